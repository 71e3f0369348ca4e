"""Projected gradient descent, with steps of one length (Madry et al., ICLR 2018)."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.robustness.attacks.ball import Ball
from linflab.models.robustness.objectives import margin


def pgd(
    network: nn.Module,
    around: Ball,
    labels: Tensor,
    loss: Literal["cross_entropy", "margin"],
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
    attacked, broken = around.random_point(generator), torch.zeros_like(labels, dtype=torch.bool)
    for k in range(steps + 1):
        attacked = attacked.detach().requires_grad_()
        logits = network(attacked)
        broken |= ~(margin(logits.detach(), labels) > 0)  # NaN too
        if k == steps or bool(broken.all()):
            break
        if loss == "cross_entropy":
            gain = functional.cross_entropy(logits, labels, reduction="sum")
        else:
            gain = -margin(logits, labels).sum()
        (gradient,) = torch.autograd.grad(gain, attacked)
        attacked = around.nearest(attacked.detach() + step * gradient.sign())
    return broken
