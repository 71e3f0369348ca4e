"""Auto-PGD: gradient ascent with momentum and per-image step sizes, halved when progress stops.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", ICML 2020: Algorithm 1, and Section 4 for the difference of logits ratio (DLR).
"""

import math
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.robustness.attacks.base import Attack, TargetedAttack
from linflab.models.robustness.attacks.linf_ball import LinfBall
from linflab.models.robustness.margins import margin

APGDLoss = Literal["margin", "cross_entropy", "dlr"]
MOMENTUM = 0.25  # fraction of the last move that is repeated
RHO = 0.75  # min fraction of improving steps; below, the step is halved
DLR_FLOOR = 1e-12  # keeps the ratio finite if all logits are equal


def apgd(
    network: nn.Module,
    ball: LinfBall,
    labels: Tensor,
    targets: Tensor | None,
    steps: int,
    eps: float,
    generator: torch.Generator,
    loss: APGDLoss = "margin",
) -> Tensor:
    """Ascend a loss from a random point, and return which images (B,) were misclassified on the way.

    Args:
        network: Network in evaluation mode.
        ball: Perturbation sets of images (B, C, H, W) or (B, D).
        labels: (B,) true classes.
        targets: (B,) target classes; None for an untargeted attack. The cross entropy has no targeted form.
        steps: Number of gradient steps.
        eps: Radius of the ball, for pixel values in [0, 1]; the first step size is 2 eps.
        generator: CPU generator for the random start.
        loss: Loss to ascend (see `attack_loss`).
    """
    misclassified = torch.zeros_like(labels, dtype=torch.bool)

    def ascend(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each image, and the signs of its gradient."""
        nonlocal misclassified
        x = x.detach().requires_grad_()
        logits = network(x)
        misclassified |= ~(margin(logits.detach(), labels) > 0)  # true for NaN
        gain = attack_loss(logits, labels, targets, loss)
        (gradient,) = torch.autograd.grad(gain.sum(), x)
        return gain.detach(), gradient.sign()

    def per_pixel(values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (ball.center.dim() - 1))

    x = previous_x = ball.sample_uniform(generator)
    gain, signs = ascend(x)
    best, best_x, best_signs = gain.clone(), x, signs
    step = torch.full_like(gain, 2 * eps)
    ends = set(_checkpoint_steps(steps))
    last_end, num_improved = 0, torch.zeros_like(gain)
    was_halved, best_at_last_end = torch.zeros_like(misclassified), best.clone()
    for k in range(1, steps + 1):
        if bool(misclassified.all()):
            break
        candidate = ball.project(x + per_pixel(step) * signs)
        if k > 1:
            candidate = ball.project(x + (1 - MOMENTUM) * (candidate - x) + MOMENTUM * (x - previous_x))
        previous_x, x = x, candidate
        previous_gain, (gain, signs) = gain, ascend(x)
        num_improved += gain > previous_gain
        better = gain > best
        best = torch.where(better, gain, best)
        best_x, best_signs = (
            torch.where(per_pixel(better), new, old) for new, old in ((x, best_x), (signs, best_signs))
        )
        if k in ends:
            is_stuck = num_improved < RHO * (k - last_end)
            is_stuck |= ~was_halved & (best <= best_at_last_end)
            step = torch.where(is_stuck, step / 2, step)
            x, signs = torch.where(per_pixel(is_stuck), best_x, x), torch.where(per_pixel(is_stuck), best_signs, signs)
            gain = torch.where(is_stuck, best, gain)
            was_halved, best_at_last_end, last_end = is_stuck, best.clone(), k
            num_improved = torch.zeros_like(num_improved)
    return misclassified


def attack_loss(logits: Tensor, labels: Tensor, targets: Tensor | None, loss: APGDLoss) -> Tensor:
    """Return the loss (B,) that an attack ascends.

    With z the logits, y the true class and z_(1) >= z_(2) >= ... the sorted logits:

    - margin: max_{j != y} z_j - z_y, or z_t - z_y for a target t;
    - cross_entropy: -log softmax(z)_y;
    - dlr: the margin loss divided by z_(1) - z_(3). For a target, the divisor is z_(1) - (z_(3) + z_(4)) / 2. The ratio
      is invariant to shifts and scales of the logits. With three classes the smallest logit replaces z_(4). With two
      classes the ratio would be constant, so the margin is used.

    Args:
        logits: (B, K), with K >= 2.
        labels: (B,) true classes.
        targets: (B,) target classes; None for an untargeted attack, and always for the cross entropy.
        loss: Which of the three losses.
    """
    if loss == "cross_entropy":
        return functional.cross_entropy(logits, labels, reduction="none")
    if targets is None:
        difference = -margin(logits, labels)
    else:
        difference = logits.gather(1, targets[:, None])[:, 0] - logits.gather(1, labels[:, None])[:, 0]
    if loss == "margin" or logits.shape[1] == 2:
        return difference
    sorted_logits, last = logits.sort(dim=1, descending=True).values, logits.shape[1] - 1
    lower = sorted_logits[:, min(2, last)]
    if targets is not None:
        lower = (lower + sorted_logits[:, min(3, last)]) / 2
    return difference / (sorted_logits[:, 0] - lower + DLR_FLOOR)


def _checkpoint_steps(steps: int) -> list[int]:
    """Return the steps at which periods end.

    The first period has 22 % of all steps. Each later one is shorter by 3 % of all steps, but has at least 6 %.
    """
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return [math.ceil(share * steps) for _, share in pairwise(shares)]


class APGD(Attack):
    """Auto-PGD on the margin."""

    kind: ClassVar[str] = "apgd"
    loss: ClassVar[APGDLoss] = "margin"
    name: ClassVar[str] = "APGD on the margin"

    def describe(self) -> str:
        """Return the attack with its settings, as text for table notes."""
        return f"{self.name} ({self.steps}, {self.restarts})"

    def run(
        self, network: nn.Module, ball: LinfBall, labels: Tensor, eps: float, generator: torch.Generator, number: int
    ) -> Tensor:
        """Return which images (B,) are misclassified at any visited point of one ascent."""
        return apgd(network, ball, labels, None, self.config.steps, eps, generator, self.loss)


class CrossEntropyAPGD(APGD):
    """Auto-PGD on the cross entropy."""

    kind: ClassVar[str] = "apgd_ce"
    loss: ClassVar[APGDLoss] = "cross_entropy"
    name: ClassVar[str] = "APGD on the cross entropy"


class DLRAPGD(APGD):
    """Auto-PGD on the difference of logits ratio."""

    kind: ClassVar[str] = "apgd_dlr"
    loss: ClassVar[APGDLoss] = "dlr"
    name: ClassVar[str] = "APGD on the DLR loss"


class TargetedAPGD(TargetedAttack):
    """Targeted Auto-PGD on the margin."""

    kind: ClassVar[str] = "targeted_apgd"
    loss: ClassVar[APGDLoss] = "margin"
    name: ClassVar[str] = "targeted APGD"

    def describe(self) -> str:
        """Return the attack with its settings, as text for table notes."""
        return f"{self.name} ({self.targets}, {self.steps}, {self.restarts})"

    def run(
        self, network: nn.Module, ball: LinfBall, labels: Tensor, eps: float, generator: torch.Generator, number: int
    ) -> Tensor:
        """Return which images (B,) are misclassified at any visited point of one targeted ascent."""
        targets = self.choose_targets(network, ball, labels, number)
        return apgd(network, ball, labels, targets, self.config.steps, eps, generator, self.loss)


class TargetedDLRAPGD(TargetedAPGD):
    """Auto-PGD on the targeted difference of logits ratio."""

    kind: ClassVar[str] = "targeted_apgd_dlr"
    loss: ClassVar[APGDLoss] = "dlr"
    name: ClassVar[str] = "targeted APGD on the DLR loss"
