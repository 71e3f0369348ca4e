"""Backends of the distance operators that this machine supports, and a way to select one."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from linflab.models.distance import cpu

CAPABILITY = torch.backends.cpu.get_cpu_capability()
BACKENDS = ["reference", *cpu.KERNEL_MODULES.get(CAPABILITY, ("portable",))]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Make the operators use one backend for float32 on the CPU."""
    previous = cpu.KERNELS
    is_compiled = backend != "reference"
    cpu.KERNELS = importlib.import_module(f"linflab.models.distance._kernels_{backend}") if is_compiled else None
    try:
        yield
    finally:
        cpu.KERNELS = previous
