"""SortNet (Zhang et al., NeurIPS 2022), whose neurons sum the largest distances, weighted by rank."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from linflab.models.networks.layers import DistanceLayer, LpDistance, SortDistance
from linflab.models.networks.linf_dist import (
    INITIALIZATION,
    Initialization,
    InputMasks,
    LinfDistMLPConfig,
    initialize_layers,
)

MASK_GROUP_SIZE = 32  # samples per mask, as in the authors' training script


class SortNetConfig(LinfDistMLPConfig):
    """Settings of SortNet, a net of dense distance layers with SortNet neurons after the first layer."""

    kind: Literal["sort_net"] = Field(  # type: ignore[assignment]
        "sort_net", description="neurons that weight the largest distances by rank, trained with random input masks"
    )
    initialization: Initialization = Field("normal", description=INITIALIZATION)
    q: Annotated[float, Field(gt=0, le=1)] = Field(
        0.75,
        description="weight of the largest distance, and probability with which training keeps an input; 1: l_inf",
    )
    # The published training uses `kept`. The runs measured here use `batch`, which averages over more samples.
    mean_over: Literal["batch", "kept"] = Field(
        "batch",
        description="samples over which mean shifts average a feature in training: the whole batch, or the groups that "
        "keep the feature in the next layer, as in the published training",
    )

    @property
    def uses_input_masks(self) -> bool:
        """True: training masks random inputs of neurons."""
        return True

    def layers(self, input_shape: Sequence[int], classes: int) -> list[DistanceLayer]:
        """Return the layers for images (C, H, W): `LpDistance`, then `SortDistance` layers."""
        first, *others = pairwise(self.layer_widths(input_shape, classes))
        layers = [LpDistance(*first), *(SortDistance(*sizes, self.q, self.mean_over) for sizes in others)]
        return initialize_layers(layers, self.initialization)


def sample_masks(network: nn.Module, samples: int, workers: int, generator: torch.Generator) -> InputMasks | None:
    """Return the input masks of a training step, one per SortNet layer and group of 32 samples.

    Every worker draws the masks of the whole batch. Worker k has samples k, k + workers, ..., so its part of a group
    has 32 / workers samples.

    Args:
        network: Network to train.
        samples: Batch size of all workers together.
        workers: Number of workers; must divide 32.
        generator: Source of the random draws.

    Returns:
        The masks, or None for networks without SortNet layers.
    """
    groups = -(-samples // MASK_GROUP_SIZE)
    layers = [layer for layer in network.modules() if isinstance(layer, SortDistance)]
    if not layers:
        return None
    device = layers[0].weight.device
    masks = [layer.sample_masks(groups, generator).to(device) for layer in layers]
    return InputMasks(masks, MASK_GROUP_SIZE // workers, layers[0].mean_over)
