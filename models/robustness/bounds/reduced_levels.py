"""Levels of a reduced network: its neurons that are not linear over the box of inputs.

The rows of a level are the linear functions that its neurons are applied to: functions of the inputs and of the outputs
of earlier levels. A level bounds linear functions of its outputs from below by linear functions of its rows, for any
parameters in their ranges. Shapes: B images, R functions or subproblems, N neurons, P pieces of a maximum.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.relaxations import FLOAT64_SLACK, relax
from linflab.models.robustness.bounds.steps import Clamp

Values = dict[str, Tensor]  # tensors (B, R or 1, N, ...) of a level, by name
MIN_WEIGHT = 1e-9  # multipliers of other neurons may cancel a coefficient, although the relaxation is not exact


class Rows(NamedTuple):
    """Linear functions of the inputs and of the outputs of levels, each with an error bound.

    Attributes:
        inputs: (B, R, D) coefficients of the inputs.
        outputs: (B, R, N) coefficients of the outputs of each earlier level.
        constant: (B, R) constant terms.
        error: (B, R) bounds of the difference to the value that the network computes.
    """

    inputs: Tensor
    outputs: tuple[Tensor, ...]
    constant: Tensor
    error: Tensor

    def select(self, index: Tensor) -> "Rows":
        """Return the functions at indices (B, R')."""

        def gather(x: Tensor) -> Tensor:
            places = index if x.dim() == 2 else index[:, :, None].expand(-1, -1, x.shape[2])
            return x.gather(1, places)

        return Rows(gather(self.inputs), tuple(map(gather, self.outputs)), gather(self.constant), gather(self.error))

    def negate(self) -> "Rows":
        """Return the functions times -1."""
        return Rows(-self.inputs, tuple(-part for part in self.outputs), -self.constant, self.error)


class Level(ABC):
    """Neurons of one layer.

    Args:
        name: Name of the layer's output in the trace.
        index: (B, N) flat indices of the neurons in the output.
        is_used: (B, N) bool: False for padding, if images have different numbers of neurons.
        rows: Rows of the neurons.
        sound: If True, round the constants of relaxations outward.
    """

    def __init__(self, name: str, index: Tensor, is_used: Tensor, rows: Rows, sound: bool) -> None:
        self.name, self.index, self.is_used, self.rows, self.sound = name, index, is_used, rows, sound

    @property
    def size(self) -> int:
        """Number of neurons N."""
        return self.index.shape[1]

    @abstractmethod
    def root_state(self) -> Values:
        """Return the state without splits: the ranges or pieces of each neuron, and what follows from them."""

    @abstractmethod
    def refresh(self, state: Values) -> None:
        """Recompute the relaxations of a state after a split."""

    @abstractmethod
    def start_params(self, state: Values, functions: int, splits: bool) -> Values:
        """Return the parameters of the adaptive relaxation for R functions; with multipliers of splits if `splits`."""

    @abstractmethod
    def clamp_(self, params: Values, state: Values) -> None:
        """Move parameters into their valid ranges."""

    @abstractmethod
    def backward(self, a: Tensor, state: Values, params: Values) -> tuple[Tensor, Tensor, Tensor]:
        """Bound functions with coefficients a (B, R, N) of the outputs from below.

        Returns:
            Coefficients (B, R, rows), constants (B, R), and sums of the magnitudes of their terms (B, R).
        """

    @abstractmethod
    def output_magnitude(self) -> Tensor:
        """Return the largest magnitudes (B, N) of the outputs."""

    @abstractmethod
    def gaps(self, a: Tensor, state: Values, params: Values) -> Tensor:
        """Return how much (B, R, N) each neuron's relaxation may lose, for coefficients a of the outputs; 0: exact."""

    @abstractmethod
    def split_(self, state: Values, rows: Tensor, neurons: Tensor, side: Tensor) -> None:
        """Restrict neurons of the subproblems `rows` (M,) to one of the two sides (M,) of their split."""


class RangeLevel(Level):
    """Neurons y = f(v) with a linear relaxation of f over a range of v; a split halves the range.

    Lower slopes of a ReLU, any in [0, 1], are parameters. A split range l <= v <= u has a multiplier beta of any sign:
    beta v <= max(beta l, beta u), so beta v - max(beta l, beta u) may be added to a lower bound. So may a multiple
    (`overlap`, at least 0) of the difference of the lower and the upper line, which is at most 0 in the range.
    Source: Wang et al., "Beta-CROWN: Efficient Bound Propagation with Per-neuron Split Constraints", NeurIPS 2021.

    Args:
        name: Name of the layer's output in the trace.
        index: (B, N) flat indices of the neurons in the output.
        is_used: (B, N) bool: False for padding.
        rows: Rows of the neurons, one for each.
        sound: If True, round the constants of relaxations outward.
        layer: Activation.
        range_: (B, N) bounds of the rows as computed.
    """

    def __init__(
        self, name: str, index: Tensor, is_used: Tensor, rows: Rows, sound: bool, layer: nn.Module, range_: Box
    ) -> None:
        super().__init__(name, index, is_used, rows, sound)
        self.layer, self.range = layer, range_
        self.is_relu = isinstance(layer, nn.ReLU)

    def root_state(self) -> Values:
        """Return the ranges and their relaxations, (B, 1, N)."""
        never = torch.zeros_like(self.is_used)[:, None]
        state = {"lower": self.range.lower[:, None], "upper": self.range.upper[:, None], "low": never, "high": never}
        self.refresh(state)
        return state

    def refresh(self, state: Values) -> None:
        """Recompute the relaxations over the ranges."""
        lines = relax(self.layer, Box(state["lower"], state["upper"]), "adaptive", self.sound)
        assert lines is not None
        state["lower_slope"], state["upper_slope"] = lines.lower_slope, lines.upper_slope
        state["lower_intercept"] = (
            torch.as_tensor(lines.lower_intercept).to(lines.lower_slope).expand_as(lines.lower_slope)
        )
        state["upper_intercept"] = lines.upper_intercept

    def start_params(self, state: Values, functions: int, splits: bool) -> Values:
        """Return the adaptive slopes, and zero multipliers."""
        slopes = state["lower_slope"]
        shape = (len(slopes), functions, slopes.shape[2])
        params = {"slope": slopes.expand(shape).clone()} if self.is_relu else {}
        if splits:
            params |= {"beta": slopes.new_zeros(shape), "overlap": slopes.new_zeros(shape)}
        return params

    def clamp_(self, params: Values, state: Values) -> None:
        """Clamp slopes to [0, 1], and multipliers to the signs of split sides."""
        if "slope" in params:
            params["slope"].clamp_(0, 1)
        if "beta" in params:
            params["overlap"].clamp_min_(0)
            beta = params["beta"]
            beta.clamp_(
                torch.zeros_like(beta).masked_fill(state["low"], -torch.inf),
                torch.zeros_like(beta).masked_fill(state["high"], torch.inf),
            )

    def backward(self, a: Tensor, state: Values, params: Values) -> tuple[Tensor, Tensor, Tensor]:
        """Replace outputs by the lower or upper line, by the sign of their coefficients."""
        positive, negative = a.clamp_min(0), a.clamp_max(0)
        slope = state["lower_slope"]
        if "slope" in params:
            unstable = (state["lower"] < 0) & (state["upper"] > 0)
            slope = torch.where(unstable, params["slope"], slope)
        q = positive * slope + negative * state["upper_slope"]
        terms = negative * state["upper_intercept"]
        if not self.is_relu:
            terms = terms + positive * state["lower_intercept"]
        constant, size = terms.sum(dim=2), terms.detach().abs().sum(dim=2)
        if "beta" in params:
            beta, overlap = params["beta"], params["overlap"]
            q = q + beta + overlap * (slope - state["upper_slope"])
            ends = torch.relu(beta) * state["upper"] - torch.relu(-beta) * state["lower"]
            ends = ends + overlap * (state["upper_intercept"] - state["lower_intercept"])
            constant, size = constant - ends.sum(dim=2), size + ends.detach().abs().sum(dim=2)
        return q, constant, size

    def output_magnitude(self) -> Tensor:
        """Return the largest magnitudes (B, N) of outputs and rows."""
        ends = [self.range.lower.abs(), self.range.upper.abs()]
        return torch.stack([*ends, *(self.layer(end).abs() for end in self.range)]).amax(dim=0) + 1

    def gaps(self, a: Tensor, state: Values, params: Values) -> Tensor:
        """Return |a| times the distance of the line in use from the other line or, for a ReLU, from its two pieces."""
        if self.is_relu:
            lower, upper = state["lower"], state["upper"]
            slope = params["slope"]
            below = torch.minimum((1 - slope) * upper, -slope * lower).clamp_min(0)
            gap = torch.where(a < 0, state["upper_intercept"], below + 1e-3 * torch.minimum(upper, -lower).clamp_min(0))
            gap = torch.where((lower < 0) & (upper > 0), gap, 0.0)
        else:
            slopes, middle = state["upper_slope"] - state["lower_slope"], (state["lower"] + state["upper"]) / 2
            gap = slopes * middle + state["upper_intercept"] - state["lower_intercept"]
            size = 1 + state["lower"].abs() + state["upper"].abs()  # smaller gaps are rounding errors
            is_open = (state["upper"] - state["lower"] > 1e-9 * size) & (gap > 1e-11 * size)
            gap = torch.where(is_open, gap, 0.0)
        return gap * (a.abs() + MIN_WEIGHT)

    def split_(self, state: Values, rows: Tensor, neurons: Tensor, side: Tensor) -> None:
        """Cut ranges at 0, at a bend of the activation, or in the middle; side 1 is above."""
        lower, upper = state["lower"][0, rows, neurons], state["upper"][0, rows, neurons]
        point = self._split_point(lower, upper)
        above = side.bool()
        state["lower"][0, rows, neurons] = torch.where(above, point, lower)
        state["upper"][0, rows, neurons] = torch.where(above, upper, point)
        state["low"][0, rows, neurons] |= above
        state["high"][0, rows, neurons] |= ~above

    def _split_point(self, lower: Tensor, upper: Tensor) -> Tensor:
        middle = (lower + upper) / 2
        if isinstance(self.layer, nn.ReLU | nn.LeakyReLU | nn.ELU):
            bends = [0.0]
        elif isinstance(self.layer, Clamp):
            bends = [self.layer.low, self.layer.high]
        else:
            bends = []
        for bend in bends:
            middle = torch.where((lower < bend) & (upper > bend), torch.full_like(middle, bend), middle)
        return middle


class MaxLevel(Level):
    """Neurons y = orientation max_p v_p; a split decides whether one piece attains the maximum.

    Let j be the piece with the largest upper bound u_j, and m the largest of the other upper bounds, at least l_j. The
    maximum is at most theta v_j + max(m - theta l_j, (1 - theta) u_j) for every theta in [0, 1]. It is at least every
    piece, which gives v_p - y <= 0 a multiplier beta_p >= 0. If one piece k remains, y = v_k, and the constraints
    v_p <= v_k have the same multipliers.

    Args:
        name: Name of the layer's output in the trace.
        index: (B, N) flat indices of the neurons in the output.
        is_used: (B, N) bool: False for padding.
        rows: Rows of the pieces, (B, N P, ...).
        sound: If True, round the constants of relaxations outward.
        orientation: (B, N) 1, or -1 for minima.
        range_: (B, N, P) bounds of the pieces; -inf for pieces that cannot attain the maximum.
    """

    def __init__(
        self, name: str, index: Tensor, is_used: Tensor, rows: Rows, sound: bool, orientation: Tensor, range_: Box
    ) -> None:
        super().__init__(name, index, is_used, rows, sound)
        self.orientation, self.range = orientation, range_
        self.candidates = range_.upper > -torch.inf
        self.piece_lower, self.piece_upper = (torch.where(self.candidates, end, 0.0)[:, None] for end in range_)

    def root_state(self) -> Values:
        """Return the candidates (B, 1, N, P), and what follows from them."""
        state = {"mask": self.candidates[:, None].clone()}
        self.refresh(state)
        return state

    def refresh(self, state: Values) -> None:
        """Recompute the best pieces among the candidates."""
        mask = state["mask"]
        upper = self.piece_upper.masked_fill(~mask, -torch.inf)
        lower = self.piece_lower.masked_fill(~mask, -torch.inf)
        state["top_upper"], state["top"] = (x[..., 0] for x in upper.max(dim=-1, keepdim=True))
        state["best"] = lower.argmax(dim=-1)
        top = state["top"][..., None]
        state["top_lower"] = lower.gather(-1, top)[..., 0]
        runner_up = upper.scatter(-1, top, -torch.inf).amax(dim=-1)
        state["runner_up"] = torch.maximum(runner_up, state["top_lower"])
        state["decided"] = mask.sum(dim=-1) <= 1
        for name in ("top_upper", "top_lower", "runner_up"):  # padding has no candidates
            state[name] = torch.where(state[name].isfinite(), state[name], 0.0)

    def start_params(self, state: Values, functions: int, splits: bool) -> Values:
        """Return the slopes of the chord above, and zero multipliers."""
        width = state["top_upper"] - state["top_lower"]
        chord = (state["top_upper"] - state["runner_up"]) / torch.where(width > 0, width, 1.0)
        shape = (chord.shape[0], functions, chord.shape[2])
        beta = chord.new_zeros(*shape, self.candidates.shape[2])
        return {"theta": chord.clamp(0, 1).expand(shape).clone(), "beta": beta}

    def clamp_(self, params: Values, state: Values) -> None:
        """Clamp slopes to [0, 1], and multipliers to nonnegative numbers."""
        params["theta"].clamp_(0, 1)
        params["beta"].clamp_min_(0).mul_(self.candidates[:, None])

    def backward(self, a: Tensor, state: Values, params: Values) -> tuple[Tensor, Tensor, Tensor]:
        """Replace maxima by their pieces."""
        theta, beta, decided = params["theta"], params["beta"], state["decided"]
        rest = a * self.orientation[:, None] - beta.sum(dim=-1)
        positive, negative = rest.clamp_min(0), rest.clamp_max(0)
        intercept = torch.maximum(state["runner_up"] - theta * state["top_lower"], (1 - theta) * state["top_upper"])
        if self.sound:
            largest = torch.maximum(
                state["top_upper"].abs(), torch.maximum(state["top_lower"].abs(), state["runner_up"].abs())
            )
            intercept = intercept + FLOAT64_SLACK * (1 + largest)
        theta = torch.where(decided, 1.0, theta)
        terms = negative * torch.where(decided, 0.0, intercept)
        places = torch.stack([state["best"], state["top"]], dim=-1).expand(*rest.shape, 2)
        q = beta.scatter_add(3, places, torch.stack([positive, negative * theta], dim=-1))
        return q.flatten(2), terms.sum(dim=2), terms.detach().abs().sum(dim=2)

    def output_magnitude(self) -> Tensor:
        """Return the largest magnitudes (B, N) of outputs and pieces."""
        return torch.maximum(self.piece_lower.abs(), self.piece_upper.abs())[:, 0].amax(dim=-1) + 1

    def gaps(self, a: Tensor, state: Values, params: Values) -> Tensor:
        """Return |a| times the distance between the upper and the lower bound of the maximum."""
        best = self.piece_lower.expand(*state["mask"].shape).gather(-1, state["best"][..., None])[..., 0]
        return torch.where(state["decided"], 0.0, (state["top_upper"] - best).clamp_min(1e-12)) * (a.abs() + MIN_WEIGHT)

    def split_(self, state: Values, rows: Tensor, neurons: Tensor, side: Tensor) -> None:
        """Side 1: the piece with the largest upper bound attains the maximum. Side 0: another one does."""
        masks = state["mask"][0, rows, neurons]
        top = nn.functional.one_hot(state["top"][0, rows, neurons], masks.shape[1]).bool()
        state["mask"][0, rows, neurons] = torch.where(side.bool()[:, None], top, masks & ~top)
