"""Which implementation of the operator computes for a tensor."""

from types import ModuleType

from torch import Tensor

from linflab.models.distance import cpu, cuda, operators, reference


def implementation_for(x: Tensor) -> ModuleType:
    """The module whose functions take tensors like x: the ops, where this device has kernels for them."""
    return operators if cpu.serves(x) or cuda.serves(x) else reference


def sorting_for(x: Tensor) -> ModuleType:
    """As `implementation_for`, of the functions that sort."""
    return operators if cpu.serves(x) and x.shape[1] <= cpu.MOST_SORTED else reference
