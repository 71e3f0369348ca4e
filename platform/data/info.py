"""Shapes, classes and statistics of datasets."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from linflab.platform.errors import InputError


@dataclass(frozen=True)
class DatasetInfo:
    """Shape, classes and statistics of a dataset: means and standard deviations, for pixel values in [0, 1]."""

    mean: tuple[float, ...]  # of each channel
    std: float  # of all channels together
    input_shape: tuple[int, int, int]  # (C, H, W)
    classes: int
    validation_size: int
    max_value: int = 255  # pixel value that maps to 1.0
    channel_std: tuple[float, ...] = ()  # of each channel; empty if `std` is that of each channel

    def select_std(self, per_channel: bool) -> Any:
        """Return the argument `std` of a network: a float, or one for each channel in a tuple.

        Raises:
            InputError: If a channel is constant, so that its standard deviation is 0.
        """
        if not per_channel:
            return self.std
        stds = self.channel_std or (self.std,) * len(self.mean)
        if 0 in stds:
            raise InputError(
                f"model.per_channel_std=true: requires channels that vary, but channel {stds.index(0)} (from 0) of the "
                "training images is constant; use false"
            )
        return stds


DATASETS = {
    "digits": DatasetInfo(
        mean=(0.3053,), std=0.3761, input_shape=(1, 8, 8), classes=10, validation_size=237, max_value=16
    ),
    "mnist": DatasetInfo(mean=(0.1307,), std=0.3081, input_shape=(1, 28, 28), classes=10, validation_size=5000),
    "fashion_mnist": DatasetInfo(mean=(0.2860,), std=0.3520, input_shape=(1, 28, 28), classes=10, validation_size=5000),
    # The published std of a color dataset is the mean of the std of each image, which is below the std of all pixels.
    # The std of each channel is that of the code of Xu et al. 2020 and of papers on certified training since then.
    "cifar10": DatasetInfo(
        mean=(0.4914, 0.4822, 0.4465),
        std=0.2009,
        input_shape=(3, 32, 32),
        classes=10,
        validation_size=5000,
        channel_std=(0.2023, 0.1994, 0.2010),
    ),
    "tiny_imagenet": DatasetInfo(
        mean=(0.4802, 0.4481, 0.3975),
        std=0.2276,
        input_shape=(3, 64, 64),
        classes=200,
        validation_size=10000,
        channel_std=(0.2302, 0.2265, 0.2262),
    ),
}


def channel_statistics(images: np.ndarray, max_value: int = 255) -> tuple[tuple[float, ...], float, tuple[float, ...]]:
    """Return the mean of each channel, the std of all pixels, and that of each channel, for pixel values in [0, 1].

    Args:
        images: (N, C, H, W) uint8.
        max_value: Pixel value that maps to 1.0.
    """
    totals, squares, channel_squares = np.zeros(images.shape[1]), 0.0, np.zeros(images.shape[1])
    for start in range(0, len(images), 4096):  # all images in float64 may not fit into memory
        part = images[start : start + 4096].astype(np.float64) / max_value
        totals += part.sum(axis=(0, 2, 3))
        part **= 2
        squares += part.sum()
        channel_squares += part.sum(axis=(0, 2, 3))
    pixels = images.size / images.shape[1]
    mean = totals / pixels
    channel_std = np.sqrt(np.maximum(channel_squares / pixels - mean**2, 0.0))
    std = float(np.sqrt(squares / images.size - (totals.sum() / images.size) ** 2))
    return tuple(mean.tolist()), std, tuple(channel_std.tolist())
