"""The FLOPs column of the comparison tables, counted."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from linflab.models.networks.layers import LpDistance


def count_parameters(network: nn.Module) -> int:
    """The number of trained scalars."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_flops(network: nn.Module, input_shape: Sequence[int]) -> int:
    """Operations for one image (C, H, W) as the tables count them: one per weight and output position.

    Biases and normalisation are not counted. Source: the FLOPs columns of Zhang et al. 2021, Tables 1 and 2; a net of
    depth 5 and width 5120 on 28 x 28 images comes to their 82.7M.
    """
    counts: list[int] = []

    def count(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, LpDistance)
        positions = output[0].numel() // layer.weight.shape[0]
        counts.append(layer.weight.numel() * positions)

    hooks = [layer.register_forward_hook(count) for layer in network.modules() if isinstance(layer, LpDistance)]
    training = network.training
    device = next(network.parameters()).device
    try:
        network.eval()
        with torch.no_grad():
            network(torch.zeros(1, *input_shape, device=device))
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return sum(counts)
