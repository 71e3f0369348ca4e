"""Layers that compute x -> A x + b in evaluation mode: their maps, for bounds that pass through them either way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from linflab.models.networks.layers import L1Linear, MeanShift, Normalize, ScaledLinear
from linflab.models.robustness.bounds.rounding import TINY, gamma
from linflab.models.robustness.bounds.tracing import Negation, Scaling, Shift


class Window(NamedTuple):
    """How a convolution looks at its inputs."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    outputs: tuple[int, ...]  # height and width of its map

    def reach(self, seen: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Height and width of the inputs that so many of its outputs, side by side, look at."""
        return tuple(
            (n - 1) * step + d * (size - 1) + 1
            for n, step, d, size in zip(seen, self.stride, self.dilation, kernel, strict=True)
        )


@dataclass(frozen=True)
class Affine:
    """x -> apply(x, weight) + bias, with `apply` linear in x (B, *inputs) and in the weight.

    Attributes:
        weight: of the map.
        bias: broadcasts against outputs (B, *outputs).
        bias_size: as `bias`: the magnitudes of what the layer sums to it.
        apply: x, weight -> outputs.
        transpose: a (B, *outputs), weight -> (B, *inputs).
        terms: how many products are summed for an output.
        window: of convolutions.
        elementwise: outputs are inputs times a weight for each feature or channel.
    """

    weight: Tensor
    bias: Tensor
    bias_size: Tensor
    apply: Callable[[Tensor, Tensor], Tensor]
    transpose: Callable[[Tensor, Tensor], Tensor]
    terms: int
    window: Window | None = None
    elementwise: bool = False

    def rounding(self, largest: Tensor, dtype: torch.dtype) -> Tensor:
        """How far off an output (B, *outputs) is, computed in `dtype` of inputs of no larger magnitude than `largest`.

        gamma(terms + 4) of the sum of the terms' magnitudes, and TINY a term, which is more than underflow adds.
        """
        magnitudes = self.apply(largest, self.weight.abs().to(largest)) + self.bias_size.to(largest)
        return gamma(self.terms + 4, dtype) * magnitudes + self.terms * TINY


@singledispatch
def affine_of(layer: nn.Module, inputs: torch.Size) -> Affine | None:
    """The map of a layer for inputs (*inputs), without the batch; None for a layer that is not affine.

    Raises:
        TypeError: an option of the layer is not supported; names it.
    """
    return None


@affine_of.register(nn.Linear)
@affine_of.register(ScaledLinear)
@affine_of.register(L1Linear)
def _linear(layer: nn.Linear, inputs: torch.Size) -> Affine:
    weight = layer.weight
    if isinstance(layer, ScaledLinear):
        weight = layer.scaled_weight
    elif isinstance(layer, L1Linear):
        weight = layer.projected_weight
    bias = weight.new_zeros(()) if layer.bias is None else layer.bias
    return Affine(weight, bias, bias.abs(), functional.linear, torch.matmul, layer.in_features)


@affine_of.register
def _convolution(layer: nn.Conv2d, inputs: torch.Size) -> Affine:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise TypeError(
            f"bounds: of Conv2d with padding {layer.padding!r} of {layer.padding_mode}; numbers of zeros do"
        )
    bias = layer.weight.new_zeros(()) if layer.bias is None else layer.bias.view(-1, 1, 1)
    return _windows(layer.weight, bias, inputs, layer.stride, layer.padding, layer.dilation, layer.groups)


@affine_of.register
def _average(layer: nn.AvgPool2d, inputs: torch.Size) -> Affine:
    if layer.ceil_mode or layer.divisor_override is not None or not layer.count_include_pad:
        raise TypeError("bounds: of AvgPool2d with ceil_mode, divisor_override or count_include_pad=False")
    size, stride, padding = (_pair(value) for value in (layer.kernel_size, layer.stride, layer.padding))
    weight = torch.full((inputs[0], 1, *size), 1 / (size[0] * size[1]), dtype=torch.float64)
    return _windows(weight, torch.zeros(()), inputs, stride, padding, (1, 1), inputs[0])


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value, value)


def _windows(
    weight: Tensor,
    bias: Tensor,
    inputs: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Affine:
    span = [d * (size - 1) + 1 for d, size in zip(dilation, weight.shape[2:], strict=True)]
    # rows and columns at the far end that no window reaches
    missed = [(n + 2 * p - s) % step for n, p, s, step in zip(inputs[1:], padding, span, stride, strict=True)]

    def apply(x: Tensor, w: Tensor) -> Tensor:
        return functional.conv2d(x, w, None, stride, padding, dilation, groups)

    def transpose(a: Tensor, w: Tensor) -> Tensor:
        return functional.conv_transpose2d(a, w, None, stride, padding, missed, groups, dilation)

    outputs = tuple(
        (n + 2 * p - s) // step + 1 for n, p, s, step in zip(inputs[1:], padding, span, stride, strict=True)
    )
    window = Window(stride, padding, dilation, groups, outputs)
    return Affine(weight, bias, bias.abs(), apply, transpose, weight[0].numel(), window)


@affine_of.register
def _batch_normalisation(layer: _BatchNorm, inputs: torch.Size) -> Affine:
    """The scale is computed as well, in six roundings: it counts as a sum of 10 terms."""
    mean, variance = layer.running_mean, layer.running_var
    if mean is None or variance is None:
        raise TypeError("bounds: of batch normalisation without running statistics")
    scale, offset = torch.rsqrt(variance + layer.eps), torch.zeros_like(mean)
    if layer.affine:
        scale, offset = layer.weight * scale, layer.bias
    return _scaling(scale, offset - mean * scale, (mean * scale).abs() + offset.abs(), inputs, 10)


@affine_of.register
def _normalisation(layer: Normalize, inputs: torch.Size) -> Affine:
    bias = -layer.mean.flatten().double() / layer.std.double()
    return _scaling((1 / layer.std.double()).expand_as(bias), bias, bias.abs(), inputs)


@affine_of.register
def _mean_shift(layer: MeanShift, inputs: torch.Size) -> Affine:
    mean = layer.running_mean
    return _scaling(torch.ones_like(mean), -mean, mean.abs(), inputs)


@affine_of.register
def _batch_scaling(layer: Scaling, inputs: torch.Size) -> Affine:
    return _scaling(layer.scale, layer.offset, layer.offset.abs(), inputs, 10)


def _scaling(scale: Tensor, bias: Tensor, bias_size: Tensor, inputs: torch.Size, terms: int = 1) -> Affine:
    """One factor and one number to add for each feature or channel."""
    scale, bias, bias_size = (part.view(-1, *[1] * (len(inputs) - 1)) for part in (scale, bias, bias_size))
    return Affine(scale, bias, bias_size, _product, _product, terms, elementwise=True)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


@affine_of.register
def _negation(layer: Negation, inputs: torch.Size) -> Affine:
    return Affine(-torch.ones(()), torch.zeros(()), torch.zeros(()), _product, _product, 1, elementwise=True)


@affine_of.register
def _shift(layer: Shift, inputs: torch.Size) -> Affine:
    constant = torch.as_tensor(layer.constant)
    while constant.dim() > len(inputs) and len(constant) == 1:
        constant = constant[0]
    if constant.dim() > len(inputs) or torch.broadcast_shapes(constant.shape, inputs) != inputs:
        raise TypeError(f"bounds: there is no rule for adding a constant of shape {tuple(constant.shape)}")
    return Affine(torch.ones(()), constant, constant.abs(), _product, _product, 1, elementwise=True)
