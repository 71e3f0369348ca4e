"""Linear relaxations: linear lower and upper bounds of an activation over a box of its inputs."""

import math
from collections.abc import Callable
from functools import partial, singledispatch
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.robustness.bounds.boxes import Box, max_magnitude
from linflab.models.robustness.bounds.steps import Clamp, OwnLayer, has_exact_rule, is_library_layer

Function = Callable[[Tensor], Tensor]
TurningPoints = Callable[[Tensor], list[Tensor]]
RelaxationKind = Literal["adaptive", "parallel", "box"]
POINTS = 64  # sampling points for SiLU and GELU
MAX_END = 1e30  # replaces infinite ends of clamp
FLOAT64_SLACK = 2.0**-48  # exceeds all float64 errors of a value, relative to its magnitude


class LinearRelaxation(NamedTuple):
    """Linear lower and upper bounds slope x + intercept of an activation, elementwise over a box.

    Attributes:
        lower_slope: Slopes of the lower bounds.
        lower_intercept: Intercepts of the lower bounds; 0.0 for ReLU.
        upper_slope: Slopes of the upper bounds.
        upper_intercept: Intercepts of the upper bounds.
    """

    lower_slope: Tensor
    lower_intercept: Tensor | float
    upper_slope: Tensor
    upper_intercept: Tensor

    @property
    def same_slope(self) -> bool:
        """True if lower and upper slopes are equal by construction."""
        return self.lower_slope is self.upper_slope


@singledispatch
def relax(
    layer: nn.Module, box: Box, relaxation: RelaxationKind = "adaptive", sound: bool = False
) -> LinearRelaxation | None:
    """Return the linear relaxation of an activation over a box of its inputs; None for other layers.

    Where an activation is not linear over the box, `relaxation` selects:

    - adaptive: the tightest bounds; the lower bound of a ReLU is x if u > -l, else 0 (Zhang et al., NeurIPS 2018);
    - parallel: equal slopes, u / (u - l) for a ReLU (Wong and Kolter, ICML 2018; Singh et al., NeurIPS 2018);
    - box: slope 0, through the ends of the range (Mirman et al., ICML 2018: a box in a hybrid zonotope).

    Args:
        layer: Layer of any type; register rules for your own with `relax.register`.
        box: Lower and upper bounds l, u of its inputs, (B, *shape).
        relaxation: Choice of slopes.
        sound: If True, widen intercepts by the float64 errors of their computation.
    """
    return None


def has_relaxation(layer: nn.Module, sound: bool = False) -> bool:
    """Return True if layers of this type have a linear relaxation.

    Args:
        layer: Layer of any type.
        sound: If True, return False for activations or relaxations of the user, since `activation_error` does not
            know the rounding of their outputs.
    """
    if sound:
        rule = relax.dispatch(type(layer))
        return is_library_layer(layer) and rule is not relax.dispatch(object) and _is_library_rule(rule)
    if isinstance(layer, OwnLayer):
        return has_exact_rule(relax, layer.layer)
    return relax.dispatch(type(layer)) is not relax.dispatch(object)


def _is_library_rule(rule: Any) -> bool:
    return str(getattr(rule, "func", rule).__module__).startswith("linflab.")


@relax.register
def _own_layer(
    layer: OwnLayer, box: Box, relaxation: RelaxationKind = "adaptive", sound: bool = False
) -> LinearRelaxation | None:
    return relax(layer.layer, box, relaxation, sound) if has_exact_rule(relax, layer.layer) else None


@relax.register
def _relu(layer: nn.ReLU, box: Box, relaxation: RelaxationKind = "adaptive", sound: bool = False) -> LinearRelaxation:
    lower, upper = box
    unstable = (lower < 0) & (upper > 0)
    active = (lower >= 0).to(lower)
    if relaxation == "box":
        slope = active
    else:
        slope = torch.where(unstable, upper / torch.where(unstable, upper - lower, 1.0), active).clamp(0, 1)
    lower_slope = slope
    if relaxation == "adaptive":
        lower_slope = torch.where(unstable, (upper > -lower).to(lower), active)
    # The upper bound passes through or above the points (l, 0) and (u, u).
    intercept = torch.maximum(-slope * lower.clamp_max(0), (upper - slope * upper).clamp_min(0))
    return LinearRelaxation(lower_slope, 0.0, slope, _round_up(intercept, box) if sound else intercept)


@relax.register
def _tanh(layer: nn.Tanh, box: Box, relaxation: RelaxationKind = "adaptive", sound: bool = False) -> LinearRelaxation:
    lower, upper = box
    if relaxation == "adaptive":
        upper_slope, upper_intercept = _tanh_upper_line(lower, upper)
        lower_slope, mirrored = _tanh_upper_line(-upper, -lower)  # tanh is odd
    else:
        # In the box, tanh' is at least the smaller of its values at the ends. For slopes up to that value,
        # tanh x - slope x is therefore nondecreasing.
        slope = torch.zeros_like(lower)
        if relaxation == "parallel":
            slope = torch.minimum(_tanh_slope(lower), _tanh_slope(upper)).clamp_min(0)
        lower_slope = upper_slope = slope
        upper_intercept, mirrored = upper.tanh() - slope * upper, slope * lower - lower.tanh()
    if sound:
        upper_intercept, mirrored = _round_up(upper_intercept, box), _round_up(mirrored, box)
    return LinearRelaxation(lower_slope, -mirrored, upper_slope, upper_intercept)


@relax.register
def _sigmoid(
    layer: nn.Sigmoid, box: Box, relaxation: RelaxationKind = "adaptive", sound: bool = False
) -> LinearRelaxation:
    """Return the relaxation of 1 / (1 + exp -x) = (1 + tanh(x / 2)) / 2."""
    lines = _tanh(nn.Tanh(), Box(box.lower / 2, box.upper / 2), relaxation, sound)
    upper_slope = lines.upper_slope / 4
    lower_slope = upper_slope if lines.same_slope else lines.lower_slope / 4
    lower, upper = (1 + torch.as_tensor(lines.lower_intercept)) / 2, (1 + lines.upper_intercept) / 2
    if sound:
        lower, upper = -_round_up(-lower, box), _round_up(upper, box)
    return LinearRelaxation(lower_slope, lower, upper_slope, upper)


@relax.register
def _leaky_relu(
    layer: nn.LeakyReLU, box: Box, relaxation: RelaxationKind = "adaptive", sound: bool = False
) -> LinearRelaxation:
    """Return the relaxation of LeakyReLU.

    The upper bound is the chord. The lower bound is the steeper piece if u > -l, otherwise the flatter piece. If
    `negative_slope` is above 1, the function is concave, and the two bounds are exchanged.
    """
    lower, upper = box
    flat = layer.negative_slope

    def function(x: Tensor) -> Tensor:
        return torch.where(x >= 0, x, flat * x)

    unstable = (lower < 0) & (upper > 0)
    chord = torch.where(unstable, _chord(function, box), _slopes(lower >= 0, flat, lower))
    if relaxation == "box":
        chord = torch.where(unstable, 0.0, chord)
    adaptive_slope = chord
    if relaxation == "adaptive":
        adaptive_slope = torch.where(unstable, _slopes(upper > -lower, flat, lower), chord)
    lower_slope, upper_slope = (adaptive_slope, chord) if flat <= 1 else (chord, adaptive_slope)
    return _between(function, box, lower_slope, upper_slope, lambda slope: [torch.zeros_like(slope)], sound)


def _slopes(steep: Tensor, flat: float, like: Tensor) -> Tensor:
    """Return 1 where a slope is steep, else `flat`."""
    return torch.where(steep, torch.ones_like(like), torch.full_like(like, flat))


@relax.register
def _clamp(layer: Clamp, box: Box, relaxation: RelaxationKind = "adaptive", sound: bool = False) -> LinearRelaxation:
    low, high = (max(-MAX_END, min(MAX_END, end)) for end in (layer.low, layer.high))

    def function(x: Tensor) -> Tensor:
        return x.clamp(low, high)

    def ends(slope: Tensor) -> list[Tensor]:
        return [torch.full_like(slope, end) for end in (low, high)]

    linear = (box.lower >= low) & (box.upper <= high)
    if relaxation == "adaptive":
        upper_slope = _upper_slope_of_clamp(box.lower, box.upper, low, high)
        lower_slope = _upper_slope_of_clamp(-box.upper, -box.lower, -high, -low)  # clamp(-x, -b, -a) = -clamp(x, a, b)
    else:
        upper_slope = linear.to(box.lower) if relaxation == "box" else _chord(function, box)
        lower_slope = upper_slope
    return _between(function, box, lower_slope, upper_slope, ends, sound)


def _upper_slope_of_clamp(lower: Tensor, upper: Tensor, low: float, high: float) -> Tensor:
    """Return the slope of an upper bound of clamp on [l, u]: the chord up to `high`, or 0 if tighter."""
    end = upper.clamp(max=high)
    rising = (end - lower.clamp(min=low)).clamp_min(0) / torch.where(end > lower, end - lower, 1.0)
    # Beyond `high`: the line through (l, f(l)) and (high, high), or the constant, whichever is lower in the middle.
    constant = (upper > high) & (upper - high > high - lower)
    return torch.where((upper <= low) | (lower >= high) | constant, 0.0, rising)


@relax.register
def _elu(layer: nn.ELU, box: Box, relaxation: RelaxationKind = "adaptive", sound: bool = False) -> LinearRelaxation:
    alpha = layer.alpha

    def function(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, alpha * torch.expm1(x.clamp_max(0)))

    def derivative(x: Tensor) -> Tensor:
        return torch.where(x > 0, torch.ones_like(x), alpha * x.clamp_max(0).exp())

    def turning_points(slope: Tensor) -> list[Tensor]:
        return [(slope.clamp_min(1e-30) / alpha).log().clamp(-80, 0), torch.zeros_like(slope)]

    return _convex(function, derivative, turning_points, box, relaxation, sound)


@relax.register
def _softplus(
    layer: nn.Softplus, box: Box, relaxation: RelaxationKind = "adaptive", sound: bool = False
) -> LinearRelaxation:
    """Return the relaxation of log(1 + exp(beta x)) / beta; torch omits at most exp(-threshold) / beta."""
    beta = layer.beta

    def function(x: Tensor) -> Tensor:
        return torch.logaddexp(beta * x, torch.zeros_like(x)) / beta

    def derivative(x: Tensor) -> Tensor:
        return torch.sigmoid(beta * x)

    def turning_points(slope: Tensor) -> list[Tensor]:
        return [torch.logit(slope, eps=1e-12) / beta]

    lines = _convex(function, derivative, turning_points, box, relaxation, sound)
    return lines._replace(lower_intercept=lines.lower_intercept - math.exp(-layer.threshold) / beta)


@relax.register(nn.SiLU)
@relax.register(nn.GELU)
def _silu_or_gelu(
    layer: nn.SiLU | nn.GELU, box: Box, relaxation: RelaxationKind = "adaptive", sound: bool = False
) -> LinearRelaxation:
    """Return the relaxation: each bound is the midpoint tangent or the chord, whichever has less area.

    Bounds hold at sampling points a distance h apart. Between them, a function with |f''| <= `bend` differs from its
    chords by at most bend h^2 / 8. Outside [-`end`, `end`] the function differs from max(0, x) by at most `rest`, and
    max(0, x) has no turning point there.
    """
    function: Function
    if isinstance(layer, nn.SiLU):
        function, bend, end, rest = functional.silu, 0.5, 12.0, 1e-4
    else:
        function, bend, end, rest = partial(functional.gelu, approximate=layer.approximate), 1.0, 8.0, 1e-12
    lower, upper = box
    first, last = lower.clamp(-end, end), upper.clamp(-end, end)
    gap = (last - first) / (POINTS - 1)
    points = first + gap * torch.arange(POINTS, device=first.device).view(-1, *[1] * first.dim())
    points = torch.cat([torch.minimum(torch.maximum(points, lower), upper), torch.stack([lower, upper])])
    values = function(points)
    sampling_error = bend * gap**2 / 8 + torch.where((lower < -end) | (upper > end), rest, 0.0)
    middle, step = (lower + upper) / 2, 1e-4  # step of a difference quotient; any slope is valid
    slopes = [(function(middle + step) - function(middle - step)) / (2 * step)]
    slopes.append(torch.where(upper - lower > step, _chord(function, box), slopes[0]))
    if relaxation != "adaptive":
        slopes = slopes[1:] if relaxation == "parallel" else [torch.zeros_like(lower)]
    lines = []
    for slope in slopes:
        differences = values - slope * points
        lines.append((slope, differences.amin(dim=0) - sampling_error, differences.amax(dim=0) + sampling_error))
    lower_slope, low, _ = lines[0]
    upper_slope, _, high = lines[0]
    for slope, smallest, largest in lines[1:]:
        better = slope * middle + smallest > lower_slope * middle + low
        lower_slope, low = torch.where(better, slope, lower_slope), torch.where(better, smallest, low)
        better = slope * middle + largest < upper_slope * middle + high
        upper_slope, high = torch.where(better, slope, upper_slope), torch.where(better, largest, high)
    if sound:
        low, high = -_round_up(_round_up(-low, box), box), _round_up(_round_up(high, box), box)
    return LinearRelaxation(lower_slope, low, upper_slope, high)


def _convex(
    function: Function,
    derivative: Function,
    turning_points: TurningPoints,
    box: Box,
    relaxation: RelaxationKind,
    sound: bool,
) -> LinearRelaxation:
    """Return the relaxation of a convex function: midpoint tangent below, chord above.

    Other relaxations use the slope of the chord for both bounds (`parallel`), or constant bounds (`box`).
    """
    middle = derivative((box.lower + box.upper) / 2)
    chord = torch.where(box.upper - box.lower > 1e-6, _chord(function, box), middle)
    if relaxation == "box":
        chord = torch.zeros_like(chord)
    return _between(function, box, middle if relaxation == "adaptive" else chord, chord, turning_points, sound)


def _chord(function: Function, box: Box) -> Tensor:
    """Return the slope between the ends of a box; 0 where they coincide."""
    width = box.upper - box.lower
    return (function(box.upper) - function(box.lower)) / torch.where(width > 0, width, 1.0)


def _between(
    function: Function, box: Box, lower_slope: Tensor, upper_slope: Tensor, turning_points: TurningPoints, sound: bool
) -> LinearRelaxation:
    """Return the tightest bounds of a function for given lower and upper slopes.

    `turning_points` returns the points where function - slope x may have an extremum, besides the ends of the box.
    """

    def differences(slope: Tensor) -> Tensor:
        inside = [torch.minimum(torch.maximum(point, box.lower), box.upper) for point in turning_points(slope)]
        return torch.stack([function(x) - slope * x for x in (*box, *inside)])

    upper, lower = differences(upper_slope).amax(dim=0), differences(lower_slope).amin(dim=0)
    if sound:
        size = 1 + (1 + torch.maximum(lower_slope.abs(), upper_slope.abs())) * max_magnitude(box)
        size = size + torch.maximum(function(box.lower).abs(), function(box.upper).abs())
        upper, lower = upper + FLOAT64_SLACK * size, lower - FLOAT64_SLACK * size
    return LinearRelaxation(lower_slope, lower, upper_slope, upper)


def _round_up(intercept: Tensor, box: Box) -> Tensor:
    return intercept + FLOAT64_SLACK * (1 + max_magnitude(box))


def _tanh_upper_line(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return slope and least intercept of a linear upper bound of tanh on [lower, upper].

    Where tanh is concave, use the midpoint tangent; where it is convex, the chord. If the box contains both parts, use
    the midpoint tangent, which gives the smallest area, if it bounds tanh at the lower end. Otherwise use the tangent
    through the lower end, or the chord if that tangent touches beyond the upper end.
    """
    width = upper - lower
    middle = (lower + upper) / 2
    chord = torch.where(width > 1e-6, (upper.tanh() - lower.tanh()) / width.clamp_min(1e-6), _tanh_slope(middle))
    near, far = torch.zeros_like(upper), upper.clamp_min(0)
    for _ in range(40):  # bisection affects tightness, not validity
        touch = (near + far) / 2
        beyond = touch.tanh() - lower.tanh() > _tanh_slope(touch) * (touch - lower)
        near, far = torch.where(beyond, near, touch), torch.where(beyond, touch, far)
    is_past_end = upper.tanh() - lower.tanh() < _tanh_slope(upper) * width
    mixed_slope = torch.where(is_past_end, chord, _tanh_slope(torch.maximum(far, middle)))
    slope = torch.where(lower >= 0, _tanh_slope(middle), torch.where(upper <= 0, chord, mixed_slope)).clamp(0, 1)
    # tanh x - slope x is largest at an end, or where slope = tanh' = 1 - tanh^2.
    turning_point = torch.atanh((1 - slope).sqrt().clamp_max(1 - torch.finfo(slope.dtype).eps))
    inside = torch.minimum(torch.maximum(turning_point, lower), upper)
    intercept = torch.stack([x.tanh() - slope * x for x in (lower, inside, upper)]).amax(dim=0)
    return slope, intercept


def _tanh_slope(x: Tensor) -> Tensor:
    return 1 - x.tanh() ** 2
