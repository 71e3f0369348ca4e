"""Adversarial training: the cross entropy of PGD adversarial examples."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from linflab.models.robustness.objectives.adversarial_images import adversarial_images
from linflab.models.robustness.objectives.base import Batch, EpsValue, ObjectiveConfig
from linflab.models.robustness.objectives.cross_entropy import CrossEntropy


class AdversarialCrossEntropyConfig(ObjectiveConfig):
    """Settings of adversarial training.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018.
    """

    attacks: ClassVar[bool] = True

    kind: Literal["adversarial_cross_entropy"] = Field(
        "adversarial_cross_entropy", description="cross entropy of PGD adversarial examples within `eps_train`"
    )
    eps_train: EpsValue = Field(description="radius of the attack in training, for pixel values in [0, 1]")
    steps: int = Field(7, ge=1, description="number of PGD steps from a random point")
    rel_step_size: float = Field(0.25, gt=0, allow_inf_nan=False, description="step size of PGD, as a fraction of eps")

    def build(self, lipschitz_constant: float) -> "AdversarialCrossEntropy":
        """Build the objective."""
        return AdversarialCrossEntropy(self)


class AdversarialCrossEntropy(CrossEntropy):
    """Cross entropy CE(z) of the points at which PGD ends after a random start."""

    def __init__(self, config: AdversarialCrossEntropyConfig) -> None:
        super().__init__()
        self.config = config

    def draw_starts(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Return uniform random numbers in [0, 1], of the shape of the batch."""
        return torch.rand(*shape, generator=generator)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the cross entropy of adversarial examples, or of the images if the batch has no starts."""
        if batch.starts is not None:
            images = adversarial_images(network, batch, batch.eps, self.config.steps, self.config.rel_step_size)
            batch = batch._replace(images=images)
        return super().loss(network, batch)
