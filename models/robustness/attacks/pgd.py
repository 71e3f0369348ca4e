"""Projected gradient descent, with steps of one length (Madry et al., ICLR 2018)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from linflab.models.robustness.attacks.ball import Ball
from linflab.models.robustness.objectives import margin

Loss = Literal["cross_entropy", "margin"]


def pgd(
    network: Callable[[Tensor], Tensor],
    around: Ball,
    labels: Tensor,
    loss: Loss,
    steps: int,
    step: float,
    generator: torch.Generator,
) -> Tensor:
    """Ascend a loss by the signs of its gradients from a random point: which images (B) lost their class on the way.

    Args:
        network: in evaluation mode.
        around: where to look.
        labels: (B), the right classes.
        loss: the cross entropy, or the margin max_j z_j - z_y.
        steps: how many; the network is seen at one point more.
        step: how far every pixel moves in a step.
        generator: of the start.
    """
    point, broken = around.random_point(generator), torch.zeros_like(labels, dtype=torch.bool)
    for _ in range(steps):
        point, logits = _ascended(network, around, point, labels, loss, step)
        broken |= ~(margin(logits, labels) > 0)  # NaN too
        if bool(broken.all()):
            return broken
    with torch.no_grad():
        return broken | ~(margin(network(point), labels) > 0)


def adversarial_images(
    network: Callable[[Tensor], Tensor], around: Ball, labels: Tensor, start: Tensor, steps: int, step: float
) -> Tensor:
    """Where an ascent of the cross entropy ends: images (B, C, H, W) to train on.

    Args: as of `pgd`, with the point to start from.
    """
    point = start
    for _ in range(steps):
        point, _ = _ascended(network, around, point, labels, "cross_entropy", step)
    return point


def _ascended(
    network: Callable[[Tensor], Tensor], around: Ball, point: Tensor, labels: Tensor, loss: Loss, step: float
) -> tuple[Tensor, Tensor]:
    """The point a step further, and the logits at this one."""
    point = point.detach().requires_grad_()
    logits = network(point)
    if loss == "cross_entropy":
        gain = functional.cross_entropy(logits, labels, reduction="sum")
    else:
        gain = -margin(logits, labels).sum()
    (gradient,) = torch.autograd.grad(gain, point)
    return around.nearest(point.detach() + step * gradient.sign()), logits.detach()
