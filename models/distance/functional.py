"""Public functions of the distance operators, which check arguments and call the ops of `ops.py`.

C++ kernels (`cpu.py`) compute float32 tensors on CPUs. Gluon kernels (`cuda.py`) compute float32 tensors on CUDA
devices, except sorting. Plain PyTorch (`reference.py`) computes everything else. All of them compute values and first
gradients. Forward mode, `torch.func` transforms and gradients of gradients (`create_graph=True`) use the definitions in
plain PyTorch (`derivatives.py`), which are many times slower. Reverse mode through these definitions stores B x O x I
terms.
"""

import math

import torch
from torch import Tensor

from linflab.models.distance import cpu, cuda, derivatives  # noqa: F401  # cuda registers its kernels

MAX_TOP_K = 16  # the kernels keep at most 16 sorted terms


def lp_distance(x: Tensor, weight: Tensor, p: float = math.inf) -> Tensor:
    """Return the l_p distance of every input to every row of a weight: y[b, o] = ||x[b] - weight[o]||_p.

    At p = inf each output is 1-Lipschitz in the l_inf norm of x. Source: Zhang et al., "Towards Certifying l_inf
    Robustness using Neural Networks with l_inf-dist Neurons", ICML 2021, Section 3 (p = inf) and 4 (finite p).

    Args:
        x: Inputs (B, I), float32 or float64. For finite p, float32 magnitudes must be below 1e37.
        weight: One center per output (O, I), with the dtype and device of x.
        p: Any real number in [1, inf], used without rounding. In float32 the relative error of gradients is about
            p 2^-22.

    Returns:
        Distances (B, O), differentiable in x and weight. If several terms share the maximum at p = inf, the gradient is
        the subgradient of the first one. Gradients are zero where x equals weight.

    Raises:
        TypeError: If x and weight are not both float32 or both float64.
        ValueError: If the shapes do not match, the devices differ, or p is below 1 or NaN.
    """
    check_tensors("lp_distance", weight, x=x)
    _check_p("lp_distance", p)
    if derivatives.is_transformed():
        return derivatives.lp_distance(x, weight, float(p))
    needs_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    records_blocks = x.is_cuda or (x.is_cpu and cpu.is_supported(x))
    if math.isinf(p) and records_blocks and needs_gradients and not torch.compiler.is_exporting():
        y, _ = torch.ops.linflab.linf_distance_with_blocks(x, weight)
        return y
    return torch.ops.linflab.lp_distance(x, weight, float(p))


def linf_distance_bounds(lower: Tensor, upper: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exact range of ||x[b] - weight[o]||_inf over the box lower[b] <= x[b] <= upper[b].

    The coordinates of a box are independent, so the largest value is max_i max(upper_i - w_i, w_i - lower_i), and the
    smallest is max_i max(lower_i - w_i, w_i - upper_i, 0). Each has the rounding error of a single difference.

    Args:
        lower: Lower corners (B, I), finite, float32 or float64, nowhere above `upper`.
        upper: Upper corners (B, I), with the dtype and device of lower.
        weight: One center per output (O, I), with the same dtype and device.

    Returns:
        Smallest and largest distances, (B, O) each, without gradients.

    Raises:
        TypeError: If the tensors are not all float32 or all float64.
        ValueError: If the shapes do not match or the devices differ.
    """
    _check_box("linf_distance_bounds", lower, upper, weight)
    with torch.no_grad():
        return torch.ops.linflab.linf_distance_bounds(lower, upper, weight)


def lp_distance_conv2d(x: Tensor, weight: Tensor, p: float = math.inf, stride: int = 1, padding: int = 0) -> Tensor:
    """Return the l_p distances of all image patches to all filters, without storing the unfolded tensor.

    The result equals that of `lp_distance` on the patches of the zero-padded x and the flattened filters.

    Args:
        x: Images (B, C, H, W), float32 or float64.
        weight: Filters (O, C, kernel height, kernel width), with the dtype and device of x.
        p: Any real number in [1, inf].
        stride: Step between patches, in pixels.
        padding: Zeros added on every side, in pixels.

    Returns:
        Distances (B, O, height, width) with height = (H + 2 padding - kernel height) // stride + 1, width likewise.
        They are differentiable in x and weight, like those of `lp_distance`.

    Raises:
        TypeError: If x and weight are not both float32 or both float64.
        ValueError: If the shapes do not match, the devices differ, or stride, padding or p is out of range.
    """
    name = "lp_distance_conv2d"
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1] or 0 in weight.shape[1:]:
        raise ValueError(
            f"{name}: x={tuple(x.shape)}, weight={tuple(weight.shape)}: must have shapes (B, C, H, W) and "
            "(O, C, kernel height, kernel width)"
        )
    if stride < 1 or padding < 0:
        raise ValueError(f"{name}: stride={stride}, padding={padding}: must be stride >= 1 and padding >= 0")
    if any(x.shape[d] + 2 * padding < weight.shape[d] for d in (2, 3)):
        raise ValueError(
            f"{name}: weight={tuple(weight.shape)}: kernels must not be larger than the padded images of "
            f"shape {tuple(x.shape)}; use larger images or padding"
        )
    check_tensors(name, weight.flatten(1), x=x.new_empty(0, math.prod(weight.shape[1:])))
    _check_p(name, p)
    if derivatives.is_transformed():
        return derivatives.lp_distance_conv2d(x, weight, float(p), stride, padding)
    return torch.ops.linflab.lp_distance_conv2d(x, weight, float(p), stride, padding)


def sort_distance(x: Tensor, weight: Tensor, q: float, top_k: int = 10) -> Tensor:
    """Return the outputs of SortNet neurons: rank-weighted sums of the largest |x[b, i] - weight[o, i]|.

    y[b, o] = sum_k c_k (k-th largest of |x[b] - weight[o]|). In the paper c_k = q (1 - q)^(k - 1) for all k. Here the
    sum has only the `top_k` largest terms, and their coefficients are scaled to sum 1. Each output is 1-Lipschitz in
    the l_inf norm of x. q = 1 is `lp_distance` at p = inf. Source: Zhang et al., "Rethinking Lipschitz Neural Networks
    and Certified Robustness: A Boolean Function Perspective", NeurIPS 2022, Section 4.

    Args:
        x: Inputs (B, I), float32 or float64.
        weight: One center per output (O, I), with the dtype and device of x.
        q: Number in (0, 1]. The smaller q is, the more similar the coefficients are.
        top_k: Number of largest terms in the sum, 1 to 16. If I is smaller, the sum has all I terms.

    Returns:
        Outputs (B, O), differentiable in x and weight. The derivative in the k-th largest term is c_k, where the first
        of equal terms ranks higher. Gradients are zero where x equals weight.

    Raises:
        TypeError: If x and weight are not both float32 or both float64.
        ValueError: If the shapes do not match, the devices differ, or q or top_k is out of range.
    """
    check_tensors("sort_distance", weight, x=x)
    _check_sort_arguments("sort_distance", q, top_k)
    if q == 1 or min(top_k, x.shape[1]) == 1:
        return lp_distance(x, weight, math.inf)
    if derivatives.is_transformed():
        return derivatives.sort_distance(x, weight, float(q), top_k)
    return torch.ops.linflab.sort_distance(x, weight, float(q), top_k)


def sort_distance_bounds(
    lower: Tensor, upper: Tensor, weight: Tensor, q: float, top_k: int = 10
) -> tuple[Tensor, Tensor]:
    """Return the exact range of `sort_distance` over the box lower[b] <= x[b] <= upper[b].

    The output increases with every |x_i - w_i|, and the coordinates of a box are independent. So the distances
    max(upper_i - w_i, w_i - lower_i) yield the largest output, and the distances max(lower_i - w_i, w_i - upper_i, 0)
    yield the smallest one.

    Args:
        lower: Lower corners (B, I), finite, float32 or float64, nowhere above `upper`.
        upper: Upper corners (B, I), with the dtype and device of lower.
        weight: One center per output (O, I), with the same dtype and device.
        q: Number in (0, 1], see `sort_distance`.
        top_k: Number of largest terms in the sum, 1 to 16.

    Returns:
        Smallest and largest outputs, (B, O) each, without gradients.

    Raises:
        TypeError: If the tensors are not all float32 or all float64.
        ValueError: If the shapes do not match, the devices differ, or q or top_k is out of range.
    """
    _check_box("sort_distance_bounds", lower, upper, weight)
    _check_sort_arguments("sort_distance_bounds", q, top_k)
    if q == 1 or min(top_k, lower.shape[1]) == 1:
        return linf_distance_bounds(lower, upper, weight)
    with torch.no_grad():
        return torch.ops.linflab.sort_distance_bounds(lower, upper, weight, float(q), top_k)


def masked_lp_distance(x: Tensor, weight: Tensor, p: float, mask: Tensor, group_size: int = 32) -> Tensor:
    """Return l_p distances over the inputs that each group's mask keeps, as in SortNet training.

    Sample b uses the inputs i with mask[b // group_size, i]: y[b, o] is the l_p norm of x[b, i] - weight[o, i] over
    these inputs, or 0 if there are none. If masks keep each input with probability q, the expected distance at p = inf
    is the output of a SortNet neuron (`sort_distance` with all terms instead of the `top_k` largest). Source: see
    `sort_distance`, Section 4.

    Args:
        x: Inputs (B, I), float32 or float64. For finite p, float32 magnitudes must be below 1e37.
        weight: One center per output (O, I), with the dtype and device of x.
        p: Any real number in [1, inf].
        mask: Inputs that each group uses, (G, I) bool with G = B / group_size rounded up, on the device of x.
        group_size: Number of consecutive samples that share a mask; the last group may be smaller.

    Returns:
        Distances (B, O), differentiable in x and weight like those of `lp_distance`. Masked inputs have zero gradients.

    Raises:
        TypeError: If x and weight are not both float32 or both float64, or mask is not bool.
        ValueError: If the shapes do not match, the devices differ, p is below 1 or NaN, or group_size is below 1.
    """
    name = "masked_lp_distance"
    check_tensors(name, weight, x=x)
    _check_p(name, p)
    if group_size < 1:
        raise ValueError(f"{name}: group_size={group_size}: must be at least 1")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: mask={mask.dtype}: must be torch.bool; use mask.bool()")
    groups = -(-x.shape[0] // group_size)
    if mask.shape != (groups, x.shape[1]):
        raise ValueError(
            f"{name}: mask={tuple(mask.shape)}: must have shape ({groups}, {x.shape[1]}) for x of shape "
            f"{tuple(x.shape)} and group_size={group_size}"
        )
    if mask.device != x.device:
        raise ValueError(f"{name}: mask={mask.device}: must be on the device of x; use mask.to({str(x.device)!r})")
    if derivatives.is_transformed():
        return derivatives.masked_lp_distance(x, weight, float(p), mask, group_size)
    return torch.ops.linflab.masked_lp_distance(x, weight, float(p), mask, group_size)


def _check_p(function: str, p: float) -> None:
    if not p >= 1:
        raise ValueError(f"{function}: p={p}: must be in [1, inf]")


def _check_sort_arguments(function: str, q: float, top_k: int) -> None:
    if not 0 < q <= 1:
        raise ValueError(f"{function}: q={q}: must be in (0, 1]")
    if top_k not in range(1, MAX_TOP_K + 1):
        raise ValueError(f"{function}: top_k={top_k}: must be an integer from 1 to {MAX_TOP_K}")


def _check_box(function: str, lower: Tensor, upper: Tensor, weight: Tensor) -> None:
    check_tensors(function, weight, lower=lower, upper=upper)
    if lower.shape != upper.shape:
        raise ValueError(
            f"{function}: lower={tuple(lower.shape)}, upper={tuple(upper.shape)}: corners must have the same shape"
        )


def check_tensors(function: str, weight: Tensor, **inputs: Tensor) -> None:
    """Check inputs (B, I) and a weight (O, I).

    Args:
        function: Name of the function, for messages.
        weight: One center per output (O, I).
        **inputs: Inputs by name of the argument.

    Raises:
        TypeError: If the tensors are not all float32 or all float64.
        ValueError: If the shapes do not match or the devices differ.
    """
    for name, x in inputs.items():
        if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{function}: {name}={x.dtype}, weight={weight.dtype}: must be all torch.float32 or all torch.float64"
            )
        if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.shape[1] == 0:
            raise ValueError(
                f"{function}: {name}={tuple(x.shape)}, weight={tuple(weight.shape)}: must have shapes (B, I) and "
                "(O, I) with the same I >= 1"
            )
        if x.device != weight.device:
            raise ValueError(f"{function}: {name}={x.device}, weight={weight.device}: must be on the same device")
