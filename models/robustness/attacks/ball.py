"""Where attacks may go: the images within eps of an image, exactly."""

from typing import NamedTuple

import torch
from torch import Tensor


class Ball(NamedTuple):
    """Images (B, C, H, W) around images, the farthest of them each way, and those of [0, 1] between the two."""

    centre: Tensor
    low: Tensor
    high: Tensor

    def random_point(self, generator: torch.Generator) -> Tensor:
        """Drawn uniformly, on the CPU, so that every device draws the same."""
        return self.point(torch.rand(self.centre.shape, generator=generator).to(self.centre))

    def point(self, shares: Tensor) -> Tensor:
        """The point that is so far on the way from the lowest to the highest, pixel by pixel."""
        return self.nearest(self.low + (self.high - self.low) * shares)

    def nearest(self, images: Tensor) -> Tensor:
        """The points of the ball that are nearest to these images."""
        return torch.clamp(images, min=self.low, max=self.high)


def ball(images: Tensor, eps: float) -> Ball:
    """The images within eps of these, in pixels, cut to [0, 1].

    No pixel is further than eps from where it was: the ends, as float64 has them, are rounded towards the images.
    """
    return Ball(images, *(_moved(images, shift).clamp(0, 1) for shift in (-eps, eps)))


def _moved(images: Tensor, shift: float) -> Tensor:
    """images + shift, rounded towards the images: no further from them than float64 says |shift| is."""
    exact = images.double() + shift
    nearest = exact.to(images.dtype)
    beyond = (nearest.double() - exact) * shift > 0
    return torch.where(beyond, torch.nextafter(nearest, images), nearest)
