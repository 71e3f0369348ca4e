"""What rounding does to a network as it is computed: error bounds that hold in any order of summation.

The model of arithmetic is IEEE 754 with rounding to nearest: a + b, a - b, a b, a / b and a fused a b + c are the exact
result times 1 + d with |d| <= u, the unit roundoff; a sum of n products, in any order and fused or not, is off by at
most gamma(n) times the sum of the products' magnitudes (Higham, "Accuracy and Stability of Numerical Algorithms",
Lemma 8.4), where nothing underflows. TINY is more than a difference or a product loses where it does, or where results
below the normal floats are flushed to zero. Matrix products in TF32 and convolutions by transforms do not keep to this
model; `exact_products` turns them off.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linflab.models.networks.layers import DistanceLayer, SortDistance
from linflab.models.networks.linf_dist import LinfDistNet

TINY = 2.0**-120


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: half the distance from 1 to the next larger number."""
    return torch.finfo(dtype).eps / 2


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute matrix products and convolutions as sums of products of floats: no TF32, bfloat16 or fast transforms.

    oneDNN's convolutions, the usual ones on CPUs, are such sums; cuDNN and NNPACK may choose others, and are not used.
    """
    backends: Any = torch.backends
    before, cudnn = [(operations, operations.fp32_precision) for operations in _products()], backends.cudnn.enabled
    with (
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        backends.nnpack.flags(enabled=False),
    ):
        backends.cudnn.enabled = False
        for operations in _products():
            operations.fp32_precision = "ieee"
        try:
            yield
        finally:
            for operations, precision in before:
                operations.fp32_precision = precision
            backends.cudnn.enabled = cudnn


def check_arithmetic(network: nn.Module, inputs: Tensor) -> None:
    """That matrix products and convolutions of a network on inputs, and of its bounds, keep to the model of arithmetic.

    Raises:
        ValueError: torch may compute them otherwise.
    """
    tensors = [inputs, *network.parameters(), *network.buffers()]
    kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.float64}:
        raise ValueError(f"sound bounds are for networks and images in float32, or both in float64, not {kinds}")
    precisions = {operations.fp32_precision for operations in _products()} - {"none", "ieee"}
    wrong = [f"they may be in {precision}" for precision in sorted(precisions)]
    device = inputs.device.type
    if torch.is_autocast_enabled(device):
        wrong.append("autocast is on")
    if any(isinstance(module, nn.Conv2d | nn.AvgPool2d) for module in network.modules()):
        if device == "cuda" and torch.backends.cudnn.enabled:
            wrong.append("cuDNN may use fast algorithms")
        if device == "cpu" and torch._C._get_nnpack_enabled():
            wrong.append("NNPACK may use fast algorithms")
    if wrong:
        raise ValueError(
            f"sound bounds need matrix products and convolutions as sums of float32 products: {', '.join(wrong)}; "
            "wrap the call in exact_products()"
        )


def _products() -> list[Any]:
    """Where torch keeps the precision of matrix products and convolutions."""
    backends: Any = torch.backends
    return [backends.mkldnn.matmul, backends.mkldnn.conv, backends.cuda.matmul]


def gamma(terms: int, dtype: torch.dtype) -> float:
    """The relative error of a sum of so many products, with respect to the sum of their magnitudes."""
    error = terms * unit_roundoff(dtype)
    return error / (1 - error) if error < 1 else math.inf


def upper_float(values: float | Tensor, like: Tensor) -> Tensor:
    """The smallest numbers of the dtype of `like` that are not below these, given as a float or in float64."""
    exact = torch.as_tensor(values, dtype=torch.float64, device=like.device)
    nearest = exact.to(like.dtype)
    return torch.where(nearest.double() >= exact, nearest, torch.nextafter(nearest, torch.full_like(nearest, math.inf)))


def logit_error(network: LinfDistNet) -> float:
    """E: no logit of a net, computed in evaluation mode at p = inf for an image in [0, 1], is off by more than E.

    Errors of a layer's inputs pass on as they are, as each layer is 1-Lipschitz. Added to them are those of its own
    roundings, which are relative to magnitudes that are bounded by the largest inputs and weights: a distance is one
    rounded difference |x_i - w_i|, a mean shift one more difference. SortNet's sum adds gamma of its terms.

    The bound does not depend on the image. In the final sum a fifth is added for what is left out: squares of u, and
    the roundings of this sum itself; what underflow adds is far less than that.
    """
    u = unit_roundoff(network.bias.dtype)
    normalize = network.features.normalize
    mean, std = normalize.mean.double(), normalize.std.item()
    size = torch.maximum(mean.abs(), (1 - mean).abs()).max().item() / std  # of a layer's inputs
    error = 2 * u * size
    for k, layer in enumerate([*network.features.distances, network.last]):
        assert isinstance(layer, DistanceLayer)
        distance = size + layer.weight.abs().max().item()
        error += u * distance
        if isinstance(layer, SortDistance):
            error += gamma(layer.terms + 1, network.bias.dtype) * distance
        shift = network.bias if k == len(network.features.shifts) else network.features.shifts[k].running_mean
        assert isinstance(shift, Tensor)
        size = distance + shift.abs().max().item()
        error += u * size
    return 1.2 * error


def lipschitz_excess(network: nn.Module) -> float:
    """By what factor the coefficients of SortNet's layers, which are rounded, may exceed a sum of 1 in all."""
    layers = [layer for layer in network.modules() if isinstance(layer, SortDistance)]
    return math.prod(1 + gamma(layer.terms + 1, layer.weight.dtype) for layer in layers)
