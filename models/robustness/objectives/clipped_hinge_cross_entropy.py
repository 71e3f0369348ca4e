"""Clipped hinge loss on the margin, plus a decaying cross entropy, for Lipschitz networks."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.robustness.margins import margin
from linflab.models.robustness.objectives.base import LambdaDecayConfig, Objective, PositiveFiniteFloat


class ClippedHingeCrossEntropyConfig(LambdaDecayConfig):
    """Settings of `ClippedHingeCrossEntropy`."""

    needs_lipschitz: ClassVar[bool] = True

    kind: Literal["clipped_hinge_cross_entropy"] = Field(
        "clipped_hinge_cross_entropy", description="clipped hinge loss on the margin plus decaying cross entropy"
    )
    theta: PositiveFiniteFloat = Field(
        description="target certified radius (hinge threshold), for pixel values in [0, 1]"
    )

    def build(self, lipschitz_constant: float) -> "ClippedHingeCrossEntropy":
        """Build the objective."""
        return ClippedHingeCrossEntropy(self, lipschitz_constant)


class ClippedHingeCrossEntropy(Objective):
    """max_j clamp((m_j + 2 L theta) / (2 L theta), 0, 1) + lambda CE(s z), with a learned scalar s.

    The scalar s starts at 1. The clipped hinge is 1 on misclassified images, and falls to 0 at certified radius theta.
    The clipped hinge has no gradient on misclassified images. The cross entropy keeps gradients alive while p is small.
    Source: Zhang et al., "Boosting the Certified Robustness of L-infinity Distance Nets", ICLR 2022.
    """

    def __init__(self, config: ClippedHingeCrossEntropyConfig, lipschitz_constant: float) -> None:
        super().__init__()
        self.threshold = 2 * lipschitz_constant * config.theta
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, labels: Tensor, cross_entropy_weight: float) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        hinge = torch.clamp((self.threshold - margin(logits, labels)) / self.threshold, 0, 1).mean()
        return hinge + cross_entropy_weight * functional.cross_entropy(self.scale * logits, labels)
