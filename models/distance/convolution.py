"""l_p distances of image patches to filters: a convolution with distances instead of dot products.

The kernels for CPUs (`cpu.py`) compute float32 tensors. This module computes everything else by the ops for rows, with
the patches of a few samples at once. Neither stores the unfolded tensor, kernel height x kernel width times as large as
the input.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import fold, unfold

MAX_PATCH_ELEMENTS = 2**22  # limit of patch values in memory; one sample may exceed it


def lp_distance_conv2d(x: Tensor, weight: Tensor, p: float, stride: int, padding: int) -> Tensor:
    """Compute `linflab.models.distance.lp_distance_conv2d`, which checks the arguments."""
    size = output_size(x, weight, stride, padding)
    y = x.new_empty(len(x), len(weight), *size)
    for samples in iter_batch_chunks(x, weight, size):
        patches = extract_patches(x[samples], weight, stride, padding)
        distances = torch.ops.linflab.lp_distance(patches, weight.flatten(1), p)
        y[samples] = distances.view(len(y[samples]), math.prod(size), len(weight)).transpose(1, 2).unflatten(2, size)
    return y


def lp_distance_conv2d_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, stride: int, padding: int, needs_grad_x: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients in x (empty unless `needs_grad_x`) and weight, given y and its gradient."""
    grad_x, grad_weight = torch.empty_like(x if needs_grad_x else x[:0]), torch.zeros_like(weight)
    for samples in iter_batch_chunks(x, weight, y.shape[2:]):
        patches = extract_patches(x[samples], weight, stride, padding)
        distances, upstream = (t[samples].flatten(2).transpose(1, 2).flatten(0, 1) for t in (y, grad_y))
        grad_patches, grad_filters = torch.ops.linflab.lp_distance_backward(
            upstream, patches, weight.flatten(1), distances, p
        )
        grad_weight += grad_filters.view_as(weight)
        if not needs_grad_x:
            continue
        columns = grad_patches.view(-1, y.shape[2] * y.shape[3], patches.shape[1]).transpose(1, 2)
        grad_x[samples] = fold(columns, x.shape[2:], weight.shape[2:], padding=padding, stride=stride)
    return grad_x, grad_weight


def output_size(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int]:
    """Return the height and width of the output."""
    height, width = ((x.shape[d] + 2 * padding - weight.shape[d]) // stride + 1 for d in (2, 3))
    return height, width


def iter_batch_chunks(x: Tensor, weight: Tensor, size: tuple[int, ...]) -> Iterator[slice]:
    """Yield slices of samples whose patches are in memory together."""
    samples = max(1, MAX_PATCH_ELEMENTS // (math.prod(weight.shape[1:]) * math.prod(size)))
    for start in range(0, len(x), samples):
        yield slice(start, start + samples)


def extract_patches(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Return zero-padded patches (samples x positions, C x kernel height x kernel width)."""
    columns = unfold(x, weight.shape[2:], padding=padding, stride=stride)
    return columns.transpose(1, 2).flatten(0, 1).contiguous()
