"""Batch normalization of one batch as an affine layer, for bounds in training mode."""

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from linflab.models.networks.channel_moments import channel_moments
from linflab.models.networks.layers import SyncedBatchNorm
from linflab.models.robustness.bounds.steps import ChannelAffine


def normalization_of(layer: _BatchNorm, x: Tensor) -> ChannelAffine:
    """Return batch normalization of a batch as an affine layer; in training it updates running statistics.

    Args:
        layer: Batch normalization, in training mode or synchronized over workers.
        x: (B, C, ...) inputs of the layer.
    """
    if isinstance(layer, SyncedBatchNorm):
        mean, variance = layer.batch_statistics(x)
    else:
        mean, variance = _batch_statistics(layer, x)
    scale = torch.rsqrt(variance + layer.eps)
    if layer.weight is not None:
        scale = layer.weight * scale
    return ChannelAffine(scale, -mean * scale if layer.bias is None else layer.bias - mean * scale)


def _batch_statistics(layer: _BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance (C,) of a batch (B, C, ...); update running statistics like PyTorch.

    Raises:
        ValueError: If there is only one value per feature, and so no variance.
    """
    count = x.numel() // x.shape[1]
    if count == 1:
        raise ValueError(
            f"batch normalization: requires more than one value per feature, not {tuple(x.shape)}; use more images"
        )
    mean, variance = channel_moments(x)
    num_batches = layer.num_batches_tracked
    if layer.running_mean is not None and layer.running_var is not None and num_batches is not None:
        with torch.no_grad():
            num_batches.add_(1)
            momentum = 1 / num_batches.item() if layer.momentum is None else layer.momentum
            layer.running_mean.lerp_(mean, momentum)
            layer.running_var.lerp_(variance * (count / (count - 1)), momentum)
    return mean, variance
