"""Instruction counts and register spills of the CUDA kernels, compiled for sm_90 without a GPU."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="requires Triton, part of PyTorch for CUDA"),
]  # fmt: skip
MAX_INSTRUCTIONS = {  # per term; backward passes compute both gradients
    "forward p = inf": 2.25,
    "forward p = inf, with blocks": 2.45,
    "forward p = 8": 4.25,
    "forward p = 12": 5.25,
    "forward p = 32": 6.25,
    "forward p = 64": 7.25,
    "forward any p <= 72": 6.5,
    "backward p = 8": 7.55,
    "backward p = 16": 9.55,
    "backward p = 64": 13.55,
    "backward any p": 9.0,
    "sort forward": 21.5,
    "sort bounds": 45.0,
}


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "distance_gpu_static.py"
    spec = importlib.util.spec_from_file_location("distance_gpu_static", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks the module up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MAX_INSTRUCTIONS)
def test_kernels_stay_within_instruction_limits(benchmark: ModuleType, name: str) -> None:
    """Kernels leave room for two programs per multiprocessor, except gradients, which fill the shared memory."""
    measured = [(case, benchmark.measure(case, 90)) for case in benchmark.cases(90) if case.name == name]
    assert min(figures["per term"] for _, figures in measured) <= MAX_INSTRUCTIONS[name]
    for case, figures in measured:
        assert figures["stack"] == 0 and figures["registers"] <= 255
        assert figures["warps"] >= (1 if name.startswith("backward") else 2) * case.warps
        assert figures["shared"] <= 227 * 1024


@pytest.mark.parametrize("target", [80, 90, 100])
def test_kernels_compile_without_spills(benchmark: ModuleType, target: int) -> None:
    cases = [
        case
        for case in benchmark.cases(target)
        if case.name.endswith(("inf", "blocks", "p = 8", "bounds", "gradients")) or case.name.startswith("sort")
    ]
    for case in cases:
        figures = benchmark.measure(case, target)
        assert figures["stack"] == 0, case.name
        assert figures["shared"] <= (163 if target == 80 else 227) * 1024, case.name


def test_kernels_compile_for_single_samples_outputs_and_inputs(benchmark: ModuleType) -> None:
    """Triton compiles arguments that are 1 into kernels, where they have another type."""
    compiled = set()
    for case in benchmark.cases(90):
        kind = (
            case.kernel.fn.__name__,
            *(case.constants.get(name) for name in ("MASKED", "RECORD", "SCALED", "RATIOS")),
        )
        if kind not in compiled:
            compiled.add(kind)
            benchmark.compiled(case, 90, ones=tuple(benchmark.INTEGERS))
    assert len(compiled) >= 12
