"""Operators of ONNX as functions of PyTorch that bounds can trace."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from linflab.platform.exchange.onnx_nodes import Converter, Node, Operation, UnsupportedNode, check_elements
from linflab.platform.exchange.onnx_shapes import (
    convert_concat,
    convert_flatten,
    convert_gather,
    convert_pad,
    convert_reshape,
    convert_slice,
    convert_squeeze,
    convert_top_k,
    convert_transpose,
    convert_unsqueeze,
)
from linflab.platform.exchange.onnx_windows import convert_average_pool, convert_conv, convert_max_pool

# Operators that are computed if all inputs are constants.
FOLDED = {
    *("Constant", "Shape", "Gather", "Concat", "Unsqueeze", "Squeeze", "Cast", "Identity", "Reshape", "Transpose"),
    *("Add", "Sub", "Mul", "Div", "Neg", "Slice", "Flatten", "ConstantOfShape", "Sqrt", "Reciprocal"),
}


def _activation(function: Callable[..., Tensor], **defaults: float) -> Converter:
    """Return the converter of an elementwise function with attributes; `defaults` has their default values."""

    def convert(node: Node) -> Operation:
        values = [float(node.attributes.get(name, default)) for name, default in defaults.items()]
        return node.operation(lambda x: function(x, *values))

    return convert


def _identity(node: Node) -> Operation:
    if len([name for name in node.outputs if name]) > 1:
        raise UnsupportedNode("several outputs")
    return node.operation(lambda x: x.clone())


def _cast(node: Node) -> Operation:
    from onnx import TensorProto

    if node.attributes["to"] != TensorProto.FLOAT:
        raise UnsupportedNode(f"to={TensorProto.DataType.Name(node.attributes['to'])}")
    return _identity(node)


def _dropout(node: Node) -> Operation:
    if node.option("training_mode", 2, False):
        raise UnsupportedNode("training_mode")
    return _identity(node)


def _clip(node: Node) -> Operation:
    low, high = node.option("min", 1, -math.inf), node.option("max", 2, math.inf)
    return node.operation(lambda x: x.clamp(float(low), float(high)))


def _gemm(node: Node) -> Operation:
    weight = node.constant(1) if node.attributes.get("transB", 0) else node.constant(1).mT
    if node.attributes.get("transA", 0) or weight.dim() != 2 or node.example(0).dim() != 2:
        raise UnsupportedNode("transA, or other than matrices")
    weight = node.attributes.get("alpha", 1.0) * weight
    if not node.has(2):
        return node.operation(functional.linear, weight)
    bias = (node.attributes.get("beta", 1.0) * node.constant(2)).broadcast_to(1, len(weight))[0]
    return node.operation(functional.linear, weight, bias)


def _matmul(node: Node) -> Operation:
    matrix = node.constant(1)
    check_elements(node.example(0)[..., 0].numel(), matrix.shape[-1] if matrix.dim() > 1 else 1)
    if matrix.dim() == 1:
        return node.operation(lambda x, weight: functional.linear(x, weight).squeeze(-1), matrix[None])
    if matrix.dim() != 2:
        raise UnsupportedNode(f"a constant of shape {tuple(matrix.shape)}")
    return node.operation(functional.linear, matrix.mT)


def _broadcast(function: Callable[[Tensor, Tensor], Tensor], between_values: bool) -> Converter:
    """Return the converter of an elementwise function of two arguments, which are expanded to a common shape.

    Args:
        function: Function of two tensors.
        between_values: Whether both may depend on the network's input.
    """

    def convert(node: Node) -> Operation:
        first, second = (
            node.examples[name] if name in node.examples else node.constants[name] for name in node.inputs[:2]
        )
        shape = torch.broadcast_shapes(first.shape, second.shape)
        check_elements(*shape)

        def expand(x: Tensor, rank: int) -> Tensor:
            if rank != len(shape):
                raise UnsupportedNode("values of different ranks")
            return x if x.shape[1:] == shape[1:] else x.expand(-1, *shape[1:])

        if node.is_value(0) and node.is_value(1):
            if not between_values:
                raise UnsupportedNode("two inputs that are not constant")
            return node.operation(lambda x, y: function(expand(x, first.dim()), expand(y, second.dim())), inputs=(0, 1))
        if node.is_value(0):
            return node.operation(lambda x, c: function(expand(x, first.dim()), c), second)
        return node.operation(lambda x, c: function(c, expand(x, second.dim())), first, inputs=(1,))

    return convert


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return x / y


def _div(node: Node) -> Operation:
    if node.is_value(1):
        raise UnsupportedNode("a divisor that is not constant")
    return _broadcast(_divide, False)(node)


def _batch_normalization(node: Node) -> Operation:
    scale, offset, mean, variance = (node.constant(k).double() for k in range(1, 5))
    if node.attributes.get("training_mode", 0) or len([name for name in node.outputs if name]) > 1:
        raise UnsupportedNode("training_mode")
    factor = scale / (variance + node.attributes.get("epsilon", 1e-5)).sqrt()
    shape = (-1, *[1] * (node.example(0).dim() - 2))
    return node.operation(
        lambda x, a, b: x * a + b, factor.float().view(shape), (offset - mean * factor).float().view(shape)
    )


def _global_pool(maximum: bool) -> Converter:
    def convert(node: Node) -> Operation:
        dims = list(range(2, node.example(0).dim()))
        return node.operation(lambda x: x.amax(dims, keepdim=True) if maximum else x.mean(dims, keepdim=True))

    return convert


def _reduce(function: Callable[..., Tensor]) -> Converter:
    def convert(node: Node) -> Operation:
        axes = node.axes()
        if not axes or 0 in axes:
            raise UnsupportedNode("a reduction over the batch")
        return node.operation(lambda x: function(x, axes, keepdim=bool(node.attributes.get("keepdims", 1))))

    return convert


OPERATORS: dict[str, Converter] = {
    "Abs": _activation(torch.abs),
    "Add": _broadcast(torch.add, True),
    "AveragePool": convert_average_pool,
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": convert_concat,
    "Conv": convert_conv,
    "Div": _div,
    "Dropout": _dropout,
    "Elu": _activation(functional.elu, alpha=1.0),
    "Flatten": convert_flatten,
    "Gather": convert_gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool(maximum=False),
    "GlobalMaxPool": _global_pool(maximum=True),
    "Identity": _identity,
    "LeakyRelu": _activation(functional.leaky_relu, alpha=0.01),
    "MatMul": _matmul,
    "MaxPool": convert_max_pool,
    "Mul": _broadcast(torch.mul, False),
    "Neg": _activation(torch.neg),
    "Pad": convert_pad,
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "Relu": _activation(torch.relu),
    "Reshape": convert_reshape,
    "Sigmoid": _activation(torch.sigmoid),
    "Slice": convert_slice,
    "Softplus": _activation(functional.softplus),
    "Squeeze": convert_squeeze,
    "Sub": _broadcast(torch.sub, True),
    "Tanh": _activation(torch.tanh),
    "TopK": convert_top_k,
    "Transpose": convert_transpose,
    "Unsqueeze": convert_unsqueeze,
}
