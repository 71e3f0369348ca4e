"""EXP-IBP: a weighted geometric mean of the adversarial and the worst-case loss."""

import math
from typing import Literal

from pydantic import Field
from torch import Tensor

from linflab.models.robustness.margins import log_cross_entropy_from_differences, logit_differences
from linflab.models.robustness.objectives.expressive import ExpressiveConfig, ExpressiveObjective


class EXPIBPConfig(ExpressiveConfig):
    """Settings of `EXPIBP`."""

    kind: Literal["exp_ibp"] = Field(
        "exp_ibp", description="EXP-IBP: weighted geometric mean of adversarial and worst-case cross entropy"
    )

    def build(self, lipschitz_constant: float) -> "EXPIBP":
        """Build the objective."""
        return EXPIBP(self)


class EXPIBP(ExpressiveObjective):
    """CE(m)^(1 - alpha) CE(M)^alpha, of the mean losses of a batch.

    The paper defines the loss of one image; its published code, like this class, multiplies the means over the batch.
    Each data-parallel worker multiplies those of its own part of the batch. Products are computed from logarithms, so
    that gradients are finite for tiny losses. Source: De Palma et al., ICLR 2024, Section 4.3 (exponential losses).
    """

    def robust_loss(self, differences: Tensor, logits: Tensor | None, labels: Tensor) -> Tensor:
        """Return the mean robust loss of a batch, a scalar."""
        assert logits is not None
        logs = [
            log_cross_entropy_from_differences(values, labels).logsumexp(dim=0) - math.log(len(labels))
            for values in (logit_differences(logits, labels), differences)
        ]
        return ((1 - self.alpha) * logs[0] + self.alpha * logs[1]).exp()
