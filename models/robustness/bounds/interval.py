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
from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from linflab.models.distance import linf_distance_bounds, sort_distance_bounds
from linflab.models.distance.convolution import output_size, patches_of, sample_chunks
from linflab.models.networks.layers import (
    BatchNorm1d,
    BatchNorm2d,
    GroupSort,
    L1Linear,
    LpDistance,
    LpDistanceConv2d,
    MeanShift,
    Normalize,
    ScaledLinear,
    SortDistance,
)
from linflab.models.robustness.bounds.affine import affine_of
from linflab.models.robustness.bounds.rounding import TINY, check_arithmetic, gamma, unit_roundoff, upper_float
from linflab.models.robustness.bounds.tracing import Concatenation, Negation, Scaling, Shift, Step, Sum, Trace, trace

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
    traced = trace_layers(network, box, sound)
    return propagate(traced, box, sound)[traced.output]


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
    traced = trace_layers(network, box, sound)
    boxes = propagate(traced, box, sound)
    last = _last_linear(traced)
    if last is not None:
        return linear_margins(last.layer, boxes[last.inputs[0]], labels, sound)
    lower, upper = boxes[traced.output]
    margins = upper - lower.gather(1, labels[:, None])
    if sound:  # the difference is rounded
        margins = torch.nextafter(margins, torch.full_like(margins, math.inf))
    return margins.scatter(1, labels[:, None], -math.inf)


def margin_range(traced: Trace, boxes: Mapping[str, Box], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and radii (B, K) of the ranges of z_j - z_y, as `interval_margins` bounds them; what is at y is open.

    Args:
        traced: the network's steps.
        boxes: of all its values.
        labels: (B), the right classes y.
    """
    last = _last_linear(traced)
    if last is not None:
        return _linear_margin_range(last.layer, boxes[last.inputs[0]], labels)
    lower, upper = boxes[traced.output]
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    return centre - centre.gather(1, labels[:, None]), radius + radius.gather(1, labels[:, None])


def _last_linear(traced: Trace) -> Step | None:
    """The step that makes the outputs, if its layer is linear and can be merged with margins."""
    last = next((step for step in traced.steps if step.output == traced.output), None)
    return last if last is not None and isinstance(last.layer, nn.Linear) else None


def linear_margins(layer: nn.Module, box: Box, labels: Tensor, sound: bool = False) -> Tensor:
    """Upper bounds M (B, K) of z_j - z_y for the logits z of a linear layer over a box of its inputs (B, I).

    To be sound they are widened for both logits. The rounding of a logit (`Affine.rounding`) is gamma(I + 4) of the sum
    of magnitudes of its terms, at the largest inputs of the box: its own computation is off by less, the centre, the
    spread and their inputs by as much each, and differences of weights and of logits by a few u; 8 times is more than
    all of it.
    """
    centre, spread = _linear_margin_range(layer, box, labels)
    margins = centre.scatter(1, labels[:, None], -math.inf) + spread
    if not sound:
        return margins
    affine = affine_of(layer, box.lower.shape[1:])
    assert affine is not None
    error = 8 * affine.rounding(largest(box), margins.dtype)
    return margins + error + error.gather(1, labels[:, None])


def _linear_margin_range(layer: nn.Module, box: Box, labels: Tensor) -> tuple[Tensor, Tensor]:
    affine = affine_of(layer, box.lower.shape[1:])
    assert affine is not None
    centre, radius, weight = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2, affine.weight
    samples = max(1, LARGEST_TABLE // weight.numel())
    spread = torch.cat(
        [
            torch.einsum("bki,bi->bk", (weight - weight[y][:, None]).abs(), r)
            for y, r in zip(labels.split(samples), radius.split(samples), strict=True)
        ]
    )
    logits = layer(centre)
    return logits - logits.gather(1, labels[:, None]), spread


def largest(box: Box) -> Tensor:
    """The largest magnitudes in a box."""
    return torch.maximum(box.lower.abs(), box.upper.abs())


@singledispatch
def layer_bounds(layer: nn.Module, box: Box | Sequence[Box], sound: bool = False) -> Box:
    """The box that holds what a layer makes of a box, or if sound what it computes; for distance layers at p = inf.

    A layer of several inputs has a box for each of them.

    Raises:
        TypeError: there is no rule for such a layer.
    """
    raise TypeError(f"bounds: there is no rule for layers of type {type(layer).__name__}")


@layer_bounds.register(Normalize)
@layer_bounds.register(MeanShift)
@layer_bounds.register(Shift)
@layer_bounds.register(nn.MaxPool2d)
@layer_bounds.register(nn.Identity)
@layer_bounds.register(nn.Dropout)
@layer_bounds.register(GroupSort)
def _monotone(layer: nn.Module, box: Box, sound: bool = False) -> Box:
    if isinstance(layer, Shift):
        affine_of(layer, box.lower.shape[1:])  # refuses what makes the value larger
    if isinstance(layer, nn.MaxPool2d) and layer.return_indices:
        raise TypeError("bounds: there is no rule for MaxPool2d with return_indices")
    return Box(layer(box.lower), layer(box.upper))


@layer_bounds.register
def _relu(layer: nn.ReLU, box: Box, sound: bool = False) -> Box:
    return Box(functional.relu(box.lower), functional.relu(box.upper))  # never in place


@layer_bounds.register
def _negation(layer: Negation, box: Box, sound: bool = False) -> Box:
    return Box(-box.upper, -box.lower)


@layer_bounds.register
def _flatten(layer: nn.Flatten, box: Box, sound: bool = False) -> Box:
    if layer.start_dim < 1:
        raise TypeError(f"bounds: there is no rule for Flatten from dimension {layer.start_dim}; from 1 there is")
    return Box(layer(box.lower), layer(box.upper))


@layer_bounds.register(Sum)
@layer_bounds.register(Concatenation)
def _joined(layer: nn.Module, boxes: Sequence[Box], sound: bool = False) -> Box:
    """Monotone in all inputs."""
    if isinstance(layer, Sum) and len({box.lower.shape[1:] for box in boxes}) > 1:
        raise TypeError(f"bounds: there is no rule for sums of shapes {[tuple(box.lower.shape[1:]) for box in boxes]}")
    if isinstance(layer, Concatenation) and layer.dim < 1:
        raise TypeError(f"bounds: there is no rule for concatenation along dimension {layer.dim}; from 1 on there is")
    return Box(layer(*(box.lower for box in boxes)), layer(*(box.upper for box in boxes)))


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
@layer_bounds.register(L1Linear)
@layer_bounds.register(nn.Conv2d)
@layer_bounds.register(nn.AvgPool2d)
@layer_bounds.register(Scaling)
@layer_bounds.register(_BatchNorm)
@layer_bounds.register(BatchNorm1d)
@layer_bounds.register(BatchNorm2d)
def _affine(layer: nn.Module, box: Box, sound: bool = False) -> Box:
    """To be sound: the layer's own sum, centre, spread and their inputs are off by its rounding at most, each."""
    affine = affine_of(layer, box.lower.shape[1:])
    assert affine is not None
    centre, radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
    middle, spread = layer(centre), affine.apply(radius, affine.weight.abs().to(radius))
    if sound:
        spread = spread + 5 * affine.rounding(largest(box), spread.dtype)
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


def has_rule(layer: nn.Module) -> bool:
    """Whether a rule was made for this very class, and not for one whose forward it replaces, as hooks do too."""
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    made_for = next((kind for kind in type(layer).__mro__ if kind in layer_bounds.registry), object)
    return made_for is not object and type(layer).forward is getattr(made_for, "forward", None)


def trace_layers(network: nn.Module, box: Box, sound: bool) -> Trace:
    """The steps of a network that layers have rules for; they are tried on a corner of a box.

    Raises:
        ValueError: the network is in training mode; or sound bounds, and torch may compute with other roundings than
            are accounted for.
        TypeError: a layer or operation has no rule, or the network computes something else than what was traced.
    """
    if sound:
        check_arithmetic(network, box.lower)
    traced = trace(network, has_rule)
    values = {traced.input: box.lower[:1].clone()}
    with torch.no_grad():
        for step in traced.steps:
            values[step.output] = step.layer(*(values[name].clone() for name in step.inputs))
        if not torch.allclose(network(box.lower[:1].clone()), values[traced.output], rtol=1e-3, equal_nan=True):
            raise TypeError(f"bounds: {type(network).__name__} computes something else than the layers traced in it")
    return traced


def propagate(traced: Trace, box: Box, sound: bool = False) -> dict[str, Box]:
    """The boxes of all values of a network, by name, over a box of inputs."""
    boxes = {traced.input: box}
    for step in traced.steps:
        boxes[step.output] = step_bounds(step, boxes, sound)
    return boxes


def step_bounds(step: Step, boxes: Mapping[str, Box], sound: bool) -> Box:
    """The box of what a step makes of the boxes of its inputs."""
    inputs = [boxes[name] for name in step.inputs]
    return layer_bounds(step.layer, inputs if isinstance(step.layer, Sum | Concatenation) else inputs[0], sound)
