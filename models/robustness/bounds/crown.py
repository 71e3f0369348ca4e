"""CROWN: linear bounds, passed back through the network to its inputs.

A linear function of some layer's values is bounded from below by one of the values before it, layer after layer: affine
layers are passed exactly, a ReLU or tanh is replaced by lines that hold it over the range of its inputs. At the images,
and at the outputs of layers that have no such lines (distance layers, of hybrids), the box of values decides.

Source: Zhang et al., "Efficient Neural Network Robustness Certification with General Activation Functions", NeurIPS
2018. An unstable ReLU has the lower line x if u > -l, else 0; the ranges come from CROWN itself or from intervals.

Sound bounds are computed in float64, in which weights and boxes of floats are exact. Rounding enters as follows. Each
value, as the network computes it in float32, is the exact result of its layer on computed inputs, plus an error that is
bounded over the box (`Affine.rounding`); so a linear function a of it loses at most |a| times that bound. What float64
loses in a is of the same kind, thousands of times smaller, and is covered by taking every bound twice. Lines need not
be those of exact arithmetic, only hold: their intercepts are the least for their slopes as computed, rounded up.
"""

import math
from collections.abc import Sequence
from functools import singledispatch
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.robustness.bounds.affine import affine_of
from linflab.models.robustness.bounds.interval import Box, largest, propagate, step_bounds, trace_layers
from linflab.models.robustness.bounds.rounding import TINY, gamma, unit_roundoff, upper_float
from linflab.models.robustness.bounds.tracing import VIEWS, Concatenation, Step, Sum

Intermediate = Literal["crown", "interval"]
LARGEST_ROWS = 2**24  # coefficients that are held together
REMAINDER = 2.0**-48  # more than all that float64 loses at a value, relative to its largest magnitude


class Lines(NamedTuple):
    """Lower and upper lines of an activation, slope x + intercept, elementwise over a box of its inputs."""

    lower_slope: Tensor
    lower_intercept: Tensor
    upper_slope: Tensor
    upper_intercept: Tensor


def crown_bounds(network: nn.Module, box: Box, intermediate: Intermediate = "crown", sound: bool = False) -> Box:
    """Bounds of a network's outputs (B, K) over a box of inputs, in evaluation mode at p = inf.

    Args:
        network: in evaluation mode.
        box: of inputs.
        intermediate: what bounds the inputs of activations.
        sound: bounds of the outputs as they are computed, with their roundings; in float64.

    Raises:
        ValueError: the network is in training mode.
        TypeError: a layer or operation has no rule, or none has lines; names it.
    """
    crown = _Crown(network, box, intermediate, sound)
    return crown.bounds(crown.output)


def crown_margins(
    network: nn.Module, box: Box, labels: Tensor, intermediate: Intermediate = "crown", sound: bool = False
) -> Tensor:
    """Upper bounds M (B, K) of z_j - z_y over a box of images, -inf at the right class y itself.

    Where all M_j < 0, no image of the box is given another class. Args, raises: as `crown_bounds`; labels (B).
    """
    one = Box(box.lower[:1], box.upper[:1])
    sizes = [value.lower.numel() for value in propagate(trace_layers(network, one, sound), one).values()]
    samples = max(1, LARGEST_ROWS // (max(sizes) * sizes[-1]))  # as many as fit at once
    return torch.cat(
        [
            _margins(_Crown(network, Box(lower, upper), intermediate, sound), y)
            for lower, upper, y in zip(*(x.split(samples) for x in (*box, labels)), strict=True)
        ]
    )


def _margins(crown: "_Crown", labels: Tensor) -> Tensor:
    identity = torch.eye(crown.boxes[crown.output].lower.shape[1], dtype=crown.dtype, device=labels.device)
    ahead = identity[labels][:, None] - identity  # of row j: z_y - z_j
    return (-crown.lower(crown.output, ahead)).scatter(1, labels[:, None], -math.inf)


@singledispatch
def lines_of(layer: nn.Module, box: Box, sound: bool) -> Lines | None:
    """The lines of an activation over a box of its inputs; None for layers that have none."""
    return None


@lines_of.register
def _relu(layer: nn.ReLU, box: Box, sound: bool) -> Lines:
    lower, upper = box
    width = (upper - lower).clamp_min(torch.finfo(lower.dtype).tiny)
    slope = torch.where(lower >= 0, 1.0, torch.where(upper <= 0, 0.0, upper / width)).clamp(0, 1)
    below = torch.where(lower >= 0, 1.0, torch.where(upper <= 0, 0.0, (upper > -lower).to(lower)))
    # the line goes through (l, 0) and (u, u)
    intercept = torch.maximum(-slope * lower.clamp_max(0), (upper - slope * upper).clamp_min(0))
    return Lines(below, torch.zeros_like(below), slope, _rounded_up(intercept, box) if sound else intercept)


@lines_of.register
def _tanh(layer: nn.Tanh, box: Box, sound: bool) -> Lines:
    lower, upper = box
    upper_slope, upper_intercept = _upper_line_of_tanh(lower, upper)
    lower_slope, mirrored = _upper_line_of_tanh(-upper, -lower)  # tanh is odd
    if sound:
        upper_intercept, mirrored = _rounded_up(upper_intercept, box), _rounded_up(mirrored, box)
    return Lines(lower_slope, -mirrored, upper_slope, upper_intercept)


def _rounded_up(intercept: Tensor, box: Box) -> Tensor:
    return intercept + REMAINDER * (1 + largest(box))


def _upper_line_of_tanh(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and least intercept of a line above tanh on [lower, upper].

    Where tanh is concave, the tangent in the middle; where it is convex, the chord; between, the tangent through the
    lower end, or the chord if that tangent touches beyond the upper end.
    """
    width = upper - lower
    middle = (lower + upper) / 2
    chord = torch.where(width > 1e-6, (upper.tanh() - lower.tanh()) / width.clamp_min(1e-6), _slope_of_tanh(middle))
    near, far = torch.zeros_like(upper), upper.clamp_min(0)
    for _ in range(40):  # bisection; where it ends decides how tight the line is, not whether it holds
        touch = (near + far) / 2
        beyond = touch.tanh() - lower.tanh() > _slope_of_tanh(touch) * (touch - lower)
        near, far = torch.where(beyond, near, touch), torch.where(beyond, touch, far)
    misses = upper.tanh() - lower.tanh() < _slope_of_tanh(upper) * width
    mixed = torch.where(misses, chord, _slope_of_tanh(far))
    slope = torch.where(lower >= 0, _slope_of_tanh(middle), torch.where(upper <= 0, chord, mixed)).clamp(0, 1)
    # tanh x - slope x is largest at an end, or where tanh' = slope, which is 1 - tanh^2
    turn = torch.atanh((1 - slope).sqrt().clamp_max(1 - torch.finfo(slope.dtype).eps))
    inside = torch.minimum(torch.maximum(turn, lower), upper)
    intercept = torch.stack([x.tanh() - slope * x for x in (lower, inside, upper)]).amax(dim=0)
    return slope, intercept


def _slope_of_tanh(x: Tensor) -> Tensor:
    return 1 - x.tanh() ** 2


class _Crown:
    """The boxes of a network's values, and bounds of linear functions of them."""

    def __init__(self, network: nn.Module, box: Box, intermediate: Intermediate, sound: bool) -> None:
        traced = trace_layers(network, box, sound)
        if sound and box.lower.dtype != torch.float32:
            raise ValueError(f"sound bounds by crown are for networks in float32, not {box.lower.dtype}")
        self.sound, self.output = sound, traced.output
        self.dtype = torch.float64 if sound else box.lower.dtype
        self.makers = {step.output: step for step in traced.steps}
        self.order = [traced.input, *self.makers]
        self.boxes = {traced.input: box}
        self.lines: dict[str, Lines] = {}
        self.errors: dict[str, Tensor] = {}
        refined: dict[str, Box] = {}
        for step in traced.steps:
            first = step.inputs[0]
            if lines_of.dispatch(type(step.layer)) is not lines_of.dispatch(object):
                if intermediate == "crown" and first not in refined:
                    refined[first] = self.bounds(first)
                    self.boxes[first] = _outwards(refined[first], box.lower.dtype)
                lines = lines_of(step.layer, _in(self.dtype, refined.get(first, self.boxes[first])), sound)
                assert lines is not None
                self.lines[step.output] = lines
            self.boxes[step.output] = step_bounds(step, self.boxes, sound)
        if not self.lines:
            raise TypeError(
                f"crown: {type(network).__name__} has no ReLU or tanh that it bounds by lines; use interval"
            )

    def bounds(self, name: str) -> Box:
        """The box of a value (B, *shape), by CROWN."""
        shape = self.boxes[name].lower.shape[1:]
        size = max(box.lower[0].numel() for box in self.boxes.values())
        samples = len(self.boxes[name].lower) if self.lines else 1  # up to the first lines they share coefficients
        parts = []
        for rows in torch.arange(shape.numel()).split(max(1, LARGEST_ROWS // (size * samples))):
            units = torch.zeros(1, len(rows), shape.numel(), dtype=self.dtype, device=self.boxes[name].lower.device)
            units[0, torch.arange(len(rows)), rows] = 1
            units = units.unflatten(2, shape)
            parts.append((self.lower(name, units), -self.lower(name, -units)))
        lower, upper = (torch.cat(bounds, dim=1).unflatten(1, shape) for bounds in zip(*parts, strict=True))
        return Box(lower, upper)

    def lower(self, name: str, a: Tensor) -> Tensor:
        """Lower bounds (B, R) of linear functions of a value, with coefficients (B or 1, R, *shape)."""
        pending = {name: a}
        total = a.new_zeros(())
        for value in reversed(self.order):
            if value not in pending:
                continue
            a, box = pending.pop(value), _in(self.dtype, self.boxes[value])
            step = self.makers.get(value)
            passed = None if step is None else self._passed(step, a)
            if passed is None:  # no lines lead on from here
                total = total + self._dot(a.clamp_min(0), box.lower) + self._dot(a.clamp_max(0), box.upper)
            else:
                total = total + passed[1]
                assert step is not None
                for before, part in zip(step.inputs, passed[0], strict=True):
                    pending[before] = pending[before] + part if before in pending else part
            if self.sound:
                total = total + self._dot(-a.abs(), self._error(value))
        return total

    def _passed(self, step: Step, a: Tensor) -> tuple[Sequence[Tensor], Tensor | float] | None:
        """Coefficients of a step's inputs, and a constant, that bound those of its output from below."""
        if step.output in self.lines:
            lines = self.lines[step.output]
            positive, negative = a.clamp_min(0), a.clamp_max(0)
            slopes = positive * lines.lower_slope[:, None] + negative * lines.upper_slope[:, None]
            return [slopes], self._dot(positive, lines.lower_intercept) + self._dot(negative, lines.upper_intercept)
        if isinstance(step.layer, VIEWS):
            return [a.flatten(2).unflatten(2, self._shape(step.inputs[0]))], 0.0
        if isinstance(step.layer, Sum):
            return [a, a], 0.0
        if isinstance(step.layer, Concatenation):
            dim = step.layer.dim
            return a.split([self._shape(name)[dim - 1] for name in step.inputs], dim=dim + 1), 0.0
        affine = affine_of(step.layer, self._shape(step.inputs[0]))
        if affine is None:
            return None
        bias = affine.bias.to(a).expand(self._shape(step.output))[None]
        before = affine.transpose(a.flatten(0, 1), affine.weight.to(a)).unflatten(0, a.shape[:2])
        return [before], self._dot(a, bias)

    def _shape(self, name: str) -> torch.Size:
        return self.boxes[name].lower.shape[1:]

    def _dot(self, a: Tensor, values: Tensor) -> Tensor:
        """The sum of a (B or 1, R, *shape) times values (B or 1, *shape), (B, R); if sound no more than it is."""
        a, values = a.flatten(2), values.flatten(1)
        total = _products(a, values)
        if not self.sound:
            return total
        share = 2 * gamma(values.shape[1] + 4 * len(self.order) + 8, a.dtype)
        return total - share * _products(a.abs(), values.abs())

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


def _products(a: Tensor, values: Tensor) -> Tensor:
    if len(a) == 1:
        return functional.linear(values, a[0])
    return torch.matmul(a, values[:, :, None])[:, :, 0]


def _in(dtype: torch.dtype, box: Box) -> Box:
    return Box(box.lower.to(dtype), box.upper.to(dtype))


def _outwards(box: Box, dtype: torch.dtype) -> Box:
    """A box of `dtype` that holds this one."""
    like = box.lower.to(dtype)
    return Box(-upper_float(-box.lower, like), upper_float(box.upper, like))
