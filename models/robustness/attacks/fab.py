"""Fast Adaptive Boundary (FAB) attack: small steps towards the linearized decision boundary.

Source: Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML 2020, for
the l_inf norm. The targeted form is from their ICML 2020 paper on AutoAttack.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from linflab.models.robustness.attacks.base import TargetedAttack
from linflab.models.robustness.attacks.linf_ball import LinfBall
from linflab.models.robustness.margins import margin

OVERSHOOT = 1.05  # eta: step length relative to the linearized boundary
MAX_BIAS = 0.1  # alpha_max: largest weight of the step from the image itself
BACKWARD = 0.9  # beta: factor on the distance to the image after a success
MIN_DENOMINATOR = 1e-12  # lower limit of denominators


def fab(
    network: nn.Module,
    ball: LinfBall,
    labels: Tensor,
    targets: Tensor,
    steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Search for the nearest misclassified image, and return which images (B,) have one in their ball.

    The search approaches the decision boundary between the label and the target class. It may leave the ball, but stays
    in [0, 1]. Only misclassified points inside the ball count.

    Args:
        network: Network in evaluation mode.
        ball: Perturbation sets of images (B, C, H, W) or (B, D).
        labels: (B,) true classes.
        targets: (B,) target classes.
        steps: Number of gradient steps.
        generator: CPU generator for a random start within half of the ball; None to start at the images.
    """
    images = ball.center
    is_successful = torch.zeros_like(labels, dtype=torch.bool)
    x = images
    if generator is not None:
        x = images + (ball.sample_uniform(generator) - images) / 2

    def per_pixel(values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (images.dim() - 1))

    def visit(x: Tensor, misclassified: Tensor) -> None:
        nonlocal is_successful
        inside = ((x >= ball.lower) & (x <= ball.upper)).flatten(1).all(dim=1)
        is_successful |= misclassified & inside

    for _ in range(steps):
        x = x.detach().requires_grad_()
        logits = network(x)
        difference = logits.gather(1, targets[:, None])[:, 0] - logits.gather(1, labels[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(difference.sum(), x)
        x, difference = x.detach(), difference.detach()
        visit(x, ~(margin(logits.detach(), labels) > 0))
        if bool(is_successful.all()):
            break
        # The linearized boundary is the plane difference + <gradient, z - x> = 0.
        level = (gradient * x).flatten(1).sum(dim=1) - difference
        x_move = towards_plane(x, gradient, level)
        image_move = towards_plane(images, gradient, level)
        distances = [move.flatten(1).abs().amax(dim=1) for move in (x_move, image_move)]
        bias = torch.clamp(distances[0] / (distances[0] + distances[1]).clamp_min(MIN_DENOMINATOR), max=MAX_BIAS)
        x = (1 - per_pixel(bias)) * (x + OVERSHOOT * x_move) + per_pixel(bias) * (images + OVERSHOOT * image_move)
        x = x.clamp(0, 1)
        with torch.no_grad():
            is_adversarial = ~(margin(network(x), labels) > 0)
        visit(x, is_adversarial)
        x = torch.where(per_pixel(is_adversarial), images + BACKWARD * (x - images), x)
    return is_successful


def towards_plane(x: Tensor, normal: Tensor, level: Tensor) -> Tensor:
    """Return the l_inf-smallest moves from points to planes, within [0, 1].

    For each sample, the move d minimizes max |d_i| subject to <normal, x + d> = level and 0 <= x + d <= 1. Each
    coordinate moves in the direction that helps, by t or to the end of [0, 1], whichever is nearer. The exact t is
    found from the sorted distances to the ends. If the plane does not meet the cube 0 <= z <= 1, each coordinate moves
    to its end of [0, 1].

    Args:
        x: (B, ...) points in [0, 1].
        normal: (B, ...) normal vectors.
        level: (B,) offsets of the planes.
    """
    points, weights = x.flatten(1), normal.flatten(1)
    deficit = level - (weights * points).sum(dim=1)
    direction = torch.sign(weights) * torch.sign(deficit)[:, None]
    max_moves = torch.where(direction > 0, 1 - points, points)
    weights = weights.abs()
    max_moves = torch.where(weights > 0, max_moves, 0.0)  # zero-weight coordinates stay
    sorted_moves, order = max_moves.sort(dim=1)
    sorted_weights = weights.gather(1, order)
    # progress[:, k] is reached if each coordinate moves by sorted_moves[:, k], or to its end if that is nearer.
    end_progress = (sorted_weights * sorted_moves).cumsum(dim=1)
    moving_weight = sorted_weights.flip(1).cumsum(dim=1).flip(1)  # [:, k] sums the weights from k on
    progress = end_progress + sorted_moves * (moving_weight - sorted_weights)
    target = deficit.abs()
    first = (progress < target[:, None]).sum(dim=1).clamp_max(points.shape[1] - 1)[:, None]
    fixed_progress = (end_progress - sorted_weights * sorted_moves).gather(1, first)[:, 0]
    t = (target - fixed_progress).clamp_min(0) / moving_weight.gather(1, first)[:, 0].clamp_min(MIN_DENOMINATOR)
    return (direction * torch.minimum(max_moves, t[:, None])).view_as(x)


class FAB(TargetedAttack):
    """Targeted FAB; the first search for each target starts at the images, the others at random points."""

    kind: ClassVar[str] = "fab"

    def describe(self) -> str:
        """Return the attack with its settings, as text for table notes."""
        return f"targeted FAB ({self.targets}, {self.steps}, {self.restarts})"

    def run(
        self, network: nn.Module, ball: LinfBall, labels: Tensor, eps: float, generator: torch.Generator, number: int
    ) -> Tensor:
        """Return which images (B,) have a misclassified point in their ball, found by one search."""
        targets = self.choose_targets(network, ball, labels, number)
        restart = number % self.config.restarts
        return fab(network, ball, labels, targets, self.config.steps, generator if restart else None)
