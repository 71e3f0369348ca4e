"""What training minimises: functions of logits, labels and, where schedules move them, lambda and eps.

With z the logits (B, K) and L the network's Lipschitz constant per pixel, m_j = z_j - z_y is how far the wrong class j
is ahead, and the margin -max_j m_j certifies the radius -max_j m_j / (2 L) in pixels. theta, the hinge threshold, is
the radius in pixels up to which training asks for more: m_j + 2 L theta is positive while that radius is below theta.
M_j, the worst-case margin, is a bound on how far m_j can come within eps.

Objectives whose `worst_case` is False take (logits, labels, lambda), the others (logits, worst-case margins, labels,
lambda); margins are (B, K), with -inf at the right class, and lambda is the weight of the cross entropy.
"""

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def wrong_class_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """m (B, K): m_j = z_j - z_y, with -inf at the right class itself, so that it never is the largest."""
    index = labels[:, None]
    return (logits - logits.gather(1, index)).scatter(1, index, -torch.inf)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y - max_{j != y} z_j (B): positive where the right class wins, and wins alone."""
    return -wrong_class_margins(logits, labels).amax(dim=1)


class HingeConfig(BaseModel):
    """Settings of `Hinge`; the defaults are those of the paper's CIFAR-10 and MNIST nets but for theta."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["hinge"] = "hinge"
    theta: Positive = Field(description="hinge threshold: the certified radius aimed at, in pixels of [0, 1]")
    max_weight: float = Field(0.75, ge=0, le=1, description="share of the worst wrong class; the rest is the mean")

    def build(self, lipschitz_constant: float) -> "Hinge":
        return Hinge(self, lipschitz_constant)


class Hinge(nn.Module):
    """a max_j relu(m_j + 2 L theta) + (1 - a)/K sum_{j != y} relu(m_j + 2 L theta), with a = max_weight.

    Source: Zhang et al. 2021, Section 5; the mixture with the mean is in the authors' published training script.
    """

    worst_case = False

    def __init__(self, config: HingeConfig, lipschitz_constant: float) -> None:
        super().__init__()
        self.max_weight = config.max_weight
        self.threshold = 2 * lipschitz_constant * config.theta

    def forward(self, logits: Tensor, labels: Tensor, cross_entropy_weight: float) -> Tensor:
        excess = functional.relu(wrong_class_margins(logits, labels) + self.threshold)
        return torch.mean(self.max_weight * excess.amax(dim=1) + (1 - self.max_weight) * excess.mean(dim=1))


class DecayingCrossEntropyConfig(BaseModel):
    """lambda, the weight of a cross entropy, falls exponentially from its start to its end along the p-schedule."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lambda_start: Positive = Field(0.05, description="weight of the cross entropy while p is at its start")
    lambda_end: Positive = Field(0.0005, description="weight of the cross entropy when p has reached its end")


class ClippedHingeCrossEntropyConfig(DecayingCrossEntropyConfig):
    """Settings of `ClippedHingeCrossEntropy`."""

    kind: Literal["clipped_hinge_cross_entropy"] = "clipped_hinge_cross_entropy"
    theta: Positive = Field(description="hinge threshold: the certified radius aimed at, in pixels of [0, 1]")

    def build(self, lipschitz_constant: float) -> "ClippedHingeCrossEntropy":
        return ClippedHingeCrossEntropy(self, lipschitz_constant)


class ClippedHingeCrossEntropy(nn.Module):
    """max_j clamp((m_j + 2 L theta) / (2 L theta), 0, 1) + lambda CE(s z), with a learnt scalar s (from 1).

    The clipped hinge is 1 on a misclassified image and falls to 0 at certified radius theta; it does not pull at
    images that are lost, and the cross entropy keeps gradients alive while p is small.
    Source: Zhang et al., "Boosting the Certified Robustness of L-infinity Distance Nets", ICLR 2022.
    """

    worst_case = False

    def __init__(self, config: ClippedHingeCrossEntropyConfig, lipschitz_constant: float) -> None:
        super().__init__()
        self.threshold = 2 * lipschitz_constant * config.theta
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, labels: Tensor, cross_entropy_weight: float) -> Tensor:
        hinge = torch.clamp((self.threshold - margin(logits, labels)) / self.threshold, 0, 1).mean()
        return hinge + cross_entropy_weight * functional.cross_entropy(self.scale * logits, labels)


class WorstCaseCrossEntropyConfig(BaseModel):
    """Settings of `WorstCaseCrossEntropy`; the defaults are those of the paper's MNIST and Fashion-MNIST hybrids."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["worst_case_cross_entropy"] = "worst_case_cross_entropy"
    eps_train: Positive = Field(description="radius of the worst case in training, in pixels of [0, 1]")
    worst_case_weight: float = Field(0.5, ge=0, le=1, description="weight of the worst case; the rest is the clean one")

    def build(self, lipschitz_constant: float) -> "WorstCaseCrossEntropy":
        return WorstCaseCrossEntropy(self)


class WorstCaseCrossEntropy(nn.Module):
    """w CE(M) + (1 - w) CE(z), with w = worst_case_weight and M_y = 0.

    Source: Zhang et al. 2021, Section 5, after Gowal et al. 2018 (who name the share of the clean loss kappa).
    """

    worst_case = True

    def __init__(self, config: WorstCaseCrossEntropyConfig) -> None:
        super().__init__()
        self.weight = config.worst_case_weight

    def forward(self, logits: Tensor, worst: Tensor, labels: Tensor, cross_entropy_weight: float) -> Tensor:
        worst_logits = worst.scatter(1, labels[:, None], 0.0)
        clean, bounded = (functional.cross_entropy(z, labels) for z in (logits, worst_logits))
        return self.weight * bounded + (1 - self.weight) * clean


class WorstCaseHingeConfig(DecayingCrossEntropyConfig):
    """Settings of `WorstCaseHinge`."""

    kind: Literal["worst_case_hinge"] = "worst_case_hinge"
    eps_train: Positive = Field(description="radius of the worst case in training, in pixels of [0, 1]")

    def build(self, lipschitz_constant: float) -> "WorstCaseHinge":
        return WorstCaseHinge()


class WorstCaseHinge(nn.Module):
    """[max_j m_j < 0] relu(max_j M_j + 1) + lambda CE(s z), with a learnt scalar s (from 1).

    A hinge over the images that are classified correctly; the cross entropy takes care of the others.
    Source: Zhang et al., NeurIPS 2022 (SortNet+MLP), by the authors' published training script.
    """

    worst_case = True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, worst: Tensor, labels: Tensor, cross_entropy_weight: float) -> Tensor:
        right = margin(logits, labels) > 0
        hinge = torch.where(right, functional.relu(worst.amax(dim=1) + 1), 0.0).mean()
        return hinge + cross_entropy_weight * functional.cross_entropy(self.scale * logits, labels)


ObjectiveConfig = Annotated[
    HingeConfig | ClippedHingeCrossEntropyConfig | WorstCaseCrossEntropyConfig | WorstCaseHingeConfig,
    Field(discriminator="kind"),
]
