"""Derivatives beyond first gradients: forward mode, `torch.func` transforms, gradients of gradients.

The kernels compute only values and first gradients. All other derivatives use the formulas in this module, which define
the operators in differentiable PyTorch for any device and floating dtype. Reverse mode through the formulas stores
B x O x I terms; forward mode stores one tile at once.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import unfold

MAX_TILE_TERMS = 2**24  # differences per tile in forward mode

Formula = Callable[[Tensor, Tensor], Tensor]  # (x, weight) -> y


def is_transformed() -> bool:
    """Return whether tensors may have tangents or be batched, which only the formulas support."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def refuse_tangents() -> None:
    """Raise if the arguments of an op may have tangents, which a kernel ignores.

    The functions of `linflab.models.distance` never call an op in this case, but an exported graph may do so.

    Raises:
        RuntimeError: If forward-mode differentiation is active.
    """
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "torch.ops.linflab: forward-mode derivatives are not supported by ops; use the functions and layers of "
            "linflab.models instead of an exported graph"
        )


def lp_distance(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """Compute `linflab.models.distance.lp_distance`, which checks the arguments."""
    return _compute_by_tiles(x, weight, lambda differences, rows: _norms(differences, p))


def masked_lp_distance(x: Tensor, weight: Tensor, p: float, mask: Tensor, group_size: int) -> Tensor:
    """Compute `linflab.models.distance.masked_lp_distance`, which checks the arguments."""
    sample_mask = mask[torch.arange(x.shape[0], device=x.device) // group_size]
    return _compute_by_tiles(
        x, weight, lambda differences, rows: _norms(torch.where(sample_mask[rows, None, :], differences, 0.0), p)
    )


def sort_distance(x: Tensor, weight: Tensor, q: float, top_k: int) -> Tensor:
    """Compute `linflab.models.distance.sort_distance`, which checks the arguments."""
    coefficients = torch.tensor(sort_coefficients(q, top_k, x.shape[1]), dtype=x.dtype, device=x.device)

    def neurons(differences: Tensor, rows: slice) -> Tensor:
        # The sort is stable, so the first of equal terms ranks higher.
        order = differences.abs().sort(dim=2, descending=True, stable=True).indices[..., : len(coefficients)]
        return (differences.gather(2, order).abs() * coefficients).sum(dim=2)

    return _compute_by_tiles(x, weight, neurons)


def lp_distance_conv2d(x: Tensor, weight: Tensor, p: float, stride: int, padding: int) -> Tensor:
    """Compute `linflab.models.distance.lp_distance_conv2d`, which checks the arguments."""
    height = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
    patches = unfold(x, weight.shape[2:], padding=padding, stride=stride).transpose(1, 2)
    distances = lp_distance(patches.flatten(0, 1), weight.flatten(1), p)
    return distances.unflatten(0, patches.shape[:2]).transpose(1, 2).unflatten(2, (height, -1))


def gradients(
    formula: Formula, compute: Callable[[], tuple[Tensor, Tensor]], grad_y: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a formula in x and weight, differentiable if autograd records them.

    Args:
        formula: Function of x and weight to differentiate.
        compute: Faster computation of the same gradients, which autograd cannot differentiate.
        grad_y: Gradient of the output of the formula.
        x: First argument of the formula.
        weight: Second argument of the formula.

    Returns:
        Gradients in the shapes of x and weight.
    """
    if is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad_y):
        return _pull_back(formula, grad_y, x, weight)
    if torch.is_grad_enabled():  # with create_graph=True
        first: tuple[Tensor, Tensor] = _Gradients.apply(formula, compute, grad_y, x, weight)
        return first
    return compute()


def _pull_back(formula: Formula, grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if torch._C._functorch.is_legacy_batchedtensor(grad_y):  # from is_grads_batched=True, unsupported by torch.func
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            leaves = [
                t.view_as(t) if create_graph and t.requires_grad else t.detach().requires_grad_() for t in (x, weight)
            ]
            grad_x, grad_weight = torch.autograd.grad(formula(*leaves), leaves, grad_y, create_graph=create_graph)
        return grad_x, grad_weight
    grads: tuple[Tensor, Tensor] = torch.func.vjp(formula, x, weight)[1](grad_y)
    return grads


class _Gradients(torch.autograd.Function):
    """First gradients by `compute`, whose own gradients come from the formula."""

    @staticmethod
    def forward(
        ctx: Any,
        formula: Formula,
        compute: Callable[[], tuple[Tensor, Tensor]],
        grad_y: Tensor,
        x: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(grad_y, x, weight)
        ctx.formula = formula
        return compute()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, None, Tensor, Tensor, Tensor]:
        first = functools.partial(_pull_back, ctx.formula)
        grad_y, x, weight = torch.func.vjp(first, *ctx.saved_tensors)[1](cotangents)
        return None, None, grad_y, x, weight


def tiles(x: Tensor, weight: Tensor, terms: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of samples and outputs that tile (B, O).

    Args:
        x: (B, I).
        weight: (O, I).
        terms: Maximum number of terms |x_i - w_i| in a tile, which has at least one sample and output.
    """
    (batch, inputs), outputs = x.shape, weight.shape[0]
    rows = max(1, min(batch, terms // inputs))
    columns = max(1, min(outputs, terms // (rows * inputs)))
    for row in range(0, batch, rows):
        for column in range(0, outputs, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def sort_coefficients(q: float, top_k: int, inputs: int) -> list[float]:
    """Return q (1 - q)^(k - 1) for the min(top_k, inputs) largest terms, divided by their sum."""
    powers = [(1 - q) ** k for k in range(min(top_k, inputs))]
    return [power / sum(powers) for power in powers]


def _compute_by_tiles(x: Tensor, weight: Tensor, neurons: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Return (B, O) from a function of differences (b, o, I) and their slice of samples, tile by tile."""
    parts: dict[int, list[Tensor]] = {}
    for rows, outs in tiles(x, weight, MAX_TILE_TERMS):
        parts.setdefault(rows.start, []).append(neurons(x[rows, None, :] - weight[None, outs, :], rows))
    if not parts:  # no samples, or no outputs
        return neurons(x[:, None, :] - weight[None, :, :], slice(None))
    return torch.cat([torch.cat(columns, dim=1) for columns in parts.values()])


def _norms(differences: Tensor, p: float) -> Tensor:
    """Return the l_p norms (b, o) of differences (b, o, I), with zero gradient where all are zero."""
    sizes = differences.abs()
    if math.isinf(p):
        first = sizes.argmax(dim=2, keepdim=True)
        return differences.gather(2, first).abs()[..., 0]
    largest = sizes.amax(dim=2, keepdim=True)
    # The norm does not depend on the scale, so derivatives through the scale cancel.
    scale = torch.where(largest == 0, 1.0, largest.clamp_min(torch.finfo(sizes.dtype).tiny))
    ratios = differences / scale
    if p % 2 == 0:
        powers = ratios.pow(p)
    else:  # at zero, existing derivatives of order below p are zero
        zero = differences == 0
        powers = torch.where(zero, 0.0, torch.where(zero, 1.0, ratios).abs().pow(p))
    total = powers.sum(dim=2)
    zero = total == 0
    return torch.where(zero, 0.0, scale[..., 0] * torch.where(zero, 1.0, total).pow(1 / p))
