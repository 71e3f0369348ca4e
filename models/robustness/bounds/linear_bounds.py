"""Linear bounds by backward propagation from outputs to inputs, the engine of CROWN.

A linear function of a layer's values is bounded from below by a linear function of the values before it, layer after
layer. Affine layers are exact. An activation is replaced by its linear relaxation over its pre-activation bounds.
Propagation ends at the images, and at the outputs of layers without a relaxation (distance layers of hybrids). There,
the box of values gives the bound.

`relaxation` selects the linear relaxation (see `relax`):

- adaptive: the bounds of CROWN (Zhang et al., "Efficient Neural Network Robustness Certification with General
  Activation Functions", NeurIPS 2018);
- parallel: the bounds of the dual network of Wong and Kolter (ICML 2018), which Salman et al. (NeurIPS 2019) show to be
  the same computation;
- box: the bounds of hybrid zonotopes (Mirman et al., ICML 2018), which are never wider than IBP.

The box relaxation is tighter than DiffAI. In DiffAI, the box of a hybrid zonotope loses its correlation at each linear
layer, where absolute weights multiply it. Here, each box keeps its own coefficients up to the outputs, like the error
terms of a zonotope. Intermediate bounds come from the same method or from IBP. Max pooling is relaxed like an
activation, by linear functions of one value per window (see `maximum_lines`).

Sound bounds are computed in float64, in which float32 weights and boxes are exact. Rounding enters as follows:

- Each value that the network computes in float32 is the exact result of its layer on computed inputs, plus an error.
  `Affine.rounding_error` bounds this error over the box. The bound of a linear function with coefficients a therefore
  decreases by at most |a| times this error bound.
- The float64 errors in a are of the same kind, thousands of times smaller. Doubling every error bound covers them.
- Relaxations must be valid, but need not equal those of real arithmetic. For the slopes as computed, intercepts are the
  tightest valid ones, rounded outward.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from linflab.models.robustness.bounds.affine import affine_map
from linflab.models.robustness.bounds.backward_steps import (
    BackwardPropagation,
    cast_box,
    check_sound_dtype,
    round_outward,
)
from linflab.models.robustness.bounds.boxes import Box, all_finite
from linflab.models.robustness.bounds.coefficients import Coefficients, DenseCoefficients, PatchCoefficients
from linflab.models.robustness.bounds.ibp import propagate_step
from linflab.models.robustness.bounds.pooling import MaximumLines, get_pooling, is_max_pooling, maximum_lines
from linflab.models.robustness.bounds.relaxations import (
    LinearRelaxation,
    RelaxationKind,
    has_relaxation,
    relax,
)
from linflab.models.robustness.bounds.rounding import gamma
from linflab.models.robustness.bounds.steps import VIEW_LAYERS, Add, Concat, Masking, Trace, TraceStep

IntermediateMethod = Literal["crown", "ibp"]
MAX_COEFFICIENTS = 2**24  # memory limit, number of coefficients


class LinearBounds(BackwardPropagation):
    """Boxes of a network's values over a box of inputs, and bounds of linear functions of these values.

    Args:
        traced: Steps of the network.
        box: Lower and upper bounds of inputs.
        intermediate: Method of the pre-activation bounds, `crown` or `ibp`.
        relaxation: Linear relaxation of activations (see `relax`).
        sound: If True, bound values as computed in float32, rounding included.
        boxes: IBP boxes of all values, if they are available.

    Raises:
        TypeError: If `sound` and the network is not in float32, or if no layer has a linear relaxation.
    """

    def __init__(
        self,
        traced: Trace,
        box: Box,
        intermediate: IntermediateMethod,
        relaxation: RelaxationKind = "adaptive",
        sound: bool = False,
        boxes: dict[str, Box] | None = None,
    ) -> None:
        check_sound_dtype("crown", sound, box)
        if not any(has_relaxation(step.layer) or is_max_pooling(step.layer) for step in traced.steps):
            raise TypeError("crown: requires an activation or max pooling with a linear relaxation; use ibp")
        start = {traced.input: box} if boxes is None else boxes
        super().__init__(traced, start, sound, torch.float64 if sound else box.lower.dtype)
        self.lines: dict[str, LinearRelaxation] = {}
        self.maxima: dict[str, MaximumLines] = {}
        self.same_slope = True  # if True, one pass gives both bounds
        refined_boxes: dict[str, Box] = {}
        for step in traced.steps:
            first = step.inputs[0]
            pooling = get_pooling(step.layer, self._shape(first))
            if has_relaxation(step.layer, sound) or pooling is not None:
                # The box of an activation's output cannot be improved, so only other boxes are refined.
                is_refined = first in refined_boxes or first in self.lines or first in self.maxima
                if intermediate == "crown" and not is_refined:
                    refined_boxes[first] = self.bounds(first)
                    self.boxes[first] = round_outward(refined_boxes[first], box.lower.dtype)
                self.relaxed.add(step.output)
                range_ = cast_box(self.dtype, refined_boxes.get(first, self.boxes[first]))
                if pooling is None:
                    lines = relax(step.layer, range_, relaxation, sound)
                    assert lines is not None
                    self.lines[step.output] = lines
                    self.same_slope = self.same_slope and lines.same_slope
                else:
                    maxima = maximum_lines(pooling, range_, relaxation, sound)
                    self.maxima[step.output] = maxima
                    self.same_slope = self.same_slope and maxima.same_slope
            if boxes is None:
                self.boxes[step.output] = propagate_step(step, self.boxes, sound)

    def logit_differences(self, labels: Tensor) -> Tensor:
        """Return upper bounds M (B, K) of z_j - z_y of the network's outputs z, -inf at y."""
        classes = self.boxes[self.output].lower.shape[1]
        other_classes = (labels[:, None] + torch.arange(1, classes, device=labels.device)) % classes
        identity = torch.eye(classes, dtype=self.dtype, device=labels.device)
        functions = DenseCoefficients(identity[labels][:, None] - identity[other_classes])  # row j: z_y - z_j
        result = torch.full((len(labels), classes), -math.inf, dtype=self.dtype, device=labels.device)
        differences = -self.lower(self.output, functions)
        if self.sound:
            differences = differences.masked_fill(~all_finite(self.boxes)[:, None], math.inf)
        return result.scatter(1, other_classes, differences)

    def bounds(self, name: str) -> Box:
        """Return the box of a value (B, *shape), by its name in the trace."""
        like = self.boxes[name].lower.to(self.dtype)
        shape, parts = like.shape[1:], []
        window = self._max_patch_elements(name)
        samples = len(like) if self.lines else 1  # samples share coefficients up to the first relaxation
        if window is None:
            size = max(box.lower[0].numel() for box in self.boxes.values())
            for indices in torch.arange(shape.numel(), device=like.device).split(
                max(1, MAX_COEFFICIENTS // (size * samples))
            ):
                parts.append(self._range(name, DenseCoefficients.identity(shape, indices, like)))
            lower, upper = (torch.cat(bounds, dim=1).unflatten(1, shape) for bounds in zip(*parts, strict=True))
            return Box(lower, upper)
        positions, chunk_size = shape[1:].numel(), max(1, MAX_COEFFICIENTS // (window * shape[0] * samples))
        for first in range(0, positions, chunk_size):
            chunk = slice(first, min(first + chunk_size, positions))
            parts.append(self._range(name, PatchCoefficients.identity(shape, chunk, like)))
        lower, upper = (  # reshaped from (B, P * C)
            torch.cat(bounds, dim=1).unflatten(1, (positions, shape[0])).transpose(1, 2).reshape(like.shape)
            for bounds in zip(*parts, strict=True)
        )
        return Box(lower, upper)

    def lower(self, name: str, functions: Coefficients) -> Tensor:
        """Return lower bounds (B, R) of linear functions of a value."""
        middle, spread = self._backward_pass(name, functions)
        return middle - spread

    def _range(self, name: str, functions: Coefficients) -> tuple[Tensor, Tensor]:
        """Return lower and upper bounds (B, R) of linear functions of a value."""
        middle, spread = self._backward_pass(name, functions)
        if self.same_slope:
            return middle - spread, middle + spread
        return middle - spread, -self.lower(name, functions.neg())

    def _backward_pass(self, name: str, functions: Coefficients) -> tuple[Tensor, Tensor]:
        """Return m and s (B, R) such that linear functions of a value are at least m - s.

        They are also at most m + s if all relaxations have equal lower and upper slopes.
        """
        pending = {name: functions}
        middle = spread = functions.a.new_zeros(())

        def add(a: Coefficients, center: Tensor, radius: Tensor | None = None) -> None:
            nonlocal middle, spread
            middle = middle + a.dot(center)
            share = 0.0
            if self.sound:
                share = 2 * gamma(center[0].numel() + 4 * len(self.order) + 8, self.dtype)
                spread = spread + share * a.abs().dot(center.abs())
            if radius is not None:
                spread = spread + (1 + share) * a.abs().dot(radius)

        for value in reversed(self.order):
            if value not in pending:
                continue
            a, step = pending.pop(value), self.producers.get(value)
            input_coefficients = None if step is None else self._backward_step(step, a, add)
            if input_coefficients is None:  # no linear relaxation: the box gives the bound
                box = cast_box(self.dtype, self.boxes[value])
                add(a, (box.lower + box.upper) / 2, (box.upper - box.lower) / 2)
            else:
                assert step is not None
                for input_name, part in zip(step.inputs, input_coefficients, strict=True):
                    pending[input_name] = pending[input_name].add(part) if input_name in pending else part
            if self.sound:
                add(a, torch.zeros_like(self.boxes[value].lower[:1], dtype=self.dtype), self._error(value))
        return middle, spread

    def _backward_step(
        self, step: TraceStep, a: Coefficients, add: Callable[..., None]
    ) -> Sequence[Coefficients] | None:
        """Return coefficients of a step's inputs that bound functions of its output from below.

        `add` receives the constant parts of the bounds. The result is None if the layer has no linear relaxation.
        """
        if step.output in self.lines:
            lines = self.lines[step.output]
            if lines.same_slope:
                low, high = lines.lower_intercept, lines.upper_intercept
                add(a, (low + high) / 2, (high - low) / 2)
                return [a.scale(lines.upper_slope)]
            negative = a.clamp_negative()
            add(negative, lines.upper_intercept - lines.lower_intercept)
            if isinstance(lines.lower_intercept, Tensor):
                add(a, lines.lower_intercept)
            return [a.scale(lines.lower_slope).add(negative.scale(lines.upper_slope - lines.lower_slope))]
        if step.output in self.maxima:
            maxima, inputs = self.maxima[step.output], self._shape(step.inputs[0])
            low, high = maxima.lower_intercept, maxima.upper_intercept
            if maxima.same_slope:
                add(a, (low + high) / 2, (high - low) / 2)
                return [a.backward_through_pooling(maxima.upper, maxima.pooling, inputs)]
            positive, negative = a.positive(), a.clamp_negative()
            add(positive, low)
            add(negative, high)
            lower_part = positive.backward_through_pooling(maxima.lower, maxima.pooling, inputs)
            return [lower_part.add(negative.backward_through_pooling(maxima.upper, maxima.pooling, inputs))]
        return self._linear_step(step, a, add)

    def _max_patch_elements(self, name: str) -> int | None:
        """Return the largest patch size of a map's functions; None if dense coefficients are better or necessary.

        They are necessary if two branches from a value have different strides, such as a convolution with stride 2
        and one with a kernel of twice the size: their windows lie at different places.
        """
        kernels: dict[str, tuple[int, ...]] = {name: (1, 1)}
        strides: dict[str, tuple[int, ...]] = {name: (1, 1)}
        largest = rows = 0
        for value in reversed(self.order):
            if value not in kernels:
                continue
            kernel, step, shape = kernels.pop(value), self.producers.get(value), self._shape(value)
            stride, window = strides[value], None
            if len(shape) != 3:
                return None
            largest, rows = max(largest, shape[0] * math.prod(kernel)), max(rows, shape.numel())
            if step is None:
                continue
            if value in self.maxima:
                window = self.maxima[value].pooling.window
                kernel = window.receptive_field(kernel, self.maxima[value].pooling.size)
            elif isinstance(step.layer, VIEW_LAYERS):
                if self._shape(step.inputs[0]) != shape:
                    return None
            elif not (value in self.lines or isinstance(step.layer, Masking | Add | Concat)):
                affine = affine_map(step.layer, self._shape(step.inputs[0]))
                if affine is None:
                    continue
                if not (affine.window or affine.elementwise):
                    return None
                window = affine.window
                if window is not None:
                    kernel = window.receptive_field(kernel, affine.weight.shape[2:])
            elif isinstance(step.layer, Concat) and step.layer.dim != 1:
                return None
            if window is not None:
                stride = tuple(own * factor for own, factor in zip(stride, window.stride, strict=True))
            for input_name in step.inputs:
                if strides.setdefault(input_name, stride) != stride:
                    return None
                kernels[input_name] = tuple(map(max, kernel, kernels.get(input_name, kernel)))
        return largest if largest < rows else None
