"""Auto-PGD: gradient ascent with momentum whose step shrinks, for each image by itself, where it stops to pay.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", ICML 2020, Algorithm 1, on margins.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from linflab.models.robustness.attacks.ball import Ball
from linflab.models.robustness.objectives import margin

MOMENTUM = 0.25  # share of the last move that is made again
IMPROVING = 0.75  # share of a period's steps that must improve the loss, else the step is halved


def apgd(
    network: nn.Module,
    around: Ball,
    labels: Tensor,
    targets: Tensor | None,
    steps: int,
    eps: float,
    generator: torch.Generator,
) -> Tensor:
    """Ascend a margin from a random point: which images (B) lost their class on the way.

    Args:
        network: in evaluation mode.
        around: where to look.
        labels: (B), the right classes.
        targets: (B), the classes to be ahead, by z_t - z_y; None: the margin max_j z_j - z_y.
        steps: how many.
        eps: radius of the ball; the first step is twice as long.
        generator: of the start.
    """
    broken = torch.zeros_like(labels, dtype=torch.bool)

    def ascend(x: Tensor) -> tuple[Tensor, Tensor]:
        """The margin of each image, and the signs of its gradient."""
        nonlocal broken
        x = x.detach().requires_grad_()
        logits = network(x)
        ahead = -margin(logits, labels)
        broken |= ~(ahead.detach() < 0)  # NaN too
        if targets is not None:
            ahead = logits.gather(1, targets[:, None])[:, 0] - logits.gather(1, labels[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(ahead.sum(), x)
        return ahead.detach(), gradient.sign()

    def per_pixel(values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (around.centre.dim() - 1))

    x = before = around.random_point(generator)
    gain, signs = ascend(x)
    best, best_x, best_signs = gain.clone(), x, signs
    step = torch.full_like(gain, 2 * eps)
    ends = set(_ends_of_periods(steps))
    last_end, improved = 0, torch.zeros_like(gain)
    halved, best_at_end = torch.zeros_like(broken), best.clone()
    for k in range(1, steps + 1):
        if bool(broken.all()):
            break
        ahead = around.nearest(x + per_pixel(step) * signs)
        if k > 1:
            ahead = around.nearest(x + (1 - MOMENTUM) * (ahead - x) + MOMENTUM * (x - before))
        before, x = x, ahead
        previous, (gain, signs) = gain, ascend(x)
        improved += gain > previous
        better = gain > best
        best = torch.where(better, gain, best)
        best_x, best_signs = (
            torch.where(per_pixel(better), new, old) for new, old in ((x, best_x), (signs, best_signs))
        )
        if k in ends:
            stuck = improved < IMPROVING * (k - last_end)
            stuck |= ~halved & (best <= best_at_end)
            step = torch.where(stuck, step / 2, step)
            x, signs = torch.where(per_pixel(stuck), best_x, x), torch.where(per_pixel(stuck), best_signs, signs)
            gain = torch.where(stuck, best, gain)
            halved, best_at_end, last_end = stuck, best.clone(), k
            improved = torch.zeros_like(improved)
    return broken


def _ends_of_periods(steps: int) -> list[int]:
    """After which steps the step size is looked at: periods of 22 % of the steps, shrinking by 3 % down to 6 %."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return [math.ceil(share * steps) for _, share in pairwise(shares)]
