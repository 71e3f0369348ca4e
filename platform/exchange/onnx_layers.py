"""Layers of traced networks as nodes of ONNX graphs: one writer per layer type."""

import math
from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from linflab.models.distance.derivatives import sort_coefficients
from linflab.models.networks.layers import GroupSort, LpDistance, LpDistanceConv2d, Normalize, SortDistance
from linflab.models.robustness.bounds.affine import Affine, adaptive_window, affine_map
from linflab.models.robustness.bounds.steps import VIEW_LAYERS, Add, Clamp, Concat, Quotient, Rearrangement, unwrap
from linflab.platform.errors import InputError
from linflab.platform.exchange.onnx_graph import GraphBuilder

Shape = Sequence[int]


@singledispatch
def write_layer(layer: nn.Module, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    """Add the nodes of a layer to a graph, and return the name of its output.

    Args:
        layer: Layer of a trace, in evaluation mode; distance layers are written at p = inf.
        graph: Graph to extend.
        inputs: Names of the input values.
        shape: Shape of the first input without the batch.
        outputs: Shape of the output without the batch.

    Raises:
        InputError: If the layer has no ONNX form (the message names it).
    """
    if isinstance(layer, VIEW_LAYERS):
        return inputs[0] if tuple(shape) == tuple(outputs) else graph.reshape(inputs[0], outputs)
    affine = affine_map(layer, torch.Size(shape))
    if affine is None or not affine.elementwise:
        raise _unsupported(layer)
    return write_scaling(affine, graph, inputs[0])


def write_scaling(affine: Affine, graph: GraphBuilder, value: str) -> str:
    """Add the nodes of a layer with one factor and one offset per feature, channel or value."""
    if bool((affine.weight != 1).any()):
        value = graph.add("Mul", value, graph.constant(affine.weight))
    return graph.add("Add", value, graph.constant(affine.bias)) if bool((affine.bias != 0).any()) else value


def write_weights(layer: nn.Module, weight: Tensor, bias: Tensor, graph: GraphBuilder, value: str, shape: Shape) -> str:
    """Add the node of a linear layer or convolution with the given weight and bias (O)."""
    bias_name = graph.constant(bias)
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return graph.add("Conv", value, graph.constant(weight), bias_name, **_convolution_options(layer))
    if len(shape) == 1:
        return graph.add("Gemm", value, graph.constant(weight), bias_name, transB=1)
    return graph.add("Add", graph.add("MatMul", value, graph.constant(weight.mT)), bias_name)


def _unsupported(layer: nn.Module, reason: str = "") -> InputError:
    name = type(unwrap(layer)).__name__ + (f" with {reason}" if reason else "")
    return InputError(f"layer={name}: has no ONNX form in linflab; use --format safetensors, or another layer")


def _pair(value: Any, dims: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * dims


def _convolution_options(layer: nn.Conv1d | nn.Conv2d) -> dict[str, Any]:
    kernel, stride, dilation = tuple(layer.kernel_size), list(layer.stride), tuple(layer.dilation)
    if layer.padding == "same":
        totals = [d * (size - 1) for d, size in zip(dilation, kernel, strict=True)]
        pads = [total // 2 for total in totals] + [total - total // 2 for total in totals]
    else:
        pads = 2 * ([0] * len(kernel) if isinstance(layer.padding, str) else list(layer.padding))
    return {"kernel_shape": kernel, "strides": stride, "dilations": dilation, "pads": pads, "group": layer.groups}


@write_layer.register(nn.Linear)
@write_layer.register(nn.Conv1d)
@write_layer.register(nn.Conv2d)
def _weights(layer: Any, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    affine = affine_map(layer, torch.Size(shape))
    assert affine is not None
    bias = affine.bias.flatten().expand(len(affine.weight))
    return write_weights(layer, affine.weight, bias, graph, inputs[0], shape)


@write_layer.register
def _normalize(layer: Normalize, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    mean, std = (part if len(shape) == 3 else part.flatten() for part in (layer.mean, layer.std))
    return graph.add("Div", graph.add("Sub", inputs[0], graph.constant(mean)), graph.constant(std))


@write_layer.register
def _quotient(layer: Quotient, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    return graph.add("Div", inputs[0], graph.constant(layer.constant))


def write_distances(graph: GraphBuilder, value: str, weight: Tensor) -> str:
    """Add nodes for |x_i - w_oi| with values x (B, I, ...) and weight (O, I, ...): (B, O, I, ...)."""
    difference = graph.add("Sub", graph.add("Unsqueeze", value, graph.integers([1])), graph.constant(weight))
    return graph.add("Abs", difference)


@write_layer.register
def _distance(layer: LpDistance, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    flat = inputs[0] if len(shape) == 1 else graph.reshape(inputs[0], [math.prod(shape)])
    return graph.add("ReduceMax", write_distances(graph, flat, layer.weight), axes=[2], keepdims=0)


@write_layer.register
def _sort_distance(layer: SortDistance, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    flat = inputs[0] if len(shape) == 1 else graph.reshape(inputs[0], [math.prod(shape)])
    distances = write_distances(graph, flat, layer.weight)
    largest, _ = graph.add_outputs("TopK", 2, distances, graph.integers([layer.top_k]), axis=-1, largest=1, sorted=1)
    coefficients = sort_coefficients(layer.q, layer.top_k, layer.weight.shape[1])
    return graph.add("MatMul", largest, graph.constant(torch.tensor(coefficients)))


@write_layer.register
def _distance_convolution(
    layer: LpDistanceConv2d, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape
) -> str:
    """Add nodes that gather patches by a convolution with one-hot filters, which is exact."""
    filters, kernel = layer.weight.flatten(1), tuple(layer.weight.shape[1:])
    size = filters.shape[1]
    one_hot = torch.eye(size).view(size, *kernel)
    pads, strides = [layer.padding] * 4, [layer.stride] * 2
    patches = graph.add("Conv", inputs[0], graph.constant(one_hot), kernel_shape=kernel[1:], pads=pads, strides=strides)
    distances = write_distances(graph, patches, filters[:, :, None, None])
    return graph.add("ReduceMax", distances, axes=[2], keepdims=0)


@write_layer.register
def _group_sort(layer: GroupSort, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    size = layer.group_size
    groups = graph.reshape(inputs[0], [shape[0] // size, size])
    ascending, _ = graph.add_outputs("TopK", 2, groups, graph.integers([size]), axis=-1, largest=0, sorted=1)
    return graph.reshape(ascending, outputs)


@write_layer.register(nn.ReLU)
@write_layer.register(nn.Tanh)
@write_layer.register(nn.Sigmoid)
def _activation(layer: nn.Module, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    name = next(kind.__name__ for kind in (nn.ReLU, nn.Tanh, nn.Sigmoid) if isinstance(layer, kind))
    return graph.add(name.capitalize(), inputs[0])


@write_layer.register
def _leaky_relu(layer: nn.LeakyReLU, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    if layer.negative_slope == -1:
        return graph.add("Abs", inputs[0])
    return graph.add("LeakyRelu", inputs[0], alpha=layer.negative_slope)


@write_layer.register
def _elu(layer: nn.ELU, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    return graph.add("Elu", inputs[0], alpha=layer.alpha)


@write_layer.register
def _softplus(layer: nn.Softplus, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    beta = graph.constant(layer.beta)
    return graph.add("Div", graph.add("Softplus", graph.add("Mul", inputs[0], beta)), beta)


@write_layer.register
def _silu(layer: nn.SiLU, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    return graph.add("Mul", inputs[0], graph.add("Sigmoid", inputs[0]))


@write_layer.register
def _gelu(layer: nn.GELU, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    x = inputs[0]
    if layer.approximate == "none":
        factor = graph.add("Erf", graph.add("Mul", x, graph.constant(math.sqrt(0.5))))
    else:
        cube = graph.add("Mul", graph.add("Mul", x, x), graph.add("Mul", x, graph.constant(0.044715)))
        sum_ = graph.add("Mul", graph.add("Add", x, cube), graph.constant(math.sqrt(2 / math.pi)))
        factor = graph.add("Tanh", sum_)
    return graph.add("Mul", graph.add("Mul", x, graph.constant(0.5)), graph.add("Add", factor, graph.constant(1.0)))


@write_layer.register
def _clamp(layer: Clamp, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    ends = [graph.constant(end) if math.isfinite(end) else "" for end in (layer.low, layer.high)]
    return graph.add("Clip", inputs[0], *ends)


@write_layer.register
def _add(layer: Add, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    return graph.add("Add", *inputs)


@write_layer.register
def _concat(layer: Concat, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    return graph.add("Concat", *inputs, axis=layer.dim)


@write_layer.register
def _zero_padding(layer: nn.ZeroPad2d, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    left, right, top, bottom = _pair(layer.padding, 4)
    return graph.add("Pad", inputs[0], graph.integers([0, 0, top, left, 0, 0, bottom, right]), mode="constant")


@write_layer.register
def _rearrangement(layer: Rearrangement, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    """Add nodes that gather values; a zero after the last one fills positions without a value."""
    index, count = layer.index.flatten(), math.prod(shape)
    flat = inputs[0] if len(shape) == 1 else graph.reshape(inputs[0], [count])
    if bool((index < 0).any()):
        flat = graph.add("Pad", flat, graph.integers([0, 0, 0, 1]), mode="constant")
        index = index.where(index >= 0, count)
    gathered = graph.add("Gather", flat, graph.integers(index.tolist()), axis=1)
    return gathered if len(outputs) == 1 else graph.reshape(gathered, outputs)


def _pool(
    operator: str, graph: GraphBuilder, value: str, size: Shape, stride: Shape, padding: Shape, dilation: Shape,
    shape: Shape, outputs: Shape, **options: Any,
) -> str:  # fmt: skip
    """Add a pooling node; windows beyond the end, as in ceil mode, become explicit padding."""
    ends = [
        max(0, (m - 1) * step + d * (k - 1) + 1 - n - start)
        for n, m, k, step, start, d in zip(shape[1:], outputs[1:], size, stride, padding, dilation, strict=True)
    ]
    pads = [*padding, *(max(end, start) for end, start in zip(ends, padding, strict=True))]
    if operator == "MaxPool":
        options["dilations"] = list(dilation)
    return graph.add(operator, value, kernel_shape=list(size), strides=list(stride), pads=pads, **options)


@write_layer.register(nn.MaxPool1d)
@write_layer.register(nn.MaxPool2d)
def _max_pool(layer: Any, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    size, stride, padding, dilation = (
        _pair(value, len(shape) - 1) for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    )
    return _pool("MaxPool", graph, inputs[0], size, stride, padding, dilation, shape, outputs)


@write_layer.register(nn.AvgPool1d)
@write_layer.register(nn.AvgPool2d)
def _avg_pool(layer: Any, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    dims = len(shape) - 1
    size, stride, padding = (_pair(value, dims) for value in (layer.kernel_size, layer.stride, layer.padding))
    if getattr(layer, "divisor_override", None) is not None:
        raise _unsupported(layer, "divisor_override")
    if layer.ceil_mode and layer.count_include_pad and any(padding):
        raise _unsupported(layer, "ceil_mode, padding and count_include_pad")
    count = int(layer.count_include_pad and any(padding))
    return _pool(
        "AveragePool", graph, inputs[0], size, stride, padding, (1,) * dims, shape, outputs, count_include_pad=count
    )


@write_layer.register(nn.AdaptiveAvgPool1d)
@write_layer.register(nn.AdaptiveAvgPool2d)
@write_layer.register(nn.AdaptiveMaxPool2d)
def _adaptive_pool(layer: Any, graph: GraphBuilder, inputs: list[str], shape: Shape, outputs: Shape) -> str:
    size = adaptive_window(layer.output_size, torch.Size(shape))
    if size is None:
        raise _unsupported(layer, f"output_size={layer.output_size}, whose windows differ in size,")
    is_maximum = isinstance(layer, nn.AdaptiveMaxPool2d)
    if tuple(size) == tuple(shape[1:]):
        return graph.add("GlobalMaxPool" if is_maximum else "GlobalAveragePool", inputs[0])
    zeros, ones = (0,) * len(size), (1,) * len(size)
    return _pool("MaxPool" if is_maximum else "AveragePool", graph, inputs[0], size, size, zeros, ones, shape, outputs)
