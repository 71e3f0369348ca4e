"""Lower bounds of linear functions of a network's outputs, selected by the name of a certifier."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from linflab.models.registry import Kind
from linflab.models.robustness.bounds.affine import affine_map
from linflab.models.robustness.bounds.boxes import Box, all_finite, max_magnitude
from linflab.models.robustness.bounds.coefficients import DenseCoefficients
from linflab.models.robustness.bounds.ibp import linear_step, propagate_bounds
from linflab.models.robustness.bounds.linear_bounds import MAX_COEFFICIENTS, LinearBounds
from linflab.models.robustness.bounds.pooling import is_max_pooling
from linflab.models.robustness.bounds.relaxations import FLOAT64_SLACK, has_relaxation
from linflab.models.robustness.bounds.steps import Trace


class OutputBound(Kind, ABC):
    """Base class of bounds of linear functions of outputs; a subclass is accepted wherever its `kind` is selected.

    The methods run without gradients, inside `strict_float32`, on checked boxes.

    Args:
        sound: If True, bound outputs as computed in float32, rounding included; if False, in real arithmetic.

    Attributes:
        splits_neurons: True if regions that these bounds do not decide are searched by branch and bound on neurons.
    """

    splits_neurons: ClassVar[bool] = False

    def __init__(self, sound: bool = True) -> None:
        self.sound = sound

    @abstractmethod
    def lower(self, traced: Trace, box: Box, functions: Tensor) -> Tensor:
        """Return lower bounds (B, R) of functions @ y in float64, for the outputs y over a box of inputs.

        Args:
            traced: Steps of a network with outputs (B, K), in float32.
            box: Lower and upper bounds of inputs, (B, ...).
            functions: (R, K) coefficients in float64.
        """


class IBPOutputBound(OutputBound):
    """Bounds by IBP; a final linear layer is merged with the functions."""

    kind: ClassVar[str] = "ibp"

    def lower(self, traced: Trace, box: Box, functions: Tensor) -> Tensor:
        """Return lower bounds (B, R) of functions of the outputs.

        Sound bounds are lowered by the magnitudes of the functions times the doubled error bounds of the outputs. The
        other half covers the float64 errors of this method, as in `linear_bounds`.
        """
        boxes = propagate_bounds(traced, box, self.sound)
        last = linear_step(traced, traced.output)
        if last is None:
            values = Box(*(bound.double() for bound in boxes[traced.output]))
            weight, offset = functions, functions.new_zeros(len(functions))
            error = FLOAT64_SLACK * functions.shape[1] * max_magnitude(values)
        else:
            values = Box(*(bound.double() for bound in boxes[last.inputs[0]]))
            affine = affine_map(last.layer, values.lower.shape[1:])
            assert affine is not None
            weight = functions @ affine.weight.double()
            bias = affine.bias.double().expand(functions.shape[1])
            offset = functions @ bias
            error = 2 * affine.rounding_error(max_magnitude(values), torch.float32)
        center, radius = (values.lower + values.upper) / 2, (values.upper - values.lower) / 2
        lower = center @ weight.mT + offset - radius @ weight.abs().mT
        if self.sound:
            lower = lower - error @ functions.abs().mT
        return lower.masked_fill(~all_finite(boxes)[:, None] | lower.isnan(), -math.inf)


class CROWNOutputBound(OutputBound):
    """Bounds by CROWN."""

    kind: ClassVar[str] = "crown"

    def lower(self, traced: Trace, box: Box, functions: Tensor) -> Tensor:
        """Return lower bounds (B, R) of functions of the outputs.

        Raises:
            TypeError: If no layer has a linear relaxation.
        """
        sizes = [value.lower.numel() for value in propagate_bounds(traced, Box(*(x[:1] for x in box))).values()]
        samples = max(1, MAX_COEFFICIENTS // (max(sizes) * max(sizes[-1], len(functions))))
        parts = []
        for lower, upper in zip(*(x.split(samples) for x in box), strict=True):
            bounds = LinearBounds(traced, Box(lower, upper), "crown", "adaptive", self.sound)
            coefficients = DenseCoefficients(functions[None].to(bounds.dtype))
            part = bounds.lower(traced.output, coefficients).double()
            parts.append(part.masked_fill(~all_finite(bounds.boxes)[:, None] | part.isnan(), -math.inf))
        return torch.cat(parts)


class TightestOutputBound(OutputBound):
    """The larger of the bounds by IBP and CROWN, neither of which is always the tighter, then splits of neurons."""

    kind: ClassVar[str] = "auto"
    splits_neurons: ClassVar[bool] = True

    def lower(self, traced: Trace, box: Box, functions: Tensor) -> Tensor:
        """Return lower bounds (B, R) of functions of the outputs; by IBP only if no layer has a linear relaxation."""
        lower = IBPOutputBound(self.sound).lower(traced, box, functions)
        if not any(has_relaxation(step.layer) or is_max_pooling(step.layer) for step in traced.steps):
            return lower
        return torch.maximum(lower, CROWNOutputBound(self.sound).lower(traced, box, functions))
