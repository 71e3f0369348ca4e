"""Surrogate gradients at finite p for l_inf-distance layers, against gradient masking.

The gradient of an l_inf distance reaches only one input of each neuron. A network that looks robust because its
gradients are sparse may not be robust. The surrogate keeps the outputs of the network, and gives every distance the
gradient of ||x - w||_p at a finite p. Attacks therefore see the true logits, without the shift of a network evaluated
at finite p.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from linflab.models.distance import lp_distance, lp_distance_conv2d
from linflab.models.networks.layers import LpDistance, LpDistanceConv2d


@contextmanager
def surrogate_gradients(network: nn.Module, p: float) -> Iterator[None]:
    """Give distance layers, including SortNet's, the gradients of ||x - w||_p inside a context.

    Outputs do not change. Networks without distance layers are not affected.

    Args:
        network: Network in evaluation mode.
        p: Finite exponent of the surrogate gradients.
    """

    def smooth(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if isinstance(layer, LpDistanceConv2d):
            distance = lp_distance_conv2d(inputs[0], layer.weight.detach(), p, layer.stride, layer.padding)
        else:
            assert isinstance(layer, LpDistance)
            distance = lp_distance(inputs[0].flatten(1), layer.weight.detach(), p)
        return output.detach() + (distance - distance.detach())

    layers = [layer for layer in network.modules() if isinstance(layer, LpDistance | LpDistanceConv2d)]
    hooks = [layer.register_forward_hook(smooth) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
