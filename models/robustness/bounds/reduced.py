"""Reduced networks: a network over a box of inputs, with only the neurons that are not linear there.

Neurons that are linear over the box are eliminated. What remains are levels of nonlinear neurons. Their rows are linear
functions of the inputs and of the outputs of earlier levels, stored as matrices (see `reduced_levels`). Backward
propagation of R functions, or of R subproblems of branch and bound, is then a few matrix products per level.

All parameters of the relaxations are free: lower slopes of ReLUs (Xu et al., "Fast and Complete", ICLR 2021), and
multipliers of split constraints (Wang et al., NeurIPS 2021). Bounds hold for any values of theirs, so soundness does
not depend on the optimization.

Everything is computed in float64. Sound bounds subtract the errors of the rows, which include all rounding in float32
and in the elimination. They also subtract a bound of the float64 errors of backward propagation: gamma(N), with N the
number of operations behind a result, times the sums of the magnitudes of all terms.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.reduced_levels import Level, Rows, Values
from linflab.models.robustness.bounds.rounding import gamma

MULTIPLIERS = ("beta", "overlap")


class Backward(NamedTuple):
    """Results of backward propagation of R functions.

    Attributes:
        bounds: (B, R) lower bounds.
        inputs: (B, R, D) coefficients of the inputs.
        outputs: (B, R, N) coefficients of the outputs of each level.
    """

    bounds: Tensor
    inputs: Tensor
    outputs: list[Tensor]


class ReducedNetwork:
    """Levels of nonlinear neurons over boxes of inputs.

    Args:
        box: Lower and upper bounds (B, D) of the inputs, in float64.
        sound: If True, include rounding errors.
    """

    def __init__(self, box: Box, sound: bool) -> None:
        self.box, self.sound = box, sound
        self.center, self.radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
        self.magnitude = torch.maximum(box.lower.abs(), box.upper.abs())
        self.levels: list[Level] = []
        self.states: list[Values] = []
        self.row_magnitudes: list[Tensor] = []

    def append(self, level: Level) -> None:
        """Add a level whose rows depend on the inputs and on the levels so far."""
        self.row_magnitudes.append(self.compute_row_magnitudes(level.rows))
        self.levels.append(level)
        self.states.append(level.root_state())

    def compute_row_magnitudes(self, rows: Rows) -> Tensor:
        """Return the sums (B, R) of the magnitudes of the terms of rows."""
        total = _dot(rows.inputs.abs(), self.magnitude) + rows.constant.abs() + rows.error
        for level, part in zip(self.levels, rows.outputs, strict=False):
            total = total + _dot(part.abs(), level.output_magnitude())
        return total

    def start_params(self, depth: int, functions: int, splits: bool = False) -> list[Values]:
        """Return the parameters of the adaptive relaxations of the first `depth` levels for R functions."""
        pairs = zip(self.levels[:depth], self.states[:depth], strict=True)
        return [level.start_params(state, functions, splits) for level, state in pairs]

    def propagate(
        self, functions: Rows, params: Sequence[Values], states: Sequence[Values] | None = None, strict: bool = True
    ) -> Backward:
        """Propagate functions (B, R) backward to the inputs, and bound them from below.

        Args:
            functions: Functions of the inputs and of the outputs of the first levels.
            params: Parameters of these levels.
            states: States of these levels, (B, 1, ...) or (B, R, ...); None: without splits.
            strict: If False, omit the bound of the float64 errors, which the optimization does not need.
        """
        states = self.states if states is None else states
        inputs, outputs = functions.inputs, list(functions.outputs)
        constant, size = functions.constant - functions.error, functions.constant.abs()
        strict, final = strict and self.sound, list[Tensor]()
        if strict:
            size = size + self.compute_row_magnitudes(functions)
        for k in reversed(range(len(outputs))):
            rows, a = self.levels[k].rows, outputs[k]
            final.append(a)
            q, part, part_size = self.levels[k].backward(a, states[k], params[k])
            inputs = inputs + q @ rows.inputs
            for j in range(k):
                outputs[j] = outputs[j] + q @ rows.outputs[j]
            constant = constant + part + _dot(q, rows.constant)
            if self.sound:
                constant = constant - _dot(q.abs(), rows.error)
            if strict:
                a_size = _dot(a.abs(), self.levels[k].output_magnitude())
                size = size + _dot(q.abs(), self.row_magnitudes[k]) + part_size + a_size
        bounds = constant + _dot(inputs, self.center) - _dot(inputs.abs(), self.radius)
        if strict:
            terms = inputs.shape[2] + sum(level.rows.constant.shape[1] + level.size for level in self.levels)
            size = size + _dot(inputs.abs(), self.magnitude)
            bounds = bounds - 4 * gamma(terms + 64, torch.float64) * size
        return Backward(bounds, inputs, outputs)

    def minimizer(self, inputs: Tensor) -> Tensor:
        """Return the inputs (B, R, D) at which functions with these coefficients (B, R, D) are least."""
        lower, upper = (end[:, None] for end in self.box)
        return torch.where(inputs > 0, lower, upper)

    def optimize(
        self,
        functions: Rows,
        params: list[Values],
        steps: int,
        states: Sequence[Values] | None = None,
        step_size: float = 0.25,
        target: float | None = 0.0,
        multiplier_scale: float = 1.0,
    ) -> tuple[Tensor, list[Values]]:
        """Maximize lower bounds over parameters by Adam; return the best sound bounds (B, R) and their parameters.

        Args:
            functions: Functions to bound from below.
            params: Parameters to start from, which are overwritten.
            steps: Number of steps.
            states: States of the levels; None: without splits.
            step_size: First step size of slopes, which decays.
            target: Stop when all bounds exceed this; None: never.
            multiplier_scale: Step size of multipliers, relative to that of slopes.
        """
        start = self.propagate(functions, params, states)
        best, best_params = start.bounds, [{name: x.clone() for name, x in part.items()} for part in params]
        leaves = [x for part in params for x in part.values()]
        if not leaves or not steps or _is_done(best, target):
            return best, best_params
        slopes, multipliers = (
            [x for part in params for name, x in part.items() if (name in MULTIPLIERS) == is_multiplier]
            for is_multiplier in (False, True)
        )
        groups = [
            {"params": [x.requires_grad_() for x in group], "lr": step_size * scale}
            for group, scale in ((slopes, 1.0), (multipliers, multiplier_scale))
            if group
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), maximize=True)
        for step in range(steps + 1):
            with torch.enable_grad():
                bounds = self.propagate(functions, params, states, strict=False).bounds
                if step < steps:
                    optimizer.zero_grad()
                    torch.where(bounds.isfinite(), bounds, 0.0).sum().backward()
            self._keep_best(bounds.detach(), params, best, best_params)
            if step == steps or _is_done(best, target):
                break
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= 0.95
            for level, part, state in zip(self.levels, params, self.states if states is None else states, strict=False):
                with torch.no_grad():
                    level.clamp_(part, state)
        for x in leaves:
            x.requires_grad_(False)
        return self.propagate(functions, best_params, states).bounds, best_params

    @staticmethod
    def _keep_best(bounds: Tensor, params: list[Values], best: Tensor, best_params: list[Values]) -> None:
        better = bounds > best
        best.copy_(torch.where(better, bounds, best))
        for part, best_part in zip(params, best_params, strict=True):
            for name, x in part.items():
                is_better = better.view(*better.shape, *[1] * (x.dim() - 2))
                best_part[name].copy_(torch.where(is_better, x.detach(), best_part[name]))


def _dot(a: Tensor, values: Tensor) -> Tensor:
    """Return the products (B, R) of coefficients (B, R, N) and values (B, N)."""
    return torch.matmul(a, values[:, :, None])[:, :, 0]


def _is_done(bounds: Tensor, target: float | None) -> bool:
    return target is not None and bool((bounds > target).all())
