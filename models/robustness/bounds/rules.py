"""IBP rules: for each layer type, a box of outputs from a box of inputs.

The rules are exact for distance layers, monotone functions and sums. Sound boxes contain all outputs that a layer
computes for the floats in a box, in any order of summation (see `rounding`). Rounding is monotone, so a layer with one
rounded difference needs no correction. Normalization, mean shifts and l_inf distances are therefore sound without one,
except for numbers that are flushed to zero. Sums are widened by their error bounds.
"""

import math
from collections.abc import Sequence
from functools import singledispatch

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from linflab.models.distance import linf_distance_bounds, sort_distance_bounds
from linflab.models.distance.convolution import extract_patches, iter_batch_chunks, output_size
from linflab.models.networks.layers import (
    BatchNorm1d,
    BatchNorm2d,
    GroupSort,
    L1ProjectedLinear,
    LpDistance,
    LpDistanceConv2d,
    MeanShift,
    Normalize,
    ScaledLinear,
    SortDistance,
)
from linflab.models.robustness.bounds.activations import (
    GELU_MINIMIZER,
    GELU_MINIMUM,
    SILU_MINIMIZER,
    SILU_MINIMUM,
    activation_error,
)
from linflab.models.robustness.bounds.affine import affine_map
from linflab.models.robustness.bounds.boxes import Box, max_magnitude
from linflab.models.robustness.bounds.rounding import UNDERFLOW_SLACK, gamma
from linflab.models.robustness.bounds.steps import (
    FORWARD_PARTS,
    Add,
    AddConstant,
    ChannelAffine,
    Clamp,
    Concat,
    Masking,
    Negate,
    OwnLayer,
    Quotient,
    Rearrangement,
    Reshape,
    Scale,
    ShrunkReLU,
    has_exact_rule,
)


@singledispatch
def propagate_layer(layer: nn.Module, box: Box | Sequence[Box], sound: bool = False) -> Box:
    """Return the box of a layer's outputs from the box of its inputs; distance layers at p = inf.

    Args:
        layer: Layer of any type; register rules for your own with `propagate_layer.register`.
        box: Lower and upper bounds of its inputs, (B, *shape); a list of boxes for layers with several inputs.
        sound: If True, contain the outputs as computed, rounding included; if False, in real arithmetic.

    Raises:
        TypeError: If there is no rule for layers of this type.
    """
    raise TypeError(
        f"bounds: {type(layer).__name__} is not supported, since it has no rule; "
        f"register one with `propagate_layer.register`"
    )


@propagate_layer.register(Normalize)
@propagate_layer.register(MeanShift)
@propagate_layer.register(AddConstant)
@propagate_layer.register(Masking)
@propagate_layer.register(Clamp)
@propagate_layer.register(Reshape)
@propagate_layer.register(Rearrangement)
@propagate_layer.register(nn.ZeroPad2d)
@propagate_layer.register(nn.MaxPool1d)
@propagate_layer.register(nn.MaxPool2d)
@propagate_layer.register(nn.AdaptiveMaxPool2d)
@propagate_layer.register(nn.Identity)
@propagate_layer.register(nn.Dropout)
@propagate_layer.register(nn.Dropout1d)
@propagate_layer.register(nn.Dropout2d)
@propagate_layer.register(GroupSort)
def _monotone(layer: nn.Module, box: Box, sound: bool = False) -> Box:
    if isinstance(layer, AddConstant):
        affine_map(layer, box.lower.shape[1:])  # rejects constants that enlarge the value
    if getattr(layer, "return_indices", False):
        raise TypeError(f"bounds: {type(layer).__name__} with return_indices=True is not supported; use False")
    return Box(layer(box.lower), layer(box.upper))


@propagate_layer.register
def _own_layer(layer: OwnLayer, box: Box, sound: bool = False) -> Box:
    return propagate_layer(layer.layer, box, sound)


@propagate_layer.register
def _relu(layer: nn.ReLU, box: Box, sound: bool = False) -> Box:
    return Box(functional.relu(box.lower), functional.relu(box.upper))  # never in place


@propagate_layer.register
def _shrunk_relu(layer: ShrunkReLU, box: Box, sound: bool = False) -> Box:
    if sound:
        raise TypeError("bounds: ShrunkReLU has no sound box, since it is for training only; use ReLU")
    lower, upper = functional.relu(box.lower), functional.relu(box.upper)
    return Box(lower, torch.where((box.lower < 0) & (box.upper > 0), layer.factor * upper, upper))


@propagate_layer.register
def _negation(layer: Negate, box: Box, sound: bool = False) -> Box:
    return Box(-box.upper, -box.lower)


@propagate_layer.register
def _flatten(layer: nn.Flatten, box: Box, sound: bool = False) -> Box:
    check_flatten(layer)
    return Box(layer(box.lower), layer(box.upper))


def check_flatten(layer: nn.Flatten) -> None:
    """Raise TypeError if the layer may merge samples."""
    if layer.start_dim < 1:
        raise TypeError(f"bounds: Flatten with start_dim={layer.start_dim} is not supported; use start_dim=1 or more")


@propagate_layer.register(Add)
@propagate_layer.register(Concat)
def _merge_inputs(layer: nn.Module, boxes: Sequence[Box], sound: bool = False) -> Box:
    """Return the box of a layer that is monotone in all inputs."""
    if isinstance(layer, Add) and len({box.lower.shape[1:] for box in boxes}) > 1:
        raise TypeError(
            f"bounds: a sum of shapes {[tuple(box.lower.shape[1:]) for box in boxes]} is not supported; use equal ones"
        )
    if isinstance(layer, Concat) and layer.dim < 1:
        raise TypeError(f"bounds: concatenation along dimension {layer.dim} is not supported; use dimension 1 or more")
    return Box(layer(*(box.lower for box in boxes)), layer(*(box.upper for box in boxes)))


@propagate_layer.register(Scale)
@propagate_layer.register(Quotient)
def _scale(layer: Scale | Quotient, box: Box, sound: bool = False) -> Box:
    """Return the box of a layer that is increasing or decreasing, by the sign of its constant."""
    affine_map(layer, box.lower.shape[1:])  # rejects constants of other shapes
    one, other = layer(box.lower), layer(box.upper)
    return Box(torch.minimum(one, other), torch.maximum(one, other))


@propagate_layer.register
def _leaky_relu(layer: nn.LeakyReLU, box: Box, sound: bool = False) -> Box:
    lower, upper = (functional.leaky_relu(corner, layer.negative_slope) for corner in box)
    if layer.negative_slope >= 0:
        return Box(lower, upper)
    smaller = torch.minimum(lower, upper)  # decreases to 0, then increases
    return Box(
        torch.where((box.lower < 0) & (box.upper > 0), smaller.clamp_max(0), smaller), torch.maximum(lower, upper)
    )


@propagate_layer.register(nn.Tanh)
@propagate_layer.register(nn.Sigmoid)
@propagate_layer.register(nn.ELU)
@propagate_layer.register(nn.Softplus)
def _growing(layer: nn.Module, box: Box, sound: bool = False) -> Box:
    """Return the box of a nondecreasing function, widened by its error bound if sound."""
    if not isinstance(layer, nn.ELU):
        lower, upper = layer(box.lower), layer(box.upper)
    elif layer.alpha < 0:
        raise TypeError(f"bounds: ELU with alpha={layer.alpha} is not supported; use a positive alpha")
    else:
        lower, upper = (functional.elu(corner, layer.alpha) for corner in box)
    if isinstance(layer, nn.Softplus):
        if layer.beta <= 0:
            raise TypeError(f"bounds: Softplus with beta={layer.beta} is not supported; use a positive beta")
        max_error = math.exp(-layer.threshold) / layer.beta  # torch returns x beyond the threshold
        lower, upper = lower - max_error, upper + max_error
    return _widen(layer, box, Box(lower, upper)) if sound else Box(lower, upper)


@propagate_layer.register(nn.SiLU)
@propagate_layer.register(nn.GELU)
def _falling_then_growing(layer: nn.SiLU | nn.GELU, box: Box, sound: bool = False) -> Box:
    if isinstance(layer, nn.SiLU):
        minimizer, minimum = SILU_MINIMIZER, SILU_MINIMUM
        ends = [functional.silu(corner) for corner in box]
    else:
        minimizer, minimum = GELU_MINIMIZER[layer.approximate], GELU_MINIMUM[layer.approximate]
        ends = [layer(corner) for corner in box]
    lower = torch.where((box.lower < minimizer) & (box.upper > minimizer), minimum, torch.minimum(*ends))
    activation_box = Box(lower, torch.maximum(*ends))
    return _widen(layer, box, activation_box) if sound else activation_box


def _widen(layer: nn.Module, box: Box, activation_box: Box) -> Box:
    """Return an activation's box, widened by the error bound of its computation."""
    lower, upper = (
        activation_error(layer, max_magnitude(box), corner.abs(), corner.dtype) for corner in activation_box
    )
    assert lower is not None and upper is not None
    return Box(activation_box.lower - lower, activation_box.upper + upper)


@propagate_layer.register(nn.Linear)
@propagate_layer.register(ScaledLinear)
@propagate_layer.register(L1ProjectedLinear)
@propagate_layer.register(nn.Conv1d)
@propagate_layer.register(nn.Conv2d)
@propagate_layer.register(nn.AvgPool1d)
@propagate_layer.register(nn.AvgPool2d)
@propagate_layer.register(nn.AdaptiveAvgPool1d)
@propagate_layer.register(nn.AdaptiveAvgPool2d)
@propagate_layer.register(ChannelAffine)
@propagate_layer.register(_BatchNorm)
@propagate_layer.register(BatchNorm1d)
@propagate_layer.register(BatchNorm2d)
def _affine(layer: nn.Module, box: Box, sound: bool = False) -> Box:
    """Return the box of an affine layer.

    A sound box is widened by 5 rounding errors: of the layer's own sum, the center, the spread, and the inputs of the
    last two.
    """
    affine = affine_map(layer, box.lower.shape[1:])
    assert affine is not None
    center, radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
    middle, spread = layer(center), affine.apply(radius, affine.weight.abs().to(radius))
    if sound:
        spread = spread + 5 * affine.rounding_error(max_magnitude(box), spread.dtype)
    return Box(middle - spread, middle + spread)


@propagate_layer.register
def _distance(layer: LpDistance, box: Box, sound: bool = False) -> Box:
    lower, upper = linf_distance_bounds(box.lower.flatten(1), box.upper.flatten(1), layer.weight)
    return _widen_for_underflow(Box(lower, upper)) if sound else Box(lower, upper)


@propagate_layer.register
def _sort_distance(layer: SortDistance, box: Box, sound: bool = False) -> Box:
    """Return the box of a SortNet layer.

    A sound box allows for the rounding errors of three sums: the layer's own sum and those of both bounds. Each
    relative error is at most gamma(top_k + 1).
    """
    lower, upper = sort_distance_bounds(box.lower, box.upper, layer.weight, layer.q, layer.top_k)
    if not sound:
        return Box(lower, upper)
    share = 3 * gamma(layer.top_k + 1, lower.dtype)
    return _widen_for_underflow(Box(lower * (1 - share), upper * (1 + share)))


def _widen_for_underflow(box: Box) -> Box:
    return Box((box.lower - UNDERFLOW_SLACK).clamp_min(0), box.upper + UNDERFLOW_SLACK)


@propagate_layer.register
def _distance_convolution(layer: LpDistanceConv2d, box: Box, sound: bool = False) -> Box:
    size = output_size(box.lower, layer.weight, layer.stride, layer.padding)
    filters = layer.weight.flatten(1)
    maps = Box(*(box.lower.new_empty(len(box.lower), len(filters), *size) for _ in box))
    for samples in iter_batch_chunks(box.lower, layer.weight, size):
        lower, upper = (extract_patches(corner[samples], layer.weight, layer.stride, layer.padding) for corner in box)
        for bound, part in zip(maps, linf_distance_bounds(lower, upper, filters), strict=True):
            bound[samples] = part.view(-1, math.prod(size), len(filters)).transpose(1, 2).unflatten(2, size)
    return _widen_for_underflow(maps) if sound else maps


def has_rule(layer: nn.Module) -> bool:
    """Return True if a rule exists for exactly this class, and no override or hook changes its forward."""
    if layer._forward_hooks or layer._forward_pre_hooks or not vars(layer).keys().isdisjoint(FORWARD_PARTS):
        return False
    if getattr(layer, "padding_mode", "zeros") != "zeros":  # traced as padding, then a convolution
        return False
    return has_exact_rule(propagate_layer, layer)
