"""GroupSort nets (Anil, Lucas & Grosse, "Sorting out Lipschitz function approximation", ICML 2019), for l_inf."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from linflab.models.networks.layers import GroupSort, L1Linear, Normalize
from linflab.models.networks.linf_dist import Depth, Width


class GroupSortNet(nn.Module):
    """Linear layers with rows in the l1 ball, and GroupSort between them.

    forward: images (B, C, H, W) in pixels of [0, 1] -> logits (B, classes). Every logit is
    `lipschitz_constant`-Lipschitz in the l_inf norm of the pixels: each layer is 1-Lipschitz, and the normalisation in
    front is 1/std-Lipschitz.

    Args:
        widths: inputs of every linear layer, and outputs of the last.
        group: features that are sorted together.
    """

    def __init__(self, widths: Sequence[int], group: int, mean: Sequence[float], std: float) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        first, *others = (L1Linear(*sizes) for sizes in pairwise(widths))
        sorted_first = [layer for linear in others for layer in (GroupSort(group), linear)]
        self.layers = nn.Sequential(nn.Flatten(), first, *sorted_first)

    @property
    def lipschitz_constant(self) -> float:
        """How much a logit can change per unit of l_inf distance between two images, in pixels: 1/std."""
        return 1.0 / self.normalize.std.item()

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(self.normalize(images))


class GroupSortConfig(BaseModel):
    """Settings of `GroupSortNet`; by default as large as that of Zhang et al. 2021, Table 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["group_sort"] = "group_sort"
    depth: Depth = Field(4, description="linear layers, the last one included")
    width: Width = Field(1024, description="outputs of every layer but the last")
    group: Annotated[int, Field(ge=2)] = Field(2, description="features that are sorted together; divides width")

    @model_validator(mode="after")
    def _groups_fill_the_width(self) -> "GroupSortConfig":
        if self.width % self.group:
            more = self.width + self.group - self.width % self.group
            raise ValueError(f"group={self.group} does not divide width={self.width}; it divides width={more}")
        return self

    def build(
        self, input_shape: Sequence[int], classes: int, mean: Sequence[float] = (0.0,), std: float = 1.0
    ) -> GroupSortNet:
        """The network for images of `input_shape` (C, H, W) with this per-channel mean and single std of the pixels."""
        widths = [math.prod(input_shape), *[self.width] * (self.depth - 1), classes]
        return GroupSortNet(widths, self.group, mean, std)
