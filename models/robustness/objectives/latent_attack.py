"""Attack on a value inside a network: PGD in a box of latent values, with gradients for the box."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.steps import Trace, compute_output

MAX_LATENT_ELEMENTS = 2**26  # latent values of an attack at once; limits memory
MIN_REL_STEP_SIZE = 0.2  # of the half-width of the box


def attacked_differences(
    second: Trace, latent: Box, labels: Tensor, classes: int, starts: Tensor, steps: int, fade: float
) -> Tensor:
    """Return logit differences (B, K) that PGD finds in a box of latent values, -inf at the true class.

    For each wrong class j, one attack maximizes z_j - z_y. The attacks are independent; attacks of the same sample
    start at the same points. Gradients with respect to the box follow `link_to_box`.

    Args:
        second: Part of the network from latent values to logits z.
        latent: Box of latent values, (B, ...).
        labels: (B,) true classes y.
        classes: Number of classes K.
        starts: (B, R, ...) starting points of R restarts, as fractions of the box.
        steps: Number of PGD steps.
        fade: Fraction of the width of the box over which gradients fade, see `link_to_box`.
    """
    offsets = torch.arange(1, classes, device=labels.device)
    targets = (labels + offsets[:, None]) % classes  # (K - 1, B)

    def differences(box: Box, points: Tensor, chunk: Tensor) -> Tensor:
        return _differences(second, link_to_box(box, points, fade), labels, chunk)

    chunks = targets.split(max(1, MAX_LATENT_ELEMENTS // max(1, latent.lower.numel())))
    points = [find_worst_points(second, latent, labels, chunk, starts, steps) for chunk in chunks]
    if len(chunks) == 1:
        found = [differences(latent, points[0], chunks[0])]
    else:  # the backward pass computes the layers of one chunk at a time again
        found = [
            checkpoint(differences, latent, *pair, use_reentrant=False, preserve_rng_state=False)
            for pair in zip(points, chunks, strict=True)
        ]
    values = torch.cat(found).T
    return values.new_full((len(labels), classes), -torch.inf).scatter(1, targets.T, values)


def find_worst_points(
    second: Trace, latent: Box, labels: Tensor, targets: Tensor, starts: Tensor, steps: int
) -> Tensor:
    """Return the points (J, B, ...) of a box with the largest z_j - z_y that PGD visits.

    A step moves each value by max(0.2, 2 / steps) half-widths of the box. Sources: Mao et al. 2023, Section 3.2; the
    step size is in the published code of Mao et al., "CTBench", ICML 2025.

    Args:
        second: Part of the network from latent values to logits z.
        latent: Box of latent values, (B, ...).
        labels: (B,) true classes y.
        targets: (J, B) wrong classes j.
        starts: (B, R, ...) starting points of R restarts, as fractions of the box.
        steps: Number of PGD steps.
    """
    lower, upper = latent.lower.detach(), latent.upper.detach()
    step_size = max(MIN_REL_STEP_SIZE, 2 / steps) * (upper - lower) / 2
    shape = (len(targets), *lower.shape)
    best, highest = lower.expand(shape), torch.full_like(targets, -torch.inf, dtype=lower.dtype)
    for start in starts.unbind(1):
        points = torch.lerp(lower, upper, start.view_as(lower)).clamp(lower, upper).expand(shape)
        for step in range(steps + 1):
            points = points.detach().requires_grad_(step < steps)
            with torch.set_grad_enabled(step < steps):
                found = _differences(second, points, labels, targets)
            is_higher = found.detach() > highest
            best = torch.where(is_higher.view(*targets.shape, *[1] * (lower.dim() - 1)), points.detach(), best)
            highest = torch.where(is_higher, found.detach(), highest)
            if step < steps:
                (gradient,) = torch.autograd.grad(found.sum(), points)
                points = torch.clamp(points.detach() + step_size * gradient.sign(), lower, upper)
    return best


def _differences(second: Trace, points: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return z_j - z_y (J, B) at points (J, B, ...), for wrong classes j (J, B) and true classes y (B,)."""
    logits = compute_output(second, points.flatten(0, 1), len(points)).unflatten(0, targets.shape)
    own = labels.expand(targets.shape)
    return (logits.gather(2, targets[..., None]) - logits.gather(2, own[..., None]))[..., 0]


def link_to_box(box: Box, points: Tensor, fade: float) -> Tensor:
    """Return points of a box, with gradients for its bounds by the rectified linear estimator.

    Let x be a coordinate of a point in [l, u], r = (x - l) / (u - l) its position, and c the argument `fade`. A
    gradient g with respect to x becomes

        max(0, 1 - r / c) g with respect to l,  and  max(0, 1 - (1 - r) / c) g with respect to u,

    summed over the points of a sample. A point on a bound passes its whole gradient to that bound; with c = 0.5, the
    gradient fades linearly to 0 at the middle of the box. If l = u, each bound gets half of the gradient. Source: Mao
    et al. 2023, Section 3.3.

    Args:
        box: Lower and upper bounds, (B, ...).
        points: (J, B, ...) points of the box.
        fade: Fraction c of the width of the box over which gradients fade, in (0, 1].
    """
    linked: Tensor = _LinkToBox.apply(box.lower, box.upper, points, fade)
    return linked


class _LinkToBox(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lower: Tensor, upper: Tensor, points: Tensor, fade: float) -> Tensor:
        ctx.save_for_backward(lower, upper, points)
        ctx.fade = fade
        return points.view_as(points)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        lower, upper, points = ctx.saved_tensors
        width, fade = upper - lower, ctx.fade
        position = (points - lower) / torch.where(width > 0, width, 1.0)
        to_lower = torch.where(width > 0, (1 - position / fade).clamp_min(0), 0.5)
        to_upper = torch.where(width > 0, (1 - (1 - position) / fade).clamp_min(0), 0.5)
        return (to_lower * gradient).sum(dim=0), (to_upper * gradient).sum(dim=0), None, None
