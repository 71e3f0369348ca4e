"""Steps of backward bound propagation that need no relaxation, and the rounding errors of a network's values."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from linflab.models.robustness.bounds.activations import activation_error
from linflab.models.robustness.bounds.affine import affine_map
from linflab.models.robustness.bounds.boxes import Box, max_magnitude
from linflab.models.robustness.bounds.coefficients import Coefficients, DenseCoefficients, PatchCoefficients
from linflab.models.robustness.bounds.pooling import is_max_pooling
from linflab.models.robustness.bounds.relaxations import FLOAT64_SLACK
from linflab.models.robustness.bounds.rounding import UNDERFLOW_SLACK, round_up, unit_roundoff
from linflab.models.robustness.bounds.steps import VIEW_LAYERS, Add, Concat, Masking, Trace, TraceStep


class BackwardPropagation:
    """Base of computations that propagate linear functions of a network's values backward through its layers.

    Args:
        traced: Steps of the network.
        boxes: Boxes of its values, by name; a subclass may add and refine them.
        sound: If True, include the rounding of values as computed in float32.
        dtype: Dtype of coefficients.

    Attributes:
        relaxed: Names of outputs of layers with a relaxation.
    """

    def __init__(self, traced: Trace, boxes: dict[str, Box], sound: bool, dtype: torch.dtype) -> None:
        self.sound, self.dtype, self.boxes, self.output = sound, dtype, boxes, traced.output
        self.producers = {step.output: step for step in traced.steps}
        self.order = [traced.input, *self.producers]
        self.errors: dict[str, Tensor] = {}
        self.relaxed: set[str] = set()

    def _linear_step(self, step: TraceStep, a: Coefficients, add: Callable[..., None]) -> Sequence[Coefficients] | None:
        """Return the coefficients of a step's inputs from those of its output; None if its layer is not affine.

        `add` receives the constant parts.
        """
        if isinstance(step.layer, Masking):
            return [a.scale(step.layer.constant.to(a.a))]
        if isinstance(step.layer, VIEW_LAYERS):
            return [
                a
                if isinstance(a, PatchCoefficients)
                else DenseCoefficients(a.a.flatten(2).unflatten(2, self._shape(step.inputs[0])))
            ]
        if isinstance(step.layer, Add):
            return [a, a]
        if isinstance(step.layer, Concat):
            return a.split(step.layer.dim, [self._shape(name)[step.layer.dim - 1] for name in step.inputs])
        affine = affine_map(step.layer, self._shape(step.inputs[0]))
        if affine is None:
            return None
        add(a, affine.bias.to(a.a).expand(self._shape(step.output))[None])
        return [a.backward_through(affine, self._shape(step.inputs[0]))]

    def _shape(self, name: str) -> torch.Size:
        return self.boxes[name].lower.shape[1:]

    def _error(self, name: str) -> Tensor:
        """Return the error bound (B, *shape) of a value for computed inputs, including float64 errors."""
        if name in self.errors:
            return self.errors[name]
        size, step, u = (
            max_magnitude(cast_box(self.dtype, self.boxes[name])),
            self.producers.get(name),
            unit_roundoff(torch.float32),
        )
        error = torch.zeros_like(size)
        if step is not None:
            input_sizes = [max_magnitude(cast_box(self.dtype, self.boxes[name])) for name in step.inputs]
            affine = affine_map(step.layer, input_sizes[0].shape[1:])
            if affine is not None:
                error = 2 * affine.rounding_error(input_sizes[0], torch.float32)
            elif isinstance(step.layer, Add):
                error = 4 * u * (input_sizes[0] + input_sizes[1])
            elif isinstance(step.layer, Masking):
                error = 4 * u * size
            else:
                layer_error = activation_error(step.layer, input_sizes[0], size, torch.float32)
                error = error if layer_error is None else layer_error
            if name in self.relaxed:  # the relaxation multiplies inputs, which may exceed the outputs
                largest = step.layer(input_sizes[0]) if is_max_pooling(step.layer) else input_sizes[0]
                size = torch.maximum(size, largest)
        self.errors[name] = error + FLOAT64_SLACK * size + UNDERFLOW_SLACK
        return self.errors[name]


def cast_box(dtype: torch.dtype, box: Box) -> Box:
    """Return a box in another dtype."""
    return Box(box.lower.to(dtype), box.upper.to(dtype))


def round_outward(box: Box, dtype: torch.dtype) -> Box:
    """Return a box in `dtype` that contains this box."""
    if box.lower.dtype == dtype:
        return box
    like = box.lower.to(dtype)
    return Box(-round_up(-box.lower, like), round_up(box.upper, like))


def check_sound_dtype(certifier: str, sound: bool, box: Box) -> None:
    """Check that sound linear bounds are for a network in float32, whose numbers are exact in float64.

    Raises:
        TypeError: If `sound` and the network has another dtype.
    """
    if sound and box.lower.dtype != torch.float32:
        raise TypeError(
            f"sound=True: {certifier} requires a network in torch.float32, not {box.lower.dtype}; use network.float(), "
            "certifier=ibp, or sound=False"
        )
