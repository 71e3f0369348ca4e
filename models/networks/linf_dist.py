"""l_inf-distance nets (Zhang et al., ICML 2021): Lipschitz in the l_inf norm by construction.

A net takes images (B, C, H, W) in pixels of [0, 1], the p of its neurons and, for SortNet in training, the subsets of
inputs that its neurons see. Certificates hold in evaluation mode at p = inf.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from linflab.models.networks.layers import DistanceLayer, LpDistance, LpDistanceConv2d, MeanShift, Normalize

Width = Annotated[int, Field(ge=1, le=1_000_000)]
Depth = Annotated[int, Field(ge=1, le=1000)]


class Subsets(NamedTuple):
    """What chance decides in a pass of SortNet: (G, I) bool for each layer after the first, and samples to a subset.

    For nets all of whose layers after the first are `SortDistance`, as `SortNetConfig` makes them.
    """

    kept: list[Tensor]
    group: int


class DistanceFeatures(nn.Module):
    """Normalisation, then distance layers, each followed by a mean shift: images (B, C, H, W) -> features (B, F).

    In evaluation mode at p = inf every feature is `lipschitz_constant`-Lipschitz in the l_inf norm of the pixels: each
    distance layer and mean shift is 1-Lipschitz, and the normalisation in front is 1/std-Lipschitz.
    """

    def __init__(self, distances: Sequence[DistanceLayer], mean: Sequence[float], std: float) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.distances = nn.ModuleList(distances)
        self.shifts = nn.ModuleList(MeanShift(len(layer.weight)) for layer in distances)

    @property
    def lipschitz_constant(self) -> float:
        """How much a feature can change per unit of l_inf distance between two images, in pixels: 1/std."""
        return 1.0 / self.normalize.std.item()

    def forward(self, images: Tensor, p: float = math.inf, subsets: Subsets | None = None) -> Tensor:
        x = self.normalize(images)
        for k, (distance, shift) in enumerate(zip(self.distances, self.shifts, strict=True)):
            x = shift(distance(x, p, *subset_of(subsets, k)))
        return x.flatten(1)


def subset_of(subsets: Subsets | None, layer: int) -> tuple[()] | tuple[Tensor, int]:
    """What the distance layer of this number gets besides x and p; the first one, 0, sees all its inputs."""
    return (subsets.kept[layer - 1], subsets.group) if subsets is not None and layer else ()


class LinfDistNet(nn.Module):
    """l_inf-dist Net: distance layers, each but the last followed by a mean shift; logits are minus the last's outputs.

    forward: images (B, C, H, W) in pixels of [0, 1] -> logits (B, classes). In evaluation mode at p = inf every logit
    is `lipschitz_constant`-Lipschitz in the l_inf norm of the pixels.
    """

    def __init__(self, distances: Sequence[DistanceLayer], mean: Sequence[float], std: float) -> None:
        super().__init__()
        *hidden, last = distances
        self.features = DistanceFeatures(hidden, mean, std)
        self.last = last
        self.bias = nn.Parameter(torch.zeros(len(last.weight)))

    @property
    def lipschitz_constant(self) -> float:
        """How much a logit can change per unit of l_inf distance between two images, in pixels: 1/std."""
        return self.features.lipschitz_constant

    def forward(self, images: Tensor, p: float = math.inf, subsets: Subsets | None = None) -> Tensor:
        x = self.features(images, p, subsets)
        return -(self.last(x, p, *subset_of(subsets, len(self.features.distances))) + self.bias)


class DistanceNetConfig(BaseModel):
    """What the settings of all nets of distance layers share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def layers(self, input_shape: Sequence[int], classes: int) -> list[DistanceLayer]:
        """The distance layers, the last one with an output for every class."""

    def build(
        self, input_shape: Sequence[int], classes: int, mean: Sequence[float] = (0.0,), std: float = 1.0
    ) -> LinfDistNet:
        """The network for images of `input_shape` (C, H, W) with this per-channel mean and single std of the pixels."""
        return LinfDistNet(self.layers(input_shape, classes), mean, std)


class LinfDistMLPConfig(DistanceNetConfig):
    """Settings of a net of dense layers. The paper's sizes are depth 5 (MNIST) or 6 (CIFAR-10) and width 5120."""

    kind: Literal["linf_dist_mlp"] = "linf_dist_mlp"
    depth: Depth = Field(5, description="distance layers, the last one included")
    width: Width = Field(5120, description="neurons of every layer but the last")
    initialization: Literal["normal", "identity"] = Field(
        "identity", description="N(0, 1) weights; identity also passes the input through the layers that can"
    )

    def layers(self, input_shape: Sequence[int], classes: int) -> list[DistanceLayer]:
        layers = [LpDistance(*sizes) for sizes in pairwise(self.widths(input_shape, classes))]
        if self.initialization == "identity":
            for layer in layers:
                layer.initialize_as_identity()
        return list(layers)

    def widths(self, input_shape: Sequence[int], classes: int) -> list[int]:
        """Inputs of every layer, and outputs of the last."""
        return [math.prod(input_shape), *[self.width] * (self.depth - 1), classes]


class LinfDistConvNetConfig(DistanceNetConfig):
    """Settings of a net whose first five layers are 3 x 3 distance convolutions; two dense layers follow.

    They have width, width, 2 width (stride 2), 2 width and 2 width filters. Source: the convolutional variant in the
    published training scripts of Zhang et al. 2021.
    """

    kind: Literal["linf_dist_conv_net"] = "linf_dist_conv_net"
    width: Width = Field(128, description="filters of the first convolution")
    dense_width: Width = Field(512, description="neurons of the dense layer before the last")

    def layers(self, input_shape: Sequence[int], classes: int) -> list[DistanceLayer]:
        channels, height, width = input_shape
        layers: list[DistanceLayer] = []
        for factor, stride in ((1, 1), (1, 1), (2, 2), (2, 1), (2, 1)):
            layers.append(LpDistanceConv2d(channels, factor * self.width, stride=stride))
            channels = factor * self.width
        positions = ((height + 1) // 2) * ((width + 1) // 2)
        return [*layers, LpDistance(channels * positions, self.dense_width), LpDistance(self.dense_width, classes)]
