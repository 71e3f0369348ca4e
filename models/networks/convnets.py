"""ReLU networks of the baselines.

They map images (B, C, H, W) with pixel values in [0, 1] to logits (B, classes) and use only layers that bound
propagation supports. `ConvNetConfig` builds the networks of Gowal et al., "On the Effectiveness of Interval Bound
Propagation", 2018, Table 1. The others follow the published code of Xu et al., "Automatic Perturbation Analysis for
Scalable Certified Robustness and Beyond", NeurIPS 2020. They were published for 3 x 56 x 56 crops of TinyImageNet.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from linflab.models.networks.base import NetworkConfig
from linflab.models.networks.layers import BatchNorm1d, BatchNorm2d, Normalize
from linflab.models.networks.linf_dist import Width


class ReluNetConfig(NetworkConfig):
    """Base of the settings of ReLU networks, which consist of feature layers and a head."""

    has_relu: ClassVar[bool] = True

    kind: str
    ibp_initialization: bool = Field(
        False, description="IBP initialization, which limits the growth of boxes; otherwise PyTorch's default"
    )
    per_channel_std: bool = Field(
        False, description="normalize each channel by its own standard deviation; otherwise all by that of all pixels"
    )

    @property
    def uses_channel_std(self) -> bool:
        """True if `build` takes one standard deviation per channel as `std`."""
        return self.per_channel_std

    @property
    def has_linear_batch_norm(self) -> bool:
        """True if linear layers have batch normalization, which requires batches of two or more samples."""
        return False

    @abstractmethod
    def features(self, channels: int) -> list[nn.Module]:
        """Return the layers from images (B, channels, H, W) to feature maps (B, F, H', W')."""

    @abstractmethod
    def head(self, shape: torch.Size, classes: int) -> list[nn.Module]:
        """Return the layers from feature maps of `shape` (F, H', W') to logits (B, classes)."""

    def build(
        self,
        input_shape: Sequence[int],
        classes: int,
        mean: Sequence[float] = (0.0,),
        std: float | Sequence[float] = 1.0,
    ) -> nn.Sequential:
        """Return the network for images with pixel values in [0, 1].

        Args:
            input_shape: Shape of an image (C, H, W).
            classes: Number of logits.
            mean: Mean pixel value of each channel.
            std: Standard deviation of all pixel values, one number for all channels, or one per channel.

        Raises:
            ValueError: If the images are too small for the layers.
        """
        features = self.features(input_shape[0])
        head = self.head(self.feature_shape(input_shape), classes)
        network = nn.Sequential(Normalize(mean, std), *features, *head)
        if self.ibp_initialization:
            init_ibp_(network)
        return network

    def feature_shape(self, input_shape: Sequence[int]) -> torch.Size:
        """Return the shape (F, H', W') of the feature maps of an image (C, H, W), without computing them.

        Raises:
            ValueError: If the images are too small for the layers.
        """
        try:
            with torch.device("meta"), torch.no_grad():
                return nn.Sequential(*self.features(input_shape[0])).eval()(torch.empty(1, *input_shape)).shape[1:]
        except RuntimeError as error:
            settings = self.model_dump(include={"kind", "size"}).items()
            raise ValueError(
                f"{', '.join(f'model.{name}={value}' for name, value in settings)}: requires larger images than "
                f"{tuple(input_shape)}; use larger images or another network"
            ) from error


@torch.no_grad()
def init_ibp_(network: nn.Module) -> None:
    """Initialize the weights of all linear and convolutional layers except the last for IBP.

    Weights are N(0, 2 pi / I^2) for I inputs per output. On average they double the width of a box, which ReLUs halve.
    The width that shortcuts add is not compensated. Source: Shi et al., "Fast Certified Robust Training with Short
    Warmup", NeurIPS 2021.
    """
    *layers, _ = (layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    for layer in layers:
        nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / layer.weight[0].numel())


class ConvSpec(NamedTuple):
    """Settings of a convolution except its input channels."""

    out_channels: int
    kernel_size: int
    stride: int = 1
    padding: int = 0


def conv_stack(channels: int, kinds: Sequence[ConvSpec], batch_norm: bool) -> list[nn.Module]:
    """Return convolutions, each followed by optional batch normalization and a ReLU.

    Args:
        channels: Input channels of the first convolution.
        kinds: Settings of the convolutions.
        batch_norm: Whether batch normalization precedes each ReLU.
    """
    layers: list[nn.Module] = []
    for out_channels, kernel_size, stride, padding in kinds:
        norm = [BatchNorm2d(out_channels)] if batch_norm else []
        layers += [nn.Conv2d(channels, out_channels, kernel_size, stride, padding), *norm, nn.ReLU()]
        channels = out_channels
    return layers


def mlp_head(widths: Sequence[int], batch_norm: bool = False) -> list[nn.Module]:
    """Return a flatten layer, then linear layers with ReLUs between them.

    Args:
        widths: Number of inputs of each linear layer, then number of outputs of the last.
        batch_norm: Whether batch normalization precedes each ReLU.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    *hidden, last = pairwise(widths)
    for inputs, outputs in hidden:
        norm = [BatchNorm1d(outputs)] if batch_norm else []
        layers += [nn.Linear(inputs, outputs), *norm, nn.ReLU()]
    return [*layers, nn.Linear(*last)]


CONV_SPECS = {
    "strided": [ConvSpec(16, 4, 2, 1), ConvSpec(32, 4, 2, 1)],
    "colt2": [ConvSpec(32, 5, 2, 2), ConvSpec(128, 4, 2, 1)],
    "colt3": [ConvSpec(32, 3, 1, 1), ConvSpec(32, 4, 2, 1), ConvSpec(128, 4, 2, 1)],
    "small": [ConvSpec(16, 4, 2), ConvSpec(32, 4)],
    "medium": [ConvSpec(32, 3), ConvSpec(32, 4, 2), ConvSpec(64, 3), ConvSpec(64, 4, 2)],
    "large": [
        ConvSpec(out_channels, 3, stride, 1)
        for out_channels, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (128, 1))
    ],
}
HIDDEN_SIZES = {"strided": [100], "colt2": [250], "colt3": [250], "small": [100], "medium": [512, 512], "large": [512]}


class ConvNetConfig(ReluNetConfig):
    """Settings of the convolutional networks of Gowal et al. 2018, Table 1, and of networks with larger strides.

    Size large is also the network of Zhang et al. 2021, Table 1. Size strided is the MNIST network of Wong & Kolter,
    "Provable Defenses against Adversarial Examples", ICML 2018. Sizes colt2 and colt3 are those of Balunovic & Vechev,
    "Adversarial Training and Provable Defenses", ICLR 2020: colt2 for MNIST, and for CIFAR-10 at eps 8/255; colt3 for
    CIFAR-10 at eps 2/255.
    """

    kind: Literal["conv_net"] = Field(
        "conv_net",
        description="ReLU convolutional networks of Gowal et al. (2018), Wong & Kolter (2018) and COLT (2020)",
    )
    size: Literal["strided", "colt2", "colt3", "small", "medium", "large"] = Field(
        "large", description="2, 2, 3, 2, 4 or 5 convolutions"
    )
    batch_norm: bool = Field(False, description="batch normalization before each ReLU")

    @property
    def has_linear_batch_norm(self) -> bool:
        """True if linear layers have batch normalization."""
        return self.batch_norm

    def features(self, channels: int) -> list[nn.Module]:
        """Return the convolutions."""
        return conv_stack(channels, CONV_SPECS[self.size], self.batch_norm)

    def head(self, shape: torch.Size, classes: int) -> list[nn.Module]:
        """Return the linear layers."""
        return mlp_head([shape.numel(), *HIDDEN_SIZES[self.size], classes], self.batch_norm)


class CNN7Config(ReluNetConfig):
    """Settings of CNN7: five convolutions with batch normalization, then two linear layers.

    Papers on certified training use the name for several networks. The variants `cifar` and `tiny_imagenet` are those
    of Shi et al. 2021 and of later work: Mueller et al., "Certified Training: Small Boxes are All You Need", ICLR 2023;
    De Palma et al., "Expressive Losses for Verified Robustness via Convex Combinations", ICLR 2024. Variant `cifar` is
    also `conv_net` of size large with batch normalization.
    """

    kind: Literal["cnn7"] = Field("cnn7", description="seven-layer ReLU networks of certified training; see variant")
    variant: Literal["xu2020", "cifar", "tiny_imagenet"] = Field(
        "xu2020",
        description="cifar and tiny_imagenet: CNN7 of papers since 2021, for MNIST and CIFAR-10 or for 64 x 64 images; "
        "xu2020: CNN7+BN of Xu et al. (2020), without batch normalization of the linear layer",
    )
    width: Width = Field(64, description="filters of the first two convolutions; the others have twice as many")
    hidden_size: Width = Field(512, description="units of the linear layer before the last")

    @property
    def has_linear_batch_norm(self) -> bool:
        """True if the linear layer before the last has batch normalization."""
        return self.variant != "xu2020"

    def features(self, channels: int) -> list[nn.Module]:
        """Return the convolutions."""
        plan = ((1, 1), (1, 1), (2, 2), (2, 1), (2, 1 if self.variant == "cifar" else 2))
        return conv_stack(channels, [ConvSpec(k * self.width, 3, stride, 1) for k, stride in plan], True)

    def head(self, shape: torch.Size, classes: int) -> list[nn.Module]:
        """Return the linear layers."""
        return mlp_head([shape.numel(), self.hidden_size, classes], self.has_linear_batch_norm)


class ResidualBlock(nn.Module):
    """Residual block inner(x) + shortcut(x), from (B, C, H, W) to (B, O, H', W').

    The shortcut is a 1 x 1 convolution if shapes differ, otherwise the identity.

    Args:
        inner: Layers of the residual branch.
        channels: Input channels C.
        outputs: Output channels O of the inner layers.
        stride: Total stride of the inner layers.
    """

    def __init__(self, inner: nn.Module, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.inner = inner
        differ = stride != 1 or channels != outputs
        self.shortcut = nn.Sequential(*([nn.Conv2d(channels, outputs, 1, stride)] if differ else []))

    def forward(self, x: Tensor) -> Tensor:
        """Return inner(x) + shortcut(x)."""
        return self.inner(x) + self.shortcut(x)


class ResNeXtConfig(ReluNetConfig):
    """Settings of ResNeXt with 3 stages of 2 blocks, whose 2 groups are 8, 16 and 32 channels wide.

    Source: Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017, without most batch
    normalization layers, like the network of Xu et al.
    """

    kind: Literal["resnext"] = Field("resnext", description="ResNeXt of Xu et al. (2020)")

    def features(self, channels: int) -> list[nn.Module]:
        """Return a convolution, then the residual blocks."""
        layers = conv_stack(channels, [ConvSpec(16, 3, 1, 1)], False)
        channels, groups = 16, 2
        for width, strides in ((8, (1, 1)), (16, (2, 1)), (32, (2, 1))):
            inside, outputs = groups * width, 2 * groups * width
            for stride in strides:
                inner = nn.Sequential(
                    *conv_stack(channels, [ConvSpec(inside, 1)], True),
                    nn.Conv2d(inside, inside, 3, stride, 1, groups=groups),
                    nn.ReLU(),
                    nn.Conv2d(inside, outputs, 1),
                )
                layers += [ResidualBlock(inner, channels, outputs, stride), nn.ReLU()]
                channels = outputs
        return layers

    def head(self, shape: torch.Size, classes: int) -> list[nn.Module]:
        """Return the linear layers."""
        return mlp_head([shape.numel(), 512, classes])


def preactivation(channels: int, layer: nn.Conv2d) -> list[nn.Module]:
    """Return batch normalization, a ReLU and the given convolution."""
    return [BatchNorm2d(channels), nn.ReLU(), layer]


class DenseConnection(nn.Module):
    """Concatenation of x and inner(x), from (B, C, H, W) to (B, C + O, H, W)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Return x and inner(x), concatenated along the channels."""
        return torch.cat((x, self.inner(x)), dim=1)


class DenseNetConfig(ReluNetConfig):
    """Settings of DenseNet with blocks of 2, 4 and 4 bottleneck layers, each of which adds 32 channels.

    Source: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017.
    """

    kind: Literal["dense_net"] = Field("dense_net", description="DenseNet of Xu et al. (2020)")

    def features(self, channels: int) -> list[nn.Module]:
        """Return a convolution, the dense blocks with transitions, and batch normalization with a ReLU."""
        layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, padding=1)]
        channels, growth = 64, 32
        for block, bottlenecks in enumerate((2, 4, 4)):
            if block:
                layers += [*preactivation(channels, nn.Conv2d(channels, channels // 2, 1)), nn.AvgPool2d(2)]
                channels //= 2
            for _ in range(bottlenecks):
                narrow = preactivation(channels, nn.Conv2d(channels, 4 * growth, 1))
                added = preactivation(4 * growth, nn.Conv2d(4 * growth, growth, 3, padding=1))
                layers.append(DenseConnection(nn.Sequential(*narrow, *added)))
                channels += growth
        return [*layers, BatchNorm2d(channels), nn.ReLU()]

    def head(self, shape: torch.Size, classes: int) -> list[nn.Module]:
        """Return the linear layers."""
        return mlp_head([shape.numel(), 512, classes])


class WideResNetConfig(ReluNetConfig):
    """Settings of a WideResNet of depth 10, with three pre-activation residual blocks.

    Source: Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016; here the second convolution of a block has the
    stride.
    """

    kind: Literal["wide_resnet"] = Field("wide_resnet", description="WideResNet of Xu et al. (2020)")
    widen_factor: Width = Field(10, description="multiplier of the blocks' channels 16, 32 and 64")

    def features(self, channels: int) -> list[nn.Module]:
        """Return a convolution, the residual blocks, and batch normalization with a ReLU."""
        layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1)]
        channels = 16
        for factor, stride in ((16, 1), (32, 2), (64, 2)):
            outputs = factor * self.widen_factor
            first = preactivation(channels, nn.Conv2d(channels, outputs, 3, padding=1))
            second = preactivation(outputs, nn.Conv2d(outputs, outputs, 3, stride, 1))
            layers.append(ResidualBlock(nn.Sequential(*first, *second), channels, outputs, stride))
            channels = outputs
        return [*layers, BatchNorm2d(channels), nn.ReLU()]

    def head(self, shape: torch.Size, classes: int) -> list[nn.Module]:
        """Return global average pooling and a linear layer."""
        return [nn.AvgPool2d((shape[1], shape[2])), *mlp_head([shape[0], classes])]
