"""Floating-point error bounds that hold in any order of summation.

The model of arithmetic is IEEE 754 with rounding to nearest. Each of a + b, a - b, a b, a / b and a fused a b + c is
the exact result times 1 + d with |d| <= u, the unit roundoff. A sum of n products, in any order and fused or not, has
an error of at most gamma(n) times the sum of the products' magnitudes, if nothing underflows. Source: Higham, "Accuracy
and Stability of Numerical Algorithms", Lemma 8.4. UNDERFLOW_SLACK exceeds the error of a difference or product that
underflows, or whose result below the normal floats is flushed to zero.

TF32 matrix products and transform-based convolutions violate this model; `strict_float32` disables them for every
certifier.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

UNDERFLOW_SLACK = 2.0**-120
ROOM = 1.2  # factor of an error bound, for terms in u^2 and the rounding of the bound itself


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the unit roundoff u: half the distance from 1 to the next larger number."""
    return torch.finfo(dtype).eps / 2


@contextmanager
def strict_float32() -> Iterator[None]:
    """Compute matrix products and convolutions as plain sums of products of floats inside a context.

    TF32, bfloat16 and fast transforms are off. Convolutions on CPUs usually run in oneDNN, which computes such sums.
    cuDNN and NNPACK may choose other algorithms, so they are disabled. Autocast is off in each thread that enters the
    context. The other settings belong to torch and are process-wide: the first thread that enters sets them, and the
    last one that leaves restores them.

    Certifiers enter this context themselves. Use it for any other computation that must have the same rounding, such as
    an attack on certified images.
    """
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        _SETTINGS.enter()
        try:
            yield
        finally:
            _SETTINGS.leave()


class _Settings:
    """Torch's settings for sums of products, saved when the first of several threads enters."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0

    def enter(self) -> None:
        backends: Any = torch.backends
        with self.lock:
            self.inside += 1
            if self.inside > 1:
                return
            self.precisions = [(operations, operations.fp32_precision) for operations in self._float32_backends()]
            self.cudnn, (self.nnpack,) = backends.cudnn.enabled, backends.nnpack.set_flags(False)
            backends.cudnn.enabled = False
            for operations, _ in self.precisions:
                operations.fp32_precision = "ieee"

    def leave(self) -> None:
        backends: Any = torch.backends
        with self.lock:
            self.inside -= 1
            if self.inside:
                return
            for operations, precision in self.precisions:
                operations.fp32_precision = precision
            backends.cudnn.enabled = self.cudnn
            backends.nnpack.set_flags(self.nnpack)

    @staticmethod
    def _float32_backends() -> list[Any]:
        """Return the torch backends that hold the precision of matrix products and convolutions."""
        backends: Any = torch.backends
        return [backends.mkldnn.matmul, backends.mkldnn.conv, backends.cuda.matmul]


_SETTINGS = _Settings()


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Return the error of a sum of products, relative to the sum of their magnitudes (Higham's gamma)."""
    error = terms * unit_roundoff(dtype)
    return error / (1 - error) if error < 1 else math.inf


def round_up(values: float | Tensor, like: Tensor) -> Tensor:
    """Return the smallest numbers of the dtype of `like` that are not below float or float64 values."""
    exact = torch.as_tensor(values, dtype=torch.float64, device=like.device)
    nearest = exact.to(like.dtype)
    return torch.where(nearest.double() >= exact, nearest, torch.nextafter(nearest, torch.full_like(nearest, math.inf)))
