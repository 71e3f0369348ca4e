"""What training minimises: functions of logits, labels and, where schedules move them, lambda and eps.

With z the logits (B, K) and L the network's Lipschitz constant per pixel, m_j = z_j - z_y is how far the wrong class j
is ahead, and the margin -max_j m_j certifies the radius -max_j m_j / (2 L) in pixels. theta, the hinge threshold, is
the radius in pixels up to which training asks for more: m_j + 2 L theta is positive while that radius is below theta.
M_j, the worst-case margin, is a bound on how far m_j can come within eps.

Objectives whose `worst_case` is False take (logits, labels, lambda), the others (worst case, labels, lambda, eps);
lambda is the weight of the cross entropy, and eps, in pixels, the radius that has grown to `eps_train` at the end.
"""

from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Radius = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1)]
Bound = Literal["interval", "crown_ibp", "crown_ibp_fused", "dual", "hybrid_zonotope"]


class WorstCase(NamedTuple):
    """What a network comes to on a batch, and can come to within eps of it.

    Attributes:
        logits: z (B, K), of the images themselves.
        margins: M (B, K), upper bounds of m_j = z_j - z_y, -inf at y.
        fused: (B), upper bounds of the cross entropy itself, where that is what is bounded.
        penalty: a scalar, on loose bounds.
    """

    logits: Tensor
    margins: Tensor
    fused: Tensor | None = None
    penalty: Tensor | float = 0.0


def wrong_class_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """m (B, K): m_j = z_j - z_y, with -inf at the right class itself, so that it never is the largest."""
    index = labels[:, None]
    return (logits - logits.gather(1, index)).scatter(1, index, -torch.inf)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y - max_{j != y} z_j (B): positive where the right class wins, and wins alone."""
    return -wrong_class_margins(logits, labels).amax(dim=1)


def cross_entropies(margins: Tensor, labels: Tensor) -> Tensor:
    """log(1 + sum_{j != y} exp M_j) (B), of margins M (B, K): the cross entropy, were they those of logits."""
    return functional.cross_entropy(margins.scatter(1, labels[:, None], 0.0), labels, reduction="none")


class CrossEntropyConfig(BaseModel):
    """Settings of `CrossEntropy`, which has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["cross_entropy"] = "cross_entropy"

    def build(self, lipschitz_constant: float) -> "CrossEntropy":
        return CrossEntropy()


class CrossEntropy(nn.Module):
    """CE(z): standard training."""

    worst_case = False

    def forward(self, logits: Tensor, labels: Tensor, cross_entropy_weight: float) -> Tensor:
        return functional.cross_entropy(logits, labels)


class AdversarialCrossEntropyConfig(BaseModel):
    """Settings of adversarial training, the cross entropy of images that PGD found within eps.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["adversarial_cross_entropy"] = "adversarial_cross_entropy"
    eps_train: Radius = Field(description="radius of the attack in training, in pixels of [0, 1]")
    steps: int = Field(7, ge=1, description="steps of PGD, from a random point")
    step_size: float = Field(0.25, gt=0, allow_inf_nan=False, description="length of a step, as a share of eps")

    def build(self, lipschitz_constant: float) -> CrossEntropy:
        return CrossEntropy()


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
    eps_train: Radius = Field(description="radius of the worst case in training, in pixels of [0, 1]")
    worst_case_weight: Weight = Field(0.5, description="weight of the worst case; the rest is the clean one")
    worst_case_weight_start: Weight | None = Field(
        None, description="its weight while eps is 0, from where it moves with eps; left out: the same throughout"
    )
    bound: Bound = Field("interval", description="by what the worst case is bounded; of distance nets, interval")
    crown_share_start: Weight = Field(1.0, description="share of CROWN in the bounds of CROWN-IBP while eps is 0")
    crown_share_end: Weight = Field(0.0, description="share of CROWN when eps has grown; the rest is by intervals")
    penalty: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="weight, while eps is 0, of the penalty on loose bounds; falls to 0"
    )

    @model_validator(mode="after")
    def _shares_of_crown_ibp(self) -> Self:
        shares = (self.crown_share_start, self.crown_share_end)
        if shares != (1.0, 0.0) and not self.bound.startswith("crown_ibp"):
            raise ValueError(
                f"crown_share_start={shares[0]:g}, crown_share_end={shares[1]:g}: bound={self.bound} has none"
            )
        return self

    def build(self, lipschitz_constant: float) -> "WorstCaseCrossEntropy":
        return WorstCaseCrossEntropy(self)


class WorstCaseCrossEntropy(nn.Module):
    """w CE(M) + (1 - w) CE(z) + c penalty, with w = worst_case_weight and M_y = 0; or a bound of CE for CE(M).

    Source: Zhang et al. 2021, Section 5, after Gowal et al. 2018 (who name the share of the clean loss kappa). The
    penalty is Shi et al.'s (NeurIPS 2021), with c falling to 0 as eps grows.
    """

    worst_case = True

    def __init__(self, config: WorstCaseCrossEntropyConfig) -> None:
        super().__init__()
        self.config = config

    def crown_share(self, eps: float) -> float:
        """Share of CROWN in the bounds of CROWN-IBP; all of it in those that know nothing else."""
        if not self.config.bound.startswith("crown_ibp"):
            return 1.0
        return self._grown(self.config.crown_share_start, self.config.crown_share_end, eps)

    def _grown(self, start: float, end: float, eps: float) -> float:
        return start + (end - start) * (eps / self.config.eps_train)

    def forward(self, worst: WorstCase, labels: Tensor, cross_entropy_weight: float, eps: float) -> Tensor:
        config = self.config
        start = config.worst_case_weight if config.worst_case_weight_start is None else config.worst_case_weight_start
        weight = self._grown(start, config.worst_case_weight, eps)
        bounded = cross_entropies(worst.margins, labels) if worst.fused is None else worst.fused
        loss = weight * bounded.mean() + (1 - weight) * functional.cross_entropy(worst.logits, labels)
        return loss + self._grown(config.penalty, 0.0, eps) * worst.penalty


class WorstCaseHingeConfig(DecayingCrossEntropyConfig):
    """Settings of `WorstCaseHinge`."""

    kind: Literal["worst_case_hinge"] = "worst_case_hinge"
    eps_train: Radius = Field(description="radius of the worst case in training, in pixels of [0, 1]")

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

    def forward(self, worst: WorstCase, labels: Tensor, cross_entropy_weight: float, eps: float) -> Tensor:
        right = margin(worst.logits, labels) > 0
        hinge = torch.where(right, functional.relu(worst.margins.amax(dim=1) + 1), 0.0).mean()
        return hinge + cross_entropy_weight * functional.cross_entropy(self.scale * worst.logits, labels)


ObjectiveConfig = Annotated[
    HingeConfig
    | ClippedHingeCrossEntropyConfig
    | WorstCaseCrossEntropyConfig
    | WorstCaseHingeConfig
    | CrossEntropyConfig
    | AdversarialCrossEntropyConfig,
    Field(discriminator="kind"),
]
