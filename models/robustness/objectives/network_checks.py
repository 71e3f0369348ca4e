"""Checks of the network before training: its layers have rules, and settings of the objective fit them."""

from collections.abc import Sequence

from torch import nn

from linflab.models.networks.hybrid import LinfDistHybrid
from linflab.models.networks.linf_dist import DistanceNet
from linflab.models.robustness.bounds.cut import head_trace
from linflab.models.robustness.bounds.rules import has_rule
from linflab.models.robustness.bounds.steps import Trace
from linflab.models.robustness.bounds.tracing import evaluation_mode, has_only_own_modules, trace
from linflab.models.robustness.bounds.worst_case import check_differentiable


def can_trace(network: nn.Module) -> bool:
    """Return whether the forward pass of a network can run.

    User-defined modules may need values of parameters, which the device `meta` does not have. Networks with such
    modules are checked by `Objective.prepare` instead.
    """
    return next(network.parameters()).device.type != "meta" or has_only_own_modules(network)


def trace_network(network: nn.Module, input_shape: Sequence[int]) -> Trace:
    """Return the trace of a network in evaluation mode; its mode does not change.

    Args:
        network: Network for which `can_trace` returns True.
        input_shape: Shape of an image, (C, H, W).

    Raises:
        TypeError: If a layer or operation has no rule (the message names it).
        ValueError: If the network fails on images of this shape.
    """
    with evaluation_mode(network):
        return trace(network, has_rule, next(network.parameters()).new_empty(1, *input_shape))


def trace_bounded_layers(network: nn.Module, input_shape: Sequence[int]) -> Trace:
    """Return the trace of the layers that IBP propagates boxes through.

    These are the layers behind the features of a hybrid. Other distance nets have none, since their Lipschitz constant
    bounds them.

    Args:
        network: Network for which `can_trace` returns True.
        input_shape: Shape of an image, (C, H, W).

    Raises:
        TypeError: If a layer or operation has no rule, or no differentiable bounds (the message names it).
        ValueError: If the network fails on images of this shape.
    """
    if isinstance(network, LinfDistHybrid):
        return head_trace(network)
    if isinstance(network, DistanceNet):
        return Trace("logits", [], "logits")
    traced = trace_network(network, input_shape)
    check_differentiable(traced)
    return traced


def check_relu_shrink(traced: Trace, relu_shrink: float) -> None:
    """Check that there are ReLUs if their upper bounds are to shrink.

    Raises:
        ValueError: If there are none.
    """
    if relu_shrink != 1 and not any(isinstance(step.layer, nn.ReLU) for step in traced.steps):
        raise ValueError(f"relu_shrink={relu_shrink:g}: requires ReLUs, but the network has none; use 1")
