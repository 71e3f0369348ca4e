"""ONNX graphs under construction."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from linflab.platform.extras import naming_extras
from linflab.platform.source import linflab_version

if TYPE_CHECKING:
    import onnx

OPSET = 17  # operators that all tools of VNN-COMP read
IR_VERSION = 8  # of the same release of ONNX
INPUT, OUTPUT, BATCH = "images", "logits", "batch"


class GraphBuilder:
    """Nodes and constants of an ONNX graph, with unique names of values."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._names: dict[tuple[Any, ...], str] = {}  # of equal constants

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output, and return the name of the output.

        Args:
            operator: Operator of ONNX.
            inputs: Names of its inputs; empty for omitted ones.
            attributes: Attributes of the operator.
        """
        return self.add_outputs(operator, 1, *inputs, **attributes)[0]

    def add_outputs(self, operator: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node with `count` outputs, and return their names."""
        from onnx import helper

        outputs = [f"{operator.lower()}_{len(self.nodes)}{f'_{k}' if k else ''}" for k in range(count)]
        self.nodes.append(helper.make_node(operator, list(inputs), outputs, name=outputs[0], **attributes))
        return outputs

    def constant(self, values: Tensor | float) -> str:
        """Add a float32 constant, and return its name."""
        return self._add_constant(torch.as_tensor(values).detach().cpu().float().contiguous().numpy())

    def integers(self, values: Sequence[int]) -> str:
        """Add an int64 constant (N,), and return its name."""
        return self._add_constant(np.array(values, dtype=np.int64))

    def reshape(self, value: str, shape: Sequence[int]) -> str:
        """Add a node that reshapes each sample to a shape without the batch, and return its output."""
        return self.add("Reshape", value, self.integers([-1, *shape]))

    def build(self, output: str, input_shape: Sequence[int], output_shape: Sequence[int]) -> "onnx.ModelProto":
        """Return the model, whose batch size is dynamic.

        Args:
            output: Name of the output value.
            input_shape: Shape of an input without the batch.
            output_shape: Shape of an output without the batch.
        """
        from onnx import TensorProto, helper

        self.nodes.append(helper.make_node("Identity", [output], [OUTPUT], name=OUTPUT))
        inputs = [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [BATCH, *input_shape])]
        outputs = [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [BATCH, *output_shape])]
        graph = helper.make_graph(self.nodes, "linflab", inputs, outputs, self.constants)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
            producer_name="linflab", producer_version=linflab_version(),
        )  # fmt: skip

    @naming_extras()
    def _add_constant(self, array: np.ndarray) -> str:
        from onnx import numpy_helper

        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._names:
            self._names[key] = f"constant_{len(self.constants)}"
            self.constants.append(numpy_helper.from_array(array, self._names[key]))
        return self._names[key]
