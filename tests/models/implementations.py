"""The implementations of the distance operators that this machine can run, and a way to choose among them."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from linflab.models.distance import cpu

CAPABILITY = torch.backends.cpu.get_cpu_capability()
IMPLEMENTATIONS = ["reference", *cpu.MODULES.get(CAPABILITY, ("portable",))]
everywhere = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@contextmanager
def using(implementation: str) -> Iterator[None]:
    """Makes the operators use one implementation, for float32 on the CPU."""
    before = cpu.KERNELS
    compiled = implementation != "reference"
    cpu.KERNELS = importlib.import_module(f"linflab.models.distance._kernels_{implementation}") if compiled else None
    try:
        yield
    finally:
        cpu.KERNELS = before
