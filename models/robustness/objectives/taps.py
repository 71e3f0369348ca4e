"""TAPS: certified training by IBP in the first part of a network, and by PGD in the second."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.networks.hybrid import LinfDistHybrid
from linflab.models.networks.linf_dist import DistanceNet
from linflab.models.robustness.bounds.cut import cut_trace
from linflab.models.robustness.bounds.two_part import TwoPartBounds, TwoPartOutput
from linflab.models.robustness.margins import cross_entropy_from_differences
from linflab.models.robustness.objectives.adversarial_bounds import Count, ReLUShrink, RobustLossConfig
from linflab.models.robustness.objectives.base import Batch, Objective, PositiveFiniteFloat
from linflab.models.robustness.objectives.latent_attack import attacked_differences
from linflab.models.robustness.objectives.network_checks import can_trace, check_relu_shrink, trace_bounded_layers


class LatentAttackConfig(RobustLossConfig):
    """Settings of `TAPS` and `STAPS`; defaults are those of the authors' published training scripts.

    Published networks have 1 to 5 attacked activation layers and gradient weights from 2 to 8 (Mao et al., "CTBench",
    ICML 2025).
    """

    attacked_activations: int = Field(
        1, ge=0, description="activation layers in the second part of the network, which is attacked instead of bounded"
    )
    taps_gradient_weight: PositiveFiniteFloat = Field(
        5.0, description="weight of the gradient of the TAPS loss, relative to that of the IBP loss"
    )
    relu_shrink: ReLUShrink = 1.0
    latent_steps: Count = Field(20, description="number of PGD steps in the second part")
    latent_restarts: Count = Field(1, description="number of PGD runs in the second part, from random points")
    gradient_fade: float = Field(
        0.5, gt=0, le=1, description="fraction of the width of a latent box over which the gradient of a bound fades"
    )

    def check_network(self, network: nn.Module, input_shape: Sequence[int]) -> None:
        """Check that the network can be cut before the attacked activation layers, and has ReLUs if they shrink."""
        if isinstance(network, DistanceNet) and not isinstance(network, LinfDistHybrid):
            raise ValueError(
                f"attacked_activations={self.attacked_activations}: requires activation layers, but "
                f"{type(network).__name__} has none; use a ReLU network or linf_dist_hybrid, or another objective"
            )
        if can_trace(network):
            traced = trace_bounded_layers(network, input_shape)
            check_relu_shrink(traced, self.relu_shrink)
            cut_trace(traced, self.attacked_activations)


class TAPSConfig(LatentAttackConfig):
    """Settings of `TAPS`."""

    kind: Literal["taps"] = Field("taps", description="TAPS: IBP in the first part of the network, PGD in the second")

    def build(self, lipschitz_constant: float) -> "TAPS":
        """Build the objective."""
        return TAPS(self)


class TAPS(Objective):
    """(1 - n) CE(M_TAPS) CE(M_IBP) + n CE(z) + c R, with n = natural_weight and warm-up regularization R.

    M_IBP are worst-case logit differences by IBP. M_TAPS are logit differences at points of the latent box, the IBP
    bounds of the values between the two parts of the network, see `attacked_differences`. Both losses are means over
    the batch; each data-parallel worker multiplies the means of its own part. The gradient of the product is weighted:

        2 w / (1 + w) CE(M_IBP) d CE(M_TAPS) + 2 / (1 + w) CE(M_TAPS) d CE(M_IBP),  w = taps_gradient_weight.

    Before eps reaches `eps_train`, CE(M_IBP) replaces the product. Source: Mao et al., "Connecting Certified and
    Adversarial Training", NeurIPS 2023. R is from Shi et al. (NeurIPS 2021); its weight c falls to 0 as eps grows.
    """

    def __init__(self, config: LatentAttackConfig) -> None:
        super().__init__()
        self.config = config
        self._bounds: TwoPartBounds | None = None

    def prepare(self, network: nn.Module, input_shape: Sequence[int]) -> None:
        """Check the network, whose user-defined modules have values of parameters here.

        Raises:
            TypeError: If a layer or operation has no rule (the message names it).
            ValueError: If a setting does not fit the network, or the network fails on images of this shape.
        """
        self.config.check_network(network, input_shape)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the training loss of a network in training mode, a scalar."""
        config = self.config
        regularization_weight = config.warmup_reg_weight * (1 - batch.eps / config.eps_train)
        if self._bounds is None or self._bounds.network is not network:
            self._bounds = TwoPartBounds(network, config.attacked_activations, config.relu_shrink)
        parts = self.propagate(self._bounds, batch, regularization_weight > 0)
        worst = parts.worst
        robust = cross_entropy_from_differences(worst.logit_difference_bounds, batch.labels).mean()
        if batch.eps >= config.eps_train:
            starts = batch.draw_uniform((config.latent_restarts, *parts.latent.lower.shape[1:]))
            robust = self._product(parts, batch.labels, starts, robust)
        clean = functional.cross_entropy(worst.logits, batch.labels)
        loss = (1 - config.natural_weight) * robust + config.natural_weight * clean
        return loss + regularization_weight * worst.regularization

    def propagate(self, bounds: TwoPartBounds, batch: Batch, with_regularization: bool) -> TwoPartOutput:
        """Return the clean logits of a batch, its bounds, and the second part of the network.

        Args:
            bounds: Bounds of the network.
            batch: Inputs of the training step.
            with_regularization: If True, compute the warm-up regularization.
        """
        return bounds.propagate(
            batch.images, batch.labels, batch.eps, batch.p, batch.masks, with_regularization=with_regularization
        )

    def _product(self, parts: TwoPartOutput, labels: Tensor, starts: Tensor, ibp_loss: Tensor) -> Tensor:
        """Return the product of the TAPS loss and the IBP loss, with weighted gradients."""
        config, (worst, latent, second) = self.config, parts
        differences = attacked_differences(
            second, latent, labels, worst.logits.shape[1], starts, config.latent_steps, config.gradient_fade
        )
        taps_loss, weight = cross_entropy_from_differences(differences, labels).mean(), config.taps_gradient_weight
        return _scale_gradient(taps_loss, 2 * weight / (1 + weight)) * _scale_gradient(ibp_loss, 2 / (1 + weight))


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x, with its gradient multiplied by a factor."""
    value = x.detach()
    return value + factor * (x - value)
