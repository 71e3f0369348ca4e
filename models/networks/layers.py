"""Layers of networks; distance layers take p and input masks as arguments and store neither."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from linflab.models.distance import lp_distance, lp_distance_conv2d, masked_lp_distance, sort_distance, tensor_cores
from linflab.models.networks.channel_moments import channel_moments


class Normalize(nn.Module):
    """Normalization (x - mean) / std with one mean per channel, and one std, or one per channel.

    The layer maps images (B, C, H, W), or flat images of one channel (B, D), to the same shape. A single std maps an
    l_inf ball of pixel values to an l_inf ball, and makes the layer 1/std-Lipschitz in the l_inf norm. Distance layers
    and GroupSort networks require it.

    Raises:
        ValueError: If a std is not a positive finite number, the numbers of means and stds differ, or flat images have
            several means.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        stds = list(std) if isinstance(std, Sequence) else [std]
        if not stds or not all(one > 0 and math.isfinite(one) for one in stds):
            raise ValueError(f"std={std}: must be positive finite numbers; use the std of all pixels, or 1.0")
        if isinstance(std, Sequence) and len(stds) != len(mean):
            raise ValueError(f"std={std}: must have {len(mean)} numbers, like mean={tuple(mean)}; use one per channel")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        scale = torch.tensor(std)
        self.register_buffer("std", scale if scale.dim() == 0 else scale.view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalized images in the same shape."""
        if images.dim() != 2:
            return (images - self.mean) / self.std
        if self.mean.numel() > 1:
            raise ValueError(
                f"images={tuple(images.shape)}: must have shape (B, C, H, W), with {self.mean.numel()} channels to "
                "normalize; use images.unflatten(1, (C, H, W))"
            )
        return (images - self.mean.view(1)) / self.std.view(1)


def single_std_normalize(mean: Sequence[float], std: float | Sequence[float]) -> Normalize:
    """Return the normalization of a network that is Lipschitz by construction.

    Raises:
        ValueError: If there is a std for each channel; the l_inf ball would then become a box of unequal sides.
    """
    if isinstance(std, Sequence):
        raise ValueError(
            f"std={std}: must be one number for networks with a Lipschitz constant in the l_inf norm; use the std of "
            "all pixels"
        )
    return Normalize(mean, std)


class LpDistance(nn.Module):
    """Dense layer of l_p-distance neurons y_o = ||x - w_o||_p without bias, from x (B, I) to y (B, O).

    Inputs are flattened. Weights are initialized from N(0, 1). Source: Zhang et al. 2021, Section 3.
    """

    on_tensor_cores = False  # if True, training uses tensor cores at p = 8 and 12

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))

    def init_identity_(self, offset: float = -10.0) -> None:
        """Initialize as a shifted identity: weight[o, o mod I] = offset, if I <= O.

        If |offset| dominates all other terms, output o is x[o mod I] - offset at p = inf, so a deep net initially
        passes its input through. With fewer outputs than inputs, inputs would be lost, so the weights do not change.
        """
        outputs, inputs = self.weight.shape
        if inputs <= outputs:
            rows = torch.arange(outputs)
            self.weight.detach()[rows, rows % inputs] = offset

    def forward(self, x: Tensor, p: float = math.inf) -> Tensor:
        """Return the l_p distances (B, O) of x (B, I) to the weights."""
        distance = tensor_cores.lp_distance if self.on_tensor_cores and self.training else lp_distance
        return distance(x.flatten(1), self.weight, p)


class LpDistanceConv2d(nn.Module):
    """l_p distances of zero-padded image patches to filters, from (B, C, H, W) to (B, O, H', W').

    Filters (O, C, kernel, kernel) are initialized from N(0, 1). Source: the convolutional variant of Zhang et al. 2021.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, padding: int = 1
    ) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))

    def init_identity_(self, offset: float = -10.0) -> None:
        """Initialize as a shifted identity: the center of filter o in channel o mod C is offset, if C <= O.

        As in `LpDistance`, output o is initially channel o mod C minus offset, at the positions of the stride.
        """
        outputs, channels, height, width = self.weight.shape
        if channels <= outputs:
            filters = torch.arange(outputs)
            self.weight.detach()[filters, filters % channels, height // 2, width // 2] = offset

    def forward(self, x: Tensor, p: float = math.inf) -> Tensor:
        """Return the l_p distances (B, O, H', W') of the patches of x (B, C, H, W) to the filters."""
        return lp_distance_conv2d(x, self.weight, p, self.stride, self.padding)


class SortDistance(LpDistance):
    """Dense layer of SortNet neurons, from x (B, I) to y (B, O).

    In evaluation, y_o = sum_k q (1 - q)^(k - 1) (k-th largest of |x - w_o|), and p must be inf. The sum has the 10
    largest terms. Its coefficients are scaled to sum 1, so each output is 1-Lipschitz in the l_inf norm. q = 1 is the
    l_inf-distance neuron. In training, y_o is the l_p distance over randomly kept inputs, at a fraction q of the cost.
    For one layer at p = inf, the expected value of y_o is the sum of all terms, apart from empty masks. Source: Zhang
    et al., "Rethinking Lipschitz Neural Networks and Certified Robustness", NeurIPS 2022.

    Args:
        q: Probability with which training keeps each input, in (0, 1].
        mean_over: Samples over which the mean shift before this layer averages in training: the whole batch, or the
            samples whose mask keeps the input.
    """

    def __init__(
        self, in_features: int, out_features: int, q: float, mean_over: Literal["batch", "kept"] = "batch"
    ) -> None:
        super().__init__(in_features, out_features)
        self.q, self.mean_over = q, mean_over
        self.top_k = min(10, in_features)

    def sample_masks(self, count: int, generator: torch.Generator) -> Tensor:
        """Return `count` random input masks (count, I), bool, on the CPU.

        Every mask keeps a random number of inputs. The authors draw one number for all groups of a batch, so that the
        kept inputs fit into one matrix. The distribution of each mask and the expected gradient are the same;
        independent numbers only reduce the variance of averages over a batch.
        """
        return torch.rand(count, self.weight.shape[1], generator=generator) < self.q

    def forward(self, x: Tensor, p: float = math.inf, mask: Tensor | None = None, group_size: int = 32) -> Tensor:
        """Return distances by mask (G, I bool, a row per `group_size` samples), or neuron outputs without it.

        Raises:
            ValueError: If masks are missing in training, or p is finite in evaluation.
        """
        if mask is not None:
            return masked_lp_distance(x, self.weight, p, mask, group_size)
        if self.training:
            raise ValueError("masks=None: SortDistance requires input masks in training; use sample_masks or eval()")
        if not math.isinf(p):
            raise ValueError(f"p={p}: must be inf for SortDistance in evaluation mode; use p=math.inf")
        return sort_distance(x, self.weight, self.q, self.top_k)


class ScaledLinear(nn.Linear):
    """Linear layer that divides its weights, initialized from N(0, 1), by sqrt(I); biases start at 0.

    The division also affects training: Adam's steps, which do not depend on the scale of a gradient, become smaller by
    sqrt(I). Source: the authors' published training script of Zhang et al. 2021.
    """

    def reset_parameters(self) -> None:
        """Initialize weights from N(0, 1) and biases as 0."""
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    @property
    def scaled_weight(self) -> Tensor:
        """Effective weight matrix (O, I)."""
        return self.weight / math.sqrt(self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, I) multiplied by the scaled weight, plus the bias, (B, O)."""
        return functional.linear(x, self.scaled_weight, self.bias)


class L1ProjectedLinear(nn.Linear):
    """Linear layer, 1-Lipschitz in the l_inf norm, whose weight rows are projected onto the l_1 unit ball.

    Source: Anil et al., "Sorting out Lipschitz function approximation", ICML 2019, Section 4.2.
    """

    @property
    def projected_weight(self) -> Tensor:
        """Effective weight matrix (O, I)."""
        return project_onto_l1_ball(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, I) multiplied by the projected weight, plus the bias, (B, O)."""
        return functional.linear(x, self.projected_weight, self.bias)


def project_onto_l1_ball(rows: Tensor) -> Tensor:
    """Return the Euclidean projection of each row of (O, I) onto the l_1 unit ball.

    A row w outside the ball becomes sign(w) relu(|w| - tau) with tau = ((sum of |w| over A) - 1) / (size of A), where A
    is the set with |w| > tau. The gradient through tau is that of the projection. NaN and infinities affect only their
    rows. Sources: Duchi et al., "Efficient projections onto the l1-ball", ICML 2008; Michelot 1986 for Newton's method,
    which finds tau faster than sorting.
    """
    sizes = rows.abs()
    inside = sizes.detach().sum(dim=1, keepdim=True) <= 1
    offsets = sizes - sizes.detach().amax(dim=1, keepdim=True)  # in (-1, 0] on A, which keeps rounding errors small
    active = _active_set(offsets.detach())
    tau = ((active * offsets).sum(dim=1, keepdim=True) - 1) / active.sum(dim=1, keepdim=True)
    excess = functional.relu(offsets - tau)
    norms = excess.detach().sum(dim=1, keepdim=True)  # exceeds 1 only by rounding errors
    return torch.where(inside, rows, rows.sign() * (excess / norms.clamp_min(1)))


@torch.no_grad()
def _active_set(offsets: Tensor) -> Tensor:
    """Return where rows (O, I), whose largest elements are 0, exceed their thresholds: (O, I) bool."""
    if offsets.is_meta or torch.compiler.is_exporting():  # without values, the loop below cannot end
        return offsets > _sorted_threshold(offsets)
    tau = ((offsets.sum(dim=1, keepdim=True) - 1) / offsets.shape[1]).clamp_min(-1)  # two lower bounds of the threshold
    active = offsets > tau
    counts = active.sum(dim=1, keepdim=True)
    while True:
        excess = functional.relu(offsets - tau).sum(dim=1, keepdim=True) - 1
        tau = torch.maximum(tau, tau + excess / counts)  # active sets only shrink, so the loop ends
        active = offsets > tau
        previous_counts, counts = counts, active.sum(dim=1, keepdim=True)
        if torch.equal(counts, previous_counts):
            return active


def _sorted_threshold(rows: Tensor) -> Tensor:
    """Return thresholds (O, 1) of rows (O, I) from their largest elements: those above the threshold."""
    largest = rows.sort(dim=1, descending=True).values
    thresholds = (largest.cumsum(dim=1) - 1) / torch.arange(1, rows.shape[1] + 1, device=rows.device)
    return thresholds.gather(1, (largest > thresholds).sum(dim=1, keepdim=True) - 1)


class GroupSort(nn.Module):
    """Activation that sorts x (B, F) in groups of `group_size` features, a divisor of F; 2 is MaxMin.

    It is 1-Lipschitz in the l_inf norm and preserves the norm of gradients. Source: Anil et al. 2019, Section 4.1.
    """

    def __init__(self, group_size: int = 2) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, F), sorted within groups."""
        return x.unflatten(1, (-1, self.group_size)).sort(dim=2).values.flatten(1)


DistanceLayer = LpDistance | LpDistanceConv2d


@torch.no_grad()
def lp_weight_decay_(layer: DistanceLayer, p: float, amount: float) -> None:
    """Apply l_p weight decay to a distance layer.

    For each neuron, w_i -= amount (|w_i| / ||w||_p)^(p-2) w_i. This is a gradient step on ||w||_p^2 / 2: usual weight
    decay at p = 2, and decay of only the largest weight at p = inf. Source: Zhang et al. 2021, Section 5, and the
    authors' published training script. `amount` is the learning rate times the weight decay.
    """
    weight = layer.weight.flatten(1)  # a view, so changes apply to the layer
    if math.isinf(p):
        largest = weight.abs().argmax(dim=1, keepdim=True)
        weight.scatter_add_(1, largest, -amount * weight.gather(1, largest))
        return
    norms = lp_distance(torch.zeros_like(weight[:1]), weight, p).T  # (O, 1)
    pull = (weight.abs() / norms.clamp_min(torch.finfo(norms.dtype).tiny)).pow_(p - 1)
    weight.sub_(pull.mul_(weight.sign()).mul_(amount * norms))


def world_size() -> int:
    """Return the number of data-parallel workers under torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class MeanShift(nn.Module):
    """Mean shift y - mean(y) per feature: batch normalization without scaling.

    Scaling would change the Lipschitz constant. In training, the mean of y (B, O) or (B, O, H, W) over batch and
    positions is subtracted, and gradients flow through it. Under torch.distributed the mean is over the batches of all
    workers, which must have the same size. In evaluation, a running mean (momentum 0.1) is subtracted: a constant bias,
    so the layer is 1-Lipschitz. In SortNet training, masks (G, O), bool, select the features that the next layer uses
    in each group of `group_size` samples. The mean of a feature is then over the samples of the groups that use it, or
    0 if no group uses it.
    """

    running_mean: Tensor
    holds_mean = False  # set inside `hold_batch_means`
    held_mean: Tensor | None = None

    def __init__(self, features: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(features))

    def forward(self, y: Tensor, mask: Tensor | None = None, group_size: int = 32) -> Tensor:
        """Return y minus its mean, or minus the running mean in evaluation."""
        if not self.training:
            return y - self.broadcast_to_positions(self.running_mean, y)
        if self.held_mean is not None:
            return y - self.broadcast_to_positions(self.held_mean, y)
        if mask is None:
            mean = y.mean(dim=[d for d in range(y.dim()) if d != 1])
        else:
            sample_mask = mask.repeat_interleave(group_size, dim=0)[: len(y)]
            mean = (sample_mask * y).sum(dim=0) / sample_mask.sum(dim=0).clamp_min(1)
        if world_size() > 1:
            mean = all_reduce(mean) / world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
        if self.holds_mean:
            self.held_mean = mean
        return y - self.broadcast_to_positions(mean, y)

    @staticmethod
    def broadcast_to_positions(mean: Tensor, y: Tensor) -> Tensor:
        """Return mean (O) in a shape that broadcasts to y (B, O, ...)."""
        return mean.view(-1, *[1] * (y.dim() - 2))


class SyncedBatchNorm(_BatchNorm):
    """Batch normalization of y (B, O, ...) over the batches of all workers in training.

    The batches must have the same size. Gradients flow through the statistics of all workers. On one worker and in
    evaluation, PyTorch's batch normalization is used. Source: Ioffe & Szegedy, "Batch Normalization", ICML 2015.

    Attributes:
        is_synced: False if each worker uses only its own batch.
    """

    is_synced = True
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(features, eps, momentum)

    def forward(self, y: Tensor) -> Tensor:
        """Return y (B, O, ...), normalized per feature."""
        if not self.training or not self.is_synced or world_size() == 1:
            return super().forward(y)  # a fused kernel
        self._check_input_dim(y)
        mean, variance = self.batch_statistics(y)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        per_position = MeanShift.broadcast_to_positions
        return (y - per_position(mean, y)) * per_position(scale, y) + per_position(self.bias, y)

    def batch_statistics(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and variance (O) that normalize y.

        In training these are the batch mean and biased variance, with gradients; the unbiased variance updates the
        running statistics. In evaluation these are the running statistics.

        Raises:
            ValueError: If there is only one value per feature in training.
        """
        if not self.training:
            return self.running_mean, self.running_var
        count = world_size() * y.numel() // y.shape[1]
        if count == 1:
            raise ValueError(f"y={tuple(y.shape)}: requires more than one value per feature; use a larger batch")
        if world_size() == 1:
            mean, variance = channel_moments(y)
        else:
            dims = [d for d in range(y.dim()) if d != 1]
            mean = all_reduce(y.mean(dims)) / world_size()
            variance = all_reduce((y - MeanShift.broadcast_to_positions(mean, y)).square().mean(dims)) / world_size()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return mean, variance


class BatchNorm1d(SyncedBatchNorm, nn.BatchNorm1d):
    """`SyncedBatchNorm` for y (B, O) or (B, O, L)."""


class BatchNorm2d(SyncedBatchNorm, nn.BatchNorm2d):
    """`SyncedBatchNorm` for y (B, O, H, W)."""
