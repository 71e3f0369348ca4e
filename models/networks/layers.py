"""The layers of networks. Distance layers take what varies over training as an argument and keep none of it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from linflab.models.distance import lp_distance, lp_distance_conv2d, lp_distance_on_subsets, sort_distance


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
    """A dense layer of l_p-distance neurons without bias: x (B, I), or what flattens to it, -> y (B, O).

    y_o = ||x - w_o||_p. Weights start as N(0, 1). Source: Zhang et al. 2021, Section 3.
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

    def forward(self, x: Tensor, p: float = math.inf) -> Tensor:
        return lp_distance(x.flatten(1), self.weight, p)


class LpDistanceConv2d(nn.Module):
    """l_p distances of patches to filters: images (B, C, H, W) -> (B, O, H', W'), with zeros beyond the edges.

    Filters (O, C, kernel, kernel) start as N(0, 1). Source: the convolutional variant of Zhang et al. 2021.
    """

    def __init__(self, channels: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding
        self.weight = nn.Parameter(torch.randn(outputs, channels, kernel, kernel))

    def forward(self, x: Tensor, p: float = math.inf) -> Tensor:
        return lp_distance_conv2d(x, self.weight, p, self.stride, self.padding)


class SortDistance(LpDistance):
    """A dense layer of SortNet's neurons: x (B, I) -> y (B, O).

    y_o = sum_k q (1 - q)^(k - 1) (k-th largest of |x - w_o|). The sum is cut after the 10 largest and its coefficients
    are scaled to sum 1, so each output is 1-Lipschitz in the l_inf norm; q = 1 is the l_inf-distance neuron. In
    evaluation that is what it computes, and p must be inf. In training it is the l_p distance over a random subset of
    the inputs, an estimate that costs q as much: for one layer, at p = inf and up to the empty subset, its mean is the
    neuron that is not cut.
    Source: Zhang et al., "Rethinking Lipschitz Neural Networks and Certified Robustness", NeurIPS 2022.

    Args:
        q: probability with which training keeps each input, in (0, 1].
    """

    def __init__(self, inputs: int, outputs: int, q: float) -> None:
        super().__init__(inputs, outputs)
        self.q = q
        self.terms = min(10, inputs)

    def draw_subsets(self, count: int, generator: torch.Generator) -> Tensor:
        """Which inputs each of `count` subsets keeps: (count, I) bool, on the CPU."""
        return torch.rand(count, self.weight.shape[1], generator=generator) < self.q

    def forward(self, x: Tensor, p: float = math.inf, kept: Tensor | None = None, group: int = 32) -> Tensor:
        """Distances over subsets in training: `kept` (G, I) bool, one for each `group` samples; else the neuron.

        Raises:
            ValueError: subsets are missing in training; or p is finite in evaluation.
        """
        if kept is not None:
            return lp_distance_on_subsets(x, self.weight, p, kept, group)
        if self.training:
            raise ValueError("SortDistance needs subsets in training: pass those of draw_subsets, or call eval() first")
        if not math.isinf(p):
            raise ValueError(f"SortDistance is defined at p = inf alone in evaluation, got p = {p}")
        return sort_distance(x, self.weight, self.q, self.terms)


class ScaledLinear(nn.Linear):
    """A linear layer whose weights are N(0, 1) parameters, divided by sqrt(I) when used; biases start at 0.

    Not only an initialisation: Adam's steps, which do not depend on the scale of a gradient, become smaller by sqrt(I).
    Source: the authors' published training script of Zhang et al. 2021.
    """

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    @property
    def scaled_weight(self) -> Tensor:
        """The matrix (O, I) that inputs are multiplied by."""
        return self.weight / math.sqrt(self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.scaled_weight, self.bias)


class L1Linear(nn.Linear):
    """A linear layer, x (B, I) -> y (B, O), whose rows are projected onto the l1 ball of radius 1 when used.

    So each output is 1-Lipschitz in the l_inf norm. Source: Anil et al., "Sorting out Lipschitz function
    approximation", ICML 2019, Section 4.2.
    """

    @property
    def projected_weight(self) -> Tensor:
        """The matrix (O, I) that inputs are multiplied by."""
        return project_onto_l1_ball(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.projected_weight, self.bias)


def project_onto_l1_ball(rows: Tensor) -> Tensor:
    """The nearest point of the l1 ball of radius 1 to each row w (O, I): sign(w) relu(|w| - tau), or w if it is inside.

    tau = (sum of |w| over A - 1) / size of A, where A is where |w| > tau: the gradient through it is that of the
    projection. NaN and infinities stay in their rows. Sources: Duchi et al., "Efficient projections onto the l1-ball",
    ICML 2008; tau by Newton's method as of Michelot 1986, since few of its steps cost less than to sort.
    """
    sizes = rows.abs()
    inside = sizes.detach().sum(dim=1, keepdim=True) <= 1
    below = sizes - sizes.detach().amax(dim=1, keepdim=True)  # those in A are in (-1, 0], with small sums and roundings
    active = _active_set(below.detach())
    tau = ((active * below).sum(dim=1, keepdim=True) - 1) / active.sum(dim=1, keepdim=True)
    excess = functional.relu(below - tau)
    norms = excess.detach().sum(dim=1, keepdim=True)  # above 1 by roundings alone
    return torch.where(inside, rows, rows.sign() * (excess / norms.clamp_min(1)))


@torch.no_grad()
def _active_set(below: Tensor) -> Tensor:
    """Where rows (O, I), whose largest elements are 0, are above their thresholds: (O, I) bool."""
    if below.is_meta or torch.compiler.is_exporting():  # there are no numbers that could end a loop
        return below > _threshold_by_sorting(below)
    tau = ((below.sum(dim=1, keepdim=True) - 1) / below.shape[1]).clamp_min(-1)  # neither is more than the threshold
    active = below > tau
    counts = active.sum(dim=1, keepdim=True)
    while True:
        excess = functional.relu(below - tau).sum(dim=1, keepdim=True) - 1
        tau = torch.maximum(tau, tau + excess / counts)  # sets only shrink, so this ends whatever roundings do
        active = below > tau
        before, counts = counts, active.sum(dim=1, keepdim=True)
        if torch.equal(counts, before):
            return active


def _threshold_by_sorting(rows: Tensor) -> Tensor:
    """The threshold (O, 1) of rows (O, I): that of their k largest elements, for the most k that are all above it."""
    largest = rows.sort(dim=1, descending=True).values
    thresholds = (largest.cumsum(dim=1) - 1) / torch.arange(1, rows.shape[1] + 1, device=rows.device)
    return thresholds.gather(1, (largest > thresholds).sum(dim=1, keepdim=True) - 1)


class GroupSort(nn.Module):
    """Sorts x (B, F) within groups of `group` consecutive features, which must divide F; 2 is MaxMin.

    1-Lipschitz in the l_inf norm, and it keeps the norm of gradients. Source: Anil et al. 2019, Section 4.1.
    """

    def __init__(self, group: int = 2) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.group)).sort(dim=2).values.flatten(1)


DistanceLayer = LpDistance | LpDistanceConv2d


@torch.no_grad()
def decay_distances(layer: DistanceLayer, p: float, amount: float) -> None:
    """l_p weight decay of a distance layer: w_i -= amount (|w_i| / ||w||_p)^(p-2) w_i for every neuron's weights w.

    It pulls at ||w||_p^2 / 2 as usual weight decay does at p = 2; at p = inf at the largest weight alone.
    Source: Zhang et al. 2021, Section 5, and the authors' published training script.
    """
    weight = layer.weight.flatten(1)  # a view
    if math.isinf(p):
        largest = weight.abs().argmax(dim=1, keepdim=True)
        weight.scatter_add_(1, largest, -amount * weight.gather(1, largest))
        return
    norms = lp_distance(torch.zeros_like(weight[:1]), weight, p).T  # (O, 1)
    pull = (weight.abs() / norms.clamp_min(torch.finfo(norms.dtype).tiny)).pow_(p - 1)
    weight.sub_(pull.mul_(weight.sign()).mul_(amount * norms))


def workers() -> int:
    """How many processes train together under torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class MeanShift(nn.Module):
    """y - mean(y) per feature: batch normalisation without the scaling, which would change the Lipschitz constant.

    In training, y (B, O) or (B, O, H, W) loses its mean over the batch, and over positions; the gradient flows through
    that mean. Under torch.distributed it is the mean over the batches of all workers, which must be of one size. In
    evaluation a running mean (momentum 0.1) is subtracted: a constant bias, so the layer is 1-Lipschitz.
    """

    running_mean: Tensor

    def __init__(self, features: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(features))

    def forward(self, y: Tensor) -> Tensor:
        if not self.training:
            return y - self.per_position(self.running_mean, y)
        mean = y.mean(dim=[d for d in range(y.dim()) if d != 1])
        if workers() > 1:
            mean = all_reduce(mean) / workers()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
        return y - self.per_position(mean, y)

    @staticmethod
    def per_position(mean: Tensor, y: Tensor) -> Tensor:
        """(O) in the shape that is subtracted from y (B, O, ...)."""
        return mean.view(-1, *[1] * (y.dim() - 2))


@contextmanager
def recomputed_means(network: nn.Module) -> Iterator[None]:
    """Compute the running means of a network in evaluation mode anew, as the mean over what it is given meanwhile.

    Each batch goes through the network with its own mean subtracted, and counts as much as any other; all should be of
    one size. Afterwards the network is in evaluation mode as before.
    """
    shifts = [module for module in network.modules() if isinstance(module, MeanShift)]
    momenta = [shift.momentum for shift in shifts]
    seen = 0

    def weigh(*_: object) -> None:  # the k-th batch moves the mean of those before by a share of 1/k
        nonlocal seen
        seen += 1
        for shift in shifts:
            shift.momentum = 1 / seen

    hook = network.register_forward_pre_hook(weigh)
    for shift in shifts:
        shift.train()
    try:
        with torch.no_grad():
            yield
    finally:
        hook.remove()
        for shift, momentum in zip(shifts, momenta, strict=True):
            shift.momentum = momentum
            shift.eval()


class WorkersBatchNorm(_BatchNorm):
    """Batch normalisation of y (B, O), or with positions behind, over the batches of all workers in training.

    Those must be of one size. The gradient flows through the statistics of all. On one worker, and in evaluation, it is
    PyTorch's. Source: Ioffe & Szegedy, "Batch Normalization", ICML 2015.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(features, eps, momentum)

    def forward(self, y: Tensor) -> Tensor:
        if not self.training or workers() == 1:
            return super().forward(y)  # a fused kernel
        self._check_input_dim(y)
        mean, variance = self.statistics(y)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        per_position = MeanShift.per_position
        return (y - per_position(mean, y)) * per_position(scale, y) + per_position(self.bias, y)

    def statistics(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (O) that y is normalised by: in evaluation the running ones.

        In training those of the batch (the biased variance), with a gradient; the running ones move towards them, with
        the unbiased variance.

        Raises:
            ValueError: there is one value of each feature in training, and so no variance.
        """
        if not self.training:
            return self.running_mean, self.running_var
        count = workers() * y.numel() // y.shape[1]
        if count == 1:
            raise ValueError(f"batch normalisation needs more than one value of each feature, got {tuple(y.shape)}")
        dims = [d for d in range(y.dim()) if d != 1]
        if workers() == 1:
            variance, mean = torch.var_mean(y, dims, correction=0)
        else:
            mean = all_reduce(y.mean(dims)) / workers()
            variance = all_reduce((y - MeanShift.per_position(mean, y)).square().mean(dims)) / workers()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return mean, variance


class BatchNorm1d(WorkersBatchNorm, nn.BatchNorm1d):
    """`WorkersBatchNorm` of y (B, O) or (B, O, L)."""


class BatchNorm2d(WorkersBatchNorm, nn.BatchNorm2d):
    """`WorkersBatchNorm` of y (B, O, H, W)."""
