"""CROWN: linear bounds, passed back through the network to its inputs.

A linear function of some layer's values is bounded from below by one of the values before it, layer after layer: affine
layers are passed exactly, a ReLU or tanh is replaced by lines that hold it over the range of its inputs. At the images,
and at the outputs of layers that have no such lines (distance layers, of hybrids), the box of values decides.

Which lines, is the `relaxation` (see `lines_of`). With adaptive ones the bounds are CROWN's (Zhang et al., "Efficient
Neural Network Robustness Certification with General Activation Functions", NeurIPS 2018); with parallel ones those of
the dual network of Wong and Kolter (ICML 2018), which Salman et al. (NeurIPS 2019) show to be the same computation;
with boxes those of hybrid zonotopes (Mirman et al., ICML 2018), which never are wider than intervals. The ranges of
activations come from the same bounds, or from intervals.

Sound bounds are computed in float64, in which weights and boxes of floats are exact. Rounding enters as follows. Each
value, as the network computes it in float32, is the exact result of its layer on computed inputs, plus an error that is
bounded over the box (`Affine.rounding`); so a linear function a of it loses at most |a| times that bound. What float64
loses in a is of the same kind, thousands of times smaller, and is covered by taking every bound twice. Lines need not
be those of exact arithmetic, only hold: their intercepts are the least for their slopes as computed, rounded up.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from linflab.models.robustness.bounds.affine import affine_of
from linflab.models.robustness.bounds.coefficients import Coefficients, Rows, Windows
from linflab.models.robustness.bounds.interval import Box, largest, propagate, step_bounds, trace_layers
from linflab.models.robustness.bounds.lines import REMAINDER, Lines, Relaxation, has_lines, lines_of
from linflab.models.robustness.bounds.rounding import TINY, gamma, unit_roundoff, upper_float
from linflab.models.robustness.bounds.tracing import VIEWS, Concatenation, Step, Sum, Trace

Intermediate = Literal["crown", "interval"]
LARGEST_ROWS = 2**24  # coefficients that are held together


def crown_bounds(
    network: nn.Module,
    box: Box,
    intermediate: Intermediate = "crown",
    sound: bool = False,
    relaxation: Relaxation = "adaptive",
) -> Box:
    """Bounds of a network's outputs (B, K) over a box of inputs, in evaluation mode at p = inf.

    Args:
        network: in evaluation mode.
        box: of inputs.
        intermediate: what bounds the inputs of activations.
        sound: bounds of the outputs as they are computed, with their roundings; in float64.
        relaxation: which lines hold activations.

    Raises:
        ValueError: the network is in training mode.
        TypeError: a layer or operation has no rule, or none has lines; names it.
    """
    crown = LinearBounds(trace_layers(network, box, sound), box, intermediate, relaxation, sound)
    return crown.bounds(crown.output)


def crown_margins(
    network: nn.Module,
    box: Box,
    labels: Tensor,
    intermediate: Intermediate = "crown",
    sound: bool = False,
    relaxation: Relaxation = "adaptive",
) -> Tensor:
    """Upper bounds M (B, K) of z_j - z_y over a box of images, -inf at the right class y itself.

    Where all M_j < 0, no image of the box is given another class. Args, raises: as `crown_bounds`; labels (B).
    """
    one = Box(box.lower[:1], box.upper[:1])
    traced = trace_layers(network, one, sound)
    sizes = [value.lower.numel() for value in propagate(traced, one).values()]
    samples = max(1, LARGEST_ROWS // (max(sizes) * sizes[-1]))  # as many as fit at once
    return torch.cat(
        [
            LinearBounds(traced, Box(lower, upper), intermediate, relaxation, sound).margins(y)
            for lower, upper, y in zip(*(x.split(samples) for x in (*box, labels)), strict=True)
        ]
    )


class LinearBounds:
    """The boxes of a network's values over a box of inputs, and bounds of linear functions of them.

    Args:
        traced: the network's steps.
        box: of inputs.
        intermediate: what bounds the inputs of activations.
        relaxation: which lines hold activations.
        sound: bounds of values as they are computed in float32.
        boxes: those of all values by intervals, where they are known.

    Raises:
        ValueError: sound bounds of what is not in float32.
        TypeError: no step is an activation with lines.
    """

    def __init__(
        self,
        traced: Trace,
        box: Box,
        intermediate: Intermediate,
        relaxation: Relaxation = "adaptive",
        sound: bool = False,
        boxes: dict[str, Box] | None = None,
    ) -> None:
        if sound and box.lower.dtype != torch.float32:
            raise ValueError(f"sound bounds by crown are for networks in float32, not {box.lower.dtype}")
        if not any(has_lines(step.layer) for step in traced.steps):
            raise TypeError("crown: the network has no ReLU or tanh to bound by lines; use interval")
        self.sound, self.output = sound, traced.output
        self.dtype = torch.float64 if sound else box.lower.dtype
        self.makers = {step.output: step for step in traced.steps}
        self.order = [traced.input, *self.makers]
        self.boxes = {traced.input: box} if boxes is None else boxes
        self.lines: dict[str, Lines] = {}
        self.errors: dict[str, Tensor] = {}
        self.parallel = True  # one pass finds both bounds
        refined: dict[str, Box] = {}
        for step in traced.steps:
            first = step.inputs[0]
            if has_lines(step.layer):
                if intermediate == "crown" and first not in refined:
                    refined[first] = self.bounds(first)
                    self.boxes[first] = _outwards(refined[first], box.lower.dtype)
                range_ = _in(self.dtype, refined.get(first, self.boxes[first]))
                lines = lines_of(step.layer, range_, relaxation, sound)
                assert lines is not None
                self.lines[step.output] = lines
                self.parallel = self.parallel and lines.parallel
            if boxes is None:
                self.boxes[step.output] = step_bounds(step, self.boxes, sound)

    def margins(self, labels: Tensor) -> Tensor:
        """Upper bounds M (B, K) of z_j - z_y of the network's outputs z, -inf at y itself."""
        classes = self.boxes[self.output].lower.shape[1]
        others = (labels[:, None] + torch.arange(1, classes, device=labels.device)) % classes
        identity = torch.eye(classes, dtype=self.dtype, device=labels.device)
        ahead = Rows(identity[labels][:, None] - identity[others])  # of row j: z_y - z_j
        found = torch.full((len(labels), classes), -math.inf, dtype=self.dtype, device=labels.device)
        return found.scatter(1, others, -self.lower(self.output, ahead))

    def bounds(self, name: str) -> Box:
        """The box of a value (B, *shape)."""
        like = self.boxes[name].lower.to(self.dtype)
        shape, parts = like.shape[1:], []
        window = self._largest_window(name)
        samples = len(like) if self.lines else 1  # up to the first lines they share coefficients
        if window is None:
            size = max(box.lower[0].numel() for box in self.boxes.values())
            for chosen in torch.arange(shape.numel()).split(max(1, LARGEST_ROWS // (size * samples))):
                parts.append(self._range(name, Rows.units(shape, chosen, like)))
            lower, upper = (torch.cat(bounds, dim=1).unflatten(1, shape) for bounds in zip(*parts, strict=True))
            return Box(lower, upper)
        positions, together = shape[1:].numel(), max(1, LARGEST_ROWS // (window * shape[0] * samples))
        for first in range(0, positions, together):
            chosen_here = slice(first, min(first + together, positions))
            parts.append(self._range(name, Windows.units(shape, chosen_here, like)))
        lower, upper = (  # (B, P * C) each
            torch.cat(bounds, dim=1).unflatten(1, (positions, shape[0])).transpose(1, 2).reshape(like.shape)
            for bounds in zip(*parts, strict=True)
        )
        return Box(lower, upper)

    def lower(self, name: str, functions: Coefficients) -> Tensor:
        """Lower bounds (B, R) of linear functions of a value."""
        middle, spread = self._passed_back(name, functions)
        return middle - spread

    def _range(self, name: str, functions: Coefficients) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds (B, R) of linear functions of a value."""
        middle, spread = self._passed_back(name, functions)
        if self.parallel:
            return middle - spread, middle + spread
        return middle - spread, -self.lower(name, functions.negated())

    def _passed_back(self, name: str, functions: Coefficients) -> tuple[Tensor, Tensor]:
        """m and s (B, R), such that functions of a value are at least m - s; and at most m + s, with parallel lines."""
        pending = {name: functions}
        middle = spread = functions.a.new_zeros(())

        def add(a: Coefficients, centre: Tensor, radius: Tensor | None = None) -> None:
            nonlocal middle, spread
            middle = middle + a.dot(centre)
            share = 0.0
            if self.sound:
                share = 2 * gamma(centre[0].numel() + 4 * len(self.order) + 8, self.dtype)
                spread = spread + share * a.abs().dot(centre.abs())
            if radius is not None:
                spread = spread + (1 + share) * a.abs().dot(radius)

        for value in reversed(self.order):
            if value not in pending:
                continue
            a, step = pending.pop(value), self.makers.get(value)
            before = None if step is None else self._before(step, a, add)
            if before is None:  # no lines lead on from here
                box = _in(self.dtype, self.boxes[value])
                add(a, (box.lower + box.upper) / 2, (box.upper - box.lower) / 2)
            else:
                assert step is not None
                for earlier, part in zip(step.inputs, before, strict=True):
                    pending[earlier] = pending[earlier].plus(part) if earlier in pending else part
            if self.sound:
                add(a, torch.zeros_like(self.boxes[value].lower[:1], dtype=self.dtype), self._error(value))
        return middle, spread

    def _before(self, step: Step, a: Coefficients, add: Callable[..., None]) -> Sequence[Coefficients] | None:
        """Coefficients of a step's inputs that bound its output's from below, but for what they `add`."""
        if step.output in self.lines:
            lines = self.lines[step.output]
            if lines.parallel:
                low, high = lines.lower_intercept, lines.upper_intercept
                add(a, (low + high) / 2, (high - low) / 2)
                return [a.times(lines.upper_slope)]
            negative = a.negative()
            add(negative, lines.upper_intercept - lines.lower_intercept)
            if isinstance(lines.lower_intercept, Tensor):
                add(a, lines.lower_intercept)
            return [a.times(lines.lower_slope).plus(negative.times(lines.upper_slope - lines.lower_slope))]
        if isinstance(step.layer, VIEWS):
            return [a if isinstance(a, Windows) else Rows(a.a.flatten(2).unflatten(2, self._shape(step.inputs[0])))]
        if isinstance(step.layer, Sum):
            return [a, a]
        if isinstance(step.layer, Concatenation):
            return a.split(step.layer.dim, [self._shape(name)[step.layer.dim - 1] for name in step.inputs])
        affine = affine_of(step.layer, self._shape(step.inputs[0]))
        if affine is None:
            return None
        add(a, affine.bias.to(a.a).expand(self._shape(step.output))[None])
        return [a.through(affine, self._shape(step.inputs[0]))]

    def _largest_window(self, name: str) -> int | None:
        """How many values the functions of a map's windows see at most; None where they are better held as rows."""
        kernels: dict[str, tuple[int, ...]] = {name: (1, 1)}
        largest = rows = 0
        for value in reversed(self.order):
            if value not in kernels:
                continue
            kernel, step, shape = kernels.pop(value), self.makers.get(value), self._shape(value)
            if len(shape) != 3:
                return None
            largest, rows = max(largest, shape[0] * math.prod(kernel)), max(rows, shape.numel())
            if step is None:
                continue
            if not (value in self.lines or isinstance(step.layer, (*VIEWS, Sum, Concatenation))):
                affine = affine_of(step.layer, self._shape(step.inputs[0]))
                if affine is None:
                    continue
                if not (affine.window or affine.elementwise):
                    return None
                if affine.window is not None:
                    kernel = affine.window.reach(kernel, affine.weight.shape[2:])
            elif isinstance(step.layer, Concatenation) and step.layer.dim != 1:
                return None
            for before in step.inputs:
                kernels[before] = tuple(map(max, kernel, kernels.get(before, kernel)))
        return largest if largest < rows else None

    def _shape(self, name: str) -> torch.Size:
        return self.boxes[name].lower.shape[1:]

    def _error(self, name: str) -> Tensor:
        """How far off a value (B, *shape) is from what its layer makes of computed inputs, and what float64 adds."""
        if name in self.errors:
            return self.errors[name]
        size, step, u = largest(_in(self.dtype, self.boxes[name])), self.makers.get(name), unit_roundoff(torch.float32)
        error = torch.zeros_like(size)
        if step is not None:
            before = [largest(_in(self.dtype, self.boxes[name])) for name in step.inputs]
            affine = affine_of(step.layer, before[0].shape[1:])
            if affine is not None:
                error = 2 * affine.rounding(before[0], torch.float32)
            elif isinstance(step.layer, Sum):
                error = 4 * u * (before[0] + before[1])
            elif isinstance(step.layer, nn.Tanh):  # its implementations are off by 4 u
                error = 10 * u * size
            if name in self.lines:
                size = torch.maximum(size, before[0])
        self.errors[name] = error + REMAINDER * size + TINY
        return self.errors[name]


def _in(dtype: torch.dtype, box: Box) -> Box:
    return Box(box.lower.to(dtype), box.upper.to(dtype))


def _outwards(box: Box, dtype: torch.dtype) -> Box:
    """A box of `dtype` that holds this one."""
    if box.lower.dtype == dtype:
        return box
    like = box.lower.to(dtype)
    return Box(-upper_float(-box.lower, like), upper_float(box.upper, like))
