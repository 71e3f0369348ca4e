"""Base class of the settings of all networks."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from linflab.models.registry import KindConfig


class NetworkConfig(KindConfig):
    """Settings of a network; any subclass that defines `kind` is accepted as `model`.

    Attributes:
        is_lipschitz: True if logits are Lipschitz by construction; the network then has a `lipschitz_constant`.
        has_distances: True if the network is a `DistanceNet`, whose neurons have an exponent p.
        has_only_distances: True if all parameters are weights and biases of distance layers, which get the same weight
            decay.
        has_relu: True if the network has ReLUs, which linear relaxations bound.
    """

    is_lipschitz: ClassVar[bool] = False
    has_distances: ClassVar[bool] = False
    has_only_distances: ClassVar[bool] = False
    has_relu: ClassVar[bool] = False

    @property
    def uses_input_masks(self) -> bool:
        """True if training masks random inputs of neurons."""
        return False

    @property
    def uses_channel_std(self) -> bool:
        """True if `build` takes one standard deviation per channel as `std`."""
        return False

    @property
    def parts(self) -> tuple["NetworkConfig", ...]:
        """Networks that this one combines; the settings themselves for a single network."""
        return (self,)

    @abstractmethod
    def build(
        self, input_shape: Sequence[int], classes: int, mean: Sequence[float] = (0.0,), std: float = 1.0
    ) -> nn.Module:
        """Return the network for images with pixel values in [0, 1].

        Args:
            input_shape: Shape of an image (C, H, W).
            classes: Number of logits.
            mean: Mean pixel value of each channel.
            std: Standard deviation of all pixel values, one number for all channels.

        Returns:
            The network, images (B, C, H, W) -> logits (B, classes).

        Raises:
            ValueError: If the images are too small for the layers.
        """

    def check(self) -> None:
        """Check that the settings are compatible with each other.

        Raises:
            ValueError: If settings are incompatible; the message starts with the name of the setting.
        """


class StoredImagesConfig(NetworkConfig):
    """Base of the settings of networks that store training images instead of being trained."""

    @property
    @abstractmethod
    def num_stored_images(self) -> int:
        """Number of training images that the network stores."""

    @abstractmethod
    def store_images(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Set the weights of a network that `build` returned, in place.

        Args:
            network: The network.
            images: (N, C, H, W) with pixel values in [0, 1], N = `num_stored_images`.
            labels: (N,) classes.

        Raises:
            ValueError: If the number of images is not `num_stored_images`, or they do not suffice.
        """
