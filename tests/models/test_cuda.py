"""Tests of the CUDA kernels, which run the checks of `cuda_checks.py` in a separate process."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

pytestmark = pytest.mark.integration
CHECKS = Path(__file__).with_name("cuda_checks.py")
FUNCTIONS = [node.name for node in ast.parse(CHECKS.read_text()).body if isinstance(node, ast.FunctionDef)]


@pytest.fixture(scope="module")
def check_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[ElementTree.Element]]:
    """Run all checks once, on a CUDA device or in the interpreter; return the cases of each function."""
    environment = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    report = tmp_path_factory.mktemp("cuda") / "report.xml"
    completed = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore",
         f"--junit-xml={report}", str(CHECKS)],
        cwd=CHECKS.parents[2], env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert report.exists(), completed.stdout[-5000:] + completed.stderr[-2000:]
    cases: dict[str, list[ElementTree.Element]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        cases.setdefault(case.get("name", "").partition("[")[0], []).append(case)
    return cases


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="requires Triton, which is installed with PyTorch for CUDA"
)
@pytest.mark.parametrize("function", [name for name in FUNCTIONS if name.startswith("test_")])
def test_kernels_pass_the_cuda_checks(function: str, check_results: dict[str, list[ElementTree.Element]]) -> None:
    outcomes = [(case.get("name"), child) for case in check_results[function] for child in case]
    failures = [f"{name}: {child.get('message')}" for name, child in outcomes if child.tag in ("failure", "error")]
    assert not failures
    skipped = [child.get("message") for _, child in outcomes if child.tag == "skipped"]
    if len(skipped) == len(check_results[function]):
        pytest.skip(skipped[0])
