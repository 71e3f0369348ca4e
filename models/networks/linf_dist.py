"""l_inf-distance nets (Zhang et al., ICML 2021), Lipschitz in the l_inf norm by construction.

Their inputs are images (B, C, H, W) with pixel values in [0, 1], the p of the neurons and, for SortNet in training,
input masks. Certificates hold in evaluation mode at p = inf.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from linflab.models.networks.base import NetworkConfig
from linflab.models.networks.layers import DistanceLayer, LpDistance, LpDistanceConv2d, MeanShift, single_std_normalize

Width = Annotated[int, Field(ge=1, le=1_000_000)]
Depth = Annotated[int, Field(ge=1, le=1000)]


class InputMasks(NamedTuple):
    """Random input masks of a training step of SortNet, whose layers after the first are `SortDistance`.

    Attributes:
        masks: Inputs that each group of samples uses, (G, I) bool for each layer after the first.
        group_size: Number of samples in a group.
        mean_over: Samples over which mean shifts average a feature: the batch, or the groups that keep the feature in
            the next layer.
    """

    masks: list[Tensor]
    group_size: int
    mean_over: Literal["batch", "kept"] = "batch"


class DistanceFeatureExtractor(nn.Module):
    """Normalization and distance layers with mean shifts, from images (B, C, H, W) to features (B, F).

    In evaluation mode at p = inf every feature is `lipschitz_constant`-Lipschitz in the l_inf norm of the pixel values:
    each distance layer and mean shift is 1-Lipschitz, and the normalization is 1/std-Lipschitz.

    Args:
        distances: Distance layers, each followed by a mean shift.
        mean: Mean pixel value of each channel.
        std: Standard deviation of all pixel values.
    """

    def __init__(self, distances: Sequence[DistanceLayer], mean: Sequence[float], std: float) -> None:
        super().__init__()
        self.normalize = single_std_normalize(mean, std)
        self.distances = nn.ModuleList(distances)
        self.shifts = nn.ModuleList(MeanShift(len(layer.weight)) for layer in distances)

    @property
    def lipschitz_constant(self) -> float:
        """Lipschitz constant 1/std of every feature in the l_inf norm of the pixel values."""
        return 1.0 / self.normalize.std.item()

    def forward(self, images: Tensor, p: float = math.inf, masks: InputMasks | None = None) -> Tensor:
        """Return features (B, F) of images (B, C, H, W); `masks` are SortNet's input masks in training."""
        x = self.normalize(images)
        for k, (distance, shift) in enumerate(zip(self.distances, self.shifts, strict=True)):
            x = distance(x, p, *_mask_arguments(masks, k))
            is_mean_masked = masks is not None and masks.mean_over == "kept" and k < len(masks.masks)
            x = shift(x, *_mask_arguments(masks, k + 1)) if is_mean_masked else shift(x)
        return x.flatten(1)


def _mask_arguments(masks: InputMasks | None, layer: int) -> tuple[()] | tuple[Tensor, int]:
    """Return the mask arguments of the distance layer with this index; layer 0 uses all inputs."""
    return (masks.masks[layer - 1], masks.group_size) if masks is not None and layer else ()


class DistanceNet(nn.Module):
    """Base of networks with distance layers.

    They map images (B, C, H, W) with pixel values in [0, 1], p and SortNet's input masks to logits (B, classes).
    """

    features: DistanceFeatureExtractor


def logits_at(network: nn.Module, images: Tensor, p: float, masks: InputMasks | None = None) -> Tensor:
    """Return logits (B, classes) of images; networks without distance layers ignore p and masks."""
    return network(images, p, masks) if isinstance(network, DistanceNet) else network(images)


class LinfDistNet(DistanceNet):
    """l_inf-dist Net: distance layers, each except the last followed by a mean shift.

    It maps images (B, C, H, W) with pixel values in [0, 1] to logits (B, classes): the negative outputs of the last
    layer, minus a bias. In evaluation mode at p = inf every logit is `lipschitz_constant`-Lipschitz in the l_inf norm
    of the pixel values.

    Args:
        distances: Distance layers, the last one with one output per class.
        mean: Mean pixel value of each channel.
        std: Standard deviation of all pixel values.
    """

    def __init__(self, distances: Sequence[DistanceLayer], mean: Sequence[float], std: float) -> None:
        super().__init__()
        *hidden, last = distances
        self.features = DistanceFeatureExtractor(hidden, mean, std)
        self.last = last
        self.bias = nn.Parameter(torch.zeros(len(last.weight)))

    @property
    def lipschitz_constant(self) -> float:
        """Lipschitz constant 1/std of every logit in the l_inf norm of the pixel values."""
        return self.features.lipschitz_constant

    def forward(self, images: Tensor, p: float = math.inf, masks: InputMasks | None = None) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W); `masks` are SortNet's input masks in training."""
        x = self.features(images, p, masks)
        return -(self.last(x, p, *_mask_arguments(masks, len(self.features.distances))) + self.bias)


Initialization = Literal["normal", "identity"]
INITIALIZATION = "normal: N(0, 1) weights; identity: also pass the input through each layer with enough outputs"


def initialize_layers(layers: Sequence[DistanceLayer], initialization: Initialization) -> list[DistanceLayer]:
    """Return the layers, whose weights are N(0, 1), after applying the initialization."""
    if initialization == "identity":
        for layer in layers:
            layer.init_identity_()
    return list(layers)


class DistanceNetConfig(NetworkConfig):
    """Base of the settings of networks that consist of distance layers."""

    is_lipschitz: ClassVar[bool] = True
    has_distances: ClassVar[bool] = True
    has_only_distances: ClassVar[bool] = True

    @abstractmethod
    def layers(self, input_shape: Sequence[int], classes: int) -> list[DistanceLayer]:
        """Return the distance layers for images (C, H, W), the last one with one output per class."""

    def build(
        self, input_shape: Sequence[int], classes: int, mean: Sequence[float] = (0.0,), std: float = 1.0
    ) -> LinfDistNet:
        """Return the network for images (C, H, W) with pixel values in [0, 1]; see `NetworkConfig.build`."""
        return LinfDistNet(self.layers(input_shape, classes), mean, std)


class LinfDistMLPConfig(DistanceNetConfig):
    """Settings of a net of dense distance layers.

    The nets of the paper have depth 5 (MNIST) or 6 (CIFAR-10) and width 5120.
    """

    kind: Literal["linf_dist_mlp"] = Field(
        "linf_dist_mlp", description="dense l_inf-distance layers with `depth` and `width`"
    )
    depth: Depth = Field(5, description="number of distance layers, including the last")
    width: Width = Field(5120, description="neurons of every layer except the last")
    initialization: Initialization = Field("identity", description=INITIALIZATION)

    def layers(self, input_shape: Sequence[int], classes: int) -> list[DistanceLayer]:
        """Return the dense distance layers for images (C, H, W), the last one with one output per class."""
        layers = [LpDistance(*sizes) for sizes in pairwise(self.layer_widths(input_shape, classes))]
        return initialize_layers(layers, self.initialization)

    def layer_widths(self, input_shape: Sequence[int], classes: int) -> list[int]:
        """Return the number of inputs of each layer, then the number of outputs of the last."""
        return [math.prod(input_shape), *[self.width] * (self.depth - 1), classes]


class LinfDistConvNetConfig(DistanceNetConfig):
    """Settings of a net of five 3 x 3 distance convolutions and two dense distance layers.

    The convolutions have width, width, 2 width (stride 2), 2 width and 2 width filters. Source: the convolutional
    variant in the published training scripts of Zhang et al. 2021.
    """

    kind: Literal["linf_dist_conv_net"] = Field(
        "linf_dist_conv_net", description="3 x 3 l_inf-distance convolutions, then dense distance layers"
    )
    width: Width = Field(128, description="filters of the first convolution")
    hidden_size: Width = Field(512, description="neurons of the dense layer before the last")
    initialization: Initialization = Field("identity", description=INITIALIZATION)

    def layers(self, input_shape: Sequence[int], classes: int) -> list[DistanceLayer]:
        """Return the distance layers for images (C, H, W), the last one with one output per class."""
        channels, height, width = input_shape
        layers: list[DistanceLayer] = []
        for factor, stride in ((1, 1), (1, 1), (2, 2), (2, 1), (2, 1)):
            layers.append(LpDistanceConv2d(channels, factor * self.width, stride=stride))
            channels = factor * self.width
        positions = ((height + 1) // 2) * ((width + 1) // 2)
        layers += [LpDistance(channels * positions, self.hidden_size), LpDistance(self.hidden_size, classes)]
        return initialize_layers(layers, self.initialization)
