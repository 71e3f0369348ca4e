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
        [helper.make_node(operator, inputs, outputs, **options) for operator, inputs, outputs, options in nodes],
        "test",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("other", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    output = onnx.shape_inference.infer_shapes(model).graph.output[0]
    if not output.type.tensor_type.HasField("shape"):  # the model is not valid, or its output has any shape
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", "K"])
    model.graph.output[0].CopyFrom(output)
    return model.SerializeToString()


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
