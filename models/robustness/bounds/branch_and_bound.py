"""Branch and bound on the nonlinear neurons of a reduced network.

A subproblem that its bound does not decide is split at a neuron into two. Both have the constraint of their side in
their bounds, with an optimized multiplier (Wang et al., "Beta-CROWN", NeurIPS 2021). The neuron is selected by filtered
smart branching (De Palma et al., "Improved Branch and Bound for Neural Network Verification via Lagrangian
Decomposition", 2021): of the neurons whose relaxations lose most, the one whose two sides have the best bounds without
optimization. A subproblem that no further split can decide is a linear program, whose exact solution gives either
multipliers that prove the bound or a counterexample.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from linflab.models.robustness.bounds.linear_bounds import MAX_COEFFICIENTS
from linflab.models.robustness.bounds.linear_program import LinearProgram
from linflab.models.robustness.bounds.reduced import ReducedNetwork
from linflab.models.robustness.bounds.reduced_levels import Rows
from linflab.models.robustness.bounds.subproblems import Subproblems, split

Status = Literal["certified", "falsified", "unknown"]
CANDIDATES = 4  # neurons whose splits are tried
GAP_WEIGHT = 0.1  # weight of what a relaxation may lose, against the improvement of a split
STEPS = 12  # optimization steps of a subproblem
STEP_SIZE = 0.2
MIN_BATCH = 32  # smaller batches are split further before their bounds are optimized
MAX_OPEN = 2**14  # with more open subproblems, those closest to a decision are taken first
CHECKED_POINTS = 32  # minimizers of bounds that are tried as counterexamples, in each iteration


class SearchResult(NamedTuple):
    """Result of branch and bound.

    Attributes:
        status: certified: all functions are positive; falsified: a counterexample was found; unknown: the search ended.
        point: (D,) counterexample among the inputs of the reduced network, else None.
        subproblems: Number of subproblems that were bounded.
    """

    status: Status
    point: Tensor | None
    subproblems: int


class BranchAndBound:
    """Proof that functions of a reduced network are positive, or search for a counterexample.

    Args:
        network: Reduced network of one image.
        functions: (1, R) functions of the inputs and of the outputs of all levels.
        is_counterexample: Function that returns which inputs (M, D) are counterexamples, (M,) bool.
        batch_size: Number of subproblems that are bounded at once.
    """

    def __init__(
        self,
        network: ReducedNetwork,
        functions: Rows,
        is_counterexample: Callable[[Tensor], Tensor],
        batch_size: int,
    ) -> None:
        self.network, self.functions, self.is_counterexample = network, functions, is_counterexample
        width = network.center.shape[1] + sum(level.rows.constant.shape[1] for level in network.levels)
        self.batch_size = max(1, min(batch_size, MAX_COEFFICIENTS // (8 * width)))
        self.scale = 1.0

    def run(self, steps: int, max_subproblems: float, is_over: Callable[[], bool]) -> SearchResult:
        """Return the result of the search.

        Args:
            steps: Optimization steps of the bounds without splits.
            max_subproblems: Largest number of subproblems.
            is_over: Function that returns True when the search must end.
        """
        opened, count, has_undecided = self._root(steps), 0, False
        while len(opened):
            point = self._find_counterexample(opened)
            if point is not None:
                return SearchResult("falsified", point, count)
            if is_over() or count >= max_subproblems:
                return SearchResult("unknown", None, count)
            size = min(len(opened), max(1, self.batch_size // 2))
            chosen = opened.bounds.topk(size, largest=len(opened) > MAX_OPEN).indices
            rest = torch.ones(len(opened), dtype=torch.bool, device=chosen.device)
            rest[chosen] = False
            children, stalled = self._branch_deeply(opened.select(chosen))
            parts = [children]
            for k in range(len(stalled)):
                if is_over():
                    return SearchResult("unknown", None, count)
                problem, point, is_positive = self._solve_program(stalled.select(torch.tensor([k])))
                if point is not None:
                    return SearchResult("falsified", point, count)
                is_open = ~(problem.bounds > 0)
                if is_positive:  # only rounding errors keep the bound from being positive, which no split changes
                    has_undecided |= bool(is_open.all())
                    continue
                halves, undecided = self._branch(problem.select(is_open), has_program=True)
                parts.append(halves)
                has_undecided |= len(undecided) > 0
            children = Subproblems.concatenate(parts)
            count += len(children) + len(stalled)
            bounded = self._bound(children) if len(children) else children
            opened = Subproblems.concatenate([opened.select(rest), bounded.select(~(bounded.bounds > 0))])
        return SearchResult("unknown" if has_undecided else "certified", None, count)

    def _root(self, steps: int) -> Subproblems:
        network, count = self.network, self.functions.constant.shape[1]
        params = network.start_params(len(network.levels), count)
        bounds, params = network.optimize(self.functions, params, steps)
        outputs = network.propagate(self.functions, params).outputs
        sizes = [a.abs().amax() for a in outputs if a.numel()]
        self.scale = max(1e-9, float(torch.stack(sizes).amax())) if sizes else 1.0
        with_multipliers = network.start_params(len(network.levels), count, splits=True)
        for part, found in zip(with_multipliers, params, strict=True):
            part.update(found)
        states = [
            {name: x.expand(1, count, *x.shape[2:]).clone() for name, x in state.items()} for state in network.states
        ]
        root = Subproblems(torch.arange(count, device=bounds.device), states, with_multipliers, bounds[0])
        return root.select(~(root.bounds > 0))

    def _bound(self, problems: Subproblems) -> Subproblems:
        """Return subproblems with optimized parameters and bounds."""
        functions = self.functions.select(problems.target[None])
        bounds, params = self.network.optimize(
            functions, problems.params, STEPS, problems.states, STEP_SIZE, 0.0, 0.5 * self.scale
        )
        return replace(problems, params=params, bounds=torch.maximum(bounds[0], problems.bounds))

    def _branch_deeply(self, problems: Subproblems) -> tuple[Subproblems, Subproblems]:
        """Split subproblems until there are enough for a batch; return them, and those that are stalled.

        A few subproblems take as long as a batch of them, so that several splits at once save time.
        """
        all_stalled = []
        while True:
            problems, stalled = self._branch(problems)
            all_stalled.append(stalled)
            functions = self.functions.select(problems.target[None])
            bounds = self.network.propagate(functions, problems.params, problems.states).bounds[0]
            bounds = torch.maximum(bounds, problems.bounds)  # a part has at least the bound of the whole
            problems = replace(problems, bounds=bounds).select(~(bounds > 0))
            if not 0 < len(problems) <= min(MIN_BATCH, self.batch_size) // 2:
                return problems, Subproblems.concatenate(all_stalled)

    def _branch(self, problems: Subproblems, has_program: bool = False) -> tuple[Subproblems, Subproblems]:
        """Return both sides of a split of each subproblem, and the subproblems that are stalled.

        A subproblem is stalled if its relaxations lose less than its bound lacks, so that only better multipliers help.

        Args:
            problems: Subproblems.
            has_program: If True, their linear programs are solved; only those without a neuron to split are stalled.
        """
        network = self.network
        functions = self.functions.select(problems.target[None])
        outputs = network.propagate(functions, problems.params, problems.states, strict=False).outputs
        parts = zip(network.levels, outputs, problems.states, problems.params, strict=True)
        gaps = [level.gaps(a, state, params)[0] for level, a, state, params in parts]
        scores = torch.cat([problems.bounds.new_zeros(len(problems), 1), *gaps], dim=1)
        is_stalled = ~(scores.amax(dim=1) > 0)
        if not has_program:
            is_stalled |= scores.sum(dim=1) < -problems.bounds
        stalled, scores = problems.select(is_stalled), scores[~is_stalled, 1:]
        problems = problems.select(~is_stalled)
        if not len(problems):
            return problems, stalled
        sizes = [level.size for level in network.levels]
        level_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(scores.device)
        neuron_of = torch.cat([torch.arange(size) for size in sizes]).to(scores.device)
        best, chosen = scores.topk(min(CANDIDATES, scores.shape[1]), dim=1)
        values = [self._try_split(problems, level_of[one], neuron_of[one]) for one in chosen.unbind(1)]
        value = (torch.stack(values, dim=1) + GAP_WEIGHT * best).masked_fill(~(best > 0), -torch.inf)
        one = chosen.gather(1, value.argmax(dim=1, keepdim=True))[:, 0]
        sides = [split(network, problems, level_of[one], neuron_of[one], torch.full_like(one, side)) for side in (0, 1)]
        return Subproblems.concatenate(sides), stalled

    def _try_split(self, problems: Subproblems, level: Tensor, neuron: Tensor) -> Tensor:
        """Return the value (S,) of a split: the sum of the improvements of both sides, the lower one with more weight.

        Without multipliers, the bound of a side may be worse than before the split; it then counts as unchanged.
        """
        functions = self.functions.select(problems.target[None])
        found = []
        for side in (0, 1):
            part = split(self.network, problems, level, neuron, torch.full_like(level, side))
            bounds = self.network.propagate(functions, part.params, part.states, strict=False).bounds[0]
            found.append((torch.maximum(bounds, problems.bounds) - problems.bounds).minimum(-problems.bounds))
        return torch.minimum(*found) + 0.3 * torch.maximum(*found)

    def _solve_program(self, problem: Subproblems) -> tuple[Subproblems, Tensor | None, bool]:
        """Solve the linear program of one subproblem.

        Returns:
            The subproblem with the bound of its program; a counterexample or None; and True if the optimum is positive.
        """
        functions = self.functions.select(problem.target[None])
        is_positive = False
        for params, optimum, point in LinearProgram(self.network, functions, problem).solutions():
            bounds = self.network.propagate(functions, params, problem.states).bounds[0]
            if bool((bounds > problem.bounds).all()):
                problem = replace(problem, params=params, bounds=bounds)
            is_positive |= optimum > 0
            if bool((bounds > 0).all()):
                break
            if point is not None and bool(self.is_counterexample(point[None])[0]):
                return problem, point, is_positive
        return problem, None, is_positive

    def _find_counterexample(self, problems: Subproblems) -> Tensor | None:
        """Return an input where the bound of a subproblem is attained, if it is a counterexample."""
        some = problems.select(problems.bounds.topk(min(CHECKED_POINTS, len(problems)), largest=False).indices)
        functions = self.functions.select(some.target[None])
        backward = self.network.propagate(functions, some.params, some.states, strict=False)
        points = self.network.minimizer(backward.inputs)[0]
        found = self.is_counterexample(points).nonzero()[:, 0]
        return points[found[0]] if len(found) else None
