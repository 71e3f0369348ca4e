"""FLOPs of each layer of a network, as in the FLOPs column of the comparison tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linflab.models.networks.layers import LpDistance, LpDistanceConv2d

COUNTED_LAYERS = (LpDistance, LpDistanceConv2d, nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class LayerCost:
    """Parameters and FLOPs of a layer; FLOPs are for one image, counted as in the tables."""

    name: str  # name of the module within the network
    kind: str
    output_shape: tuple[int, ...]  # without the batch dimension
    parameters: int
    flops: int


def count_parameters(network: nn.Module) -> int:
    """Return the number of trained scalars."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_flops(network: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the FLOPs for one image (C, H, W): one per weight and output position.

    Biases and normalization are not counted. Source: the FLOPs columns of Zhang et al. 2021, Tables 1 and 2. A net of
    depth 5 and width 5120 on 28 x 28 images has 82.7M FLOPs, as in the paper.
    """
    return sum(cost.flops for cost in layer_costs(network, input_shape))


def layer_costs(network: nn.Module, input_shape: Sequence[int]) -> list[LayerCost]:
    """Return the cost of each layer that has weights, for one image (C, H, W), in order of execution."""
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

    hooks = [layer.register_forward_hook(count) for layer in names if isinstance(layer, COUNTED_LAYERS)]
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
