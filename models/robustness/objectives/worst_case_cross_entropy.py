"""Certified training by the cross entropy of worst-case logit differences."""

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from linflab.models.robustness.bounds.worst_case import BoundMethod, WorstCaseOutput
from linflab.models.robustness.margins import cross_entropy_from_differences
from linflab.models.robustness.objectives.base import EpsValue, ObjectiveConfig, UnitInterval
from linflab.models.robustness.objectives.worst_case import WorstCaseObjective


class WorstCaseCrossEntropyConfig(ObjectiveConfig):
    """Settings of `WorstCaseCrossEntropy`; defaults are those of the paper's (Fashion-)MNIST hybrids."""

    kind: Literal["worst_case_cross_entropy"] = Field(
        "worst_case_cross_entropy", description="worst-case cross entropy over the `eps_train` ball"
    )
    eps_train: EpsValue = Field(description="radius of the worst case in training, for pixel values in [0, 1]")
    worst_case_weight: UnitInterval = Field(0.5, description="weight of the worst-case loss; the rest is clean loss")
    worst_case_weight_start: UnitInterval | None = Field(
        None, description="worst-case weight while eps is 0, interpolated linearly in eps; null: constant weight"
    )
    bound: BoundMethod = Field(
        "ibp",
        description="method that bounds the worst case; distance nets require ibp. hybrid_zonotope is tighter than "
        "DiffAI, whose boxes lose their correlation at each linear layer",
    )
    crown_weight_start: UnitInterval = Field(1.0, description="weight of the CROWN bounds in CROWN-IBP while eps is 0")
    crown_weight_end: UnitInterval = Field(
        0.0, description="weight of the CROWN bounds in CROWN-IBP at `eps_train`; the rest is IBP"
    )
    warmup_reg_weight: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the warm-up regularization while eps is 0; decays to 0 at `eps_train`",
    )

    @model_validator(mode="after")
    def _check_crown_weights(self) -> Self:
        shares = (self.crown_weight_start, self.crown_weight_end)
        if shares != (1.0, 0.0) and not self.bound.startswith("crown_ibp"):
            raise ValueError(
                f"crown_weight_start={shares[0]:g}, crown_weight_end={shares[1]:g}: not supported by "
                f"bound={self.bound}; leave them out, or use bound=crown_ibp or crown_ibp_fused"
            )
        return self

    def build(self, lipschitz_constant: float) -> "WorstCaseCrossEntropy":
        """Build the objective."""
        return WorstCaseCrossEntropy(self)


class WorstCaseCrossEntropy(WorstCaseObjective):
    """w CE(M) + (1 - w) CE(z) + c R, with w = worst_case_weight, M_y = 0 and warm-up regularization R.

    With loss fusion, a bound of the cross entropy replaces CE(M). Source: Zhang et al. 2021, Section 5, after Gowal et
    al. 2018, whose kappa is 1 - w. R is from Shi et al. (NeurIPS 2021); its weight c falls to 0 as eps grows.
    """

    def __init__(self, config: WorstCaseCrossEntropyConfig) -> None:
        super().__init__(config.bound, config.warmup_reg_weight > 0)
        self.config = config

    def crown_weight(self, eps: float) -> float:
        """Return the weight of the CROWN bounds against IBP bounds in CROWN-IBP; 1 for other methods."""
        if not self.config.bound.startswith("crown_ibp"):
            return 1.0
        return self._interpolate(self.config.crown_weight_start, self.config.crown_weight_end, eps)

    def _interpolate(self, start: float, end: float, eps: float) -> float:
        return start + (end - start) * (eps / self.config.eps_train)

    def forward(self, worst: WorstCaseOutput, labels: Tensor, cross_entropy_weight: float, eps: float) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        config = self.config
        start = config.worst_case_weight if config.worst_case_weight_start is None else config.worst_case_weight_start
        weight = self._interpolate(start, config.worst_case_weight, eps)
        worst_loss = (
            cross_entropy_from_differences(worst.logit_difference_bounds, labels)
            if worst.loss_upper_bound is None
            else worst.loss_upper_bound
        )
        loss = weight * worst_loss.mean() + (1 - weight) * functional.cross_entropy(worst.logits, labels)
        return loss + self._interpolate(config.warmup_reg_weight, 0.0, eps) * worst.regularization
