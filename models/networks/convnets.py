"""The ReLU networks of the rivals of Zhang et al. 2021: images (B, C, H, W) in pixels of [0, 1] -> logits (B, classes).

Their layers are those that bounds have rules for. `ConvNetConfig` makes the networks of Gowal et al., "On the
Effectiveness of Interval Bound Propagation", 2018, Table 1; the others are those that Xu et al., "Automatic
Perturbation Analysis for Scalable Certified Robustness and Beyond", NeurIPS 2020, train on 3 x 56 x 56 crops of
TinyImageNet, by their published code.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from linflab.models.networks.layers import BatchNorm1d, BatchNorm2d, Normalize
from linflab.models.networks.linf_dist import Width


class ReluNetConfig(BaseModel):
    """What the settings of all networks here share: layers that make feature maps, then a head."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    interval_initialization: bool = Field(
        False, description="weights start such that boxes widen little in linear layers; else as PyTorch's"
    )

    @abstractmethod
    def features(self, channels: int) -> list[nn.Module]:
        """The layers from images of so many channels to maps (B, F, H', W')."""

    @abstractmethod
    def head(self, shape: torch.Size, classes: int) -> list[nn.Module]:
        """The layers from maps of `shape` (F, H', W') to logits."""

    def build(
        self, input_shape: Sequence[int], classes: int, mean: Sequence[float] = (0.0,), std: float = 1.0
    ) -> nn.Sequential:
        """The network for images of `input_shape` (C, H, W) with this per-channel mean and single std of the pixels.

        Raises:
            ValueError: the images are too small for its layers.
        """
        features = self.features(input_shape[0])
        head = self.head(self.shape_of_maps(input_shape), classes)
        network = nn.Sequential(Normalize(mean, std), *features, *head)
        if self.interval_initialization:
            initialize_for_intervals(network)
        return network

    def shape_of_maps(self, input_shape: Sequence[int]) -> torch.Size:
        """(F, H', W') of images (C, H, W), without computing them."""
        try:
            with torch.device("meta"), torch.no_grad():
                return nn.Sequential(*self.features(input_shape[0])).eval()(torch.empty(1, *input_shape)).shape[1:]
        except RuntimeError as error:
            settings = self.model_dump(include={"kind", "size"}).items()
            raise ValueError(
                f"{', '.join(f'model.{name}={value}' for name, value in settings)}: images of shape "
                f"{tuple(input_shape)} are too small for its layers; use larger ones or another network"
            ) from error


@torch.no_grad()
def initialize_for_intervals(network: nn.Module) -> None:
    """Weights N(0, 2 pi / I^2) of linear layers and convolutions with I inputs to an output, but for the last.

    On average they double the width of a box, which ReLUs halve. What shortcuts add to a box is not made up for.
    Source: Shi et al., "Fast Certified Robust Training with Short Warmup", NeurIPS 2021.
    """
    *layers, _ = (layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    for layer in layers:
        nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / layer.weight[0].numel())


class Convolution(NamedTuple):
    """What makes a convolution, but for its inputs."""

    filters: int
    kernel: int
    stride: int = 1
    padding: int = 0


def convolutions(channels: int, kinds: Sequence[Convolution], batch_norm: bool) -> list[nn.Module]:
    """Convolutions, each followed by a ReLU and before it, if so asked, by batch normalisation."""
    layers: list[nn.Module] = []
    for filters, kernel, stride, padding in kinds:
        norm = [BatchNorm2d(filters)] if batch_norm else []
        layers += [nn.Conv2d(channels, filters, kernel, stride, padding), *norm, nn.ReLU()]
        channels = filters
    return layers


def dense(widths: Sequence[int], batch_norm: bool = False) -> list[nn.Module]:
    """Linear layers of these widths, from inputs to outputs, with ReLUs between, of maps that are flattened first."""
    layers: list[nn.Module] = [nn.Flatten()]
    *hidden, last = pairwise(widths)
    for inputs, outputs in hidden:
        norm = [BatchNorm1d(outputs)] if batch_norm else []
        layers += [nn.Linear(inputs, outputs), *norm, nn.ReLU()]
    return [*layers, nn.Linear(*last)]


CONVOLUTIONS = {
    "strided": [Convolution(16, 4, 2, 1), Convolution(32, 4, 2, 1)],
    "small": [Convolution(16, 4, 2), Convolution(32, 4)],
    "medium": [Convolution(32, 3), Convolution(32, 4, 2), Convolution(64, 3), Convolution(64, 4, 2)],
    "large": [
        Convolution(filters, 3, stride, 1) for filters, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (128, 1))
    ],
}
HIDDEN = {"strided": [100], "small": [100], "medium": [512, 512], "large": [512]}


class ConvNetConfig(ReluNetConfig):
    """Settings of the networks of Gowal et al. 2018, Table 1; large is that of Zhang et al. 2021, Table 1.

    And strided, the one of Wong & Kolter, "Provable Defenses against Adversarial Examples", ICML 2018, on MNIST.
    """

    kind: Literal["conv_net"] = "conv_net"
    size: Literal["strided", "small", "medium", "large"] = Field("large", description="2, 2, 4 or 5 convolutions")
    batch_norm: bool = Field(False, description="batch normalisation before each ReLU")

    def features(self, channels: int) -> list[nn.Module]:
        return convolutions(channels, CONVOLUTIONS[self.size], self.batch_norm)

    def head(self, shape: torch.Size, classes: int) -> list[nn.Module]:
        return dense([shape.numel(), *HIDDEN[self.size], classes], self.batch_norm)


class CNN7Config(ReluNetConfig):
    """Settings of CNN7+BN: five convolutions with batch normalisation, and two linear layers."""

    kind: Literal["cnn7"] = "cnn7"
    width: Width = Field(64, description="filters of the first two convolutions; the others have twice as many")
    hidden: Width = Field(512, description="units of the linear layer before the last")

    def features(self, channels: int) -> list[nn.Module]:
        plan = ((1, 1), (1, 1), (2, 2), (2, 1), (2, 2))
        return convolutions(channels, [Convolution(k * self.width, 3, stride, 1) for k, stride in plan], True)

    def head(self, shape: torch.Size, classes: int) -> list[nn.Module]:
        return dense([shape.numel(), self.hidden, classes])


class Residual(nn.Module):
    """inner(x) + shortcut(x): x (B, C, H, W) -> (B, O, H', W').

    The shortcut is a convolution with 1 x 1 filters where shapes differ, else x itself.
    """

    def __init__(self, inner: nn.Module, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.inner = inner
        differ = stride != 1 or channels != outputs
        self.shortcut = nn.Sequential(*([nn.Conv2d(channels, outputs, 1, stride)] if differ else []))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.shortcut(x)


class ResNeXtConfig(ReluNetConfig):
    """Settings of ResNeXt with 3 stages of 2 blocks, of 2 groups that are 8, 16 and 32 channels wide.

    Source: Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017; without most of its
    batch normalisations, as Xu et al. have it.
    """

    kind: Literal["resnext"] = "resnext"

    def features(self, channels: int) -> list[nn.Module]:
        layers = convolutions(channels, [Convolution(16, 3, 1, 1)], False)
        channels, groups = 16, 2
        for width, strides in ((8, (1, 1)), (16, (2, 1)), (32, (2, 1))):
            inside, outputs = groups * width, 2 * groups * width
            for stride in strides:
                inner = nn.Sequential(
                    *convolutions(channels, [Convolution(inside, 1)], True),
                    nn.Conv2d(inside, inside, 3, stride, 1, groups=groups),
                    nn.ReLU(),
                    nn.Conv2d(inside, outputs, 1),
                )
                layers += [Residual(inner, channels, outputs, stride), nn.ReLU()]
                channels = outputs
        return layers

    def head(self, shape: torch.Size, classes: int) -> list[nn.Module]:
        return dense([shape.numel(), 512, classes])


def normalized(channels: int, layer: nn.Conv2d) -> list[nn.Module]:
    """A convolution behind batch normalisation and ReLU."""
    return [BatchNorm2d(channels), nn.ReLU(), layer]


class WithInput(nn.Module):
    """x and inner(x), side by side: x (B, C, H, W) -> (B, C + O, H, W)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.inner(x)), dim=1)


class DenseNetConfig(ReluNetConfig):
    """Settings of DenseNet with blocks of 2, 4 and 4 bottlenecks, each of which adds 32 channels.

    Source: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017.
    """

    kind: Literal["dense_net"] = "dense_net"

    def features(self, channels: int) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, padding=1)]
        channels, growth = 64, 32
        for block, bottlenecks in enumerate((2, 4, 4)):
            if block:
                layers += [*normalized(channels, nn.Conv2d(channels, channels // 2, 1)), nn.AvgPool2d(2)]
                channels //= 2
            for _ in range(bottlenecks):
                narrow = normalized(channels, nn.Conv2d(channels, 4 * growth, 1))
                added = normalized(4 * growth, nn.Conv2d(4 * growth, growth, 3, padding=1))
                layers.append(WithInput(nn.Sequential(*narrow, *added)))
                channels += growth
        return [*layers, BatchNorm2d(channels), nn.ReLU()]

    def head(self, shape: torch.Size, classes: int) -> list[nn.Module]:
        return dense([shape.numel(), 512, classes])


class WideResNetConfig(ReluNetConfig):
    """Settings of a WideResNet of depth 10: three blocks with batch normalisation and ReLU before convolutions.

    Source: Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016; a block's second convolution has the stride.
    """

    kind: Literal["wide_resnet"] = "wide_resnet"
    widen: Width = Field(10, description="times 16, 32 and 64: channels of the blocks")

    def features(self, channels: int) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1)]
        channels = 16
        for factor, stride in ((16, 1), (32, 2), (64, 2)):
            outputs = factor * self.widen
            first = normalized(channels, nn.Conv2d(channels, outputs, 3, padding=1))
            second = normalized(outputs, nn.Conv2d(outputs, outputs, 3, stride, 1))
            layers.append(Residual(nn.Sequential(*first, *second), channels, outputs, stride))
            channels = outputs
        return [*layers, BatchNorm2d(channels), nn.ReLU()]

    def head(self, shape: torch.Size, classes: int) -> list[nn.Module]:
        return [nn.AvgPool2d((shape[1], shape[2])), *dense([shape[0], classes])]
