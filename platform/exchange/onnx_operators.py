"""Operators of ONNX as functions of PyTorch that bounds can trace."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.networks.layers import GroupSort
from linflab.models.robustness.bounds.steps import Rearrangement

if TYPE_CHECKING:
    import onnx

# Operators that are computed if all inputs are constants.
FOLDED = {
    *("Constant", "Shape", "Gather", "Concat", "Unsqueeze", "Squeeze", "Cast", "Identity", "Reshape", "Transpose"),
    *("Add", "Sub", "Mul", "Div", "Neg", "Slice", "Flatten", "ConstantOfShape", "Sqrt", "Reciprocal"),
}


class UnsupportedNode(ValueError):
    """A node that has no traceable form; the message continues "with"."""


class Operation(NamedTuple):
    """An operation of a network.

    Attributes:
        function: Function of the inputs and constants; several results are a tuple.
        inputs: Names of its inputs.
        constants: Names of its constants, in float32.
        outputs: Names of its results.
    """

    function: Callable[..., Any]
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]


class Node:
    """A node of an ONNX graph, with its attributes and the constants and example values among its inputs.

    Args:
        proto: The node.
        constants: Constants by name; operations may add further ones.
        examples: Values for one input by name, (1, ...).
    """

    def __init__(self, proto: "onnx.NodeProto", constants: dict[str, Tensor], examples: Mapping[str, Tensor]) -> None:
        from onnx import helper

        self.kind, self.inputs, self.outputs = proto.op_type, tuple(proto.input), tuple(proto.output)
        self.attributes: dict[str, Any] = {one.name: helper.get_attribute_value(one) for one in proto.attribute}
        self.constants, self.examples = constants, examples

    @property
    def is_constant(self) -> bool:
        """True if no input depends on the network's input, or if only its shape is used."""
        return self.kind == "Shape" or not any(name in self.examples for name in self.inputs)

    def has(self, index: int) -> bool:
        """Return whether an input is given."""
        return len(self.inputs) > index and bool(self.inputs[index])

    def is_value(self, index: int) -> bool:
        """Return whether an input depends on the network's input."""
        return self.has(index) and self.inputs[index] in self.examples

    def example(self, index: int) -> Tensor:
        """Return the example (1, ...) of an input that depends on the network's input."""
        if not self.is_value(index):
            raise UnsupportedNode(f"a constant as input {index}")
        return self.examples[self.inputs[index]]

    def constant(self, index: int) -> Tensor:
        """Return a constant input."""
        if self.is_value(index):
            raise UnsupportedNode(f"an input {index} that is not constant")
        return self.constants[self.inputs[index]]

    def option(self, name: str, index: int, default: Any = None) -> Any:
        """Return an option as a number or list: an attribute in old versions of an operator, an input in new ones."""
        if name in self.attributes:
            return self.attributes[name]
        return self.constant(index).tolist() if self.has(index) else default

    def operation(self, function: Callable[..., Any], *constants: Tensor, inputs: Sequence[int] = (0,)) -> Operation:
        """Return an operation of some inputs and of constants in float32.

        Args:
            function: Function of the inputs and constants.
            constants: Further arguments of the function.
            inputs: Indices of the inputs.
        """
        names = []
        for constant in constants:
            if constant.dtype != torch.float32:
                raise UnsupportedNode(f"a constant in {str(constant.dtype).removeprefix('torch.')}")
            names.append(f"{self.outputs[0]}\0{len(names)}")
            self.constants[names[-1]] = constant.clone(memory_format=torch.contiguous_format)
        for index in inputs:
            self.example(index)
        return Operation(function, tuple(self.inputs[index] for index in inputs), tuple(names), self.outputs)

    def axes(self, name: str = "axes", index: int = 1, rank: int | None = None) -> list[int] | None:
        """Return an option with dimensions, from 0; None if it is not given.

        Args:
            name: Name of the option.
            index: Index of the input that has the option in new versions.
            rank: Number of dimensions that negative numbers count from; by default that of the first input.
        """
        axes = self.option(name, index)
        if axes is None:
            return None
        rank = self.example(0).dim() if rank is None else rank
        axes = [axes] if isinstance(axes, int) else list(axes)
        if not all(-rank <= axis < rank for axis in axes):
            raise UnsupportedNode(f"{name}={axes}")
        return [axis % rank for axis in axes]


Converter = Callable[[Node], Operation]


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


def _window(node: Node, size: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return strides, dilations, and the padding at starts and ends, of a convolution or pooling with a kernel size."""
    dims = len(size)
    strides = list(node.attributes.get("strides", [1] * dims))
    dilations = list(node.attributes.get("dilations", [1] * dims))
    mode = node.attributes.get("auto_pad", b"NOTSET").decode()
    pads = list(node.attributes.get("pads", [0] * 2 * dims))
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * 2 * dims
        for d, n in enumerate(node.example(0).shape[2:]):
            span = (math.ceil(n / strides[d]) - 1) * strides[d] + dilations[d] * (size[d] - 1) + 1
            total = max(0, span - n)
            small, large = total // 2, total - total // 2
            pads[d], pads[dims + d] = (small, large) if mode == "SAME_UPPER" else (large, small)
    elif mode not in ("NOTSET", "VALID"):
        raise UnsupportedNode(f"auto_pad={mode}")
    if dims not in (1, 2) or min(pads) < 0:
        raise UnsupportedNode(f"kernel_shape={list(size)} and pads={pads}")
    return strides, dilations, pads[:dims], pads[dims:]


def _conv(node: Node) -> Operation:
    weight = node.constant(1)
    strides, dilations, starts, ends = _window(node, weight.shape[2:])
    group, channels = node.attributes.get("group", 1), node.example(0).shape[1]
    edges = [edge for pair in reversed(list(zip(starts, ends, strict=True))) for edge in pair]
    is_symmetric = starts == ends
    convolve: Callable[..., Tensor] = functional.conv1d if weight.dim() == 3 else functional.conv2d

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x if is_symmetric else functional.pad(x, edges)
        return convolve(x, weight, bias, strides, starts if is_symmetric else 0, dilations, group)

    rows = weight.flatten(1)
    if not node.has(2) and bool(((rows == 0) | (rows == 1)).all()) and bool((rows.sum(dim=1) == 1).all()):
        # One-hot filters gather patches, which has no rounding.
        index = torch.arange(1.0, 1 + node.example(0)[0].numel(), dtype=torch.float64).view(node.example(0).shape)
        layer = Rearrangement(apply(index, weight.double())[0].long() - 1)
        return node.operation(layer)
    if group < 1 or channels != weight.shape[1] * group:
        raise UnsupportedNode(f"{channels} channels for a weight of shape {tuple(weight.shape)}")
    return node.operation(apply, weight, *([node.constant(2)] if node.has(2) else []))


def _batch_normalization(node: Node) -> Operation:
    scale, offset, mean, variance = (node.constant(k).double() for k in range(1, 5))
    if node.attributes.get("training_mode", 0) or len([name for name in node.outputs if name]) > 1:
        raise UnsupportedNode("training_mode")
    factor = scale / (variance + node.attributes.get("epsilon", 1e-5)).sqrt()
    shape = (-1, *[1] * (node.example(0).dim() - 2))
    return node.operation(
        lambda x, a, b: x * a + b, factor.float().view(shape), (offset - mean * factor).float().view(shape)
    )


def _max_pool(node: Node) -> Operation:
    size = list(node.attributes["kernel_shape"])
    strides, dilations, starts, ends = _window(node, size)
    if len([name for name in node.outputs if name]) > 1 or node.attributes.get("storage_order", 0):
        raise UnsupportedNode("indices as output")
    ceil_mode = bool(node.attributes.get("ceil_mode", 0))
    # The last windows may reach over the end by the padding, as in torch's ceil mode.
    sizes = node.example(0).shape[2:]
    outputs = [
        (n + a + b - d * (k - 1) - 1) // step + 1
        for n, a, b, k, step, d in zip(sizes, starts, ends, size, strides, dilations, strict=True)
    ]
    for mode in (ceil_mode, True, False):
        kind = nn.MaxPool1d if len(size) == 1 else nn.MaxPool2d
        layer = kind(tuple(size), tuple(strides), tuple(starts), tuple(dilations), ceil_mode=mode)
        if (mode == ceil_mode and starts == ends) or list(layer(node.example(0)).shape[2:]) == outputs:
            return node.operation(layer)
    raise UnsupportedNode(f"pads={starts + ends}")


def _average_pool(node: Node) -> Operation:
    size = list(node.attributes["kernel_shape"])
    strides, dilations, starts, ends = _window(node, size)
    counts = bool(node.attributes.get("count_include_pad", 0))
    ceil_mode = bool(node.attributes.get("ceil_mode", 0))
    if set(dilations) != {1} or (ceil_mode and counts and any(starts)):
        raise UnsupportedNode("dilations, or ceil_mode with count_include_pad")
    outputs = [
        (n + a + b - k) // step + 1
        for n, a, b, k, step in zip(node.example(0).shape[2:], starts, ends, size, strides, strict=True)
    ]
    kind = nn.AvgPool1d if len(size) == 1 else nn.AvgPool2d
    for mode in (ceil_mode, True, False):
        layer = kind(tuple(size), tuple(strides), tuple(starts), mode, counts)
        is_same = list(layer(node.example(0)).shape[2:]) == outputs and not (counts and starts != ends)
        if (mode == ceil_mode and starts == ends) or is_same:
            return node.operation(layer)
    raise UnsupportedNode(f"pads={starts + ends}")


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


def _to_shape(node: Node, shape: Sequence[int]) -> Operation:
    """Return a reshape of each sample to the shape (1, ...) of one sample."""
    if not shape or shape[0] != 1:
        raise UnsupportedNode(f"a result of shape {list(shape)}, which moves the batch")
    sizes = tuple(shape[1:])
    return node.operation(lambda x: x.reshape(x.shape[0], *sizes))


def _reshape(node: Node) -> Operation:
    x, target = node.example(0), node.constant(1).tolist()
    if not node.attributes.get("allowzero", 0):
        target = [x.shape[k] if size == 0 else size for k, size in enumerate(target)]
    if target and target[0] == -1 and len(target) > 1:  # the batch, which is 1 here
        return _to_shape(node, list(x.reshape(target).shape))
    return _to_shape(node, list(x.reshape(target).shape))


def _flatten(node: Node) -> Operation:
    x, axis = node.example(0), node.attributes.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return _to_shape(node, [math.prod(x.shape[:axis]), math.prod(x.shape[axis:])])


def _squeeze(node: Node) -> Operation:
    x, axes = node.example(0), node.axes()
    axes = [k for k, size in enumerate(x.shape) if size == 1] if axes is None else axes
    if 0 in axes:
        raise UnsupportedNode("axes that include the batch")
    if any(x.shape[axis] != 1 for axis in axes):
        raise UnsupportedNode(f"axes={axes} of a value of shape {list(x.shape)}")
    return _to_shape(node, [size for k, size in enumerate(x.shape) if k not in axes])


def _unsqueeze(node: Node) -> Operation:
    x, count = node.example(0), node.option("axes", 1)
    axes = node.axes(rank=x.dim() + len([count] if isinstance(count, int) else count))
    assert axes is not None
    if 0 in axes:
        raise UnsupportedNode("axes that include the batch")
    sizes = iter(x.shape)
    return _to_shape(node, [1 if k in axes else next(sizes) for k in range(x.dim() + len(axes))])


def _transpose(node: Node) -> Operation:
    order = list(node.attributes.get("perm", range(node.example(0).dim())[::-1]))
    if order[:1] != [0]:
        raise UnsupportedNode(f"perm={order}, which moves the batch")
    return node.operation(lambda x: x.permute(order))


def _concat(node: Node) -> Operation:
    axis = node.attributes["axis"] % node.example(0).dim()
    if axis == 0:
        raise UnsupportedNode("axis=0, the batch")
    return node.operation(lambda *values: torch.cat(values, axis), inputs=range(len(node.inputs)))


def _pad(node: Node) -> Operation:
    pads, value = node.option("pads", 1), node.option("value", 2, 0.0)
    rank = node.example(0).dim()
    mode = node.attributes.get("mode", b"constant").decode()
    if mode != "constant" or value or node.has(3) or len(pads) != 2 * rank or pads[0] or pads[rank]:
        raise UnsupportedNode(f"mode={mode} and value={value}, or axes")
    edges = [edge for axis in range(rank - 1, 0, -1) for edge in (pads[axis], pads[rank + axis])]
    return node.operation(lambda x: functional.pad(x, edges))


def _gather(node: Node) -> Operation:
    axis, index = node.attributes.get("axis", 0) % node.example(0).dim(), node.constant(1)
    if axis == 0 or index.dim() > 1:
        raise UnsupportedNode("indices of the batch, or of several dimensions")
    size = node.example(0).shape[axis]
    positions = [int(one) + size if one < 0 else int(one) for one in index.flatten()]
    if not all(0 <= one < size for one in positions):
        raise UnsupportedNode("indices beyond the end")
    indices = torch.arange(node.example(0)[0].numel()).view(node.example(0).shape[1:])
    selected = indices.index_select(axis - 1, torch.tensor(positions, dtype=torch.long))
    return node.operation(Rearrangement(selected if index.dim() else selected.squeeze(axis - 1)))


def _slice(node: Node) -> Operation:
    rank = node.example(0).dim()
    starts, ends = node.option("starts", 1), node.option("ends", 2)
    axes = node.axes("axes", 3) or list(range(len(starts)))
    steps = node.option("steps", 4) or [1] * len(starts)
    if 0 in axes or min(steps) < 1 or len(axes) > rank:
        raise UnsupportedNode("a slice of the batch, or negative steps")
    parts = dict(zip(axes, zip(starts, ends, steps, strict=True), strict=True))
    slices = tuple(slice(*parts[axis]) if axis in parts else slice(None) for axis in range(rank))
    return node.operation(lambda x: x[slices])


def _top_k(node: Node) -> Operation:
    """Return the largest or smallest values along the last dimension, by sorting it."""
    x = node.example(0)
    (count,) = k if isinstance(k := node.option("k", 1), list) else (k,)
    axis = node.attributes.get("axis", -1) % x.dim()
    size = x.shape[-1]
    if axis != x.dim() - 1 or axis == 0 or not 1 <= count <= size or not node.attributes.get("sorted", 1):
        raise UnsupportedNode(f"axis={axis}, k={count}, or unsorted outputs")
    return node.operation(SortedValues(size, count, bool(node.attributes.get("largest", 1))))


class SortedValues(nn.Module):
    """The largest or smallest values along the last dimension, in order.

    Args:
        size: Size of the last dimension.
        count: Number of values.
        is_descending: True for the largest values, False for the smallest.
    """

    def __init__(self, size: int, count: int, is_descending: bool) -> None:
        super().__init__()
        self.sort, self.count, self.is_descending = GroupSort(size), count, is_descending

    def forward(self, x: Tensor) -> Tensor:
        """Return the values (B, ..., count) of x (B, ..., size)."""
        values = self.sort(x.flatten(1)).reshape(x.shape)
        return (values.flip(-1) if self.is_descending else values)[..., : self.count]


OPERATORS: dict[str, Converter] = {
    "Abs": _activation(torch.abs),
    "Add": _broadcast(torch.add, True),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _div,
    "Dropout": _dropout,
    "Elu": _activation(functional.elu, alpha=1.0),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool(maximum=False),
    "GlobalMaxPool": _global_pool(maximum=True),
    "Identity": _identity,
    "LeakyRelu": _activation(functional.leaky_relu, alpha=0.01),
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "Mul": _broadcast(torch.mul, False),
    "Neg": _activation(torch.neg),
    "Pad": _pad,
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "Relu": _activation(torch.relu),
    "Reshape": _reshape,
    "Sigmoid": _activation(torch.sigmoid),
    "Slice": _slice,
    "Softplus": _activation(functional.softplus),
    "Squeeze": _squeeze,
    "Sub": _broadcast(torch.sub, True),
    "Tanh": _activation(torch.tanh),
    "TopK": _top_k,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
