"""l_inf balls: the exact sets of images that attacks may visit."""

from typing import NamedTuple

import torch
from torch import Tensor


class LinfBall(NamedTuple):
    """l_inf balls around images, intersected with [0, 1].

    Attributes:
        center: (B, C, H, W) or (B, D) images.
        lower: Lower bounds, of the same shape.
        upper: Upper bounds, of the same shape.
    """

    center: Tensor
    lower: Tensor
    upper: Tensor

    def sample_uniform(self, generator: torch.Generator) -> Tensor:
        """Return uniform random points, drawn on the CPU so that every device gets the same values."""
        return self.interpolate(
            torch.rand(self.center.shape, generator=generator, device=generator.device).to(self.center)
        )

    def interpolate(self, shares: Tensor) -> Tensor:
        """Return lower + (upper - lower) * shares, pixel by pixel."""
        return self.project(self.lower + (self.upper - self.lower) * shares)

    def project(self, images: Tensor) -> Tensor:
        """Return the nearest points of the ball."""
        return torch.clamp(images, min=self.lower, max=self.upper)


def linf_ball(images: Tensor, eps: float) -> LinfBall:
    """Return the l_inf balls around images, for pixel values in [0, 1].

    No pixel is further than eps from the image: float64 bounds are rounded towards the images.

    Args:
        images: (B, C, H, W) or (B, D), pixel values in [0, 1].
        eps: Radius of the balls, for pixel values in [0, 1].
    """
    return LinfBall(images, *(_shift_rounding_inward(images, shift).clamp(0, 1) for shift in (-eps, eps)))


def _shift_rounding_inward(images: Tensor, shift: float) -> Tensor:
    """Return images + shift, rounded towards the images: at most |shift| away in float64."""
    exact = images.double() + shift
    nearest = exact.to(images.dtype)
    beyond = (nearest.double() - exact) * shift > 0
    return torch.where(beyond, torch.nextafter(nearest, images), nearest)
