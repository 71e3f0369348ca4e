"""Stochastic weight averaging: the running mean of a network's weights over steps at the end of training.

Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from linflab.platform.config.experiment import TrainingConfig


class WeightAverage:
    """Mean of the weights after selected steps. Workers hold equal weights, so each has the same average.

    Args:
        network: Network whose weights are averaged.
        settings: Start and interval of averaging.
        steps: Number of steps of the run.
    """

    def __init__(self, network: nn.Module, settings: TrainingConfig, steps: int) -> None:
        assert settings.averaging_start is not None
        self.network, self.interval = network, settings.averaging_interval
        # The tolerance keeps rounding of the product from shifting the start by a step.
        self.first_step = min(math.ceil(settings.averaging_start * steps - 1e-9), steps - 1)
        self.count = 0
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the current weights in the mean, if they are to be averaged after this step, counted from 0."""
        if step < self.first_step or (step - self.first_step) % self.interval:
            return
        self.count += 1
        for name, parameter in self.network.named_parameters():
            if self.count == 1:
                self.weights[name] = parameter.detach().clone()
            else:
                self.weights[name].lerp_(parameter, 1 / self.count)

    def covers(self, step: int) -> bool:
        """Return whether there is an average after this step, counted from 0."""
        return step >= self.first_step

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Replace the weights of a copy of the network by their mean."""
        for name, parameter in network.named_parameters():
            parameter.copy_(self.weights[name])

    def state_dict(self) -> dict[str, Any]:
        """Return number and mean of the averaged weights."""
        return {"count": self.count, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Restore the mean from a checkpoint.

        Args:
            state: Content of the checkpoint.
            step: Number of steps that are done.

        Raises:
            ValueError: If the content does not match the network or the number of steps.
        """
        expected_count = max(0, math.ceil((step - self.first_step) / self.interval))
        if state["count"] != expected_count or type(state["count"]) is not int:
            raise ValueError(f"the average has {state['count']!r:.50} weights instead of {expected_count}")
        parameters = dict(self.network.named_parameters()) if expected_count else {}
        stored = {name: (tensor.shape, tensor.dtype) for name, tensor in state["weights"].items()}
        if stored != {name: (parameter.shape, parameter.dtype) for name, parameter in parameters.items()}:
            raise ValueError("the averaged weights do not match the network")
        if not all(bool(tensor.isfinite().all()) for tensor in state["weights"].values()):
            raise ValueError("an averaged weight is not finite")
        self.count = expected_count
        self.weights = {name: state["weights"][name].to(parameter.device) for name, parameter in parameters.items()}
