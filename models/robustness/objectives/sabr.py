"""SABR: the worst-case loss over a small box around an adversarial image."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from linflab.models.robustness.margins import cross_entropy_from_differences
from linflab.models.robustness.objectives.adversarial_bounds import AdversarialBoundObjective, Ball, SmallBoxConfig
from linflab.models.robustness.objectives.adversarial_images import adversarial_centers
from linflab.models.robustness.objectives.base import UnitInterval


class SABRConfig(SmallBoxConfig):
    """Settings of `SABR`; the attack has the defaults of the paper."""

    kind: Literal["sabr"] = Field("sabr", description="SABR: worst-case cross entropy of a small box")
    box_ratio: UnitInterval = Field(
        0.6,
        description="half-width of the box, as a fraction of the attack's radius: 0 is adversarial training, 1 is IBP",
    )

    def build(self, lipschitz_constant: float) -> "SABR":
        """Build the objective."""
        return SABR(self)


class SABR(AdversarialBoundObjective):
    """CE(M), with M over the box of half-width lambda e around the adversarial image, and lambda = box_ratio.

    e is the radius of the attack. The center of the box is moved so that the box is inside the attack's ball. Source:
    Mueller et al., "Certified Training: Small Boxes Are All You Need", ICLR 2023.
    """

    uses_logits = False

    def __init__(self, config: SABRConfig) -> None:
        super().__init__(config, config.relu_shrink)
        self.box_ratio = config.box_ratio

    def choose_ball(self, images: Tensor, points: Tensor, eps: float, attack_eps: float) -> Ball:
        """Return the small balls around adversarial images."""
        return Ball(adversarial_centers(images, points, attack_eps, self.box_ratio), self.box_ratio * attack_eps)

    def robust_loss(self, differences: Tensor, logits: Tensor | None, labels: Tensor) -> Tensor:
        """Return the mean worst-case cross entropy of a batch, a scalar."""
        return cross_entropy_from_differences(differences, labels).mean()
