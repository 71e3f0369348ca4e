"""Hinge loss on the margin, for Lipschitz networks."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from linflab.models.robustness.margins import logit_differences
from linflab.models.robustness.objectives.base import Objective, ObjectiveConfig, PositiveFiniteFloat


class HingeConfig(ObjectiveConfig):
    """Settings of `Hinge`; defaults except theta are those of the paper's CIFAR-10 and MNIST nets."""

    needs_lipschitz: ClassVar[bool] = True

    kind: Literal["hinge"] = Field("hinge", description="hinge loss on the margin")
    theta: PositiveFiniteFloat = Field(
        description="target certified radius (hinge threshold), for pixel values in [0, 1]"
    )
    max_weight: float = Field(
        0.75, ge=0, le=1, description="weight of the hinge of the closest wrong class; the rest is the mean"
    )

    def build(self, lipschitz_constant: float) -> "Hinge":
        """Build the objective."""
        return Hinge(self, lipschitz_constant)


class Hinge(Objective):
    """a max_j relu(m_j + 2 L theta) + (1 - a)/K sum_{j != y} relu(m_j + 2 L theta), with a = max_weight.

    Source: Zhang et al. 2021, Section 5; the mixture with the mean is in the authors' published training script.
    """

    def __init__(self, config: HingeConfig, lipschitz_constant: float) -> None:
        super().__init__()
        self.max_weight = config.max_weight
        self.threshold = 2 * lipschitz_constant * config.theta

    def forward(self, logits: Tensor, labels: Tensor, cross_entropy_weight: float) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        excess = functional.relu(logit_differences(logits, labels) + self.threshold)
        return torch.mean(self.max_weight * excess.amax(dim=1) + (1 - self.max_weight) * excess.mean(dim=1))
