"""The layers of l_inf-distance nets. Each takes what varies over training (p) as an argument and keeps none of it."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from linflab.models.distance import lp_distance


class Normalize(nn.Module):
    """(x - mean) / std, with one mean per channel and ONE std, so that an l_inf ball of pixels stays an l_inf ball.

    Maps images (B, C, H, W) to the same shape and is 1/std-Lipschitz in the l_inf norm.

    Raises:
        ValueError: std is not a positive finite number.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: float) -> None:
        super().__init__()
        if not (std > 0 and math.isfinite(std)):
            raise ValueError(f"std must be a positive number, got {std}")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class LpDistance(nn.Module):
    """A dense layer of l_p-distance neurons without bias: x (B, I) -> y (B, O) with y_o = ||x - w_o||_p.

    Weights start as N(0, 1). Source: Zhang et al. 2021, Section 3.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def initialize_as_identity(self, offset: float = -10.0) -> None:
        """Start as a shifted identity: weight[o, o mod I] = offset, where there are at least as many outputs as inputs.

        With |offset| larger than all else, output o is x[o mod I] - offset at p = inf, so that a deep net begins by
        passing its input on. With fewer outputs than inputs the weights stay as they are: inputs would be lost.
        """
        outputs, inputs = self.weight.shape
        if inputs <= outputs:
            rows = torch.arange(outputs)
            with torch.no_grad():
                self.weight[rows, rows % inputs] = offset

    @torch.no_grad()
    def decay(self, p: float, amount: float) -> None:
        """l_p weight decay: w_i -= amount (|w_i| / ||w||_p)^(p-2) w_i for every neuron's weights w.

        It pulls at ||w||_p^2 / 2 as usual weight decay does at p = 2; at p = inf at the largest weight alone.
        Source: Zhang et al. 2021, Section 5, and the authors' published training script.
        """
        norms = lp_distance(torch.zeros_like(self.weight[:1]), self.weight, p).T  # (O, 1)
        if math.isinf(p):
            largest = self.weight.abs().argmax(dim=1, keepdim=True)
            self.weight.scatter_add_(1, largest, -amount * self.weight.gather(1, largest))
            return
        pull = (self.weight.abs() / norms.clamp_min(torch.finfo(norms.dtype).tiny)).pow_(p - 1)
        self.weight.sub_(pull.mul_(self.weight.sign()).mul_(amount * norms))

    def forward(self, x: Tensor, p: float = math.inf) -> Tensor:
        return lp_distance(x, self.weight, p)


class MeanShift(nn.Module):
    """y - mean(y) per feature: batch normalisation without the scaling, which would change the Lipschitz constant.

    In training, y (B, O) loses its batch mean, and the gradient flows through that mean; under torch.distributed it is
    the mean over the batches of all workers, which must be of one size. In evaluation a running mean (momentum 0.1) is
    subtracted: a constant bias, so the layer is 1-Lipschitz.
    """

    running_mean: Tensor

    def __init__(self, features: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(features))

    def forward(self, y: Tensor) -> Tensor:
        if not self.training:
            return y - self.running_mean
        mean = y.mean(dim=0)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            mean = all_reduce(mean) / dist.get_world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
        return y - mean
