"""Reference l_p-distance and SortNet operators in plain PyTorch, for any device and floating dtype.

The l_p distance and its gradient, with d = x[b, i] - w[o, i]:

    y[b, o] = (sum_i |x[b, i] - w[o, i]|^p)^(1/p),        max_i |x[b, i] - w[o, i]| at p = inf

    dy/dx[b, i] = sign(d) (|d| / y)^(p - 1) = -dy/dw[o, i]

Both powers are computed of ratios in [0, 1], so they overflow at no p. Terms whose ratio underflows are negligible. At
p = inf the gradient is sign(d) at the first largest term, which is a subgradient also at ties. The SortNet neuron and
its gradient:

    y[b, o] = sum_k c_k (k-th largest of |d|),        dy/dx[b, i] = c_k sign(d) = -dy/dw[o, i] at the k-th largest

The first of equal terms ranks higher. Operators are computed in tiles, so no tensor of size B x O x I is stored.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from linflab.models.distance import derivatives
from linflab.models.distance.derivatives import sort_coefficients

# Terms |x_i - w_i| per tile. On a CPU a tile fits in a core's L2 cache for all passes over it. On other
# devices it is large enough to keep the device busy: a quarter of a GiB in float32.
CPU_TILE_ELEMENTS, DEVICE_TILE_ELEMENTS = 2**17, 2**26
BLOCK_INPUTS = 64  # see `linf_distance_with_blocks`


def lp_distance(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """Compute `linflab.models.distance.lp_distance`, which checks the arguments."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows, outs in _tiles(x, weight):
        d = (x[rows, None, :] - weight[None, outs, :]).abs_()
        largest = d.amax(dim=2, keepdim=True)
        if math.isinf(p):
            y[rows, outs] = largest[..., 0]
        else:
            ratio = d.div_(largest.clamp_min(torch.finfo(d.dtype).tiny))
            y[rows, outs] = largest[..., 0] * ratio.pow_(p).sum(dim=2).pow_(1 / p)
    return y


def linf_distance_with_blocks(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances at p = inf and the block of BLOCK_INPUTS inputs that has the first largest term, (B, O) each."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    blocks = torch.empty_like(y, dtype=torch.int32)
    for rows, outs in _tiles(x, weight):
        y[rows, outs], first = (x[rows, None, :] - weight[None, outs, :]).abs_().max(dim=2)
        blocks[rows, outs] = (first // BLOCK_INPUTS).to(torch.int32)
    return y, blocks


def linf_distance_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, blocks: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients at p = inf in x and weight; this reference ignores `blocks`."""
    return lp_distance_backward(grad_y, x, weight, y, math.inf)


def linf_distance_bounds(lower: Tensor, upper: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `linflab.models.distance.linf_distance_bounds`, which checks the arguments."""
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    high = torch.empty_like(low)
    for rows, outs in _tiles(lower, weight):
        below, above = lower[rows, None, :] - weight[None, outs, :], upper[rows, None, :] - weight[None, outs, :]
        high[rows, outs] = torch.maximum(above, -below).amax(dim=2)
        low[rows, outs] = torch.maximum(below, -above).amax(dim=2).clamp_min_(0)
    return low, high


def _tiles(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    return derivatives.tiles(x, weight, CPU_TILE_ELEMENTS if x.device.type == "cpu" else DEVICE_TILE_ELEMENTS)


def lp_distance_backward(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return the gradients in x and weight, given the output y and its gradient."""
    grad_x, grad_weight = x.new_zeros(x.shape), weight.new_zeros(weight.shape)
    for rows, outs in _tiles(x, weight):
        d = x[rows, None, :] - weight[None, outs, :]
        if math.isinf(p):
            first = d.abs().argmax(dim=2, keepdim=True)
            slope = torch.zeros_like(d).scatter_(2, first, d.gather(2, first).sign())
        else:
            scale = y[rows, outs, None].clamp_min(torch.finfo(d.dtype).tiny)
            slope = d.sign()
            slope *= d.abs_().div_(scale).pow_(p - 1)
        slope *= grad_y[rows, outs, None]
        grad_x[rows] += slope.sum(dim=1)
        grad_weight[outs] -= slope.sum(dim=0)
    return grad_x, grad_weight


def sort_distance(x: Tensor, weight: Tensor, q: float, top_k: int) -> Tensor:
    """Compute `linflab.models.distance.sort_distance`, which checks the arguments."""
    y, coefficients = x.new_empty(x.shape[0], weight.shape[0]), sort_coefficients(q, top_k, x.shape[1])
    for rows, outs in _tiles(x, weight):
        y[rows, outs] = _weighted_top_k((x[rows, None, :] - weight[None, outs, :]).abs_(), coefficients)
    return y


def sort_distance_backward(grad_y: Tensor, x: Tensor, weight: Tensor, q: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the gradients in x and weight, given the gradient of the output."""
    grad_x, grad_weight = x.new_zeros(x.shape), weight.new_zeros(weight.shape)
    for rows, outs in _tiles(x, weight):
        d = x[rows, None, :] - weight[None, outs, :]
        rest, slope = d.abs(), torch.zeros_like(d)
        for coefficient in sort_coefficients(q, top_k, x.shape[1]):
            largest = rest.argmax(dim=2, keepdim=True)  # the first of equal terms, unlike topk
            slope.scatter_(2, largest, coefficient * d.gather(2, largest).sign())
            rest.scatter_(2, largest, -1.0)
        slope *= grad_y[rows, outs, None]
        grad_x[rows] += slope.sum(dim=1)
        grad_weight[outs] -= slope.sum(dim=0)
    return grad_x, grad_weight


def sort_distance_bounds(lower: Tensor, upper: Tensor, weight: Tensor, q: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Compute `linflab.models.distance.sort_distance_bounds`, which checks the arguments."""
    coefficients = sort_coefficients(q, top_k, lower.shape[1])
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    high = torch.empty_like(low)
    for rows, outs in _tiles(lower, weight):
        below, above = lower[rows, None, :] - weight[None, outs, :], upper[rows, None, :] - weight[None, outs, :]
        high[rows, outs] = _weighted_top_k(torch.maximum(above, -below), coefficients)
        low[rows, outs] = _weighted_top_k(torch.maximum(below, -above).clamp_min_(0), coefficients)
    return low, high


def _weighted_top_k(distances: Tensor, coefficients: list[float]) -> Tensor:
    largest = distances.topk(len(coefficients), dim=2).values
    return (largest * largest.new_tensor(coefficients)).sum(dim=2)


def masked_lp_distance(x: Tensor, weight: Tensor, p: float, mask: Tensor, group_size: int) -> Tensor:
    """Compute `linflab.models.distance.masked_lp_distance`, which checks the arguments."""
    y = x.new_zeros(x.shape[0], weight.shape[0])
    for rows, inputs in _iter_groups(mask, group_size):
        y[rows] = lp_distance(x[rows, inputs], weight[:, inputs], p)
    return y


def _iter_groups(mask: Tensor, group_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the samples of each group and the indices of its inputs, except for groups without inputs."""
    for number, row in enumerate(mask):
        inputs = row.nonzero()[:, 0]
        if len(inputs):
            yield slice(number * group_size, (number + 1) * group_size), inputs


def masked_lp_distance_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, mask: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients in x and weight, given the output y and its gradient."""
    grad_x, grad_weight = x.new_zeros(x.shape), weight.new_zeros(weight.shape)
    for rows, inputs in _iter_groups(mask, group_size):
        group_grad_x, group_grad_weight = lp_distance_backward(
            grad_y[rows], x[rows, inputs], weight[:, inputs], y[rows], p
        )
        grad_x[rows, inputs] = group_grad_x
        grad_weight.index_add_(1, inputs, group_grad_weight)
    return grad_x, grad_weight
