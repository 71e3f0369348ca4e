"""l_inf-distance networks (Zhang et al., ICML 2021): Lipschitz in the l_inf norm by construction."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from linflab.models.networks.layers import LpDistance, MeanShift, Normalize


class LinfDistMLPConfig(BaseModel):
    """Settings of `LinfDistMLP`. The paper's sizes are depth 5 (MNIST) or 6 (CIFAR-10) and width 5120."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linf_dist_mlp"] = "linf_dist_mlp"
    depth: int = Field(5, ge=1, le=1000, description="distance layers, the last one included")
    width: int = Field(5120, ge=1, le=1_000_000, description="neurons of every layer but the last")
    initialization: Literal["normal", "identity"] = Field(
        "identity", description="N(0, 1) weights; identity also passes the input through the layers that can"
    )

    def build(
        self, input_shape: Sequence[int], classes: int, mean: Sequence[float] = (0.0,), std: float = 1.0
    ) -> "LinfDistMLP":
        """The network for images of `input_shape` (C, H, W) with this per-channel mean and single std of the pixels."""
        return LinfDistMLP(self, input_shape, classes, mean, std)


class LinfDistMLP(nn.Module):
    """l_inf-dist Net: dense distance layers, each but the last followed by a mean shift; logits are minus the outputs.

    forward: images (B, C, H, W) in pixels of [0, 1] -> logits (B, classes). In evaluation mode at p = inf every logit
    is `lipschitz_constant`-Lipschitz in the l_inf norm of the pixels: each distance layer and mean shift is
    1-Lipschitz, and the normalisation in front is 1/std-Lipschitz.
    """

    def __init__(
        self, config: LinfDistMLPConfig, input_shape: Sequence[int], classes: int, mean: Sequence[float], std: float
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        widths = [math.prod(input_shape), *[config.width] * (config.depth - 1), classes]
        self.distances = nn.ModuleList(LpDistance(i, o) for i, o in pairwise(widths))
        self.shifts = nn.ModuleList(MeanShift(o) for o in widths[1:-1])
        self.bias = nn.Parameter(torch.zeros(classes))
        if config.initialization == "identity":
            for layer in self.distances:
                assert isinstance(layer, LpDistance)
                layer.initialize_as_identity()

    @property
    def lipschitz_constant(self) -> float:
        """How much a logit can change per unit of l_inf distance between two images, in pixels: 1/std."""
        return 1.0 / self.normalize.std.item()

    def forward(self, images: Tensor, p: float = math.inf) -> Tensor:
        x = self.normalize(images).flatten(1)
        *hidden, last = self.distances
        for distance, shift in zip(hidden, self.shifts, strict=True):
            x = shift(distance(x, p))
        return -(last(x, p) + self.bias)
