"""ONNX models as PyTorch networks that bounds can trace.

Operators without rules are rejected by name before anything runs. Files are untrusted: sizes are checked, and external
data and subgraphs are not read.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from linflab.platform.errors import InputError
from linflab.platform.exchange.onnx_nodes import (
    MAX_ELEMENTS,
    KnownValues,
    Node,
    Operation,
    UnsupportedNode,
    check_elements,
)
from linflab.platform.exchange.onnx_operators import FOLDED, OPERATORS
from linflab.platform.exchange.onnx_patterns import match_pattern
from linflab.platform.exchange.s_expressions import shorten_token
from linflab.platform.extras import naming_extras
from linflab.platform.files import read_bytes

if TYPE_CHECKING:
    import onnx

MAX_BYTES = 2**31 - 1  # limit of the file format
MAX_OPSET = 26


class OnnxNetwork(nn.Module):
    """Network of an ONNX model, in float32 and evaluation mode.

    Constants of the model are buffers. The first dimension of inputs and outputs is the batch, of any size.

    Args:
        operations: Operations in order of computation.
        constants: Constants by name in the model.
        input: Name of the input.
        output: Name of the output.
        input_shape: Shape of an input without the batch.
        output_shape: Shape of an output without the batch.
    """

    def __init__(
        self, operations: Sequence[Operation], constants: Mapping[str, Tensor], input: str, output: str,
        input_shape: tuple[int, ...], output_shape: tuple[int, ...],
    ) -> None:  # fmt: skip
        super().__init__()
        self.operations, self.input, self.output = list(operations), input, output
        self.input_shape, self.output_shape = input_shape, output_shape
        self.layers = nn.ModuleList([step.function for step in operations if isinstance(step.function, nn.Module)])
        self.buffer_names: dict[str, str] = {}
        for step in operations:
            for name in step.constants:
                if name not in self.buffer_names:
                    self.buffer_names[name] = f"constant_{len(self.buffer_names)}"
                    self.register_buffer(self.buffer_names[name], constants[name])
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs (B, *output_shape) of inputs (B, *input_shape)."""
        values = {self.input: images}
        for step in self.operations:
            constants = [getattr(self, self.buffer_names[name]) for name in step.constants]
            results = step.function(*(values[name] for name in step.inputs), *constants)
            values.update(zip(step.outputs, results if isinstance(results, tuple) else (results,), strict=False))
        return values[self.output]


def read_onnx(path: Path) -> OnnxNetwork:
    """Read an ONNX file.

    Raises:
        InputError: If the file cannot be read, is not an ONNX model, or has an operator that is not supported (the
            message names it).
        ModuleNotFoundError: If `onnx` is not installed; the message has the command that installs it.
    """
    try:
        content = read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); use an ONNX file") from None
    return import_onnx(content, str(path))


@naming_extras()
def import_onnx(content: bytes, name: str, with_patterns: bool = True) -> OnnxNetwork:
    """Return the network of a serialized ONNX model.

    Args:
        content: The model.
        name: Name of the file, for messages.
        with_patterns: If True, represent distance and SortNet layers that linflab wrote by their own layers, which
            need less memory and have bounds of their own. If False, the network has operations of PyTorch only.

    Raises:
        InputError: If it is not an ONNX model, or has an operator that is not supported (the message names it).
        ModuleNotFoundError: If `onnx` is not installed; the message has the command that installs it.
    """
    import onnx

    try:
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(model)
    except Exception as error:  # a damaged file can raise almost any exception
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{name}: must be an ONNX model ({reason}); use a file written by an ONNX exporter") from None
    opsets = [one.version for one in model.opset_import if one.domain in ("", "ai.onnx")]
    if not opsets or not 7 <= opsets[0] <= MAX_OPSET:
        raise InputError(f"{name}: opset={opsets or 'none'}: must be from 7 to {MAX_OPSET}; convert the model")
    return _Importer(model.graph, name, with_patterns).run()


class _Importer:
    """Conversion of one graph, node by node, with the values for one random input."""

    def __init__(self, graph: "onnx.GraphProto", name: str, with_patterns: bool) -> None:
        self.graph, self.name, self.with_patterns = graph, name, with_patterns
        self.known = KnownValues({}, {}, {})
        self.operations: list[Operation] = []

    def run(self) -> OnnxNetwork:
        """Return the network.

        Raises:
            InputError: If the graph is not supported.
        """
        for tensor in self.graph.initializer:
            self.known.constants[tensor.name] = self._read_constant(tensor)
        input, shape = self._input()
        example = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
        self.known.examples[input] = example
        with torch.no_grad():
            for number, proto in enumerate(self.graph.node):
                self._convert(proto, number)
        if len(self.graph.output) != 1 or self.graph.output[0].name not in self.known.examples:
            raise InputError(f"{self.name}: must have one output that depends on the input; use such a model")
        output = self.graph.output[0].name
        output_shape = tuple(self.known.examples[output].shape[1:])
        operations = _drop_unused(self.operations, output)
        return OnnxNetwork(operations, self.known.constants, input, output, shape, output_shape)

    def _read_constant(self, tensor: "onnx.TensorProto") -> Tensor:
        """Return an initializer."""
        from onnx import TensorProto, numpy_helper

        label = shorten_token(tensor.name)
        if tensor.data_location == TensorProto.EXTERNAL:
            raise InputError(f"{self.name}: external data of {label!r} is not supported; use one file")
        try:
            array = numpy_helper.to_array(tensor)
        except Exception as error:  # a damaged file can raise almost any exception
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{self.name}: constant {label!r} is not valid ({reason}); use a valid model") from None
        return _to_tensor(array, self.name, label)

    def _input(self) -> tuple[str, tuple[int, ...]]:
        """Return name and shape (without the batch) of the only input."""
        from onnx import TensorProto

        inputs = [one for one in self.graph.input if one.name not in self.known.constants]
        if len(inputs) != 1:
            raise InputError(f"{self.name}: has {len(inputs)} inputs; use a model with one")
        kind = inputs[0].type.tensor_type
        if kind.elem_type != TensorProto.FLOAT:
            raise InputError(f"{self.name}: the input must be in float32; convert the model")
        sizes = [one.dim_value if one.HasField("dim_value") else 0 for one in kind.shape.dim]
        if len(sizes) < 2 or sizes[0] not in (0, 1, -1) or min(sizes[1:]) < 1 or math.prod(sizes[1:]) > MAX_ELEMENTS:
            raise InputError(
                f"{self.name}: input of shape {sizes} is not supported; use a batch dimension of 1 or of variable size "
                "first, then fixed sizes"
            )
        return inputs[0].name, tuple(sizes[1:])

    def _convert(self, proto: "onnx.NodeProto", number: int) -> None:
        """Add the operation of a node, or its results if all inputs are constants."""
        label = f"{self.name}: {shorten_token(proto.op_type)} node {shorten_token(proto.name or f'number {number}')!r}"
        if proto.domain not in ("", "ai.onnx") or proto.op_type not in {*OPERATORS, *FOLDED}:
            raise InputError(f"{label} is not supported; use a network of {', '.join(sorted(OPERATORS))}")
        node = Node(proto, self.known.constants, self.known.examples)
        try:
            if node.is_constant:
                self._fold(proto, node)
                return
            if proto.op_type not in OPERATORS:
                raise UnsupportedNode("an input that is not constant")
            operation = match_pattern(node, self.known) if self.with_patterns else None
            operation = operation or OPERATORS[proto.op_type](node)
            inputs = [self.known.examples[name] for name in operation.inputs]
            constants = [self.known.constants[name] for name in operation.constants]
            results: Any = operation.function(*inputs, *constants)
            results = results if isinstance(results, tuple) else (results,)
            if any(one.shape[:1] != (1,) or not one.numel() for one in results):
                raise UnsupportedNode("an empty output, or one without the batch as first dimension")
        except UnsupportedNode as error:
            raise InputError(f"{label} with {error} is not supported; use a network without it") from None
        except InputError:
            raise
        except Exception as error:  # as above
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{label} is not valid ({reason}); use a valid model") from None
        self.operations.append(operation)
        for name, example in zip(operation.outputs, results, strict=False):
            self.known.examples[name] = example
            self.known.producers[name] = node

    def _fold(self, proto: "onnx.NodeProto", node: Node) -> None:
        """Compute the outputs of a node of constants."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        if proto.op_type not in FOLDED:
            raise UnsupportedNode("constant inputs only")
        if proto.op_type == "Shape" and proto.input[0] in self.known.examples:
            sizes = list(self.known.examples[proto.input[0]].shape)
            part = sizes[node.attributes.get("start", 0) : node.attributes.get("end")]
            self.known.constants[proto.output[0]] = torch.tensor(part)
            return
        check_elements(
            *(node.constant(0).tolist() if proto.op_type == "ConstantOfShape" else _largest_sizes(proto, self.known))
        )
        names = [name for name in proto.input if name]
        inputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in names]
        outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in proto.output]
        graph = onnx.helper.make_graph([proto], "constants", inputs, outputs)
        opsets = [onnx.helper.make_opsetid("", 17)]
        results = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets)).run(
            None, {name: self.known.constants[name].numpy() for name in names}
        )
        for name, value in zip(proto.output, results, strict=True):
            self.known.constants[name] = _to_tensor(np.asarray(value), self.name, name)


def _largest_sizes(proto: "onnx.NodeProto", known: KnownValues) -> list[int]:
    """Return sizes whose product is at least the number of results of an elementwise operation of constants."""
    shapes = [list(known.constants[name].shape) for name in proto.input if name]
    rank = max(map(len, shapes), default=0)
    return [max(sizes) for sizes in zip(*([1] * (rank - len(shape)) + shape for shape in shapes), strict=True)]


def _drop_unused(operations: Sequence[Operation], output: str) -> list[Operation]:
    """Return the operations on which an output depends."""
    needed, kept = {output}, []
    for step in reversed(operations):
        if needed.intersection(step.outputs):
            needed.update(step.inputs)
            kept.append(step)
    return kept[::-1]


def _to_tensor(array: np.ndarray, name: str, value: str) -> Tensor:
    """Return a constant as a tensor, in its own memory."""
    try:
        return torch.from_numpy(np.array(array))
    except TypeError:
        raise InputError(f"{name}: {value!r} of type {array.dtype} is not supported; use float32") from None
