"""ONNX models and VNN-LIB texts for tests."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def make_model(
    nodes: Sequence[tuple[Any, ...]], shape: Sequence[int | str], constants: dict[str, np.ndarray] | None = None,
    opset: int = 17, kind: int = TensorProto.FLOAT,
) -> bytes:  # fmt: skip
    """Return a serialized model with the input `x` and the output `y`.

    Args:
        nodes: Operator, names of inputs, names of outputs and attributes of each node.
        shape: Shape of the input, with the batch.
        constants: Initializers.
        opset: Version of the operators.
        kind: Type of the input.
    """
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, outputs, **options) for kind, inputs, outputs, options in nodes],
        "test",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8).SerializeToString()


def format_property(inputs: int, outputs: int, *assertions: str) -> str:
    """Return a VNN-LIB text with these assertions."""
    lines = [f"(declare-const {letter}_{index} Real)" for letter, count in (("X", inputs), ("Y", outputs))
             for index in range(count)]  # fmt: skip
    return "\n".join([*lines, *(f"(assert {one})" for one in assertions)])


def box_assertions(lower: Sequence[float], upper: Sequence[float]) -> list[str]:
    """Return the bounds of all inputs as formulas."""
    return [
        formula
        for index, (low, high) in enumerate(zip(lower, upper, strict=True))
        for formula in (f"(>= X_{index} {low!r})", f"(<= X_{index} {high!r})")
    ]


def load(content: bytes) -> onnx.ModelProto:
    """Return a parsed model."""
    return onnx.load_model_from_string(content)
