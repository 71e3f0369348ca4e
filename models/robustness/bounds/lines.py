"""Lines that hold an activation over a range of its inputs, from below and from above."""

from functools import singledispatch
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from linflab.models.robustness.bounds.interval import Box, largest

Relaxation = Literal["adaptive", "parallel", "box"]
REMAINDER = 2.0**-48  # more than all that float64 loses at a value, relative to its largest magnitude


class Lines(NamedTuple):
    """Lower and upper lines of an activation, slope x + intercept, elementwise over a box of its inputs."""

    lower_slope: Tensor
    lower_intercept: Tensor | float  # 0.0 of ReLUs
    upper_slope: Tensor
    upper_intercept: Tensor

    @property
    def parallel(self) -> bool:
        """Whether both have the same slopes by construction."""
        return self.lower_slope is self.upper_slope


@singledispatch
def lines_of(layer: nn.Module, box: Box, relaxation: Relaxation = "adaptive", sound: bool = False) -> Lines | None:
    """The lines of an activation over a box of its inputs; None for layers that have none.

    Where an activation is not linear over the box, its lines are by `relaxation`

    - adaptive: the tightest ones, of a ReLU the lower line x if u > -l, else 0 (Zhang et al., NeurIPS 2018);
    - parallel: of one slope, of a ReLU u / (u - l) (Wong and Kolter, ICML 2018; Singh et al., NeurIPS 2018);
    - box: of slope 0, through the ends of its range (Mirman et al., ICML 2018: a box in a hybrid zonotope).
    """
    return None


def has_lines(layer: nn.Module) -> bool:
    """Whether there are lines for layers of this kind."""
    return lines_of.dispatch(type(layer)) is not lines_of.dispatch(object)


@lines_of.register
def _relu(layer: nn.ReLU, box: Box, relaxation: Relaxation = "adaptive", sound: bool = False) -> Lines:
    lower, upper = box
    unstable = (lower < 0) & (upper > 0)
    active = (lower >= 0).to(lower)
    if relaxation == "box":
        slope = active
    else:
        slope = torch.where(unstable, upper / torch.where(unstable, upper - lower, 1.0), active).clamp(0, 1)
    below = slope
    if relaxation == "adaptive":
        below = torch.where(unstable, (upper > -lower).to(lower), active)
    # the upper line goes through (l, 0) and (u, u), or above
    intercept = torch.maximum(-slope * lower.clamp_max(0), (upper - slope * upper).clamp_min(0))
    return Lines(below, 0.0, slope, _rounded_up(intercept, box) if sound else intercept)


@lines_of.register
def _tanh(layer: nn.Tanh, box: Box, relaxation: Relaxation = "adaptive", sound: bool = False) -> Lines:
    lower, upper = box
    if relaxation == "adaptive":
        upper_slope, upper_intercept = _upper_line_of_tanh(lower, upper)
        lower_slope, mirrored = _upper_line_of_tanh(-upper, -lower)  # tanh is odd
    else:  # no slope of tanh in the box is below the lesser one at its ends: x -> tanh x - slope x grows
        slope = torch.zeros_like(lower)
        if relaxation == "parallel":
            slope = torch.minimum(_slope_of_tanh(lower), _slope_of_tanh(upper)).clamp_min(0)
        lower_slope = upper_slope = slope
        upper_intercept, mirrored = upper.tanh() - slope * upper, slope * lower - lower.tanh()
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
