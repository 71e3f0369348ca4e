"""Standard training: the cross entropy of clean images."""

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from linflab.models.robustness.objectives.base import Objective, ObjectiveConfig


class CrossEntropyConfig(ObjectiveConfig):
    """Settings of `CrossEntropy`, which has none besides `kind`."""

    kind: Literal["cross_entropy"] = Field("cross_entropy", description="cross entropy of clean images")

    def build(self, lipschitz_constant: float) -> "CrossEntropy":
        """Build the objective."""
        return CrossEntropy()


class CrossEntropy(Objective):
    """CE(z): standard training."""

    def forward(self, logits: Tensor, labels: Tensor, cross_entropy_weight: float) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        return functional.cross_entropy(logits, labels)
