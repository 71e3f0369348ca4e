"""l_p distances at p = 8 and 12 as matrix products of powers in fp16, which run on tensor cores.

With q = p - 1, and slopes s[b, o] = grad_y[b, o] y[b, o]^(1 - p):

    y[b, o]^p    = sum_k C(p, k) (-1)^k sum_i x[b, i]^(p - k) w[o, i]^k
    grad_x[b, i] = sum_k C(q, k) (-1)^k x[b, i]^(q - k) sum_o s[b, o] w[o, i]^k,        grad_w likewise

Powers are rounded to fp16, with a power of two as scale for each k, and products are added in float32. The terms
cancel: a rounding error u = 2^-11 of all powers becomes a relative error of at most 2 u Q / (p y^p) in y, with
Q = sum_i (|x_i| + |w_i|)^p. By Minkowski's inequality Q <= (||x||_p + ||w||_p)^p, where the terms k = 0 and k = p give
the two norms. Outputs whose error bound exceeds twice a tolerance are flagged. Both passes compute flagged outputs by
the definition of the distance. Outputs are also flagged if fp16 underflow may cause an error above the tolerance, or
the slope is beyond fp16's range.

On a CPU the same rounded operands are multiplied in float32, which emulates tensor cores exactly up to the order of
summation. Results are bitwise reproducible for the same operands, device and number of threads: no sum uses atomic
additions.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from linflab.models.distance import derivatives, functional

EXPONENTS = (8, 12)  # at p = 16, 2 to 12 % of the outputs of trained networks would be flagged
TOLERANCE = 5e-2  # half of the first-order bound on the relative error of y
MAX_FLAGGED = 0.2  # largest share of outputs that are computed one by one
UNIT_ROUNDOFF = 2.0**-11  # of fp16
MAX_EXPONENT = 15  # operands are scaled to about 2^15; the largest fp16 number is 65504
SUBNORMAL_ERROR = 2.0**-25  # largest rounding error of an fp16 number below 2^-14
SLOPE_RANGE = 26  # log2 of the range of y^(1 - p), less than the 29 of fp16 numbers from 2^-14 to 2^15
MAX_FLAGGED_TERMS, MAX_PRODUCT = 2**24, 2**25  # size limits of temporary float32 tensors, in elements

Flagged = tuple[Tensor, Tensor]  # samples and outputs of the flagged distances, (N,) int64 each


def lp_distance(x: Tensor, weight: Tensor, p: float = math.inf) -> Tensor:
    """Return l_p distances, at p = 8 and 12 approximately, by matrix products in fp16.

    At other p, in float64, and where derivatives beyond first gradients are required, the exact operator
    `linflab.models.distance.lp_distance` computes the result. At p = 8 and 12, outputs whose error bound is too large
    are computed exactly. If these are more than a fifth, all outputs are computed exactly.

    Args:
        x: Inputs (B, I), float32 or float64.
        weight: One center per output (O, I), with the dtype and device of x.
        p: Any real number in [1, inf].

    Returns:
        Distances (B, O), differentiable in x and weight. To first order, their relative error is below 0.1 from the
        rounding of powers, and below 0.05 from underflow. In training on digits, it was at most 2e-2, with root mean
        squares below 1e-3. The relative error of gradients was below 1e-2 at p = 8, and 2e-2 at p = 12.

    Raises:
        TypeError: If x and weight are not both float32 or both float64.
        ValueError: If the shapes do not match, the devices differ, or p is below 1 or NaN.
    """
    if p not in EXPONENTS or x.dtype != torch.float32 or derivatives.is_transformed():
        return functional.lp_distance(x, weight, p)
    functional.check_tensors("lp_distance", weight, x=x)
    y: Tensor = _LpDistance.apply(x, weight, int(p))
    return y


class _LpDistance(torch.autograd.Function):
    """Distances whose first gradients come from `backward`, and higher ones from the exact formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, p: int) -> Tensor:
        y, flagged = forward(x, weight, p)
        ctx.p = p
        ctx.save_for_backward(x, weight, y, *(flagged or ()))
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, y, *flagged = ctx.saved_tensors
        compute = functools.partial(backward, grad_y, x, weight, y, ctx.p, tuple(flagged) or None)
        formula = functools.partial(derivatives.lp_distance, p=ctx.p)
        return *derivatives.gradients(formula, compute, grad_y, x, weight), None


def forward(x: Tensor, weight: Tensor, p: int, tolerance: float = TOLERANCE) -> tuple[Tensor, Flagged | None]:
    """Return the distances, and which of them were computed by their definition.

    Args:
        x: Inputs (B, I), float32.
        weight: One center per output (O, I), with the device of x.
        p: An even exponent.
        tolerance: Half of the bound on the relative error, to first order, of outputs that are not flagged.

    Returns:
        Distances (B, O), and the flagged outputs, or None in their place if the exact operator computed all outputs.
    """
    if 0 in (len(x), len(weight)):
        return torch.ops.linflab.lp_distance(x, weight, float(p)), None
    scale, a, b = _normalized(x, weight)
    of_a, of_b, common, underflow = _scales(_size(a), _size(b), x.shape[1], p)
    left, right = _operand(list(_powers(a, p - 1))[::-1], of_a), _operand(_powers(b, p - 1), of_b)
    sums = a.pow(p).sum(dim=1, keepdim=True), b.pow(p).sum(dim=1)
    total = _product(left, right.t()).div_(common).add_(sums[0]).add_(sums[1])
    y = total.clamp_min(0).pow_(1 / p)
    ratio = (tolerance * p / UNIT_ROUNDOFF) ** (1 / p)
    by_norms = y >= (sums[0] ** (1 / p) + sums[1] ** (1 / p)) / ratio
    by_underflow = total > underflow / (p * tolerance)
    by_slope = y >= y.amax() * 2 ** (-SLOPE_RANGE / (p - 1))
    # If an operand is not finite, `underflow` is not a number or infinite, and all outputs are flagged.
    rows, columns = (~(by_norms & by_underflow & by_slope & total.isfinite())).nonzero(as_tuple=True)
    if len(rows) > MAX_FLAGGED * y.numel():
        return torch.ops.linflab.lp_distance(x, weight, float(p)), None
    y *= scale
    for some in _chunks(rows, x.shape[1]):
        d = (x[rows[some]] - weight[columns[some]]).abs_()
        most = d.amax(dim=1)
        ratios = d.div_(most.clamp_min(torch.finfo(d.dtype).tiny)[:, None])
        y[rows[some], columns[some]] = most * ratios.pow_(p).sum(dim=1).pow_(1 / p)
    return y, (rows, columns)


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: int, flagged: Flagged | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients in x and weight, given the results of `forward` and the gradient of y.

    Args:
        grad_y: Gradient of the distances (B, O).
        x: Inputs (B, I), float32.
        weight: One center per output (O, I).
        y: Distances (B, O).
        p: An even exponent.
        flagged: Distances whose gradients are computed by their definition; None for all.

    Returns:
        Gradients (B, I) and (O, I).
    """
    if flagged is None:
        of_x, of_weight = torch.ops.linflab.lp_distance_backward(grad_y, x, weight, y, float(p))
        return of_x, of_weight
    rows, columns = flagged
    scale, a, b = _normalized(x, weight)
    size = _power_of_two(torch.frexp(_size(grad_y.nan_to_num(0.0, 0.0, 0.0))).exponent)
    slopes = (grad_y / size).mul_((y / scale).pow_(1 - p))
    slopes[rows, columns] = 0.0
    grad_x, grad_weight = _pulled_back(slopes, a, b, p, size), _pulled_back(slopes.t(), b, a, p, size)
    for some in _chunks(rows, x.shape[1]):
        d = x[rows[some]] - weight[columns[some]]
        of_y = y[rows[some], columns[some]].clamp_min(torch.finfo(d.dtype).tiny)
        slope = d.sign() * d.abs_().div_(of_y[:, None]).pow_(p - 1)
        slope *= grad_y[rows[some], columns[some]][:, None]
        _add_rows(grad_x, rows[some], slope)
        _add_rows(grad_weight, columns[some], slope.neg_())
    return grad_x, grad_weight


def _scales(of_x: Tensor, of_weight: Tensor, inputs: int, p: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the scales of the terms k = 1 to p - 1 of y^p, and the error from underflow.

    For each k, the scaled operands x^(p - k) and weight^k have the same largest value. The products of all k have the
    same scale.

    Args:
        of_x: Largest magnitude of x, a scalar.
        of_weight: Largest magnitude of the weight.
        inputs: Number of inputs I.
        p: Exponent.

    Returns:
        Scales (p - 1,) of the powers of x, which include the binomial coefficients, and of the powers of weight; the
        scale of the sum; the largest error of y^p if powers underflow in fp16.
    """
    k, binomials = torch.arange(p + 1, device=of_x.device), _binomials(p, of_x.device)
    log_x, log_weight = (size.clamp_min(torch.finfo(size.dtype).tiny).log2() for size in (of_x, of_weight))
    largest = binomials.abs().log2() + (p - k) * log_x + k * log_weight  # log2 of the largest term of each k
    common = (2 * MAX_EXPONENT - largest.max()).floor()
    exponents = ((common - largest) / 2 + k * log_weight).round()
    underflow = 4 * SUBNORMAL_ERROR * inputs * torch.exp2((largest[1:p] - common) / 2).sum()
    powers = (binomials * _power_of_two(exponents))[1:p], _power_of_two(common - exponents)[1:p]
    return *powers, _power_of_two(common), underflow


def _pulled_back(slopes: Tensor, x: Tensor, weight: Tensor, p: int, size: Tensor) -> Tensor:
    """Return size sum_o slopes[b, o] (x[b, i] - weight[o, i])^(p - 1), (B, I).

    The gradient in weight has the same form with x and weight exchanged, since p - 1 is odd. Horner's rule in x is
    applied to the sums divided by their binomial coefficients, so that each power needs only one pass over the tensor.
    """
    exponents = torch.frexp(slopes.abs().amax(dim=1, keepdim=True)).exponent.clamp_min(-100)  # one exponent per row
    rounded = (slopes * _power_of_two(MAX_EXPONENT - exponents)).half()
    exponent = torch.frexp(_size(weight)).exponent.clamp(-3, 0)  # powers of x / 2^-3 remain finite
    scales, x = MAX_EXPONENT - torch.arange(1, p, device=x.device) * exponent, x * _power_of_two(-exponent)
    # All terms use the rounded slopes, so that the rounding errors do not grow by cancellation.
    total = rounded.float().sum(dim=1, keepdim=True) * 2**MAX_EXPONENT
    powers, count, k = _powers(weight, p - 1), max(1, MAX_PRODUCT // x.numel()), 0
    for some in _power_of_two(scales).split(count):
        for product in _product(rounded, _operand(powers, some)).unflatten(1, (-1, x.shape[1])).unbind(1):
            k += 1
            total = product.addcmul_(total, x, value=-k / (p - k))  # the ratio of coefficients k - 1 and k
    return total * (-size * _power_of_two(exponents) * _power_of_two((p - 1) * exponent - 2 * MAX_EXPONENT))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of fp16 matrices in float32."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _operand(powers: Iterable[Tensor], scales: Tensor) -> Tensor:
    """Return scaled powers (R, I) side by side in fp16, (R, number of scales * I)."""
    parts = None
    for k, (scale, power) in enumerate(zip(scales, powers, strict=False)):  # draws only as many powers as scales
        if parts is None:
            parts = power.new_empty(power.shape[0], len(scales), power.shape[1], dtype=torch.float16)
        torch.mul(power, scale, out=parts[:, k])
    assert parts is not None
    return parts.flatten(1)


def _powers(x: Tensor, count: int) -> Iterator[Tensor]:
    """Yield x, x^2, ..., x^count."""
    return itertools.accumulate(itertools.repeat(x, count), torch.mul)


def _binomials(p: int, device: torch.device) -> Tensor:
    """Return the coefficients of (a - b)^p by power of b, (p + 1) float32."""
    return torch.tensor([(-1.0) ** k * math.comb(p, k) for k in range(p + 1)], dtype=torch.float32, device=device)


def _normalized(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a power of two, and x and weight divided by it: their largest magnitude is in [0.5, 1)."""
    scale = _power_of_two(torch.frexp(torch.maximum(_size(x), _size(weight))).exponent.clamp(-120, 125))
    return scale, x / scale, weight / scale


def _size(x: Tensor) -> Tensor:
    """Return the largest magnitude, a scalar, in one pass over x."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent exactly, in float32, for integers; beyond [-126, 127] the nearest normal number."""
    return ((exponent.clamp(-126, 127).to(torch.int32) + 127) << 23).view(torch.float32)


def _chunks(rows: Tensor, inputs: int) -> Iterator[slice]:
    """Yield slices of the flagged outputs whose terms fit into a temporary tensor."""
    count = max(1, MAX_FLAGGED_TERMS // inputs)
    return (slice(start, start + count) for start in range(0, len(rows), count))


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows (N, I) to the rows of a total (R, I) with these indices, in a fixed order."""
    if total.is_cuda:
        total.index_put_((index,), rows, accumulate=True)  # sorts; index_add_ adds atomically
    else:
        total.index_add_(0, index, rows)  # sequential; index_put_ adds atomically on several threads
