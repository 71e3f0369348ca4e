"""Universal approximation by l_inf-dist nets, constructively: nets that approximate a given 1-Lipschitz function.

Theorem (Zhang et al., ICML 2021): on a bounded domain, l_inf-dist nets of width at most d + 2 approximate every
function of d inputs that is 1-Lipschitz in the l_inf norm. The nets here have weights in closed form. Let the balls of
radius r around samples x_1, ..., x_N cover the box, and let f be the function. The McShane extension of the samples,

    u(x) = min_i (f(x_i) + ||x - x_i||_inf),

satisfies f <= u <= f + 2 r on the box: the lower bound is the Lipschitz property, and the upper bound follows from the
nearest sample. So u - r has an error of at most r. Two nets compute it:

- shallow: N distances to the samples, and one neuron per output that takes the minimum. The neuron is a distance to
  C - f(x_i), with C so large that max_i |z_i - (C - f(x_i))| = C - min_i (z_i + f(x_i)).
- deep: width d + 2 for one output. Layers pass on the d inputs and the negative of the minimum so far, and compute the
  distance to one sample at a time. A distance neuron selects inputs by large weights: if |z_j| <= S for all j and C is
  at least 2 S plus the constants, max(|z_1 + c_1 + C|, |z_2 - c_2 - C|, |z_3|) = C + max(z_1 + c_1, c_2 - z_2).

Source of the extension: McShane, "Extension of range of functions", Bulletin of the AMS 1934.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from linflab.models.distance import lp_distance
from linflab.models.networks.layers import LpDistance, MeanShift
from linflab.models.networks.linf_dist import LinfDistNet

Form = Literal["shallow", "deep"]
MAX_SAMPLES = {"shallow": 1_000_000, "deep": 50_000}  # a deep net has two layers per sample
COVER_CELLS = 2_000_000  # cells of the grid that bounds the covering radius of samples
MAX_COMPARED = 2000  # samples of a function with which the Lipschitz check compares all others
CHUNK = 1000  # samples whose distances to all others are in memory at once
ROUNDING = 1e-9  # relative rounding of values and distances that the Lipschitz check allows


@dataclass(frozen=True)
class NetworkSize:
    """Size of an approximating net, known before the net is built.

    Attributes:
        samples: Number N of samples of the function.
        depth: Number of distance layers, including the last: 2 or 2 N + 1.
        width: Largest number of neurons of a layer: N, or d + 1 plus the number of outputs.
        parameters: Number of weights and biases.
    """

    samples: int
    depth: int
    width: int
    parameters: int


def network_size(form: Form, samples: int, inputs: int, outputs: int = 1) -> NetworkSize:
    """Return the size of the net for N samples.

    Args:
        form: `shallow` or `deep`.
        samples: Number N of samples.
        inputs: Number d of inputs.
        outputs: Number of functions that the net approximates together.

    Raises:
        ValueError: If a number is not positive, or the form is unknown.
    """
    _check_form(form)
    for name, value in (("samples", samples), ("inputs", inputs), ("outputs", outputs)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1; use a positive number")
    if form == "shallow":
        return NetworkSize(samples, 2, max(samples, outputs), samples * (inputs + outputs) + outputs)
    width = inputs + 1 + outputs
    weights = inputs * width + (2 * samples - 1) * width**2 + width * outputs
    return NetworkSize(samples, 2 * samples + 1, width, weights + outputs)


@dataclass(frozen=True)
class GridPlan:
    """Samples at the centers of a grid of cells, whose half-width is at most the tolerance.

    Attributes:
        lower: Lower corner of the box, d numbers.
        upper: Upper corner of the box.
        tolerance: Largest error of the net on the box.
        cells: Number of cells along each axis.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    tolerance: float
    cells: tuple[int, ...]

    @property
    def samples(self) -> int:
        """Number of samples."""
        return math.prod(self.cells)

    def size(self, form: Form, outputs: int = 1) -> NetworkSize:
        """Return the size of the net; see `network_size`."""
        return network_size(form, self.samples, len(self.lower), outputs)

    def points(self) -> Tensor:
        """Return the centers of the cells, (N, d) in float64."""
        return _grid(self.lower, self.upper, self.cells)


def plan_grid(lower: Sequence[float], upper: Sequence[float], tolerance: float) -> GridPlan:
    """Return the grid of samples with which a net approximates any 1-Lipschitz function on a box.

    Args:
        lower: Lower corner of the box, d numbers.
        upper: Upper corner of the box, above `lower`.
        tolerance: Largest error on the box, in the l_inf norm; positive.

    Raises:
        ValueError: If the box is empty or not finite, or the tolerance is not positive.
    """
    lower, upper = _check_box(lower, upper)
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance}: must be positive and finite; use a positive number")
    # A tolerance that divides a side must not need another cell because of rounding.
    cells = tuple(max(1, math.ceil((b - a) / (2 * tolerance) * (1 - 1e-12))) for a, b in zip(lower, upper, strict=True))
    return GridPlan(lower, upper, tolerance, cells)


def approximate(
    function: Callable[[Tensor], Tensor],
    lower: Sequence[float],
    upper: Sequence[float],
    tolerance: float,
    form: Form = "deep",
) -> LinfDistNet:
    """Return an l_inf-dist net that approximates a function on a box; `plan_grid` gives its size in advance.

    Args:
        function: Maps points (N, d) in float64 to values (N,) or (N, K), each 1-Lipschitz in the l_inf norm.
        lower: Lower corner of the box, d numbers.
        upper: Upper corner of the box, above `lower`.
        tolerance: Largest error of each output on the box; positive.
        form: `shallow` or `deep`, which has width d + 1 + K.

    Returns:
        The net in float64 and evaluation mode, points (B, d) or images with d pixels -> values (B, K).

    Raises:
        ValueError: If an argument is invalid, the net would be too large, or the values show that the function is not
            1-Lipschitz.
    """
    plan = plan_grid(lower, upper, tolerance)
    _check_samples(form, plan.samples, f"tolerance={tolerance}", "use a larger tolerance or form=shallow")
    points = plan.points()
    values = _check_values(function(points), points, "function", stride=-(-plan.samples // MAX_COMPARED))
    return _build(form, points, values, plan.lower, plan.upper, tolerance)


def approximate_samples(
    points: Tensor,
    values: Tensor,
    lower: Sequence[float],
    upper: Sequence[float],
    tolerance: float,
    form: Form = "deep",
) -> LinfDistNet:
    """Return an l_inf-dist net that approximates, on a box, every 1-Lipschitz function with the given values.

    Args:
        points: Samples (N, d) in the box; the checks take time quadratic in N.
        values: Their values, (N,) or (N, K).
        lower: Lower corner of the box, d numbers.
        upper: Upper corner of the box, above `lower`.
        tolerance: Largest error of each output on the box. The samples must cover the box to this distance; see
            `covering_radius`, whose result is the error that the net has.
        form: `shallow` or `deep`, which has width d + 1 + K.

    Returns:
        The net in float64 and evaluation mode, points (B, d) or images with d pixels -> values (B, K).

    Raises:
        ValueError: If an argument is invalid, the samples do not cover the box, or no 1-Lipschitz function has these
            values.
    """
    lower, upper = _check_box(lower, upper)
    points = torch.as_tensor(points, dtype=torch.float64)
    if points.dim() != 2 or not len(points) or points.shape[1] != len(lower):
        raise ValueError(f"points={tuple(points.shape)}: must have shape (N, {len(lower)}), like the box; reshape them")
    corners = torch.tensor([lower, upper], dtype=torch.float64)
    if not ((points >= corners[0]) & (points <= corners[1])).all():
        raise ValueError(f"points: must be in the box from {lower} to {upper}; use a larger box")
    _check_samples(form, len(points), f"points={tuple(points.shape)}", "use fewer samples or form=shallow")
    values = _check_values(values, points, "values")
    radius = covering_radius(points, lower, upper)
    if not radius <= tolerance:
        raise ValueError(
            f"tolerance={tolerance}: must be at least {radius:.4g}, the proven covering radius of the samples; use it, "
            "or add samples"
        )
    return _build(form, points, values, lower, upper, radius)


def covering_radius(points: Tensor, lower: Sequence[float], upper: Sequence[float]) -> float:
    """Return a proven upper bound of the largest l_inf distance from a point of the box to its nearest sample.

    The bound is the largest distance from the center of a cell of a fine grid, plus the half-width of the cell. It
    exceeds the exact value by at most twice the half-width.

    Args:
        points: Samples (N, d).
        lower: Lower corner of the box, d numbers.
        upper: Upper corner of the box, above `lower`.
    """
    lower, upper = _check_box(lower, upper)
    per_axis = max(1, int(COVER_CELLS ** (1 / len(lower))))
    per_axis = max(1, min(per_axis, 1 + int((50 * COVER_CELLS / len(points)) ** (1 / len(lower)))))
    centers = _grid(lower, upper, (per_axis,) * len(lower))
    half_width = max(b - a for a, b in zip(lower, upper, strict=True)) / (2 * per_axis)
    nearest = [lp_distance(part, points.double()).amin(dim=1).max() for part in centers.split(CHUNK)]
    return (torch.stack(nearest).max().item() + half_width) * (1 + ROUNDING)


def _grid(lower: Sequence[float], upper: Sequence[float], cells: Sequence[int]) -> Tensor:
    """Return the centers of equal cells of a box, (N, d) in float64."""
    axes = [
        a + (b - a) * (torch.arange(count, dtype=torch.float64) + 0.5) / count
        for a, b, count in zip(lower, upper, cells, strict=True)
    ]
    return torch.cartesian_prod(*axes).reshape(-1, len(axes))


def _check_form(form: str) -> None:
    if form not in get_args(Form):
        raise ValueError(f"form={form}: must be one of {', '.join(get_args(Form))}; use deep for a narrow net")


def _check_box(lower: Sequence[float], upper: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    lower, upper = tuple(map(float, lower)), tuple(map(float, upper))
    if not lower or len(lower) != len(upper):
        raise ValueError(f"upper={upper}: must have as many numbers as lower={lower}; use one per input")
    if not all(-math.inf < a < b < math.inf for a, b in zip(lower, upper, strict=True)):
        raise ValueError(f"upper={upper}: must be above lower={lower} and finite; use a box with positive sides")
    return lower, upper


def _check_samples(form: Form, count: int, setting: str, advice: str) -> None:
    _check_form(form)
    if count > MAX_SAMPLES[form]:
        raise ValueError(
            f"{setting}: must need at most {MAX_SAMPLES[form]:,} samples with form={form}, but needs {count:,}; "
            f"{advice if form == 'deep' else advice.removesuffix(' or form=shallow')}"
        )


def _check_values(values: Tensor, points: Tensor, name: str, stride: int = 1) -> Tensor:
    """Return values (N, K) in float64, after a check that a 1-Lipschitz function can have them.

    Each value is compared with every `stride`-th one.

    Raises:
        ValueError: If shapes do not match, a value is not finite, or two values differ by more than their distance.
    """
    values = torch.as_tensor(values, dtype=torch.float64).detach()
    values = values[:, None] if values.dim() == 1 else values
    if values.dim() != 2 or len(values) != len(points) or not values.shape[1] or not values.isfinite().all():
        raise ValueError(
            f"{name}={tuple(values.shape)}: must give finite values of shape ({len(points)},) or ({len(points)}, K); "
            "use one row per point"
        )
    others, others_values = points[::stride].contiguous(), values[::stride].contiguous()
    slack = ROUNDING * (1 + values.abs().max().item() + points.abs().max().item())
    for start in range(0, len(points), CHUNK):
        part = slice(start, start + CHUNK)
        difference = lp_distance(values[part], others_values)
        excess = difference - lp_distance(points[part], others) - slack
        if (excess > 0).any():
            row, column = divmod(int(excess.argmax()), len(others))
            first, second = points[start + row].tolist(), others[column].tolist()
            raise ValueError(
                f"{name}: must be 1-Lipschitz in the l_inf norm, but changes by {difference[row, column]:.4g} between "
                f"{first} and {second}; divide it by its Lipschitz constant"
            )
    return values


def _build(
    form: Form, points: Tensor, values: Tensor, lower: Sequence[float], upper: Sequence[float], radius: float
) -> LinfDistNet:
    middles = (values.amin(dim=0) + values.amax(dim=0)) / 2  # centered values keep the offsets small
    corners = torch.tensor([lower, upper], dtype=torch.float64)
    parts = (points, values - middles, corners.mean(dim=0), (corners[1] - corners[0]).max().item() / 2)
    network, offset = _shallow(*parts) if form == "shallow" else _deep(*parts)
    with torch.no_grad():
        network.bias.copy_(radius - offset - middles)
    return network.eval()


def _shallow(points: Tensor, values: Tensor, center: Tensor, half_side: float) -> tuple[LinfDistNet, float]:
    """Return the shallow net and C, which its last neurons add; see the module."""
    offset = values.abs().max().item() + 2 * half_side
    return _assemble([points, offset - values.T]), offset


def _deep(points: Tensor, values: Tensor, center: Tensor, half_side: float) -> tuple[LinfDistNet, float]:
    """Return the deep net and C, which its last neurons add; see the module.

    The state between layers is (x - center, m, t): d inputs, the largest -(f(x_i) + ||x - x_i||) so far for each
    output, and t, which becomes the distance to the current sample in two steps, one for each sign of the differences.
    """
    (samples, inputs), outputs = points.shape, values.shape[1]
    size = 4 * half_side + values.abs().max().item()  # bounds the state, and constants are at most as large
    offset = 2.0 ** math.ceil(math.log2(3 * size))  # sums with a power of two lose no further bits in later layers
    width = inputs + outputs + 1
    state, minimum, distance = torch.arange(inputs), torch.arange(inputs, inputs + outputs), width - 1
    points = points - center

    def blank() -> Tensor:
        weight = torch.zeros(width, width, dtype=torch.float64)
        weight[state, state] = -offset  # pass on the inputs
        weight[minimum, minimum] = -offset
        return weight

    first = center.repeat(width, 1)
    first[state, state] -= offset
    first[minimum, 0] -= offset  # no minimum yet: any value will be ignored
    first[distance] += points[0] - offset
    weights = [first]
    for i in range(samples):
        second_sign = blank()
        second_sign[distance, :inputs] = points[i] + offset
        second_sign[distance, distance] = -offset
        weights.append(second_sign)
        update = blank()
        update[minimum, distance] = offset - values[i]
        if i == 0:
            update[minimum, minimum] = 0.0
        if i + 1 < samples:
            update[distance, :inputs] = points[i + 1] - offset
            weights.append(update)
        else:
            weights.append(update[minimum])
    return _assemble(weights, offset), offset


def _assemble(weights: Sequence[Tensor], shift: float = 0.0) -> LinfDistNet:
    """Return the l_inf-dist net with these weights, for inputs that are not normalized.

    Args:
        weights: One matrix (outputs, inputs) per layer.
        shift: Number that is subtracted after each layer except the last.
    """
    layers = []
    for weight in weights:
        layer = LpDistance(weight.shape[1], weight.shape[0]).to(weight)
        layer.weight.detach().copy_(weight)
        layers.append(layer)
    network = LinfDistNet(layers, (0.0,), 1.0).to(weights[0])
    for mean_shift in network.features.shifts:
        assert isinstance(mean_shift, MeanShift)
        mean_shift.running_mean.fill_(shift)
    return network
