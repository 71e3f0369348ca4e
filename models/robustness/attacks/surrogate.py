"""Dense gradients for networks of l_inf distances, whose own say little: they reach one input of each neuron.

A network that looks robust because its gradients are sparse is not. The surrogate computes what the network computes,
and has the gradient that every distance ||x - w|| would have at a finite p, at the same inputs. Attacks through it see
the logits that they have to beat, without the shift that a network evaluated at finite p has.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from linflab.models.distance import lp_distance, lp_distance_conv2d
from linflab.models.networks.layers import LpDistance, LpDistanceConv2d


@contextmanager
def dense_gradients(network: nn.Module, p: float) -> Iterator[None]:
    """Give distance layers, SortNet's too, the gradients of ||x - w||_p; what they compute stays as it is.

    No-op for networks without distance layers.

    Args:
        network: in evaluation mode.
        p: of the gradients, finite.
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
