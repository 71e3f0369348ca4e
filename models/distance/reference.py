"""The l_p-distance operator, and SortNet's, by their definitions in plain PyTorch: any device, any floating dtype.

    y[b, o] = (sum_i |x[b, i] - w[o, i]|^p)^(1/p),        max_i |x[b, i] - w[o, i]| at p = inf

    dy/dx[b, i] = sign(d) (|d| / y)^(p - 1) = -dy/dw[o, i]    with d = x[b, i] - w[o, i]

Both powers are taken of ratios in [0, 1] (the largest term is divided out), so no p overflows; a ratio that underflows
is a term too small to count. At p = inf the gradient is sign(d) at the first largest term: a subgradient also at ties.

    y[b, o] = sum_k c_k (k-th largest of |d|),        dy/dx[b, i] = c_k sign(d) = -dy/dw[o, i] at the k-th largest

is SortNet's neuron; of equal terms, the first counts as larger.

Work goes in tiles, so that no tensor of size B x O x I exists.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Terms |x_i - w_i| held at a time. On a CPU a tile is about the size of a core's level-2 cache, so that all passes over
# it stay there; elsewhere it is as large as keeps the device busy, a quarter of a GiB in float32.
TILE, TILE_ELSEWHERE = 2**17, 2**26


def lp_distance(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """See `linflab.models.distance.lp_distance`, which also checks the arguments."""
    return _LpDistance.apply(x, weight, p)


def linf_distance_bounds(lower: Tensor, upper: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `linflab.models.distance.linf_distance_bounds`, which also checks the arguments."""
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    high = torch.empty_like(low)
    for rows, outs in _tiles(lower, weight):
        below, above = lower[rows, None, :] - weight[None, outs, :], upper[rows, None, :] - weight[None, outs, :]
        high[rows, outs] = torch.maximum(above, -below).amax(dim=2)
        low[rows, outs] = torch.maximum(below, -above).amax(dim=2).clamp_min_(0)
    return low, high


def _tiles(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Pairs of a slice of samples and a slice of outputs that cover (B, O); a tile has one row of I terms at least."""
    (batch, inputs), outputs = x.shape, weight.shape[0]
    terms = TILE if x.device.type == "cpu" else TILE_ELSEWHERE
    rows = max(1, min(batch, terms // inputs))
    columns = max(1, min(outputs, terms // (rows * inputs)))
    for row in range(0, batch, rows):
        for column in range(0, outputs, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def lp_distance_backward(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Gradients in x and weight, given the output y and its gradient."""
    grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
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


def _distances(x: Tensor, weight: Tensor, p: float) -> Tensor:
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


class _LpDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, p: float) -> Tensor:
        y = _distances(x, weight, p)
        ctx.save_for_backward(x, weight, y)
        ctx.p = p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, y = ctx.saved_tensors
        return *lp_distance_backward(grad_y, x, weight, y, ctx.p), None


def sort_coefficients(q: float, terms: int, inputs: int) -> list[float]:
    """q (1 - q)^(k - 1) for the largest terms, divided by their sum; as many as there are inputs at most."""
    powers = [(1 - q) ** k for k in range(min(terms, inputs))]
    return [power / sum(powers) for power in powers]


def sort_distance(x: Tensor, weight: Tensor, q: float, terms: int) -> Tensor:
    """See `linflab.models.distance.sort_distance`, which also checks the arguments."""
    return _SortDistance.apply(x, weight, sort_coefficients(q, terms, x.shape[1]))


def sort_distance_bounds(lower: Tensor, upper: Tensor, weight: Tensor, q: float, terms: int) -> tuple[Tensor, Tensor]:
    """See `linflab.models.distance.sort_distance_bounds`, which also checks the arguments."""
    coefficients = sort_coefficients(q, terms, lower.shape[1])
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    high = torch.empty_like(low)
    for rows, outs in _tiles(lower, weight):
        below, above = lower[rows, None, :] - weight[None, outs, :], upper[rows, None, :] - weight[None, outs, :]
        high[rows, outs] = _sum_of_largest(torch.maximum(above, -below), coefficients)
        low[rows, outs] = _sum_of_largest(torch.maximum(below, -above).clamp_min_(0), coefficients)
    return low, high


def _sum_of_largest(distances: Tensor, coefficients: list[float]) -> Tensor:
    largest = distances.topk(len(coefficients), dim=2).values
    return (largest * largest.new_tensor(coefficients)).sum(dim=2)


class _SortDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, coefficients: list[float]) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        for rows, outs in _tiles(x, weight):
            y[rows, outs] = _sum_of_largest((x[rows, None, :] - weight[None, outs, :]).abs_(), coefficients)
        ctx.save_for_backward(x, weight)
        ctx.coefficients = coefficients
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
        for rows, outs in _tiles(x, weight):
            d = x[rows, None, :] - weight[None, outs, :]
            rest, slope = d.abs(), torch.zeros_like(d)
            for coefficient in ctx.coefficients:
                largest = rest.argmax(dim=2, keepdim=True)  # the first of equal ones, unlike topk's
                slope.scatter_(2, largest, coefficient * d.gather(2, largest).sign())
                rest.scatter_(2, largest, -1.0)
            slope *= grad_y[rows, outs, None]
            grad_x[rows] += slope.sum(dim=1)
            grad_weight[outs] -= slope.sum(dim=0)
        return grad_x, grad_weight, None


def lp_distance_on_subsets(x: Tensor, weight: Tensor, p: float, kept: Tensor, group: int) -> Tensor:
    """See `linflab.models.distance.lp_distance_on_subsets`, which also checks the arguments."""
    return _LpDistanceOnSubsets.apply(x, weight, p, kept, group)


def _subsets(kept: Tensor, group: int) -> Iterator[tuple[slice, Tensor]]:
    """Samples of a group, and the inputs that they use, of groups that use any."""
    for number, row in enumerate(kept):
        inputs = row.nonzero()[:, 0]
        if len(inputs):
            yield slice(number * group, (number + 1) * group), inputs


class _LpDistanceOnSubsets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, p: float, kept: Tensor, group: int) -> Tensor:
        y = x.new_zeros(x.shape[0], weight.shape[0])
        for rows, inputs in _subsets(kept, group):
            y[rows] = _distances(x[rows, inputs], weight[:, inputs], p)
        ctx.save_for_backward(x, weight, y, kept)
        ctx.p, ctx.group = p, group
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, y, kept = ctx.saved_tensors
        grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
        for rows, inputs in _subsets(kept, ctx.group):
            of_x, of_weight = lp_distance_backward(grad_y[rows], x[rows, inputs], weight[:, inputs], y[rows], ctx.p)
            grad_x[rows, inputs] = of_x
            grad_weight.index_add_(1, inputs, of_weight)
        return grad_x, grad_weight, None, None, None
