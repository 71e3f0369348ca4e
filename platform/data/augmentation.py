"""Data augmentation: random crop, shift, flip and gamma correction in training, center crop in evaluation.

Whole batches are cropped and flipped as uint8, on the device that holds them. All random draws of an epoch are made
together, one row per image in the order of the epoch. The draws therefore do not depend on the number of workers.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional

GAMMA_STEPS = 2**20  # logarithms of random exponents are multiples of a small step, so that draws are integers


class AugmentationConfig(BaseModel):
    """Random crop with padding, horizontal flip and gamma correction; all only in training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    crop_size: int | None = Field(
        None, ge=1, description="side of the square crop, which is central in evaluation; null: the whole image"
    )
    padding: int = Field(0, ge=0, le=1000, description="pixels added to every side before the random crop")
    padding_mode: Literal["constant", "edge"] = Field(
        "constant", description="constant: black pixels; edge: pixels of the edge"
    )
    horizontal_flip: bool = Field(False, description="flip each training image horizontally with probability 1/2")
    gamma_range: float = Field(
        0.0,
        ge=0,
        le=2,
        description="gamma correction: the pixel values of each training image are raised to the power exp(u), with u "
        "uniform in [-gamma_range, gamma_range]; 0: none",
    )

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the network's input for images of this size."""
        return (height, width) if self.crop_size is None else (self.crop_size, self.crop_size)

    def sample_params(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Draw the augmentation of images.

        Args:
            count: Number of images.
            height: Height of the images, in pixels.
            width: Width of the images, in pixels.
            generator: Source of the random draws.

        Returns:
            (count, 3) int64: first row and first column of the crop in the padded image, and flip (0 or 1). With gamma
            correction, (count, 4): also the logarithm of the exponent, as a position in its range, 0 to `GAMMA_STEPS`.
        """
        columns = [
            torch.randint(full + 2 * self.padding - size + 1, (count,), generator=generator)
            for full, size in zip((height, width), self.output_size(height, width), strict=True)
        ]
        columns.append(torch.randint(2 if self.horizontal_flip else 1, (count,), generator=generator))
        if self.gamma_range > 0:
            columns.append(torch.randint(GAMMA_STEPS + 1, (count,), generator=generator))
        return torch.stack(columns, dim=1)

    def crop_and_flip(self, images: Tensor, params: Tensor) -> Tensor:
        """Crop and flip images (B, C, H, W) uint8 by `params` (B, 3 or 4); return (B, C, *output_size)."""
        if self.crop_size is None and self.padding == 0 and not self.horizontal_flip:
            return images
        height, width = images.shape[2:]
        out_height, out_width = self.output_size(height, width)
        row, column, flip = params[:, :3].unbind(1)
        windows = self._pad(images).unfold(2, out_height, 1).unfold(3, out_width, 1)  # a view of all crops
        crops = windows[torch.arange(len(images), device=images.device), :, row, column]
        return torch.where(flip.bool()[:, None, None, None], crops.flip(3), crops) if self.horizontal_flip else crops

    def correct_gamma(self, inputs: Tensor, params: Tensor) -> Tensor:
        """Raise inputs (B, C, H, W), pixel values in [0, 1], to random powers given by `params` (B, 4).

        Powers are computed in float64 and then rounded, so the results of two devices rarely differ.
        """
        if self.gamma_range == 0:
            return inputs
        u = self.gamma_range * (2 * params[:, 3].double() / GAMMA_STEPS - 1)
        return inputs.double().pow(u.exp()[:, None, None, None]).to(inputs)

    def _pad(self, images: Tensor) -> Tensor:
        if self.padding_mode == "constant":
            return functional.pad(images, [self.padding] * 4)
        rows, columns = (
            torch.arange(-self.padding, size + self.padding, device=images.device).clamp(0, size - 1)
            for size in images.shape[2:]
        )
        return images[:, :, rows[:, None], columns]

    def center_crop(self, images: Tensor) -> Tensor:
        """Return the center crop of images (B, C, H, W), which is the network's input in evaluation."""
        if self.crop_size is None:
            return images
        top, left = ((full - self.crop_size) // 2 for full in images.shape[2:])
        return images[:, :, top : top + self.crop_size, left : left + self.crop_size]
