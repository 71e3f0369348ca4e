"""The l_p-distance operator, and SortNet's: a small public surface in front of one implementation per device.

In float32, tensors on CPUs go to C++ kernels (`cpu.py`), on CUDA devices, but for sorting, to Triton's (`cuda.py`);
everything else goes to plain PyTorch (`reference.py`).
"""

import math

import torch
from torch import Tensor

from linflab.models.distance import convolution
from linflab.models.distance.choice import implementation_for, sorting_for

__all__ = [
    "linf_distance_bounds",
    "lp_distance",
    "lp_distance_conv2d",
    "lp_distance_on_subsets",
    "sort_distance",
    "sort_distance_bounds",
]

MOST_TERMS = 16  # that sort_distance takes: the kernels hold so many in order


def lp_distance(x: Tensor, weight: Tensor, p: float = math.inf) -> Tensor:
    """The l_p distance of every input to every row of a weight: y[b, o] = ||x[b] - weight[o]||_p.

    At p = inf each output is 1-Lipschitz in the l_inf norm of x. Source: Zhang et al., "Towards Certifying l_inf
    Robustness using Neural Networks with l_inf-dist Neurons", ICML 2021, Section 3 (p = inf) and 4 (finite p).

    Args:
        x: inputs (B, I), float32 or float64; in float32 below 1e37 in magnitude, where p is finite.
        weight: one centre per output (O, I), of the dtype and device of x.
        p: any real number in [1, inf]; it is used as it is, never rounded. In float32 gradients err by about p 2^-22,
            relatively.

    Returns:
        Distances (B, O), differentiable once in x and weight. Where several terms share the maximum, the gradient
        at p = inf is the subgradient that belongs to the first of them; where x equals weight it is zero.

    Raises:
        TypeError: x and weight are not both float32 or both float64.
        ValueError: the shapes do not fit, the devices differ, or p is below 1 or NaN.
    """
    _check("lp_distance", weight, x=x)
    _check_p("lp_distance", p)
    return implementation_for(x).lp_distance(x, weight, float(p))


def linf_distance_bounds(lower: Tensor, upper: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The exact range of ||x[b] - weight[o]||_inf over the box lower[b] <= x[b] <= upper[b].

    The coordinates of a box move freely, so the largest value is max_i max(upper_i - w_i, w_i - lower_i), and the
    smallest is max_i max(lower_i - w_i, w_i - upper_i, 0); each is rounded as a single difference is.

    Args:
        lower: lower corners (B, I), finite, float32 or float64, nowhere above `upper`.
        upper: upper corners (B, I), of the dtype and device of lower.
        weight: one centre per output (O, I), of the same dtype and device.

    Returns:
        Smallest and largest distance, (B, O) each, without gradients.

    Raises:
        TypeError, ValueError: as `lp_distance`.
    """
    _check_box("linf_distance_bounds", lower, upper, weight)
    with torch.no_grad():
        return implementation_for(lower).linf_distance_bounds(lower, upper, weight)


def lp_distance_conv2d(x: Tensor, weight: Tensor, p: float = math.inf, stride: int = 1, padding: int = 0) -> Tensor:
    """The l_p distance of every patch of images to every filter, without the unfolded tensor in memory.

    Equal to unfolding x (zeros beyond the edges) and `lp_distance` of its patches to the flattened filters.

    Args:
        x: images (B, C, H, W), float32 or float64.
        weight: filters (O, C, kernel height, kernel width), of the dtype and device of x.
        p: any real number in [1, inf].
        stride: step between patches, in pixels.
        padding: zeros added on every side, in pixels.

    Returns:
        Distances (B, O, height, width) with height = (H + 2 padding - kernel height) // stride + 1, width likewise;
        differentiable once in x and weight, as `lp_distance` is.

    Raises:
        TypeError: x and weight are not both float32 or both float64.
        ValueError: the shapes do not fit, the devices differ, or stride, padding or p is out of range.
    """
    name = "lp_distance_conv2d"
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1] or 0 in weight.shape[1:]:
        raise ValueError(
            f"{name} takes x (B, C, H, W) and weight (O, C, kernel height, kernel width), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if stride < 1 or padding < 0:
        raise ValueError(f"{name} takes stride >= 1 and padding >= 0, got {stride} and {padding}")
    if any(x.shape[d] + 2 * padding < weight.shape[d] for d in (2, 3)):
        raise ValueError(f"{name} takes kernels no larger than the padded image, got {weight.shape} for {x.shape}")
    _check(name, weight.flatten(1), x=x.new_empty(0, math.prod(weight.shape[1:])))
    _check_p(name, p)
    return convolution.lp_distance_conv2d(x, weight, float(p), stride, padding)


def sort_distance(x: Tensor, weight: Tensor, q: float, terms: int = 10) -> Tensor:
    """SortNet's neurons: y[b, o] = sum_k c_k (k-th largest of |x[b] - weight[o]|), c_k proportional to (1 - q)^(k - 1).

    The coefficients of the paper are q (1 - q)^(k - 1) for all k; here the first `terms` are kept, and divided by their
    sum. Each output is 1-Lipschitz in the l_inf norm of x. q = 1 is `lp_distance` at p = inf. Source: Zhang et al.,
    "Rethinking Lipschitz Neural Networks and Certified Robustness: A Boolean Function Perspective", NeurIPS 2022,
    Section 4.

    Args:
        x: inputs (B, I), float32 or float64.
        weight: one centre per output (O, I), of the dtype and device of x.
        q: in (0, 1]; the smaller, the more alike the coefficients.
        terms: how many of the largest terms count, 1 to 16; all of them where I is less.

    Returns:
        Outputs (B, O), differentiable once in x and weight: c_k at the k-th largest term, where equal terms count in
        the order of their positions, the first as the largest; zero where x equals weight.

    Raises:
        TypeError: x and weight are not both float32 or both float64.
        ValueError: the shapes do not fit, the devices differ, or q or terms is out of range.
    """
    _check("sort_distance", weight, x=x)
    _check_order("sort_distance", q, terms)
    if q == 1 or min(terms, x.shape[1]) == 1:
        return lp_distance(x, weight, math.inf)
    return sorting_for(x).sort_distance(x, weight, float(q), terms)


def sort_distance_bounds(
    lower: Tensor, upper: Tensor, weight: Tensor, q: float, terms: int = 10
) -> tuple[Tensor, Tensor]:
    """The exact range of `sort_distance` over the box lower[b] <= x[b] <= upper[b].

    The neuron grows with every |x_i - w_i|, and the coordinates of a box move freely, so its largest value is that of
    the distances max(upper_i - w_i, w_i - lower_i), and its smallest that of max(lower_i - w_i, w_i - upper_i, 0).

    Args:
        lower: lower corners (B, I), finite, float32 or float64, nowhere above `upper`.
        upper: upper corners (B, I), of the dtype and device of lower.
        weight: one centre per output (O, I), of the same dtype and device.
        q: as in `sort_distance`.
        terms: as in `sort_distance`.

    Returns:
        Smallest and largest output, (B, O) each, without gradients.

    Raises:
        TypeError, ValueError: as `sort_distance`.
    """
    _check_box("sort_distance_bounds", lower, upper, weight)
    _check_order("sort_distance_bounds", q, terms)
    if q == 1 or min(terms, lower.shape[1]) == 1:
        return linf_distance_bounds(lower, upper, weight)
    with torch.no_grad():
        return sorting_for(lower).sort_distance_bounds(lower, upper, weight, float(q), terms)


def lp_distance_on_subsets(x: Tensor, weight: Tensor, p: float, kept: Tensor, group: int = 32) -> Tensor:
    """The l_p distance where each group of samples uses a subset of the inputs; all outputs use the same.

    Sample b uses the inputs i with kept[b // group, i]: y[b, o] is the l_p norm of x[b, i] - weight[o, i] over these,
    0 where there are none. With subsets that keep each input with probability q, the distances at p = inf have
    SortNet's neurons (`sort_distance` of all terms) as their means. Source: as `sort_distance`, Section 4.

    Args:
        x: inputs (B, I), float32 or float64; in float32 below 1e37 in magnitude, where p is finite.
        weight: one centre per output (O, I), of the dtype and device of x.
        p: any real number in [1, inf].
        kept: which inputs each group uses (B / group rounded up, I), bool, on the device of x.
        group: consecutive samples that share a subset; the last group may have fewer.

    Returns:
        Distances (B, O), differentiable once in x and weight, as `lp_distance` is of what is kept; zero elsewhere.

    Raises:
        TypeError: x and weight are not both float32 or both float64, or kept is not bool.
        ValueError: the shapes do not fit, the devices differ, p is below 1 or NaN, or group is below 1.
    """
    name = "lp_distance_on_subsets"
    _check(name, weight, x=x)
    _check_p(name, p)
    if group < 1:
        raise ValueError(f"{name} takes group >= 1, got group = {group}")
    if kept.dtype != torch.bool:
        raise TypeError(f"{name} takes kept in bool, got {kept.dtype}")
    groups = -(-x.shape[0] // group)
    if kept.shape != (groups, x.shape[1]):
        raise ValueError(
            f"{name} takes kept ({groups}, {x.shape[1]}) for x {tuple(x.shape)} in groups of {group}, "
            f"got {tuple(kept.shape)}"
        )
    if kept.device != x.device:
        raise ValueError(f"{name} takes tensors on one device, got x {x.device}, kept {kept.device}")
    return implementation_for(x).lp_distance_on_subsets(x, weight, float(p), kept, group)


def _check_p(function: str, p: float) -> None:
    if not p >= 1:
        raise ValueError(f"{function} takes 1 <= p <= inf, got p = {p}")


def _check_order(function: str, q: float, terms: int) -> None:
    if not 0 < q <= 1:
        raise ValueError(f"{function} takes 0 < q <= 1, got q = {q}")
    if terms not in range(1, MOST_TERMS + 1):
        raise ValueError(f"{function} takes terms from 1 to {MOST_TERMS}, got {terms}")


def _check_box(function: str, lower: Tensor, upper: Tensor, weight: Tensor) -> None:
    _check(function, weight, lower=lower, upper=upper)
    if lower.shape != upper.shape:
        raise ValueError(f"{function} takes corners of one shape, got {lower.shape} and {upper.shape}")


def _check(function: str, weight: Tensor, **inputs: Tensor) -> None:
    for name, x in inputs.items():
        if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{function} takes float32 or float64 for all, got {name} {x.dtype}, weight {weight.dtype}")
        if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.shape[1] == 0:
            raise ValueError(
                f"{function} takes {name} (B, I) and weight (O, I) with one I >= 1, "
                f"got {tuple(x.shape)} and {tuple(weight.shape)}"
            )
        if x.device != weight.device:
            raise ValueError(f"{function} takes tensors on one device, got {name} {x.device}, weight {weight.device}")
