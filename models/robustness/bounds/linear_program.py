"""Linear program of a subproblem of branch and bound.

Variables are the inputs x, the outputs y of the levels, and one violation t >= 0 of all split constraints with cost M.
Rows v are linear in x and y. The program is always feasible. If its splits contradict each other, its optimum grows
with M, so that large M prove it. Dual solutions are multipliers of the split constraints and slopes of ReLUs, for which
backward propagation computes a sound bound. The solver (HiGHS) therefore needs not be exact.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from linflab.models.robustness.bounds.reduced import ReducedNetwork
from linflab.models.robustness.bounds.reduced_levels import MaxLevel, RangeLevel, Rows, Values
from linflab.models.robustness.bounds.subproblems import Subproblems

TIME_LIMIT_S = 20.0  # per program; one that takes longer proves nothing
COSTS = (1e2, 1e4, 1e6)  # costs of a violation, relative to the size of the function


class Solution(NamedTuple):
    """Optimum of a linear program, in real arithmetic.

    Attributes:
        params: Parameters of the relaxations from the dual solution.
        optimum: Least value of the function, plus the cost of a violation.
        inputs: (D,) inputs where it is attained, if no constraint is violated there.
    """

    params: list[Values]
    optimum: float
    inputs: Tensor | None


class LinearProgram:
    """Linear program of one subproblem: the minimum of a function over the relaxed network with its splits.

    Args:
        network: Reduced network of one image.
        functions: (1, 1) function.
        problem: One subproblem.
    """

    def __init__(self, network: ReducedNetwork, functions: Rows, problem: Subproblems) -> None:
        self.network, self.problem = network, problem
        sizes = [network.center.shape[1], *(level.size for level in network.levels)]
        self.starts = np.cumsum([0, *sizes])
        self.width = int(self.starts[-1]) + 1  # with the violation
        self.cost, self.constant = self._row_matrix(functions)[0], float(functions.constant[0, 0])
        lower, upper = (end[0].cpu().numpy() for end in network.box)
        free = np.full(self.width - len(lower) - 1, np.inf)
        self.bounds = np.stack([np.concatenate([lower, -free, [0.0]]), np.concatenate([upper, free, [np.inf]])], axis=1)
        self.rows: list[np.ndarray] = []  # rows @ variables <= limits
        self.limits: list[np.ndarray] = []
        self.equal_rows: list[np.ndarray] = [np.zeros((0, self.width))]
        self.equal_limits: list[np.ndarray] = [np.zeros(0)]
        self.places: list[dict[str, tuple[slice, np.ndarray]]] = []
        self.count = 0
        for k, level in enumerate(network.levels):
            self.places.append({})
            state = {name: x[0, 0].cpu() for name, x in problem.states[k].items()}
            values, constant = self._row_matrix(level.rows), level.rows.constant[0].cpu().numpy()
            outputs = np.zeros((level.size, self.width))
            outputs[np.arange(level.size), self.starts[k + 1] + np.arange(level.size)] = 1
            if isinstance(level, RangeLevel):
                self._add_range_level(level, state, values, constant, outputs)
            elif isinstance(level, MaxLevel):
                self._add_max_level(level, state, values, constant, outputs)

    def solutions(self) -> Iterator[Solution]:
        """Yield solutions for growing costs of a violation, until there is none."""
        from scipy.optimize import linprog

        scale = max(1e-6, float(np.abs(self.cost).max()))
        for relative_cost in COSTS:
            cost = self.cost / scale
            cost[-1] = relative_cost
            found = linprog(
                cost,
                np.concatenate(self.rows) if self.rows else None,
                np.concatenate(self.limits) if self.limits else None,
                np.concatenate(self.equal_rows),
                np.concatenate(self.equal_limits),
                self.bounds,
                method="highs",
                options={"time_limit": TIME_LIMIT_S},
            )
            if found.status != 0:
                continue
            is_feasible = found.x[-1] <= 1e-9
            inputs = torch.as_tensor(found.x[: self.starts[1]]).to(self.network.center)
            optimum = float(found.fun) * scale + self.constant
            yield Solution(self._read_params(found, scale), optimum, inputs if is_feasible else None)
            if is_feasible:
                return

    def _row_matrix(self, rows: Rows) -> np.ndarray:
        """Return the coefficients of rows of all variables."""
        parts = [rows.inputs, *rows.outputs]
        matrix = np.zeros((rows.constant.shape[1], self.width))
        for start, part in zip(self.starts, parts, strict=False):
            matrix[:, start : start + part.shape[2]] = part[0].cpu().numpy()
        return matrix

    def _require(self, k: int, name: str, rows: np.ndarray, limits: np.ndarray, index: np.ndarray) -> None:
        """Add rows @ variables <= limits, the constraints `name` of elements `index` of level k."""
        self.rows.append(rows)
        self.limits.append(limits)
        self.places[k][name] = slice(self.count, self.count + len(rows)), index
        self.count += len(rows)

    def _add_range_level(
        self, level: RangeLevel, state: Values, values: np.ndarray, constant: np.ndarray, outputs: np.ndarray
    ) -> None:
        k = len(self.places) - 1
        part = {name: x.numpy() for name, x in state.items()}
        is_open = (part["lower"] < 0) & (part["upper"] > 0) if level.is_relu else np.ones(level.size, dtype=bool)
        fixed = np.flatnonzero(~is_open)
        self.equal_rows.append(outputs[fixed] - part["lower_slope"][fixed, None] * values[fixed])
        self.equal_limits.append(part["lower_slope"][fixed] * constant[fixed])
        index = np.flatnonzero(is_open)
        lower_slope = np.ones(level.size) if level.is_relu else part["lower_slope"]
        for name, sign, slope, intercept in (
            ("below", 1.0, lower_slope, part["lower_intercept"]),
            ("above", -1.0, part["upper_slope"], part["upper_intercept"]),
        ):
            line = slope[index, None] * values[index] - outputs[index]
            self._require(k, name, sign * line, -sign * (slope * constant + intercept)[index], index)
        if level.is_relu:
            self._require(k, "zero", -outputs[index], np.zeros(len(index)), index)
        for name, sign, end in (("low", -1.0, part["lower"]), ("high", 1.0, part["upper"])):
            index = np.flatnonzero(part[name])
            rows = sign * values[index]
            rows[:, -1] = -1.0
            self._require(k, name, rows, sign * (end - constant)[index], index)

    def _add_max_level(
        self, level: MaxLevel, state: Values, values: np.ndarray, constant: np.ndarray, outputs: np.ndarray
    ) -> None:
        k, pieces = len(self.places) - 1, level.candidates.shape[2]
        candidates, decided = level.candidates[0].cpu().numpy(), state["decided"].numpy()
        values, constant = values.reshape(level.size, pieces, -1), constant.reshape(level.size, pieces)
        top, orientation = state["top"].numpy(), level.orientation[0].cpu().numpy()
        used = level.is_used[0].cpu().numpy()
        maxima = orientation[:, None] * outputs
        fixed = np.flatnonzero(decided | ~used)
        winner = top[fixed]
        self.equal_rows.append(maxima[fixed] - values[fixed, winner])
        self.equal_limits.append(constant[fixed, winner])
        neuron, piece = np.nonzero(candidates & decided[:, None] & (np.arange(pieces) != top[:, None]))
        rows = values[neuron, piece] - values[neuron, top[neuron]]
        rows[:, -1] = -1.0
        limits = constant[neuron, top[neuron]] - constant[neuron, piece]
        self._require(k, "won", rows, limits, neuron * pieces + piece)
        neuron, piece = np.nonzero(candidates & ~decided[:, None])
        rows = values[neuron, piece] - maxima[neuron]
        self._require(k, "below", rows, -constant[neuron, piece], neuron * pieces + piece)
        index = np.flatnonzero(~decided & used)
        low, high, other = (state[name].numpy() for name in ("top_lower", "top_upper", "runner_up"))
        theta = np.clip((high - other) / np.where(high > low, high - low, 1.0), 0, 1)
        shift = np.maximum(other - theta * low, (1 - theta) * high)
        line = theta[:, None] * values[np.arange(level.size), top]
        limits = theta * constant[np.arange(level.size), top] + shift
        self._require(k, "above", (maxima - line)[index], limits[index], index)

    def _read_params(self, found: object, scale: float) -> list[Values]:
        """Return the parameters that a dual solution gives."""
        duals = np.maximum(-np.asarray(found.ineqlin.marginals), 0) * scale if self.rows else np.zeros(0)  # type: ignore[attr-defined]
        result = []
        for k, level in enumerate(self.network.levels):
            params = {name: x.clone() for name, x in self.problem.params[k].items()}
            multipliers = {name: (duals[rows], index) for name, (rows, index) in self.places[k].items()}
            if isinstance(level, RangeLevel):
                beta = np.zeros(level.size)
                for name, sign in (("low", -1.0), ("high", 1.0)):
                    values, index = multipliers[name]
                    beta[index] += sign * values
                params["beta"].copy_(torch.as_tensor(beta)[None, None])
                (line, index), (above, _) = multipliers["below"], multipliers["above"]
                total = line + (multipliers["zero"][0] if level.is_relu else 0.0)
                overlap = np.zeros(level.size)
                overlap[index] = np.minimum(total, above)  # both lines of a neuron may be active
                params["overlap"].copy_(torch.as_tensor(overlap)[None, None])
                if level.is_relu:
                    slope = params["slope"][0, 0].cpu().numpy().copy()
                    slope[index] = np.where(total > 0, line / np.where(total > 0, total, 1.0), slope[index])
                    params["slope"].copy_(torch.as_tensor(slope)[None, None])
            else:
                flat = np.zeros(params["beta"].numel())
                for name in ("won", "below"):
                    values, index = multipliers[name]
                    flat[index] += values
                params = level.start_params(self.problem.states[k], 1, splits=True)  # the program has these slopes
                params["beta"].copy_(torch.as_tensor(flat).view_as(params["beta"]))
            level.clamp_(params, self.problem.states[k])
            result.append(params)
        return result
