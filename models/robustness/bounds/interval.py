"""Interval bounds: from a box of inputs, layer by layer, a box that holds all outputs.

A network is traced into its layers (torch.fx), and every layer has a rule: which box holds what it makes of a box. For
distance layers, monotone functions and sums the rules are exact; what is lost is how outputs depend on one another. The
bounds are differentiable where the layers' rules are. They are those of exact arithmetic, unless they are asked to be
sound.

Sources: Gowal et al., "On the Effectiveness of Interval Bound Propagation", 2018 (linear layers, and the last one
merged with the margin); Zhang et al. 2021, Section 4 (distance layers).

Sound bounds hold for the network as it is computed, with its roundings (see `rounding`): for every box of floats, all
that the layers compute for floats in it, in any order of summation, is in the boxes. Rounding is monotone, so what is
made of one rounded difference needs nothing more: normalisation, mean shifts and l_inf distances are sound as they are,
but for numbers that are flushed to zero. Sums are widened by their error bounds.
"""

import math
import operator
from collections.abc import Callable
from functools import singledispatch
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from linflab.models.distance import linf_distance_bounds, sort_distance_bounds
from linflab.models.distance.convolution import output_size, patches_of, sample_chunks
from linflab.models.networks.layers import (
    LpDistance,
    LpDistanceConv2d,
    MeanShift,
    Normalize,
    ScaledLinear,
    SortDistance,
)
from linflab.models.robustness.bounds.rounding import TINY, gamma, unit_roundoff, upper_float
from linflab.models.robustness.objectives import wrong_class_margins

LARGEST_TABLE = 2**24  # numbers that are held together when rows are compared


class Box(NamedTuple):
    """All x with lower <= x <= upper, elementwise."""

    lower: Tensor
    upper: Tensor


def pixel_box(images: Tensor, eps: float | Tensor) -> Box:
    """The images (B, C, H, W) within eps of these, in pixels, that are images: cut to [0, 1].

    eps is one number, or one for each image (B, 1, 1, 1) in float64.

    It holds every such image of the same dtype: eps is rounded upwards, and sums to nearest floats, beyond which there
    is no float that is within eps.
    """
    radius = upper_float(eps, images)
    return Box((images - radius).clamp(0, 1), (images + radius).clamp(0, 1))


def interval_bounds(network: nn.Module, box: Box, sound: bool = False) -> Box:
    """Bounds of a network's outputs over a box of inputs, in evaluation mode at p = inf.

    Args:
        network: in evaluation mode.
        box: of inputs.
        sound: bounds of the outputs as they are computed, with their roundings.

    Raises:
        ValueError: the network is in training mode.
        TypeError: a layer or operation of the network has no rule; names it.
    """
    return _Interpreter(network, sound).run(box)


def interval_margins(network: nn.Module, box: Box, labels: Tensor, sound: bool = False) -> Tensor:
    """Upper bounds M (B, K) of z_j - z_y over a box of images, -inf at the right class y itself.

    Where all M_j < 0, no image of the box is given another class. The last layer, if it is linear, is merged with the
    margin: its rows w_j - w_y are bounded, which is tighter than the logits one by one.

    Args:
        network: in evaluation mode.
        box: (B, C, H, W) corners, in pixels.
        labels: (B), the right classes.
        sound: M_j < 0 proves that z_j < z_y as they are computed, with their roundings.

    Raises:
        ValueError, TypeError: as `interval_bounds`.
    """
    interpreter = _Interpreter(network, sound)
    last = interpreter.last_layer
    if isinstance(last, nn.Linear):
        return linear_margins(last, interpreter.run(box, last_layer=False), labels, sound)
    lower, upper = interpreter.run(box)
    margins = upper - lower.gather(1, labels[:, None])
    if sound:  # the difference is rounded
        margins = torch.nextafter(margins, torch.full_like(margins, math.inf))
    return margins.scatter(1, labels[:, None], -math.inf)


def linear_margins(layer: nn.Linear, box: Box, labels: Tensor, sound: bool = False) -> Tensor:
    """Upper bounds M (B, K) of z_j - z_y for the logits z of a linear layer over a box of its inputs (B, I).

    To be sound they are widened for both logits. Of the sums of magnitudes of a logit's terms, at the largest inputs of
    the box, its own computation is off by gamma(I + 1), the centre, the spread and their inputs by as much each, and
    differences of weights and of logits by a few u: 8 gamma(I + 4) is more than all of it, and TINY for every term more
    than underflow adds.
    """
    centre, radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
    weight = weight_of(layer)
    samples = max(1, LARGEST_TABLE // weight.numel())
    spread = torch.cat(
        [
            torch.einsum("bki,bi->bk", (weight - weight[y][:, None]).abs(), r)
            for y, r in zip(labels.split(samples), radius.split(samples), strict=True)
        ]
    )
    margins = wrong_class_margins(layer(centre), labels) + spread
    if not sound:
        return margins
    error = 8 * (gamma(layer.in_features + 4, margins.dtype) * _magnitudes(layer, box) + layer.in_features * TINY)
    return margins + error + error.gather(1, labels[:, None])


def weight_of(layer: nn.Linear) -> Tensor:
    """The matrix (O, I) that a linear layer multiplies by."""
    return layer.scaled_weight if isinstance(layer, ScaledLinear) else layer.weight


def _magnitudes(layer: nn.Linear, box: Box) -> Tensor:
    """For each output the sum of the magnitudes of its terms, at the largest inputs of a box."""
    largest = torch.maximum(box.lower.abs(), box.upper.abs())
    return functional.linear(largest, weight_of(layer).abs(), None if layer.bias is None else layer.bias.abs())


@singledispatch
def layer_bounds(layer: nn.Module, box: Box, sound: bool = False) -> Box:
    """The box that holds what a layer makes of a box, or if sound what it computes; for distance layers at p = inf.

    Raises:
        TypeError: there is no rule for such a layer.
    """
    raise TypeError(f"interval bounds: there is no rule for layers of type {type(layer).__name__}")


@layer_bounds.register(Normalize)
@layer_bounds.register(MeanShift)
@layer_bounds.register(nn.Flatten)
@layer_bounds.register(nn.ReLU)
def _monotone(layer: nn.Module, box: Box, sound: bool = False) -> Box:
    return Box(layer(box.lower), layer(box.upper))


@layer_bounds.register
def _tanh(layer: nn.Tanh, box: Box, sound: bool = False) -> Box:
    """Implementations of tanh are off by 4 u at most; at two places, and with room for the roundings here."""
    lower, upper = layer(box.lower), layer(box.upper)
    if not sound:
        return Box(lower, upper)
    share = 10 * unit_roundoff(lower.dtype)
    return Box(lower - share * lower.abs() - TINY, upper + share * upper.abs() + TINY)


@layer_bounds.register(nn.Linear)
@layer_bounds.register(ScaledLinear)
def _linear(layer: nn.Linear, box: Box, sound: bool = False) -> Box:
    """To be sound: centre, spread and the layer's own sum are off by gamma(I + 1) each, their inputs and sums by u.

    Underflow adds less than TINY for every term.
    """
    centre, radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
    middle, spread = layer(centre), functional.linear(radius, weight_of(layer).abs())
    if sound:
        share = gamma(layer.in_features + 4, spread.dtype)
        spread = spread + 5 * (share * _magnitudes(layer, box) + layer.in_features * TINY)
    return Box(middle - spread, middle + spread)


@layer_bounds.register
def _distance(layer: LpDistance, box: Box, sound: bool = False) -> Box:
    lower, upper = linf_distance_bounds(box.lower.flatten(1), box.upper.flatten(1), layer.weight)
    return _flushed(Box(lower, upper)) if sound else Box(lower, upper)


@layer_bounds.register
def _sort_distance(layer: SortDistance, box: Box, sound: bool = False) -> Box:
    """To be sound: the layer's own sum and the bounds' are off by gamma of their terms each."""
    lower, upper = sort_distance_bounds(box.lower, box.upper, layer.weight, layer.q, layer.terms)
    if not sound:
        return Box(lower, upper)
    share = 3 * gamma(layer.terms + 1, lower.dtype)
    return _flushed(Box(lower * (1 - share), upper * (1 + share)))


def _flushed(box: Box) -> Box:
    return Box((box.lower - TINY).clamp_min(0), box.upper + TINY)


@layer_bounds.register
def _distance_convolution(layer: LpDistanceConv2d, box: Box, sound: bool = False) -> Box:
    size = output_size(box.lower, layer.weight, layer.stride, layer.padding)
    filters = layer.weight.flatten(1)
    maps = Box(*(box.lower.new_empty(len(box.lower), len(filters), *size) for _ in box))
    for samples in sample_chunks(box.lower, layer.weight, size):
        lower, upper = (patches_of(corner[samples], layer.weight, layer.stride, layer.padding) for corner in box)
        for bound, part in zip(maps, linf_distance_bounds(lower, upper, filters), strict=True):
            bound[samples] = part.view(-1, math.prod(size), len(filters)).transpose(1, 2).unflatten(2, size)
    return _flushed(maps) if sound else maps


def _shifted(box: Box, constant: Tensor | float) -> Box:
    if not isinstance(box, Box) or isinstance(constant, Box):
        raise TypeError("interval bounds: there is no rule for this sum; a layer's output plus a constant has one")
    return Box(box.lower + constant, box.upper + constant)


FUNCTIONS: dict[Callable[..., Any] | str, Callable[..., Box]] = {
    operator.neg: lambda box: Box(-box.upper, -box.lower),
    operator.add: _shifted,
    "flatten": lambda box, *dims: Box(box.lower.flatten(*dims), box.upper.flatten(*dims)),
}


def _has_rule(layer: nn.Module) -> bool:
    """Whether a rule was made for this very class, and not for one whose forward it replaces, as hooks do too."""
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    made_for = next((kind for kind in type(layer).__mro__ if kind in layer_bounds.registry), object)
    return made_for is not object and type(layer).forward is getattr(made_for, "forward", None)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return _has_rule(module) or super().is_leaf_module(module, name)


class _OfImages(nn.Module):
    """A network as a function of images alone: its other arguments are those by default, p = inf."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class _Interpreter:
    """A traced network, run on boxes."""

    def __init__(self, network: nn.Module, sound: bool) -> None:
        if any(module.training for module in network.modules()):
            raise ValueError("interval bounds need the network in evaluation mode: call network.eval() first")
        if sound and torch.get_float32_matmul_precision() != "highest":
            raise ValueError(
                f"sound bounds need torch.set_float32_matmul_precision('highest'), it is "
                f"{torch.get_float32_matmul_precision()!r}: matrix products of fewer bits are not accounted for"
            )
        self.root, self.sound = _OfImages(network), sound
        self.nodes = list(_Tracer().trace(self.root).nodes)
        (self.output,) = (node.args[0] for node in self.nodes if node.op == "output")
        if not isinstance(self.output, fx.Node):
            raise TypeError(f"interval bounds: {type(network).__name__} has several outputs; there is a rule for one")
        for node in self.nodes:
            self._check(node)

    def _check(self, node: fx.Node) -> None:
        """That there is a rule for a node: none may be left out silently."""
        if node.op == "call_module":
            layer = self.root.get_submodule(str(node.target))
            if not _has_rule(layer):
                raise TypeError(f"interval bounds: there is no rule for layers of type {type(layer).__name__}")
            others = [*node.args[1:], *node.kwargs.values()]
            if any(other is not None and other != math.inf for other in others):  # p = inf is what the rules are for
                raise TypeError(
                    f"interval bounds: {type(layer).__name__} is called with {others}; the rule is for none"
                )
        elif node.op in ("call_function", "call_method") and (node.target not in FUNCTIONS or node.kwargs):
            raise TypeError(f"interval bounds: there is no rule for the operation {node.target} {node.kwargs or ''}")

    @property
    def last_layer(self) -> nn.Module | None:
        """The layer whose output is the network's, if it is a layer's."""
        return self.root.get_submodule(self.output.target) if self.output.op == "call_module" else None

    def run(self, box: Box, last_layer: bool = True) -> Box:
        """The box of outputs; or of what goes into the last layer."""
        values: dict[fx.Node, Any] = {}

        def value(argument: Any) -> Any:
            return values[argument] if isinstance(argument, fx.Node) else argument

        for node in self.nodes:
            if node is self.output and not last_layer:
                return value(node.args[0])
            if node.op == "placeholder":
                values[node] = box
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(node.target)(self.root)
            elif node.op == "call_module":
                values[node] = layer_bounds(self.root.get_submodule(node.target), value(node.args[0]), self.sound)
            elif node.op in ("call_function", "call_method"):
                values[node] = FUNCTIONS[node.target](*map(value, node.args))
        return values[self.output]
