"""l_inf-dist Net+MLP: a distance network whose last layer is replaced by a small MLP."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from linflab.models.networks.base import NetworkConfig
from linflab.models.networks.layers import DistanceLayer, ScaledLinear
from linflab.models.networks.linf_dist import (
    DistanceFeatureExtractor,
    DistanceNet,
    DistanceNetConfig,
    InputMasks,
    LinfDistMLPConfig,
    Width,
)


class LinfDistHybridConfig(NetworkConfig):
    """Settings of `LinfDistHybrid`; the networks of the paper have 512 hidden units."""

    has_distances: ClassVar[bool] = True

    kind: Literal["linf_dist_hybrid"] = Field(
        "linf_dist_hybrid", description="distance net `backbone` whose last layer is replaced by an MLP"
    )
    backbone: DistanceNetConfig = Field(
        LinfDistMLPConfig(), description="distance net whose last layer the head replaces"
    )
    hidden_size: Width = Field(512, description="hidden units of the head")

    @property
    def uses_input_masks(self) -> bool:
        """True if training masks random inputs of neurons."""
        return self.backbone.uses_input_masks

    def check(self) -> None:
        """Check that a distance layer remains below the head.

        Raises:
            ValueError: If the backbone has only one layer.
        """
        if getattr(self.backbone, "depth", 2) < 2:
            raise ValueError("model.backbone.depth=1: must be at least 2, since the head replaces the last layer")

    def build(
        self, input_shape: Sequence[int], classes: int, mean: Sequence[float] = (0.0,), std: float = 1.0
    ) -> "LinfDistHybrid":
        """Return the network for images (C, H, W) with pixel values in [0, 1]; see `NetworkConfig.build`."""
        return LinfDistHybrid(self.backbone.layers(input_shape, classes)[:-1], self.hidden_size, classes, mean, std)


class LinfDistHybrid(DistanceNet):
    """Distance layers, each followed by a mean shift, and an MLP head (linear, tanh, linear).

    It maps images (B, C, H, W) with pixel values in [0, 1] to logits (B, classes). The features are Lipschitz, see
    `DistanceFeatureExtractor`. The head has no useful Lipschitz constant; bound propagation certifies it instead.
    Source: Zhang et al. 2021, Section 5 (l_inf-dist Net+MLP).

    Args:
        distances: Distance layers of the backbone without the last.
        hidden: Hidden units of the head.
        classes: Number of logits.
        mean: Mean pixel value of each channel.
        std: Standard deviation of all pixel values.
    """

    def __init__(
        self, distances: Sequence[DistanceLayer], hidden: int, classes: int, mean: Sequence[float], std: float
    ) -> None:
        super().__init__()
        self.features = DistanceFeatureExtractor(distances, mean, std)
        inputs = distances[-1].weight.shape[0]
        self.head = nn.Sequential(ScaledLinear(inputs, hidden), nn.Tanh(), ScaledLinear(hidden, classes))

    @property
    def last(self) -> nn.Linear:
        """Linear layer that outputs the logits."""
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        return last

    def forward(self, images: Tensor, p: float = math.inf, masks: InputMasks | None = None) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W); `masks` are SortNet's input masks in training."""
        return self.head(self.features(images, p, masks))
