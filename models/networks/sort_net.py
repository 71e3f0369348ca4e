"""SortNet (Zhang et al., NeurIPS 2022): neurons that weigh the largest distances by rank, not the largest one alone."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from linflab.models.networks.layers import DistanceLayer, LpDistance, SortDistance
from linflab.models.networks.linf_dist import LinfDistMLPConfig, Subsets

GROUP = 32  # samples of a batch that share a subset, in the authors' published training script


class SortNetConfig(LinfDistMLPConfig):
    """Settings of SortNet: an l_inf-dist net of dense layers whose layers after the first have SortNet's neurons."""

    kind: Literal["sort_net"] = "sort_net"  # type: ignore[assignment]
    initialization: Literal["normal", "identity"] = "normal"
    q: Annotated[float, Field(gt=0, le=1)] = Field(
        0.75, description="weight of the largest distance; training keeps each input with this probability; 1: l_inf"
    )

    def layers(self, input_shape: Sequence[int], classes: int) -> list[DistanceLayer]:
        first, *others = pairwise(self.widths(input_shape, classes))
        layers = [LpDistance(*first), *(SortDistance(*sizes, self.q) for sizes in others)]
        if self.initialization == "identity":
            for layer in layers:
                layer.initialize_as_identity()
        return list(layers)


def draw_subsets(network: nn.Module, samples: int, workers: int, generator: torch.Generator) -> Subsets | None:
    """The subsets of a training step, one for each layer and 32 of its `samples`; None for nets without sort layers.

    Of several workers each draws all, since samples k, k + workers, ... are a worker's: its part of a group is
    32 / workers samples. 32 must be a multiple of `workers`.
    """
    groups = -(-samples // GROUP)
    layers = [layer for layer in network.modules() if isinstance(layer, SortDistance)]
    if not layers:
        return None
    device = layers[0].weight.device
    return Subsets([layer.draw_subsets(groups, generator).to(device) for layer in layers], GROUP // workers)
