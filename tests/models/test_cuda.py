"""The kernels for CUDA devices: see `cuda_checks.py`, which runs in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKS = Path(__file__).with_name("cuda_checks.py")


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with PyTorch for CUDA"
)
def test_kernels() -> None:
    """On a CUDA device where there is one, else in Triton's interpreter."""
    chosen = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", str(CHECKS)],
        cwd=CHECKS.parents[2], env={**os.environ, **chosen}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]
