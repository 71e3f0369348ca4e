"""Base classes of certified training that combines an attack with IBP: SABR, MTL-IBP, CC-IBP and EXP-IBP."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.networks.linf_dist import logits_at
from linflab.models.robustness.bounds.worst_case import WorstCaseBounds
from linflab.models.robustness.objectives.adversarial_images import adversarial_images, draw_image_starts
from linflab.models.robustness.objectives.base import (
    Batch,
    EpsValue,
    Objective,
    ObjectiveConfig,
    PositiveFiniteFloat,
    UnitInterval,
)
from linflab.models.robustness.objectives.network_checks import can_trace, check_relu_shrink, trace_bounded_layers

Count = Annotated[int, Field(ge=1, le=1000)]
RelStepSize = Annotated[
    PositiveFiniteFloat, Field(description="size of the first step of PGD, as a fraction of the attack's radius")
]
StepDecayAfter = Annotated[
    tuple[Count, ...],
    Field(description="steps, counted from 1, after which the step size is multiplied by step_decay_factor"),
]
ReLUShrink = Annotated[
    UnitInterval,
    Field(description="factor of the upper bounds of unstable ReLUs in training; 0.8 in published runs at small eps"),
]


class Ball(NamedTuple):
    """l_inf balls (B) over which a loss bounds the worst case.

    Attributes:
        centers: (B, C, H, W), pixel values in [0, 1].
        radius: Radius, for pixel values in [0, 1].
    """

    centers: Tensor
    radius: float


class RobustLossConfig(ObjectiveConfig):
    """Settings of a robust loss in a sum with clean loss and warm-up regularization."""

    attacks: ClassVar[bool] = True

    eps_train: EpsValue = Field(description="radius of the worst case in training, for pixel values in [0, 1]")
    natural_weight: UnitInterval = Field(0.0, description="weight of the clean loss; the rest is the robust loss")
    warmup_reg_weight: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the warm-up regularization while eps is 0; decays to 0 at `eps_train`",
    )


class AdversarialBoundConfig(RobustLossConfig):
    """Settings of the attack on images."""

    attack_eps_factor: PositiveFiniteFloat = Field(
        1.0, description="radius of the attack, as a multiple of the radius of the worst case"
    )
    steps: Count = Field(8, description="number of PGD steps from a random point")
    rel_step_size: RelStepSize = 0.25
    step_decay_after: StepDecayAfter = ()
    step_decay_factor: PositiveFiniteFloat = Field(0.1, description="factor of the step size")
    restarts: Count = Field(1, description="runs of PGD per image; the end with the largest loss is used")
    batch_norm_statistics: Literal["clean", "adversarial"] = Field(
        "clean", description="images whose statistics batch normalization and mean shifts use in training"
    )

    def check_network(self, network: nn.Module, input_shape: Sequence[int]) -> None:
        """Check that the layers of the network have rules."""
        if can_trace(network):
            trace_bounded_layers(network, input_shape)

    def attack_images(self, network: nn.Module, batch: Batch) -> tuple[float, Tensor]:
        """Return the radius of the attack on the images of a batch, and the images (B, C, H, W) at which it ends.

        Args:
            network: Network in training mode.
            batch: Inputs of the training step, with starting points.
        """
        eps = min(1.0, self.attack_eps_factor * batch.eps)
        decay = self.step_decay_after, self.step_decay_factor
        return eps, adversarial_images(network, batch, eps, self.steps, self.rel_step_size, *decay)


class SmallBoxConfig(AdversarialBoundConfig):
    """Settings of bounds over a small box around an adversarial image; the attack has the defaults of SABR's paper."""

    rel_step_size: RelStepSize = 0.5
    step_decay_after: StepDecayAfter = (4, 7)
    relu_shrink: ReLUShrink = 1.0

    def check_network(self, network: nn.Module, input_shape: Sequence[int]) -> None:
        """Check that the layers of the network have rules, and that there are ReLUs if their bounds are to shrink."""
        if can_trace(network):
            check_relu_shrink(trace_bounded_layers(network, input_shape), self.relu_shrink)


class AdversarialBoundObjective(Objective):
    """Robust loss of adversarial images and IBP bounds, in a sum with clean loss and regularization.

    The loss is v CE(z) + (1 - v) robust loss + c R, with v = natural_weight and warm-up regularization R. While eps is
    0, the robust loss is CE(z). R is computed on the boxes of the robust loss; its weight c falls to 0 as eps grows.
    PGD attacks the network in evaluation mode.

    Args:
        config: Settings.
        relu_shrink: Factor of the upper bounds of unstable ReLUs.

    Attributes:
        uses_logits: True if the robust loss uses the logits of adversarial images.
    """

    uses_logits = True

    def __init__(self, config: AdversarialBoundConfig, relu_shrink: float = 1.0) -> None:
        super().__init__()
        self.config, self.relu_shrink = config, relu_shrink
        self._bounds: WorstCaseBounds | None = None

    @abstractmethod
    def robust_loss(self, differences: Tensor, logits: Tensor | None, labels: Tensor) -> Tensor:
        """Return the mean robust loss of a batch, a scalar.

        Args:
            differences: (B, K) worst-case logit differences M over `choose_ball`, -inf at the true class.
            logits: (B, K) logits of adversarial images; may be None if `uses_logits` is False.
            labels: (B,) true classes.
        """

    def choose_ball(self, images: Tensor, points: Tensor, eps: float, attack_eps: float) -> Ball:
        """Return the balls over which the worst case is bounded; by default the eps-ball.

        Args:
            images: (B, C, H, W) clean images, pixel values in [0, 1].
            points: (B, C, H, W) adversarial images.
            eps: Radius of the worst case, for pixel values in [0, 1].
            attack_eps: Radius of the attack, for pixel values in [0, 1].
        """
        return Ball(images, eps)

    def prepare(self, network: nn.Module, input_shape: Sequence[int]) -> None:
        """Check the network, whose user-defined modules have values of parameters here.

        Raises:
            TypeError: If a layer or operation has no rule (the message names it).
            ValueError: If a setting does not fit the network, or the network fails on images of this shape.
        """
        self.config.check_network(network, input_shape)

    def draw_starts(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Return uniform random numbers in [0, 1], one set per restart; see `Batch.starts`."""
        return draw_image_starts(shape, self.config.restarts, generator)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a network in training mode, a scalar; without starts, eps must be 0."""
        config = self.config
        if self._bounds is None or self._bounds.network is not network:
            self._bounds = WorstCaseBounds(network, relu_shrink=self.relu_shrink)
        reg_weight = config.warmup_reg_weight * (1 - batch.eps / config.eps_train)
        if batch.starts is None:
            return self._clean_loss(network, batch, reg_weight)
        attack_eps, points = config.attack_images(network, batch)
        ball = self.choose_ball(batch.images, points, batch.eps, attack_eps)
        is_clean_first = config.batch_norm_statistics == "clean"
        first, second = (batch.images, points) if is_clean_first else (points, batch.images)
        uses_second = self.uses_logits if is_clean_first else config.natural_weight > 0
        worst = self._bounds(
            first,
            batch.labels,
            ball.radius,
            batch.p,
            batch.masks,
            with_regularization=reg_weight > 0,
            centers=None if ball.centers is first else ball.centers,
            points=second if uses_second else None,
        )
        logits = (worst.logits, worst.point_logits) if is_clean_first else (worst.point_logits, worst.logits)
        loss = self.robust_loss(worst.logit_difference_bounds, logits[1], batch.labels)
        if (weight := config.natural_weight) > 0:
            assert logits[0] is not None
            loss = weight * functional.cross_entropy(logits[0], batch.labels) + (1 - weight) * loss
        return loss + reg_weight * worst.regularization if reg_weight > 0 else loss

    def _clean_loss(self, network: nn.Module, batch: Batch, reg_weight: float) -> Tensor:
        """Return the clean cross entropy plus regularization, a scalar."""
        if reg_weight == 0:
            logits = logits_at(network, batch.images, batch.p, batch.masks)
            return functional.cross_entropy(logits, batch.labels)
        assert self._bounds is not None
        worst = self._bounds(batch.images, batch.labels, 0.0, batch.p, batch.masks, with_regularization=True)
        return functional.cross_entropy(worst.logits, batch.labels) + reg_weight * worst.regularization
