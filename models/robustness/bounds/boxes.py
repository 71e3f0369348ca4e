"""Boxes: elementwise lower and upper bounds, such as the perturbation set of an image."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from linflab.models.robustness.bounds.rounding import round_up
from linflab.models.robustness.inputs import check_eps, check_images, check_radii


class Box(NamedTuple):
    """The set of all x with lower <= x <= upper, elementwise."""

    lower: Tensor
    upper: Tensor


def perturbation_box(images: Tensor, eps: float | Tensor) -> Box:
    """Return the box of all images within eps, intersected with [0, 1].

    The box contains every such image of the same dtype, for two reasons: eps is rounded up, and each bound is rounded
    to the nearest float. No float beyond that float is within eps.

    Args:
        images: (B, C, H, W) or flat (B, D), pixel values in [0, 1].
        eps: Radius of the l_inf ball, from 0 to 1, for pixel values in [0, 1]; or one radius per image in float64, (B,
            1, 1, 1) or (B, 1).

    Raises:
        TypeError: If images or eps have the wrong type or dtype.
        ValueError: If images or eps have an invalid shape or range.
    """
    check_images(images)
    if isinstance(eps, Tensor) and eps.dim():
        check_radii(eps)
        if eps.dim() != images.dim():
            raise ValueError(f"eps={tuple(eps.shape)}: must be one number or have shape (B, 1, ...); use eps.view")
    else:
        eps = check_eps(eps)
    return ball_box(images, eps)


def ball_box(images: Tensor, eps: float | Tensor) -> Box:
    """Return `perturbation_box` of checked arguments; training calls it in every step."""
    radius = round_up(eps, images)
    return Box((images - radius).clamp(0, 1), (images + radius).clamp(0, 1))


def max_magnitude(box: Box) -> Tensor:
    """Return the largest magnitudes in a box, elementwise."""
    return torch.maximum(box.lower.abs(), box.upper.abs())


def one_point(box: Box) -> Box:
    """Return a box of one all-zero sample, to find output shapes and errors for an empty batch."""
    point = box.lower.new_zeros(1, *box.lower.shape[1:])
    return Box(point, point)


def all_finite(boxes: Mapping[str, Box]) -> Tensor:
    """Return for which samples (B,) all boxes are finite; elsewhere sums may overflow and cancel to NaN."""
    ends = [bound.flatten(1).isfinite().all(dim=1) for box in boxes.values() for bound in box]
    return torch.stack(ends).all(dim=0)
