"""Contexts in which the means and variances that a network subtracts and divides by are chosen otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from linflab.models.networks.layers import MeanShift, SyncedBatchNorm

# Layers that subtract running means in evaluation, and those that also divide by running standard deviations.
Layer = MeanShift | _BatchNorm
Kinds = tuple[type[Layer], ...]
MEAN_SHIFTS: Kinds = (MeanShift,)
BATCH_NORMS: Kinds = (_BatchNorm,)


def layers_with_statistics(network: nn.Module, kinds: Kinds) -> list[Layer]:
    """Return the layers of these kinds that have running statistics, in the order of `network.modules()`."""
    return [module for module in network.modules() if isinstance(module, kinds) and module.running_mean is not None]


@contextmanager
def recalibrate_running_statistics(network: nn.Module, kinds: Kinds) -> Iterator[None]:
    """Recalibrate the running statistics of a network in evaluation mode on the batches run inside a context.

    Each batch passes through the network with its own mean subtracted, or normalized by its own mean and variance. The
    running statistics become the averages of the batches' means and unbiased variances. All batches have equal weight,
    so they should have the same size. Several workers must run the same batches, since layers do not share statistics.
    The network is in evaluation mode again afterwards.

    Args:
        network: Network in evaluation mode.
        kinds: `MEAN_SHIFTS`, `BATCH_NORMS` or both.
    """
    layers = layers_with_statistics(network, kinds)
    momenta = [layer.momentum for layer in layers]
    num_batches = 0

    def weigh(*_: object) -> None:  # the k-th batch has weight 1/k
        nonlocal num_batches
        num_batches += 1
        for layer in layers:
            layer.momentum = 1 / num_batches

    hook = network.register_forward_pre_hook(weigh)
    for layer in layers:
        layer.train()
        if isinstance(layer, SyncedBatchNorm):
            layer.is_synced = False
    try:
        with torch.no_grad():
            yield
    finally:
        hook.remove()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()
            if isinstance(layer, SyncedBatchNorm):
                layer.is_synced = True


@contextmanager
def hold_batch_means(network: nn.Module) -> Iterator[None]:
    """Inside a context, mean shifts in training subtract the means of the first batch from all batches."""
    shifts = [module for module in network.modules() if isinstance(module, MeanShift)]
    for shift in shifts:
        shift.holds_mean = True
    try:
        yield
    finally:
        for shift in shifts:
            shift.holds_mean, shift.held_mean = False, None
