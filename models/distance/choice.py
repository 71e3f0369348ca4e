"""Which implementation of the operator computes for a tensor."""

from types import ModuleType

from torch import Tensor

from linflab.models.distance import cpu, cuda, reference


def implementation_for(x: Tensor) -> ModuleType:
    """The module whose functions take tensors like x."""
    if cpu.serves(x):
        return cpu
    return cuda if cuda.serves(x) else reference
