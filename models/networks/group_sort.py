"""GroupSort networks, which are Lipschitz in the l_inf norm by construction.

Source: Anil, Lucas & Grosse, "Sorting out Lipschitz function approximation", ICML 2019.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from linflab.models.networks.base import NetworkConfig
from linflab.models.networks.layers import GroupSort, L1ProjectedLinear, single_std_normalize
from linflab.models.networks.linf_dist import Depth, Width


class GroupSortNet(nn.Module):
    """Network of linear layers whose weight rows have l_1 norm at most 1, with GroupSort between them.

    It maps images (B, C, H, W) with pixel values in [0, 1] to logits (B, classes). Every logit is
    `lipschitz_constant`-Lipschitz in the l_inf norm of the pixel values: each layer is 1-Lipschitz, and the
    normalization is 1/std-Lipschitz.

    Args:
        widths: Number of inputs of each linear layer, then number of outputs of the last.
        group: Number of features that are sorted together.
        mean: Mean pixel value of each channel.
        std: Standard deviation of all pixel values.
    """

    def __init__(self, widths: Sequence[int], group: int, mean: Sequence[float], std: float) -> None:
        super().__init__()
        self.normalize = single_std_normalize(mean, std)
        first, *others = (L1ProjectedLinear(*sizes) for sizes in pairwise(widths))
        blocks = [layer for linear in others for layer in (GroupSort(group), linear)]
        self.layers = nn.Sequential(nn.Flatten(), first, *blocks)

    @property
    def lipschitz_constant(self) -> float:
        """Lipschitz constant 1/std of every logit in the l_inf norm of the pixel values."""
        return 1.0 / self.normalize.std.item()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W)."""
        return self.layers(self.normalize(images))


class GroupSortConfig(NetworkConfig):
    """Settings of `GroupSortNet`; the defaults have the size of the network in Zhang et al. 2021, Table 1."""

    is_lipschitz: ClassVar[bool] = True

    kind: Literal["group_sort"] = Field(
        "group_sort", description="linear layers whose weight rows have l_1 norm at most 1, with GroupSort between them"
    )
    depth: Depth = Field(4, description="number of linear layers, including the last")
    width: Width = Field(1024, description="outputs of every layer except the last")
    group_size: Annotated[int, Field(ge=2)] = Field(
        2, description="number of features that are sorted together; must divide width"
    )

    @model_validator(mode="after")
    def _check_group_size(self) -> "GroupSortConfig":
        if self.width % self.group_size:
            next_width = self.width + self.group_size - self.width % self.group_size
            raise ValueError(f"group_size={self.group_size}: must divide width={self.width}; use width={next_width}")
        return self

    def build(
        self, input_shape: Sequence[int], classes: int, mean: Sequence[float] = (0.0,), std: float = 1.0
    ) -> GroupSortNet:
        """Return the network for images (C, H, W) with pixel values in [0, 1]; see `NetworkConfig.build`."""
        widths = [math.prod(input_shape), *[self.width] * (self.depth - 1), classes]
        return GroupSortNet(widths, self.group_size, mean, std)
