"""Certified training by a hinge loss on worst-case logit differences, plus a decaying cross entropy."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.robustness.bounds.worst_case import WorstCaseOutput
from linflab.models.robustness.margins import margin
from linflab.models.robustness.objectives.base import EpsValue, LambdaDecayConfig
from linflab.models.robustness.objectives.worst_case import WorstCaseObjective


class WorstCaseHingeConfig(LambdaDecayConfig):
    """Settings of `WorstCaseHinge`."""

    kind: Literal["worst_case_hinge"] = Field(
        "worst_case_hinge",
        description="worst-case hinge loss over the `eps_train` ball plus decaying cross entropy",
    )
    eps_train: EpsValue = Field(description="radius of the worst case in training, for pixel values in [0, 1]")

    def build(self, lipschitz_constant: float) -> "WorstCaseHinge":
        """Build the objective."""
        return WorstCaseHinge()


class WorstCaseHinge(WorstCaseObjective):
    """[max_j m_j < 0] relu(max_j M_j + 1) + lambda CE(s z), with a learned scalar s, initially 1.

    The hinge applies to correctly classified images; only the cross entropy trains on the others. Source: Zhang et al.,
    NeurIPS 2022 (SortNet+MLP), by the authors' published training script.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, worst: WorstCaseOutput, labels: Tensor, cross_entropy_weight: float, eps: float) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        right = margin(worst.logits, labels) > 0
        hinge = torch.where(right, functional.relu(worst.logit_difference_bounds.amax(dim=1) + 1), 0.0).mean()
        return hinge + cross_entropy_weight * functional.cross_entropy(self.scale * worst.logits, labels)
