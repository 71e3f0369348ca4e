"""Networks as ONNX models, written from the traced steps of a forward pass.

The trace is written with `onnx.helper` instead of by `torch.onnx`, which cannot export distance layers, since they are
operators of linflab. The trace has these layers at p = inf, and no operations without effect on the logits.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from linflab.models.robustness.bounds.affine import affine_map
from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.ibp import trace_and_check
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.bounds.steps import Trace, TraceStep, run_steps
from linflab.platform.errors import InputError
from linflab.platform.exchange.onnx_graph import INPUT, GraphBuilder
from linflab.platform.exchange.onnx_layers import write_layer, write_weights
from linflab.platform.extras import naming_extras

if TYPE_CHECKING:
    import onnx


@naming_extras()
@strict_float32()
def build_onnx(network: nn.Module, input_shape: tuple[int, ...]) -> "onnx.ModelProto":
    """Return a network as an ONNX model in float32, with a dynamic batch size.

    Normalization is part of the model. Batch normalization is folded into the linear layer or convolution before it.
    Distance layers are written at p = inf with standard operators.

    Args:
        network: Network in evaluation mode, in float32.
        input_shape: Shape of an image without the batch, (C, H, W) or (D,).

    Raises:
        InputError: If a layer has no ONNX form, or an operation has no rule (the message names it).
        ModuleNotFoundError: If `onnx` is not installed; the message has the command that installs it.
    """
    import onnx

    traced, shapes = _trace(network, input_shape)
    foldable = _find_foldable(traced, shapes)
    graph, names = GraphBuilder(), {traced.input: INPUT}
    for step in traced.steps:
        inputs = [names[name] for name in step.inputs]
        shape, outputs = shapes[step.inputs[0]], shapes[step.output]
        with torch.no_grad():
            if step.output in foldable:
                weight, bias = _fold(step, foldable[step.output], shape, outputs)
                names[step.output] = write_weights(step.layer, weight, bias, graph, inputs[0], shape)
            elif isinstance(step.layer, _BatchNorm) and step.inputs[0] in foldable:
                names[step.output] = inputs[0]
            else:
                names[step.output] = write_layer(step.layer, graph, inputs, shape, outputs)
    model = graph.build(names[traced.output], input_shape, shapes[traced.output])
    onnx.checker.check_model(model, full_check=True)
    return model


def _trace(network: nn.Module, input_shape: tuple[int, ...]) -> tuple[Trace, dict[str, torch.Size]]:
    """Return the trace of a network, and the shapes of its values without the batch."""
    example = torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0))
    try:
        traced = trace_and_check(network, Box(example, example))
    except (TypeError, ValueError) as error:
        raise InputError(f"export: {error}") from None
    with torch.no_grad():
        values = run_steps(traced.steps, {traced.input: example})
    return traced, {name: value.shape[1:] for name, value in values.items()}


def _find_foldable(traced: Trace, shapes: dict[str, torch.Size]) -> dict[str, TraceStep]:
    """Return the steps of batch normalization that follow a linear layer or convolution, by its output.

    No other step may use this output, and both layers must have the same features or channels.
    """
    uses: dict[str, list[TraceStep]] = {}
    for step in traced.steps:
        for name in step.inputs:
            uses.setdefault(name, []).append(step)
    foldable = {}
    for step in traced.steps:
        users = uses.get(step.output, [])
        is_linear = isinstance(step.layer, nn.Linear) and len(shapes[step.output]) == 1
        is_last = step.output == traced.output
        has_channels = is_linear or isinstance(step.layer, nn.Conv1d | nn.Conv2d)
        if has_channels and not is_last and len(users) == 1 and isinstance(users[0].layer, _BatchNorm):
            foldable[step.output] = users[0]
    return foldable


def _fold(step: TraceStep, normalization: TraceStep, shape: torch.Size, outputs: torch.Size) -> tuple[Tensor, Tensor]:
    """Return weight and bias (O) of a linear layer followed by batch normalization, in float64."""
    affine, scaling = affine_map(step.layer, shape), affine_map(normalization.layer, outputs)
    assert affine is not None and scaling is not None
    scale, offset = scaling.weight.double().flatten(), scaling.bias.double().flatten()
    weight = affine.weight.double()
    bias = affine.bias.double().flatten().expand(len(weight))
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), bias * scale + offset
