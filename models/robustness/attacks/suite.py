"""Suites of attacks, and robust accuracy under attack, an upper bound on true robust accuracy."""

from contextlib import nullcontext, suppress
from typing import ClassVar

import torch
from torch import Tensor, nn

from linflab.models.networks.layers import LpDistance, LpDistanceConv2d
from linflab.models.robustness.attacks.base import Attack, AttackConfig, AttackMethod
from linflab.models.robustness.attacks.linf_ball import linf_ball
from linflab.models.robustness.attacks.surrogate import surrogate_gradients
from linflab.models.robustness.inputs import check_batch, check_eps, check_logits, compute_logits
from linflab.models.robustness.margins import margin

DISTANCE_NET_ATTACKS = ("pgd", "surrogate_pgd")
OTHER_NET_ATTACKS = ("pgd", "targeted_apgd")


class AutoAttack(AttackMethod):
    """AutoAttack "standard" (Croce and Hein, ICML 2020): four attacks with the published settings."""

    kind: ClassVar[str] = "autoattack"

    def describe(self) -> str:
        """Return the suite with its settings, as text for table notes."""
        return (
            "AutoAttack standard (APGD on the cross entropy, targeted APGD on the DLR loss, targeted FAB: 100 steps, "
            "9 classes; Square: 5000 queries)"
        )

    def attacks(self) -> list[Attack]:
        """Return the four attacks with the published settings."""
        parts = ("apgd_ce", "targeted_apgd_dlr", "fab", "square")
        published = {"methods": parts, "steps": 100, "restarts": 1, "target_classes": 9, "queries": 5000}
        return AttackConfig(surrogate_p=self.config.surrogate_p, **published).attacks()


def default_attacks(network: nn.Module) -> tuple[str, ...]:
    """Return the kinds of the default attacks on a network.

    They are cheap, and give at most half a percentage point more robust accuracy than AutoAttack standard. Gradients of
    distance layers reach only one input of each neuron, so distance nets need surrogate gradients, which suffice for
    them. Other networks need targeted attacks.
    """
    distances = any(isinstance(module, LpDistance | LpDistanceConv2d) for module in network.modules())
    return DISTANCE_NET_ATTACKS if distances else OTHER_NET_ATTACKS


def robust_under_attack(
    network: nn.Module, images: Tensor, labels: Tensor, eps: float, config: AttackConfig, generator: torch.Generator
) -> Tensor:
    """Return which images stay correctly classified under all attacks within the ball, at p = inf.

    Args:
        network: Network in evaluation mode.
        images: (B, C, H, W) or flat (B, D), pixel values in [0, 1]; an empty batch gives an empty result.
        labels: (B,) true classes, of any integer dtype.
        eps: Radius of the l_inf ball, intersected with [0, 1], for pixel values in [0, 1].
        config: Attacks and their settings.
        generator: CPU generator for all random draws.

    Returns:
        (B,) bool: True if every visited point, including the image itself, is classified correctly. A tie is an error.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If the network is in training mode, or shapes, pixel values, labels or eps are invalid.
    """
    labels, eps = check_batch(network, images, labels), check_eps(eps)
    images = images.detach()
    if not len(images):
        return torch.zeros(0, dtype=torch.bool, device=images.device)
    attacked = _AnyBatchSize(network)
    # A point that is misclassified only in half precision is not an adversarial example of the network.
    with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        with torch.no_grad():
            logits = compute_logits(network, images)
            check_logits(logits, labels)
            robust = margin(logits, labels) > 0
        if config.methods is None:
            config = config.model_copy(update={"methods": default_attacks(network)})
        for attack in config.attacks():
            surrogate = surrogate_gradients(network, attack.config.surrogate_p)
            with surrogate if attack.follows_surrogate else nullcontext():
                for number in range(attack.count_runs(logits.shape[1])):
                    remaining = robust.nonzero()[:, 0]
                    if len(remaining):
                        ball = linf_ball(images[remaining], eps)
                        is_successful = attack.run(attacked, ball, labels[remaining], eps, generator, number)
                        robust[remaining[is_successful]] = False
    return robust


class _AnyBatchSize(nn.Module):
    """A network for any number of images; a single image is doubled if the network fails on it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.training, self.has_failed = network, network.training, False

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K)."""
        if len(images) == 1 and not self.has_failed:
            with suppress(RuntimeError, ValueError, IndexError):
                logits: Tensor = self.network(images)
                if logits.dim() == 2 and len(logits) == 1:
                    return logits
            self.has_failed = True
        return compute_logits(self.network, images)
