"""STAPS: TAPS over a small box around an adversarial image."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from linflab.models.robustness.bounds.two_part import TwoPartBounds, TwoPartOutput
from linflab.models.robustness.objectives.adversarial_bounds import SmallBoxConfig
from linflab.models.robustness.objectives.adversarial_images import adversarial_centers, draw_image_starts
from linflab.models.robustness.objectives.base import Batch, UnitInterval
from linflab.models.robustness.objectives.taps import TAPS, LatentAttackConfig


class STAPSConfig(LatentAttackConfig, SmallBoxConfig):
    """Settings of `STAPS`: those of TAPS, and those of SABR's attack."""

    kind: Literal["staps"] = Field("staps", description="STAPS: TAPS over a small box around an adversarial image")
    box_ratio: UnitInterval = Field(
        0.6, description="half-width of the small box, as a fraction of the attack's radius; 1: TAPS"
    )

    def build(self, lipschitz_constant: float) -> "STAPS":
        """Build the objective."""
        return STAPS(self)


class STAPS(TAPS):
    """The loss of `TAPS`, with bounds over the small box of SABR instead of the eps-ball.

    PGD attacks the images, and the box of half-width `box_ratio` times the radius of the attack is propagated, also
    before eps reaches `eps_train`. Source: Mao et al., "Connecting Certified and Adversarial Training", NeurIPS 2023.
    """

    config: STAPSConfig

    def __init__(self, config: STAPSConfig) -> None:
        super().__init__(config)

    def draw_starts(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Return uniform random numbers in [0, 1] for the attack on images; see `Batch.starts`."""
        return draw_image_starts(shape, self.config.restarts, generator)

    def propagate(self, bounds: TwoPartBounds, batch: Batch, with_regularization: bool) -> TwoPartOutput:
        """Return the clean logits of a batch, its bounds over small boxes, and the second part of the network."""
        config = self.config
        if batch.starts is None:
            return super().propagate(bounds, batch, with_regularization)
        attack_eps, points = config.attack_images(bounds.network, batch)
        is_clean_first = config.batch_norm_statistics == "clean"
        parts = bounds.propagate(
            batch.images if is_clean_first else points,
            batch.labels,
            config.box_ratio * attack_eps,
            batch.p,
            batch.masks,
            with_regularization,
            adversarial_centers(batch.images, points, attack_eps, config.box_ratio),
            None if is_clean_first else batch.images,
        )
        if is_clean_first:
            return parts
        assert parts.worst.point_logits is not None
        return parts._replace(worst=parts.worst._replace(logits=parts.worst.point_logits))
