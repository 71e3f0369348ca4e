"""What part of an image the network sees: cut, shifted and flipped by chance in training, from the centre otherwise.

All images of a batch are worked on together, as uint8, on the device where they are. What chance decides is drawn for
a whole epoch at once, by position in its order, so that it does not depend on the number of workers.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional


class AugmentationConfig(BaseModel):
    """Random crop with padding, and horizontal flip; both in training alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    crop: int | None = Field(
        None, ge=1, description="side of the square that the network sees, cut from the centre in evaluation; none: all"
    )
    padding: int = Field(0, ge=0, le=1000, description="pixels added on every side before the random crop")
    padding_mode: Literal["constant", "edge"] = Field("constant", description="black pixels, or those of the edge")
    flip: bool = Field(False, description="mirror every other training image, by chance, from left to right")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what the network sees of such an image."""
        return (height, width) if self.crop is None else (self.crop, self.crop)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """What chance decides for `count` images of this size: first row, first column and flip, (count, 3) int64."""
        columns = [
            torch.randint(full + 2 * self.padding - seen + 1, (count,), generator=generator)
            for full, seen in zip((height, width), self.size(height, width), strict=True)
        ]
        flips = torch.randint(2 if self.flip else 1, (count,), generator=generator)
        return torch.stack([*columns, flips], dim=1)

    def augment(self, images: Tensor, draws: Tensor) -> Tensor:
        """The parts of images (B, C, H, W) uint8 that `draws` (B, 3) chose: (B, C, height, width) of `size`."""
        if self.crop is None and self.padding == 0 and not self.flip:
            return images
        height, width = images.shape[2:]
        out_height, out_width = self.size(height, width)
        row, column, flip = draws.unbind(1)
        windows = self._padded(images).unfold(2, out_height, 1).unfold(3, out_width, 1)  # a view: all there are
        seen = windows[torch.arange(len(images), device=images.device), :, row, column]
        return torch.where(flip.bool()[:, None, None, None], seen.flip(3), seen) if self.flip else seen

    def _padded(self, images: Tensor) -> Tensor:
        if self.padding_mode == "constant":
            return functional.pad(images, [self.padding] * 4)
        rows, columns = (
            torch.arange(-self.padding, size + self.padding, device=images.device).clamp(0, size - 1)
            for size in images.shape[2:]
        )
        return images[:, :, rows[:, None], columns]

    def centre(self, images: Tensor) -> Tensor:
        """What the network sees of images (B, C, H, W) in evaluation."""
        if self.crop is None:
            return images
        top, left = ((full - self.crop) // 2 for full in images.shape[2:])
        return images[:, :, top : top + self.crop, left : left + self.crop]
