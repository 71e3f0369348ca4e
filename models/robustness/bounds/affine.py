"""Layers x -> A x + b in evaluation mode, as maps for forward and backward bound propagation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from linflab.models.networks.layers import L1ProjectedLinear, MeanShift, Normalize, ScaledLinear
from linflab.models.robustness.bounds.rounding import UNDERFLOW_SLACK, gamma
from linflab.models.robustness.bounds.steps import (
    AddConstant,
    ChannelAffine,
    Negate,
    OwnLayer,
    Quotient,
    Rearrangement,
    Scale,
    has_exact_rule,
)

MIN_DIVISOR = 2.0**-126  # smaller divisors are subnormal, with fewer bits


class ConvGeometry(NamedTuple):
    """Geometry of a convolution or pooling.

    Attributes:
        stride: Stride of each dimension.
        padding: Padding of each dimension.
        dilation: Dilation of each dimension.
        groups: Number of groups.
        outputs: Height and width of the output map.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    outputs: tuple[int, ...]

    def receptive_field(self, outputs: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Return height and width of the inputs that neighboring outputs depend on.

        Args:
            outputs: Number of neighboring outputs along each dimension.
            kernel: Kernel size.
        """
        return tuple(
            (n - 1) * step + d * (size - 1) + 1
            for n, step, d, size in zip(outputs, self.stride, self.dilation, kernel, strict=True)
        )


@dataclass(frozen=True)
class Affine:
    """Map x -> apply(x, weight) + bias, with `apply` linear in x (B, *inputs) and in the weight.

    Attributes:
        weight: Weight of the map.
        bias: Bias, which broadcasts against outputs (B, *outputs).
        bias_magnitude: Sums of the magnitudes of the terms of `bias`, in the shape of `bias`.
        apply: Function from x and weight to outputs.
        transpose: Function from a (B, *outputs) and weight to (B, *inputs).
        num_terms: Number of products summed per output.
        window: Geometry of a two-dimensional convolution; None for other maps.
        elementwise: True if outputs are inputs times one weight per feature or channel.
    """

    weight: Tensor
    bias: Tensor
    bias_magnitude: Tensor
    apply: Callable[[Tensor, Tensor], Tensor]
    transpose: Callable[[Tensor, Tensor], Tensor]
    num_terms: int
    window: ConvGeometry | None = None
    elementwise: bool = False

    def rounding_error(self, largest: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the error bound of outputs (B, *outputs) computed in `dtype`.

        The bound is gamma(`num_terms` + 4) times the sum of the magnitudes of the terms. UNDERFLOW_SLACK is added per
        term, which exceeds the effect of underflow. Inputs and weights may underflow too, so UNDERFLOW_SLACK /
        gamma(`num_terms` + 4) is added to their magnitudes.

        Args:
            largest: Largest magnitudes of inputs (B, *inputs).
            dtype: Dtype of the computation.
        """
        share = gamma(self.num_terms + 4, dtype)
        underflow = UNDERFLOW_SLACK / share
        magnitudes = self.apply(
            largest + underflow, self.weight.abs().to(largest) + underflow
        ) + self.bias_magnitude.to(largest)
        return share * magnitudes + self.num_terms * UNDERFLOW_SLACK


@singledispatch
def affine_map(layer: nn.Module, inputs: torch.Size) -> Affine | None:
    """Return the affine map of a layer; None if the layer is not affine.

    Args:
        layer: Layer of any type; register maps for your own with `affine_map.register`.
        inputs: Shape of its inputs without the batch.

    Raises:
        TypeError: If an option of the layer is not supported (the message names it).
    """
    return None


@affine_map.register
def _own_layer(layer: OwnLayer, inputs: torch.Size) -> Affine | None:
    return affine_map(layer.layer, inputs) if has_exact_rule(affine_map, layer.layer) else None


@affine_map.register(nn.Linear)
@affine_map.register(ScaledLinear)
@affine_map.register(L1ProjectedLinear)
def _linear(layer: nn.Linear, inputs: torch.Size) -> Affine:
    weight = layer.weight
    if isinstance(layer, ScaledLinear):
        weight = layer.scaled_weight
    elif isinstance(layer, L1ProjectedLinear):
        weight = layer.projected_weight
    bias = weight.new_zeros(()) if layer.bias is None else layer.bias
    return Affine(weight, bias, bias.abs(), functional.linear, torch.matmul, weight.shape[1])


@affine_map.register(nn.Conv1d)
@affine_map.register(nn.Conv2d)
def _convolution(layer: nn.Conv1d | nn.Conv2d, inputs: torch.Size) -> Affine:
    kind = type(layer).__name__
    if layer.padding_mode != "zeros":
        raise TypeError(f"bounds: {kind} with padding_mode={layer.padding_mode!r} is not supported; use 'zeros'")
    if layer.padding == "same":
        sides = [d * (size - 1) for d, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        if any(side % 2 for side in sides):
            raise TypeError(
                f"bounds: {kind} with padding='same' and kernel_size={tuple(layer.kernel_size)} is not supported, "
                "since it pads two sides differently; use an odd kernel_size, or padding as numbers"
            )
        padding = tuple(side // 2 for side in sides)
    else:
        padding = (0,) * len(layer.kernel_size) if isinstance(layer.padding, str) else layer.padding
    bias = layer.weight.new_zeros(()) if layer.bias is None else layer.bias.view(-1, *[1] * (len(inputs) - 1))
    return _windows(layer.weight, bias, inputs, layer.stride, padding, layer.dilation, layer.groups)


@affine_map.register(nn.AvgPool1d)
@affine_map.register(nn.AvgPool2d)
def _avg_pool(layer: nn.AvgPool1d | nn.AvgPool2d, inputs: torch.Size) -> Affine:
    dims = len(inputs) - 1
    size, stride, padding = (_tuple(value, dims) for value in (layer.kernel_size, layer.stride, layer.padding))
    divisor = getattr(layer, "divisor_override", None)
    if not layer.ceil_mode and divisor is None and (layer.count_include_pad or not any(padding)):
        return _averages(size, stride, padding, inputs)
    with torch.device("meta"):
        outputs = layer(torch.empty(1, *inputs)).shape[2:]
    matrices = []
    for n, m, k, step, edge in zip(inputs[1:], outputs, size, stride, padding, strict=True):
        matrix = torch.zeros(n, m, dtype=torch.float64, device="cpu")
        for j in range(m):
            start = j * step - edge
            first, last = max(start, 0), min(start + k, n)
            counted = min(start + k, n + edge) - start if layer.count_include_pad else last - first
            matrix[first:last, j] = 1 if divisor is not None else 1 / counted
        matrices.append(matrix)
    if divisor is not None:
        if divisor <= 0:
            raise TypeError(
                f"bounds: AvgPool2d with divisor_override={divisor} is not supported; use a positive number"
            )
        matrices[0] /= divisor
    return _separable(matrices)


@affine_map.register(nn.AdaptiveAvgPool1d)
@affine_map.register(nn.AdaptiveAvgPool2d)
def _adaptive_average(layer: nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d, inputs: torch.Size) -> Affine:
    size = adaptive_window(layer.output_size, inputs)
    if size is not None:
        return _averages(size, size, (0,) * len(size), inputs)
    output_size = _tuple(layer.output_size, len(inputs) - 1)
    return _separable(
        [_averages_of_parts(n, n if m is None else m) for n, m in zip(inputs[1:], output_size, strict=True)]
    )


def _separable(matrices: Sequence[Tensor]) -> Affine:
    """Return pooling whose windows differ between positions.

    The extent and the weight of a window along one dimension depend only on the position along this dimension. One
    matrix (inputs, outputs) per dimension is therefore sufficient.
    """

    def product_with(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        for dim, weight in enumerate(weights, 2):
            x = (x.transpose(dim, -1) @ weight.to(x)).transpose(dim, -1)
        return x

    def apply(x: Tensor, w: Tensor) -> Tensor:
        return product_with(x, matrices) * w

    def transpose(a: Tensor, w: Tensor) -> Tensor:
        return product_with(a * w, [matrix.mT for matrix in matrices])

    terms = math.prod(int((matrix != 0).sum(dim=0).max()) for matrix in matrices)
    return Affine(_number(1), _number(0), _number(0), apply, transpose, terms + len(matrices) + 1)


def _averages_of_parts(inputs: int, outputs: int) -> Tensor:
    """Return the matrix (inputs, outputs) of adaptive average pooling along one dimension."""
    matrix = torch.zeros(inputs, outputs, dtype=torch.float64, device="cpu")
    for k in range(outputs):
        first, last = k * inputs // outputs, -(-(k + 1) * inputs // outputs)
        matrix[first:last, k] = 1 / (last - first)
    return matrix


def adaptive_window(outputs: int | tuple[int | None, ...] | None, inputs: torch.Size) -> tuple[int, ...] | None:
    """Return the window size of adaptive pooling of (C, *positions); None if windows differ in size."""
    sizes = zip(inputs[1:], _tuple(outputs, len(inputs) - 1), strict=True)
    pairs = [(n, n if size is None else size) for n, size in sizes]
    return tuple(n // m for n, m in pairs) if all(n % m == 0 for n, m in pairs) else None


def _averages(size: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], inputs: torch.Size) -> Affine:
    weight = torch.full((inputs[0], 1, *size), 1 / math.prod(size), dtype=torch.float64, device="cpu")
    return _windows(weight, _number(0), inputs, stride, padding, (1,) * len(size), inputs[0])


def _tuple(value: Any, dims: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * dims


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
    # Rows and columns at the far end that no window covers.
    uncovered = [(n + 2 * p - s) % step for n, p, s, step in zip(inputs[1:], padding, span, stride, strict=True)]
    convolve, convolve_back = (
        (functional.conv2d, functional.conv_transpose2d)
        if len(span) == 2
        else (functional.conv1d, functional.conv_transpose1d)
    )

    def apply(x: Tensor, w: Tensor) -> Tensor:
        return convolve(x, w, None, stride, padding, dilation, groups)

    def transpose(a: Tensor, w: Tensor) -> Tensor:
        return convolve_back(a, w, None, stride, padding, uncovered, groups, dilation)

    outputs = tuple(
        (n + 2 * p - s) // step + 1 for n, p, s, step in zip(inputs[1:], padding, span, stride, strict=True)
    )
    window = ConvGeometry(stride, padding, dilation, groups, outputs) if len(span) == 2 else None
    return Affine(weight, bias, bias.abs(), apply, transpose, weight[0].numel(), window)


@affine_map.register
def _zero_padding(layer: nn.ZeroPad2d, inputs: torch.Size) -> Affine:
    """Return zero padding as a convolution with ones of size 1."""
    left, right, top, bottom = _tuple(layer.padding, 4)
    if min(left, right, top, bottom) < 0:
        raise TypeError(f"bounds: ZeroPad2d with negative padding {layer.padding} is not supported; use a slice")
    channels, height, width = inputs

    def apply(x: Tensor, w: Tensor) -> Tensor:
        return functional.pad(x * w.view(-1, 1, 1), (left, right, top, bottom))

    def transpose(a: Tensor, w: Tensor) -> Tensor:
        return a[:, :, top : top + height, left : left + width] * w.view(-1, 1, 1)

    window = ConvGeometry((1, 1), (top, left), (1, 1), channels, (height + top + bottom, width + left + right))
    return Affine(torch.ones(channels, 1, 1, 1, device="cpu"), _number(0), _number(0), apply, transpose, 1, window)


@affine_map.register
def _rearrangement(layer: Rearrangement, inputs: torch.Size) -> Affine:
    index = layer.index.flatten()

    def apply(x: Tensor, w: Tensor) -> Tensor:
        return layer(x) * w

    def transpose(a: Tensor, w: Tensor) -> Tensor:
        flat = a.flatten(1) * w
        scattered = flat.new_zeros(len(a), inputs.numel() + 1)  # the last column collects padding
        scattered = scattered.index_add(1, index.where(index >= 0, inputs.numel()), flat)
        return scattered[:, :-1].unflatten(1, inputs)

    return Affine(_number(1), _number(0), _number(0), apply, transpose, 1)


@affine_map.register
def _batch_norm(layer: _BatchNorm, inputs: torch.Size) -> Affine:
    """Return the map, which counts as a sum of 10 terms because its scale is rounded six times."""
    mean, variance = layer.running_mean, layer.running_var
    if mean is None or variance is None:
        raise TypeError(
            f"bounds: {type(layer).__name__} with track_running_stats=False is not supported, since it uses batch "
            "statistics in evaluation mode; use the default"
        )
    scale, offset = torch.rsqrt(variance + layer.eps), torch.zeros_like(mean)
    if layer.affine:
        scale, offset = layer.weight * scale, layer.bias
    return _scaling(scale, offset - mean * scale, (mean * scale).abs() + offset.abs(), inputs, 10)


@affine_map.register
def _normalize(layer: Normalize, inputs: torch.Size) -> Affine:
    std = layer.std.flatten().double()  # one number, or one per channel
    bias = -layer.mean.flatten().double() / std
    return _scaling((1 / std).expand_as(bias), bias, bias.abs(), inputs)


@affine_map.register
def _mean_shift(layer: MeanShift, inputs: torch.Size) -> Affine:
    mean = layer.running_mean
    return _scaling(torch.ones_like(mean), -mean, mean.abs(), inputs)


@affine_map.register
def _channel_affine(layer: ChannelAffine, inputs: torch.Size) -> Affine:
    return _scaling(layer.scale, layer.offset, layer.offset.abs(), inputs, 10)


def _scaling(scale: Tensor, bias: Tensor, bias_magnitude: Tensor, inputs: torch.Size, terms: int = 1) -> Affine:
    """Return a map with one factor and one offset per feature or channel."""
    scale, bias, bias_magnitude = (part.view(-1, *[1] * (len(inputs) - 1)) for part in (scale, bias, bias_magnitude))
    return Affine(scale, bias, bias_magnitude, _product, _product, terms, elementwise=True)


def _number(value: float) -> Tensor:
    """Return a CPU scalar, which combines with tensors on any device, whatever torch's default device."""
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


@affine_map.register
def _negation(layer: Negate, inputs: torch.Size) -> Affine:
    return Affine(-_number(1), _number(0), _number(0), _product, _product, 1, elementwise=True)


@affine_map.register
def _shift(layer: AddConstant, inputs: torch.Size) -> Affine:
    constant = _constant_for(layer.constant, inputs)
    return Affine(_number(1), constant, constant.abs(), _product, _product, 1, elementwise=True)


@affine_map.register
def _scale(layer: Scale, inputs: torch.Size) -> Affine:
    factor = _constant_for(layer.constant, inputs)
    return Affine(factor, _number(0), _number(0), _product, _product, 1, elementwise=True)


@affine_map.register
def _quotient(layer: Quotient, inputs: torch.Size) -> Affine:
    divisor = _constant_for(layer.constant, inputs)
    if bool((divisor.abs() < MIN_DIVISOR).any()):
        raise TypeError(f"bounds: division by {float(divisor.abs().min()):g} is not supported; use a larger divisor")
    factor = 1 / divisor.double()
    return Affine(factor, _number(0), _number(0), _product, _product, 1, elementwise=True)


def _constant_for(constant: Tensor | float, inputs: torch.Size) -> Tensor:
    """Return a floating-point constant that broadcasts against inputs (B, *inputs), without batch axis.

    Numbers become float64.

    Raises:
        TypeError: If the constant differs between samples, or would enlarge the inputs.
    """
    tensor = constant if isinstance(constant, Tensor) else torch.tensor(constant, dtype=torch.float64, device="cpu")
    if not tensor.is_floating_point():
        tensor = tensor.double()
    while tensor.dim() > len(inputs) and len(tensor) == 1:
        tensor = tensor[0]
    sizes = zip(reversed(tensor.shape), reversed(inputs), strict=False)
    if tensor.dim() > len(inputs) or not all(n in (1, size) for n, size in sizes):
        raise TypeError(
            f"bounds: a constant of shape {tuple(tensor.shape)} is not supported for values of shape {tuple(inputs)}; "
            "use one that broadcasts to them and is the same for all samples"
        )
    return tensor
