"""Subproblems of branch and bound, stored as tensors with one entry per subproblem."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linflab.models.robustness.bounds.reduced import ReducedNetwork
from linflab.models.robustness.bounds.reduced_levels import Values


@dataclass(frozen=True)
class Subproblems:
    """S subproblems: a function to bound from below, over a part of the box of inputs.

    Attributes:
        target: (S,) index of the function.
        states: Splits of each level, tensors (1, S, N, ...).
        params: Parameters of the relaxations of each level, tensors (1, S, N, ...).
        bounds: (S,) lower bounds of the functions.
    """

    target: Tensor
    states: list[Values]
    params: list[Values]
    bounds: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def select(self, index: Tensor) -> "Subproblems":
        """Return copies of the subproblems at these indices, or where a mask is True."""
        states, params = (
            [{name: x[:, index] for name, x in part.items()} for part in parts] for parts in (self.states, self.params)
        )
        return Subproblems(self.target[index], states, params, self.bounds[index])

    @staticmethod
    def concatenate(parts: "Sequence[Subproblems]") -> "Subproblems":
        """Return all subproblems of one or more groups."""

        def join(values: Sequence[list[Values]]) -> list[Values]:
            return [
                {name: torch.cat([one[name] for one in level], dim=1) for name in level[0]}
                for level in zip(*values, strict=True)
            ]

        return Subproblems(
            torch.cat([part.target for part in parts]),
            join([part.states for part in parts]),
            join([part.params for part in parts]),
            torch.cat([part.bounds for part in parts]),
        )


def split(network: ReducedNetwork, problems: Subproblems, level: Tensor, neuron: Tensor, side: Tensor) -> Subproblems:
    """Return one side of a split of each subproblem; the other tensors are shared.

    Args:
        network: Reduced network of one image.
        problems: S subproblems.
        level: (S,) index of the level of the split neuron.
        neuron: (S,) index of the neuron in its level.
        side: (S,) 0 or 1.
    """
    states = []
    for k, part in enumerate(network.levels):
        rows = (level == k).nonzero()[:, 0]
        state = problems.states[k]
        if len(rows):
            state = {name: x.clone() for name, x in state.items()}
            part.split_(state, rows, neuron[rows], side[rows])
            part.refresh(state)
        states.append(state)
    params = [{name: x.clone() for name, x in part.items()} for part in problems.params]
    for part, values, state in zip(network.levels, params, states, strict=True):
        part.clamp_(values, state)
    return replace(problems, states=states, params=params)
