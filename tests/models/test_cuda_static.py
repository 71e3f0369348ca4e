"""What the kernels for CUDA devices cost by their machine code, for sm_90: no GPU is needed."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, of PyTorch for CUDA"),
]  # fmt: skip
MOST = {  # instructions a term, of a backward pass for both gradients
    "forward p = inf": 2.4,
    "forward p = 8": 4.6,
    "forward any p": 12.0,
    "backward p = 8": 11.0,
    "backward any p": 14.0,
}


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "distance_gpu_static.py"
    spec = importlib.util.spec_from_file_location("distance_gpu_static", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MOST)
def test_instructions_and_spills(benchmark: ModuleType, name: str) -> None:
    (case,) = [case for case in benchmark.cases() if case.name == name]
    found = [benchmark.measure(case, tile, 90) for tile in case.tiles]
    assert min(one["per term"] for one in found) <= MOST[name]
    for one in found:
        assert one["stack"] == 0 and one["warps"] >= 8 and one["registers"] <= 255


@pytest.mark.parametrize("target", [80, 90, 100])
def test_all_compile_without_spills(benchmark: ModuleType, target: int) -> None:
    for case in benchmark.cases():
        if case.name.endswith(("inf", "any p", "p = 8", "bounds")):
            assert benchmark.measure(case, case.tiles[0], target)["stack"] == 0, case.name
