"""The FLOPs column of the comparison tables, counted, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linflab.models.networks.layers import LpDistance, LpDistanceConv2d

COUNTED = (LpDistance, LpDistanceConv2d, nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class LayerCost:
    """A layer with weights, and what it costs: FLOPs for one image, as the tables count them."""

    name: str  # of the module within the network
    kind: str
    output_shape: tuple[int, ...]  # for one image
    parameters: int
    flops: int


def count_parameters(network: nn.Module) -> int:
    """The number of trained scalars."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_flops(network: nn.Module, input_shape: Sequence[int]) -> int:
    """Operations for one image (C, H, W) as the tables count them: one per weight and output position.

    Biases and normalisation are not counted. Source: the FLOPs columns of Zhang et al. 2021, Tables 1 and 2; a net of
    depth 5 and width 5120 on 28 x 28 images comes to their 82.7M.
    """
    return sum(cost.flops for cost in layer_costs(network, input_shape))


def layer_costs(network: nn.Module, input_shape: Sequence[int]) -> list[LayerCost]:
    """The layers with weights, in the order in which an image (C, H, W) passes them, and the cost of each."""
    names = {module: name for name, module in network.named_modules()}
    costs: list[LayerCost] = []

    def count(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        shape = tuple(output.shape[1:])
        positions = output[0].numel() // weight.shape[0]
        costs.append(
            LayerCost(names[layer], type(layer).__name__, shape, count_parameters(layer), weight.numel() * positions)
        )

    hooks = [layer.register_forward_hook(count) for layer in names if isinstance(layer, COUNTED)]
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
    return costs
