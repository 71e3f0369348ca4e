"""Nodes of ONNX graphs during import, and the operations that they become."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import onnx


MAX_ELEMENTS = 2**28  # per value, for one input


class UnsupportedNode(ValueError):
    """A node that has no traceable form; the message continues "with"."""


def check_elements(*sizes: int) -> None:
    """Check the size of a value, for one input, before it is computed.

    Raises:
        UnsupportedNode: If the product of the sizes is negative or too large.
    """
    if not 0 <= math.prod(sizes) <= MAX_ELEMENTS:
        raise UnsupportedNode(f"a result of more than {MAX_ELEMENTS:,} numbers")


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
        names: list[str] = []
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


class KnownValues(NamedTuple):
    """Known values of a graph.

    Attributes:
        constants: Constants by name.
        examples: Values for one input by name, (1, ...).
        producers: Nodes by the names of their outputs.
    """

    constants: dict[str, Tensor]
    examples: dict[str, Tensor]
    producers: dict[str, Node]
