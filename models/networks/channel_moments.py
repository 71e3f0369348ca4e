"""Mean and variance of the channels of a batch."""

from typing import Any

import torch
from torch import Tensor

from linflab.models.distance import cpu, derivatives


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance (C,) of each channel of a batch (B, C, ...)."""
    if x.dim() > 2 and x.numel() and x.is_cpu and cpu.is_supported(x) and not derivatives.is_transformed():
        moments: tuple[Tensor, Tensor] = _ChannelMoments.apply(x)
        return moments
    variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    return mean, variance


class _ChannelMoments(torch.autograd.Function):
    """`channel_moments` by the C++ kernel, which is several times faster than `torch.var_mean`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        values = x.contiguous()
        mean, variance = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
        pointers = [tensor.data_ptr() for tensor in (values, mean, variance)]
        assert cpu.KERNELS is not None
        cpu.KERNELS.channel_moments(*pointers, *values.flatten(2).shape, torch.get_num_threads())
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        shape = (-1, *[1] * (x.dim() - 2))
        slope = 2 / count * grad_variance
        return torch.addcmul((grad_mean / count - slope * mean).view(shape), x, slope.view(shape))
