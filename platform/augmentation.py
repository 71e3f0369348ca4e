"""What part of an image the network sees: cut, shifted and flipped by chance in training, from the centre otherwise.

All images of a batch are worked on together, as uint8, on the device where they are. What chance decides is drawn for
a whole epoch at once, by position in its order, so that it does not depend on the number of workers.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


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
        row, column, flip = draws.unsqueeze(2).unbind(1)  # (B, 1) each
        rows = row - self.padding + torch.arange(out_height, device=images.device)
        along = torch.arange(out_width, device=images.device)
        columns = column - self.padding + torch.where(flip > 0, out_width - 1 - along, along)
        places = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
        places = places.flatten(1)[:, None].expand(-1, images.shape[1], -1)
        seen = images.flatten(2).gather(2, places).unflatten(2, (out_height, out_width))
        if self.padding and self.padding_mode == "constant":
            inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
            seen *= inside[:, None]
        return seen

    def centre(self, images: Tensor) -> Tensor:
        """What the network sees of images (B, C, H, W) in evaluation."""
        if self.crop is None:
            return images
        top, left = ((full - self.crop) // 2 for full in images.shape[2:])
        return images[:, :, top : top + self.crop, left : left + self.crop]
