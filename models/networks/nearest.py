"""Nearest-neighbor classifier in the l_inf norm, as an l_inf-dist net that stores training images.

For an image x, class k and training images x_1, ..., x_N with labels y_i, the logit is

    z_k(x) = min_i (||x - x_i||_inf + s [y_i = k]),    s = the largest distance of two images,

the McShane extension of the labels, coded as s or 0. On images it is the distance to the nearest image of another class
than k, so it is largest for the class of the nearest neighbor. The margin of that class is the difference between the
distances to the nearest image of another class and to the nearest neighbor. No training takes place.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from linflab.models.networks.base import StoredImagesConfig
from linflab.models.networks.layers import LpDistance, MeanShift
from linflab.models.networks.linf_dist import LinfDistNet, Width


class LinfNearestConfig(StoredImagesConfig):
    """Settings of the nearest-neighbor classifier: a `LinfDistNet` of two layers.

    The first layer has one neuron per stored image, whose output is the distance to it. A neuron of the last layer
    takes the minimum for its class, as in the shallow nets of `linflab.models.networks.universal`.
    """

    is_lipschitz: ClassVar[bool] = True
    has_distances: ClassVar[bool] = True
    has_only_distances: ClassVar[bool] = True

    kind: Literal["l_inf_nearest"] = Field(
        "l_inf_nearest", description="nearest-neighbor classifier in the l_inf norm; stores training images"
    )
    samples: Width = Field(
        1000, description="training images that the network stores, drawn at random if there are more"
    )

    def build(
        self, input_shape: Sequence[int], classes: int, mean: Sequence[float] = (0.0,), std: float = 1.0
    ) -> LinfDistNet:
        """Return the network, with random weights until images are stored; see `NetworkConfig.build`."""
        layers = [LpDistance(math.prod(input_shape), self.samples), LpDistance(self.samples, classes)]
        return LinfDistNet(layers, mean, std)

    @property
    def num_stored_images(self) -> int:
        """Number of training images that the network stores."""
        return self.samples

    @torch.no_grad()
    def store_images(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Set the weights of a network that `build` returned, in place; see `StoredImagesConfig.store_images`."""
        assert isinstance(network, LinfDistNet)
        hidden, shift, last = network.features.distances[0], network.features.shifts[0], network.last
        assert isinstance(hidden, LpDistance) and isinstance(shift, MeanShift)
        classes = len(last.weight)
        if len(images) != self.samples:
            raise ValueError(f"samples={self.samples}: must be the number of images, {len(images)}; use it")
        if missing := sorted(set(range(classes)) - set(labels.tolist())):
            raise ValueError(
                f"samples={self.samples}: must include an image of each class, but has none of class {missing[0]}; use "
                "more samples"
            )
        hidden.weight.copy_(network.features.normalize(images).flatten(1))
        shift.running_mean.zero_()
        # Distances d_i of images are at most s, so |d_i - 2 s| >= s for other classes, and |d_i - s| <= s for the own
        # one. The largest term is therefore 2 s minus the smallest distance to an image of another class.
        largest = 1.0 / network.features.normalize.std
        is_own = labels == torch.arange(classes, device=labels.device)[:, None]
        last.weight.copy_(torch.where(is_own, largest, 2 * largest))
        network.bias.copy_((-2 * largest).expand(classes))
