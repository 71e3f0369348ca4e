"""l_inf-dist Net+MLP: the last distance layer gives place to a small ordinary network."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from linflab.models.networks.layers import DistanceLayer, ScaledLinear
from linflab.models.networks.linf_dist import (
    DistanceFeatures,
    DistanceNetConfig,
    LinfDistConvNetConfig,
    LinfDistMLPConfig,
    Subsets,
    Width,
)
from linflab.models.networks.sort_net import SortNetConfig


class LinfDistHybridConfig(DistanceNetConfig):
    """Settings of `LinfDistHybrid`; the paper's have 512 hidden units."""

    kind: Literal["linf_dist_hybrid"] = "linf_dist_hybrid"
    net: Annotated[LinfDistMLPConfig | LinfDistConvNetConfig | SortNetConfig, Field(discriminator="kind")] = Field(
        LinfDistMLPConfig(), description="the net whose last layer the head takes the place of"
    )
    hidden: Width = Field(512, description="hidden units of the head")

    def layers(self, input_shape: Sequence[int], classes: int) -> list[DistanceLayer]:
        return self.net.layers(input_shape, classes)[:-1]

    def build(  # type: ignore[override]
        self, input_shape: Sequence[int], classes: int, mean: Sequence[float] = (0.0,), std: float = 1.0
    ) -> "LinfDistHybrid":
        """The network for images of `input_shape` (C, H, W) with this per-channel mean and single std of the pixels."""
        return LinfDistHybrid(self.layers(input_shape, classes), self.hidden, classes, mean, std)


class LinfDistHybrid(nn.Module):
    """Distance layers, each followed by a mean shift, and a head: linear, tanh, linear.

    forward: images (B, C, H, W) in pixels of [0, 1] -> logits (B, classes). The features are Lipschitz as those of
    `DistanceFeatures`; the head has no useful Lipschitz constant, and is certified by bounds instead.
    Source: Zhang et al. 2021, Section 5 (l_inf-dist Net+MLP).
    """

    def __init__(
        self, distances: Sequence[DistanceLayer], hidden: int, classes: int, mean: Sequence[float], std: float
    ) -> None:
        super().__init__()
        self.features = DistanceFeatures(distances, mean, std)
        inputs = distances[-1].weight.shape[0]
        self.head = nn.Sequential(ScaledLinear(inputs, hidden), nn.Tanh(), ScaledLinear(hidden, classes))

    @property
    def last(self) -> nn.Linear:
        """The layer whose outputs are the logits."""
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        return last

    def forward(self, images: Tensor, p: float = math.inf, subsets: Subsets | None = None) -> Tensor:
        return self.head(self.features(images, p, subsets))
