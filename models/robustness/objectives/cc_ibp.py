"""CC-IBP: the cross entropy of a convex combination of adversarial and worst-case logit differences."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from linflab.models.robustness.margins import cross_entropy_from_differences
from linflab.models.robustness.objectives.expressive import ExpressiveConfig, ExpressiveObjective


class CCIBPConfig(ExpressiveConfig):
    """Settings of `CCIBP`."""

    kind: Literal["cc_ibp"] = Field(
        "cc_ibp", description="CC-IBP: cross entropy of a weighted sum of adversarial and worst-case logit differences"
    )

    def build(self, lipschitz_constant: float) -> "CCIBP":
        """Build the objective."""
        return CCIBP(self)


class CCIBP(ExpressiveObjective):
    """CE((1 - alpha) m + alpha M).

    Source: De Palma et al., ICLR 2024, Section 4.1 (convex combinations).
    """

    def robust_loss(self, differences: Tensor, logits: Tensor | None, labels: Tensor) -> Tensor:
        """Return the mean robust loss of a batch, a scalar."""
        assert logits is not None
        # logits instead of differences, since 0 times the -inf at the true class is NaN
        adversarial = logits - logits.gather(1, labels[:, None])
        combined = (1 - self.alpha) * adversarial + self.alpha * differences.scatter(1, labels[:, None], 0.0)
        return cross_entropy_from_differences(combined, labels).mean()
