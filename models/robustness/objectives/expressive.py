"""Base classes of expressive losses, which interpolate between adversarial training and IBP by a coefficient alpha."""

from pydantic import Field

from linflab.models.robustness.objectives.adversarial_bounds import AdversarialBoundConfig, AdversarialBoundObjective
from linflab.models.robustness.objectives.base import UnitInterval


class ExpressiveConfig(AdversarialBoundConfig):
    """Settings of expressive losses."""

    alpha: UnitInterval = Field(0.5, description="weight of the IBP bounds: 0 is adversarial training, 1 is IBP")


class ExpressiveObjective(AdversarialBoundObjective):
    """Robust loss between the cross entropy of adversarial images and that of IBP bounds over the eps-ball.

    Notation: m are the logit differences of adversarial images, M the worst-case ones, and CE(m) is the cross entropy
    as a function of logit differences. Source: De Palma et al., "Expressive Losses for Verified Robustness via Convex
    Combinations", ICLR 2024.
    """

    def __init__(self, config: ExpressiveConfig) -> None:
        super().__init__(config)
        self.alpha = config.alpha
