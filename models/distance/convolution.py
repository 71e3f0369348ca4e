"""The l_p distance of image patches to filters: a convolution with distances in place of dot products.

Patches are made for a few samples at a time, in the forward and again in the backward pass, so that the unfolded
tensor, kernel height x kernel width times as large as the input, never exists.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, library
from torch.nn.functional import fold, unfold

from linflab.models.distance.choice import implementation_for
from linflab.models.distance.operators import no_second_gradients

PATCH_VALUES = 2**22  # values of patches held at a time, or those of one sample where they are more


library.define("linflab::lp_distance_conv2d", "(Tensor x, Tensor weight, float p, int stride, int padding) -> Tensor")
library.define(
    "linflab::lp_distance_conv2d_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor y, float p, int stride, int padding, bool of_x) -> "
    "(Tensor, Tensor)",
)


def lp_distance_conv2d(x: Tensor, weight: Tensor, p: float, stride: int, padding: int) -> Tensor:
    """`linflab.models.distance.lp_distance_conv2d` without its checks."""
    return torch.ops.linflab.lp_distance_conv2d(x, weight, p, stride, padding)


@library.impl("linflab::lp_distance_conv2d", "CompositeExplicitAutograd")
def _forward(x: Tensor, weight: Tensor, p: float, stride: int, padding: int) -> Tensor:
    size = output_size(x, weight, stride, padding)
    y = x.new_empty(len(x), len(weight), *size)
    for samples in sample_chunks(x, weight, size):
        patches = patches_of(x[samples], weight, stride, padding)
        distances = _distance(patches, weight.flatten(1), p)
        y[samples] = distances.view(-1, math.prod(size), len(weight)).transpose(1, 2).unflatten(2, size)
    return y


@library.impl("linflab::lp_distance_conv2d_backward", "CompositeExplicitAutograd")
def _backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, stride: int, padding: int, of_x: bool
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = torch.empty_like(x if of_x else x[:0]), torch.zeros_like(weight)
    for samples in sample_chunks(x, weight, y.shape[2:]):
        patches = patches_of(x[samples], weight, stride, padding)
        distances, upstream = (t[samples].flatten(2).transpose(1, 2).flatten(0, 1) for t in (y, grad_y))
        grad_patches, grad_filters = _gradients(upstream, patches, weight.flatten(1), distances, p)
        grad_weight += grad_filters.view_as(weight)
        if not of_x:
            continue
        columns = grad_patches.view(-1, y.shape[2] * y.shape[3], patches.shape[1]).transpose(1, 2)
        grad_x[samples] = fold(columns, x.shape[2:], weight.shape[2:], padding=padding, stride=stride)
    return grad_x, grad_weight


@library.register_fake("linflab::lp_distance_conv2d")
def _fake_forward(x: Tensor, weight: Tensor, p: float, stride: int, padding: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *output_size(x, weight, stride, padding))


@library.register_fake("linflab::lp_distance_conv2d_backward")
def _fake_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, stride: int, padding: int, of_x: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x if of_x else x[:0]), torch.empty_like(weight)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, float, int, int], output: Tensor) -> None:
    x, weight, ctx.p, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, weight, output)


def _gradients_of(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
    of_x = ctx.needs_input_grad[0]
    grad_x, grad_weight = torch.ops.linflab.lp_distance_conv2d_backward(
        grad_y, *ctx.saved_tensors, ctx.p, ctx.stride, ctx.padding, of_x
    )
    return grad_x if of_x else None, grad_weight, None, None, None


library.register_autograd("linflab::lp_distance_conv2d", _gradients_of, setup_context=_save_for_backward)
library.register_autograd("linflab::lp_distance_conv2d_backward", no_second_gradients)


def output_size(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int]:
    """Height and width of what filters make of images."""
    height, width = ((x.shape[d] + 2 * padding - weight.shape[d]) // stride + 1 for d in (2, 3))
    return height, width


def sample_chunks(x: Tensor, weight: Tensor, size: tuple[int, ...]) -> Iterator[slice]:
    """Samples whose patches are held together."""
    samples = max(1, PATCH_VALUES // (math.prod(weight.shape[1:]) * math.prod(size)))
    for start in range(0, len(x), samples):
        yield slice(start, start + samples)


def patches_of(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """(samples x positions, C x kernel height x kernel width), zeros beyond the edges."""
    columns = unfold(x, weight.shape[2:], padding=padding, stride=stride)
    return columns.transpose(1, 2).flatten(0, 1).contiguous()


def _distance(x: Tensor, weight: Tensor, p: float) -> Tensor:
    distances: Tensor = implementation_for(x).lp_distance(x, weight, p)
    return distances


def _gradients(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = implementation_for(x).lp_distance_backward(grad_y, x, weight, y, p)
    return gradients
