"""Adversarial images for training, and the centers of the small boxes around them that SABR propagates."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.networks.linf_dist import logits_at
from linflab.models.robustness.attacks.linf_ball import linf_ball
from linflab.models.robustness.attacks.pgd import pgd_examples
from linflab.models.robustness.bounds.tracing import evaluation_mode
from linflab.models.robustness.objectives.base import Batch


def draw_image_starts(shape: Sequence[int], restarts: int, generator: torch.Generator) -> Tensor:
    """Return uniform random numbers in [0, 1], (B, C, H, W), or (B, restarts, C, H, W) for several restarts.

    Args:
        shape: Shape of the batch, (B, C, H, W).
        restarts: Number of starting points per image.
        generator: CPU generator.
    """
    size = tuple(shape) if restarts == 1 else (shape[0], restarts, *shape[1:])
    return torch.rand(size, generator=generator)


def adversarial_images(
    network: nn.Module,
    batch: Batch,
    eps: float,
    steps: int,
    rel_step_size: float,
    decay_after: tuple[int, ...] = (),
    decay_factor: float = 1.0,
) -> Tensor:
    """Return the images (B, C, H, W) at which PGD ends, in evaluation mode so that running statistics do not change.

    If the batch has several starting points per image, the end with the largest cross entropy is returned.

    Args:
        network: Network in training mode.
        batch: Inputs of the training step; `starts` select the starting points.
        eps: Radius of the attack, for pixel values in [0, 1].
        steps: Number of steps.
        rel_step_size: Size of the first step, as a fraction of eps.
        decay_after: Steps, from 1, after each of which the step size is multiplied by `decay_factor`.
        decay_factor: Factor of the step size.
    """
    assert batch.starts is not None
    ball = linf_ball(batch.images, eps)
    step_sizes = [
        rel_step_size * eps * decay_factor ** sum(after < step for after in decay_after) for step in range(1, steps + 1)
    ]

    def compute_logits(images: Tensor) -> Tensor:
        return logits_at(network, images, batch.p, batch.masks)

    with evaluation_mode(network):
        if batch.starts.dim() == batch.images.dim():
            return pgd_examples(compute_logits, ball, batch.labels, ball.interpolate(batch.starts), step_sizes)
        worst = batch.images
        worst_losses = torch.full_like(batch.labels, -torch.inf, dtype=batch.images.dtype)
        for starts in batch.starts.unbind(dim=1):
            points = pgd_examples(compute_logits, ball, batch.labels, ball.interpolate(starts), step_sizes)
            with torch.no_grad():
                losses = functional.cross_entropy(compute_logits(points), batch.labels, reduction="none")
            is_worse = losses > worst_losses
            worst = torch.where(is_worse.view(-1, *[1] * (points.dim() - 1)), points, worst)
            worst_losses = torch.maximum(losses, worst_losses)
        return worst


def adversarial_centers(images: Tensor, points: Tensor, eps: float, ratio: float) -> Tensor:
    """Return points (B, C, H, W) of the eps-ball, clamped to the ball of radius (1 - ratio) eps.

    The ball of radius `ratio * eps` around them is inside the eps-ball. Source: Mueller et al., "Certified Training:
    Small Boxes Are All You Need", ICLR 2023, Section 3.

    Args:
        images: (B, C, H, W) clean images, pixel values in [0, 1].
        points: (B, C, H, W) adversarial images within eps.
        eps: Radius of the l_inf ball, for pixel values in [0, 1].
        ratio: Radius of the small balls as a fraction of eps, in [0, 1].
    """
    slack = (1 - ratio) * eps
    return points.clamp(images - slack, images + slack)
