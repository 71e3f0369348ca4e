"""MTL-IBP: a weighted sum of the adversarial and the worst-case loss."""

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from linflab.models.robustness.margins import cross_entropy_from_differences
from linflab.models.robustness.objectives.expressive import ExpressiveConfig, ExpressiveObjective


class MTLIBPConfig(ExpressiveConfig):
    """Settings of `MTLIBP`."""

    kind: Literal["mtl_ibp"] = Field(
        "mtl_ibp", description="MTL-IBP: weighted sum of adversarial and worst-case cross entropy"
    )

    def build(self, lipschitz_constant: float) -> "MTLIBP":
        """Build the objective."""
        return MTLIBP(self)


class MTLIBP(ExpressiveObjective):
    """(1 - alpha) CE(m) + alpha CE(M).

    Source: De Palma et al., ICLR 2024, Section 4.2 (multi-task learning).
    """

    def robust_loss(self, differences: Tensor, logits: Tensor | None, labels: Tensor) -> Tensor:
        """Return the mean robust loss of a batch, a scalar."""
        assert logits is not None
        worst_loss = cross_entropy_from_differences(differences, labels).mean()
        return (1 - self.alpha) * functional.cross_entropy(logits, labels) + self.alpha * worst_loss
