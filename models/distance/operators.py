"""The ops `linflab::...`: what they take and return, and their gradients; float32 only.

They have fake kernels and, where they are differentiable, gradients, so that `torch.compile` can trace them. What they
compute is in one file a device: `cpu.py`, `cuda.py`.
"""

from typing import Any

import torch
from torch import Tensor, library

library.define("linflab::lp_distance", "(Tensor x, Tensor weight, float p) -> Tensor")
library.define(
    "linflab::lp_distance_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor y, float p) -> (Tensor, Tensor)",
)
library.define("linflab::linf_distance_bounds", "(Tensor lower, Tensor upper, Tensor weight) -> (Tensor, Tensor)")
library.define(
    "linflab::lp_distance_on_subsets", "(Tensor x, Tensor weight, float p, Tensor kept, int group) -> Tensor"
)
library.define(
    "linflab::lp_distance_on_subsets_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor y, float p, Tensor kept, int group) -> (Tensor, Tensor)",
)
library.define("linflab::sort_distance", "(Tensor x, Tensor weight, float q, int terms) -> Tensor")
library.define(
    "linflab::sort_distance_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, float q, int terms) -> (Tensor, Tensor)",
)
library.define(
    "linflab::sort_distance_bounds",
    "(Tensor lower, Tensor upper, Tensor weight, float q, int terms) -> (Tensor, Tensor)",
)


@library.register_fake("linflab::lp_distance")
def _fake_forward(x: Tensor, weight: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@library.register_fake("linflab::lp_distance_backward")
def _fake_backward(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@library.register_fake("linflab::linf_distance_bounds")
def _fake_bounds(lower: Tensor, upper: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    return low, torch.empty_like(low)


@library.register_fake("linflab::lp_distance_on_subsets")
def _fake_forward_on_subsets(x: Tensor, weight: Tensor, p: float, kept: Tensor, group: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@library.register_fake("linflab::lp_distance_on_subsets_backward")
def _fake_backward_on_subsets(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, kept: Tensor, group: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@library.register_fake("linflab::sort_distance")
def _fake_sort_forward(x: Tensor, weight: Tensor, q: float, terms: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@library.register_fake("linflab::sort_distance_backward")
def _fake_sort_backward(grad_y: Tensor, x: Tensor, weight: Tensor, q: float, terms: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@library.register_fake("linflab::sort_distance_bounds")
def _fake_sort_bounds(lower: Tensor, upper: Tensor, weight: Tensor, q: float, terms: int) -> tuple[Tensor, Tensor]:
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    return low, torch.empty_like(low)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    x, weight, ctx.p = inputs
    ctx.save_for_backward(x, weight, output)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, y = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.linflab.lp_distance_backward(grad_y, x, weight, y, ctx.p)
    return grad_x, grad_weight, None


def _save_for_backward_on_subsets(ctx: Any, inputs: tuple[Tensor, Tensor, float, Tensor, int], output: Tensor) -> None:
    x, weight, ctx.p, kept, ctx.group = inputs
    ctx.save_for_backward(x, weight, output, kept)


def _gradients_on_subsets(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    x, weight, y, kept = ctx.saved_tensors
    backward = torch.ops.linflab.lp_distance_on_subsets_backward
    return *backward(grad_y, x, weight, y, ctx.p, kept, ctx.group), None, None, None


def _save_for_sort_backward(ctx: Any, inputs: tuple[Tensor, Tensor, float, int], output: Tensor) -> None:
    x, weight, ctx.q, ctx.terms = inputs
    ctx.save_for_backward(x, weight)


def _sort_gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
    grad_x, grad_weight = torch.ops.linflab.sort_distance_backward(grad_y, *ctx.saved_tensors, ctx.q, ctx.terms)
    return grad_x, grad_weight, None, None


def no_second_gradients(ctx: Any, *gradients: Tensor) -> None:
    """What the gradients of an op that is differentiable once do when they are differentiated: raise."""
    raise RuntimeError("distances are differentiable once; gradients of their gradients are not implemented")


library.register_autograd("linflab::lp_distance", _gradients, setup_context=_save_for_backward)
library.register_autograd("linflab::lp_distance_backward", no_second_gradients)
library.register_autograd(
    "linflab::lp_distance_on_subsets", _gradients_on_subsets, setup_context=_save_for_backward_on_subsets
)
library.register_autograd("linflab::lp_distance_on_subsets_backward", no_second_gradients)
library.register_autograd("linflab::sort_distance", _sort_gradients, setup_context=_save_for_sort_backward)
library.register_autograd("linflab::sort_distance_backward", no_second_gradients)


def lp_distance(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """See `linflab.models.distance.lp_distance`, which also checks the arguments; float32 only."""
    return torch.ops.linflab.lp_distance(x, weight, p)


def lp_distance_backward(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Gradients in x and weight, given the output y and its gradient."""
    return torch.ops.linflab.lp_distance_backward(grad_y, x, weight, y, p)


def linf_distance_bounds(lower: Tensor, upper: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `linflab.models.distance.linf_distance_bounds`, which also checks the arguments; float32 only."""
    return torch.ops.linflab.linf_distance_bounds(lower, upper, weight)


def sort_distance(x: Tensor, weight: Tensor, q: float, terms: int) -> Tensor:
    """See `linflab.models.distance.sort_distance`, which also checks the arguments; float32 only."""
    return torch.ops.linflab.sort_distance(x, weight, q, terms)


def sort_distance_bounds(lower: Tensor, upper: Tensor, weight: Tensor, q: float, terms: int) -> tuple[Tensor, Tensor]:
    """See `linflab.models.distance.sort_distance_bounds`, which also checks the arguments; float32 only."""
    return torch.ops.linflab.sort_distance_bounds(lower, upper, weight, q, terms)


def lp_distance_on_subsets(x: Tensor, weight: Tensor, p: float, kept: Tensor, group: int) -> Tensor:
    """See `linflab.models.distance.lp_distance_on_subsets`, which also checks the arguments; float32 only."""
    return torch.ops.linflab.lp_distance_on_subsets(x, weight, p, kept, group)
