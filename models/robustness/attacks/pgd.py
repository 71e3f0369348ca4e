"""Projected gradient descent with a fixed step size (Madry et al., ICLR 2018)."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.robustness.attacks.base import Attack
from linflab.models.robustness.attacks.linf_ball import LinfBall
from linflab.models.robustness.margins import margin

AttackLoss = Literal["cross_entropy", "margin"]


def pgd(
    network: Callable[[Tensor], Tensor],
    ball: LinfBall,
    labels: Tensor,
    loss: AttackLoss,
    steps: int,
    step: float,
    generator: torch.Generator,
) -> Tensor:
    """Ascend a loss by gradient signs from a random point; return which images (B,) were misclassified.

    Args:
        network: Network in evaluation mode, or a function from images to logits (B, K).
        ball: Perturbation sets of images (B, C, H, W) or (B, D).
        labels: (B,) true classes.
        loss: `cross_entropy`, or `margin` for max_{j != y} z_j - z_y.
        steps: Number of steps; the network is evaluated at `steps + 1` points.
        step: Step size of each pixel, for pixel values in [0, 1].
        generator: CPU generator for the random start.
    """
    point, misclassified = ball.sample_uniform(generator), torch.zeros_like(labels, dtype=torch.bool)
    for _ in range(steps):
        point, logits = _ascent_step(network, ball, point, labels, loss, step)
        misclassified |= ~(margin(logits, labels) > 0)  # true for NaN
        if bool(misclassified.all()):
            return misclassified
    with torch.no_grad():
        return misclassified | ~(margin(network(point), labels) > 0)


def pgd_examples(
    network: Callable[[Tensor], Tensor], ball: LinfBall, labels: Tensor, start: Tensor, step_sizes: Sequence[float]
) -> Tensor:
    """Return the images (B, C, H, W) at the end of an ascent of the cross entropy, to train on.

    Args:
        network: Function from images to logits (B, K).
        ball: Perturbation sets of images (B, C, H, W).
        labels: (B,) true classes.
        start: (B, C, H, W) points of the ball to start from.
        step_sizes: Step size of each step, for pixel values in [0, 1].
    """
    point = start
    for step in step_sizes:
        point, _ = _ascent_step(network, ball, point, labels, "cross_entropy", step)
    return point


def adversarial_images(
    network: Callable[[Tensor], Tensor],
    ball: LinfBall,
    labels: Tensor,
    targets: Tensor,
    steps: int,
    eps: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Ascend z_t - z_y from random points, and return the first misclassified points.

    Step sizes decrease linearly from eps / 2.

    Args:
        network: Function from images to logits (B, K).
        ball: Perturbation sets of images (B, C, H, W) or (B, D).
        labels: (B,) true classes y.
        targets: (B,) wrong classes t.
        steps: Number of steps.
        eps: Radius of the balls, for pixel values in [0, 1].
        generator: CPU generator for the random starts.

    Returns:
        Which images (B,) were misclassified, and the points (B, ...) where this happened, or the last ones.
    """
    point = ball.sample_uniform(generator)
    found, results = torch.zeros_like(labels, dtype=torch.bool), point
    for step in range(steps + 1):
        with torch.enable_grad():
            leaf = point.detach().requires_grad_()
            logits = network(leaf)
            gain = (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).sum()
            (gradient,) = torch.autograd.grad(gain, leaf)
        is_new = ~found & ~(margin(logits.detach(), labels) > 0)  # true for NaN
        found = found | is_new
        results = torch.where((is_new | ~found).view(-1, *[1] * (point.dim() - 1)), leaf.detach(), results)
        if step == steps or bool(found.all()):
            break
        point = ball.project(leaf.detach() + 0.5 * eps * (1 - step / steps) * gradient.sign())
    return found, results


def _ascent_step(
    network: Callable[[Tensor], Tensor], ball: LinfBall, point: Tensor, labels: Tensor, loss: AttackLoss, step: float
) -> tuple[Tensor, Tensor]:
    """Return the point after one step, and the logits at the given point."""
    point = point.detach().requires_grad_()
    logits = network(point)
    if loss == "cross_entropy":
        gain = functional.cross_entropy(logits, labels, reduction="sum")
    else:
        gain = -margin(logits, labels).sum()
    (gradient,) = torch.autograd.grad(gain, point)
    return ball.project(point.detach() + step * gradient.sign()), logits.detach()


class PGD(Attack):
    """PGD by the network's own gradients; runs alternate between the cross entropy and the margin."""

    kind: ClassVar[str] = "pgd"
    follows_surrogate: ClassVar[bool] = False

    def describe(self) -> str:
        """Return the attack with its settings, as text for table notes."""
        return f"PGD ({self.steps} of {self.config.rel_step_size:g} eps, {self.restarts})"

    def run(
        self, network: nn.Module, ball: LinfBall, labels: Tensor, eps: float, generator: torch.Generator, number: int
    ) -> Tensor:
        """Return which images (B,) are misclassified at any visited point; odd runs ascend the margin."""
        loss: AttackLoss = "margin" if number % 2 else "cross_entropy"
        return pgd(network, ball, labels, loss, self.config.steps, self.config.rel_step_size * eps, generator)


class SurrogatePGD(PGD):
    """PGD by the surrogate gradients of distance layers."""

    kind: ClassVar[str] = "surrogate_pgd"
    follows_surrogate: ClassVar[bool] = True

    def describe(self) -> str:
        """Return the attack with its settings, as text for table notes."""
        return super().describe().replace("PGD", f"PGD by gradients at p = {self.config.surrogate_p:g}", 1)
