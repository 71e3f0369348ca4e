"""Interval bound propagation (IBP): boxes that contain all outputs, layer by layer.

A network is traced into layers. Each layer has a rule that maps a box of its inputs to a box of its outputs;
dependencies between outputs are lost. The bounds are differentiable where the rules are. `ibp_bounds` and
`ibp_logit_differences` are floating-point sound by default. With `sound=False`, which training uses, they
hold only in real arithmetic.

Sources: Gowal et al., "On the Effectiveness of Interval Bound Propagation", 2018 (linear layers, and the last one
merged with the logit differences); Zhang et al. 2021, Section 4 (distance layers).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from linflab.models.robustness.bounds.affine import affine_map
from linflab.models.robustness.bounds.boxes import Box, all_finite, max_magnitude, one_point
from linflab.models.robustness.bounds.rounding import ROOM, UNDERFLOW_SLACK, gamma, strict_float32
from linflab.models.robustness.bounds.rules import has_rule, propagate_layer
from linflab.models.robustness.bounds.steps import Add, Concat, Trace, TraceStep
from linflab.models.robustness.bounds.tracing import trace
from linflab.models.robustness.bounds.weighted_sum import WeightedSum, split_sum
from linflab.models.robustness.inputs import check_box, check_classes, check_labels, check_network, check_precision

TRACE_TOLERANCE = 1e-5  # relative, on outputs; detects half precision inside the network
MAX_TABLE_ELEMENTS = 2**24  # memory limit for differences of weight rows


@strict_float32()
def ibp_bounds(network: nn.Module, box: Box, sound: bool = True) -> Box:
    """Return IBP bounds of a network's outputs over a box of inputs, with distance layers at p = inf.

    Args:
        network: Network in evaluation mode.
        box: Lower and upper bounds of inputs (B, ...); an empty batch gives empty bounds.
        sound: If True, bound the outputs as computed, rounding included; if False, in real arithmetic.

    Returns:
        Lower and upper bounds of the outputs, (B, ...).

    Raises:
        TypeError: If a layer or operation has no rule (the message names it), or dtypes of network and box differ.
        ValueError: If the network is in training mode, or the box is not finite or on another device.
    """
    check_box(*box)
    if not len(box.lower):
        return Box(*(bound[:0] for bound in ibp_bounds(network, one_point(box), sound)))
    traced = trace_and_check(network, box)
    boxes = propagate_bounds(traced, box, sound)
    lower, upper = boxes[traced.output]
    if sound:  # an overflowing bound proves nothing about its sample
        overflows = _per_sample(~all_finite(boxes), lower)
        lower, upper = lower.masked_fill(overflows, -math.inf), upper.masked_fill(overflows, math.inf)
    return Box(lower, upper)


@strict_float32()
def ibp_logit_differences(network: nn.Module, box: Box, labels: Tensor, sound: bool = True) -> Tensor:
    """Return upper bounds M (B, K) of z_j - z_y over a box of images, -inf at the true class y.

    If all M_j < 0, every image in the box has the true class. A final linear layer is merged with the
    differences: bounding rows w_j - w_y is tighter than bounding the logits separately. If the logits are a sum with
    positive weights, as in ensembles, the bound is the sum of the parts' own bounds with the same weights.

    Args:
        network: Network in evaluation mode.
        box: Lower and upper bounds of images, (B, C, H, W) or (B, D); an empty batch gives an empty result, (0, K).
        labels: (B,) true classes y, of any integer dtype.
        sound: If True, M_j < 0 proves z_j < z_y as computed, rounding included; if False, in real arithmetic.

    Returns:
        (B, K) worst-case logit differences M.

    Raises:
        TypeError: If a layer or operation has no rule (the message names it), dtypes of network and box differ, or
            labels are not integers.
        ValueError: If the network is in training mode, the box is not finite or on another device, or a label is not
            below K.
    """
    check_box(*box)
    labels = check_labels(labels, box.lower)
    if not len(labels):
        return ibp_logit_differences(network, one_point(box), labels.new_zeros(1), sound)[:0]
    return ibp_margins(trace_and_check(network, box), box, labels, sound)


def ibp_margins(traced: Trace, box: Box, labels: Tensor, sound: bool = True) -> Tensor:
    """Return `ibp_logit_differences` of a traced network, for a checked box and checked labels.

    Raises:
        ValueError: If a label is not below the number of classes.
    """
    boxes = propagate_bounds(traced, box, sound)
    check_classes(boxes[traced.output].lower.shape[1:], labels)
    logits = split_sum(traced)
    if logits.roundings:
        differences = _sum_differences(traced, logits, boxes, labels, sound)
    else:
        differences = _value_differences(traced, traced.output, boxes, labels, sound)
    if sound:
        differences = differences.masked_fill(~all_finite(boxes)[:, None], math.inf)
    return differences.scatter(1, labels[:, None], -math.inf)


def _value_differences(traced: Trace, name: str, boxes: Mapping[str, Box], labels: Tensor, sound: bool) -> Tensor:
    """Return upper bounds (B, K) of v_j - v_y of a value v (B, K) of the network; column y is unspecified."""
    last = linear_step(traced, name)
    if last is not None:
        return final_layer_logit_differences(last.layer, boxes[last.inputs[0]], labels, sound)
    lower, upper = boxes[name]
    differences = upper - lower.gather(1, labels[:, None])
    if sound:  # the difference is rounded
        differences = torch.nextafter(differences, torch.full_like(differences, math.inf))
    return differences


def _sum_differences(
    traced: Trace, logits: WeightedSum, boxes: Mapping[str, Box], labels: Tensor, sound: bool
) -> Tensor:
    """Return upper bounds (B, K) of z_j - z_y of logits that are a weighted sum of values; column y is unspecified.

    A sound bound allows for the rounding of both logits, and for that of its own sum. Each is relative to the sum of
    the magnitudes, by at most gamma(R), with R = `logits.roundings`; underflow is added. `ROOM` covers the rounding of
    the error itself. The box of the logits, which includes their rounding, is a bound too.
    """
    index = labels[:, None]
    parts = [
        (weight, _value_differences(traced, name, boxes, labels, sound).scatter(1, index, 0.0))
        for name, weight in logits.parts
    ]
    total = torch.stack([weight * part for weight, part in parts]).sum(dim=0)
    if not sound:
        return total
    magnitudes = torch.stack([weight * max_magnitude(boxes[name]) for name, weight in logits.parts]).sum(dim=0)
    magnitudes = magnitudes + magnitudes.gather(1, index)
    magnitudes = magnitudes + torch.stack([weight * part.abs() for weight, part in parts]).sum(dim=0)
    underflow = 3 * logits.underflow + len(parts) * UNDERFLOW_SLACK  # of both logits, and of the products here
    error = ROOM * (gamma(logits.roundings, total.dtype) * magnitudes + underflow)
    return torch.minimum(total + error, _value_differences(traced, traced.output, boxes, labels, sound))


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def logit_difference_ranges(traced: Trace, boxes: Mapping[str, Box], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return centers and radii (B, K) of the ranges of z_j - z_y by IBP; column y is unspecified.

    Args:
        traced: Steps of the network.
        boxes: Boxes of all its values, by name.
        labels: (B,) true classes y.
    """
    ranges = [(weight, *_value_ranges(traced, name, boxes, labels)) for name, weight in split_sum(traced).parts]
    if len(ranges) == 1 and ranges[0][0] == 1:
        return ranges[0][1:]
    center = torch.stack([weight * center for weight, center, _ in ranges]).sum(dim=0)
    return center, torch.stack([weight * radius for weight, _, radius in ranges]).sum(dim=0)


def _value_ranges(traced: Trace, name: str, boxes: Mapping[str, Box], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return centers and radii (B, K) of the ranges of v_j - v_y of a value v (B, K) of the network."""
    last = linear_step(traced, name)
    if last is not None:
        return _final_layer_ranges(last.layer, boxes[last.inputs[0]], labels)
    lower, upper = boxes[name]
    center, radius = (lower + upper) / 2, (upper - lower) / 2
    return center - center.gather(1, labels[:, None]), radius + radius.gather(1, labels[:, None])


def linear_step(traced: Trace, name: str) -> TraceStep | None:
    """Return the step that computes a value if its layer is linear, else None."""
    last = next((step for step in traced.steps if step.output == name), None)
    return last if last is not None and isinstance(last.layer, nn.Linear) else None


def final_layer_logit_differences(layer: nn.Module, box: Box, labels: Tensor, sound: bool = False) -> Tensor:
    """Return upper bounds M (B, K) of z_j - z_y for the logits z of a linear layer over a box (B, I).

    Sound bounds are widened for both logits. Let e be `Affine.rounding_error` of a logit: gamma(I + 4) times the sum of
    the magnitudes of its terms, at the largest inputs of the box. The error of the computed logit is below e.
    The errors of the center and the spread, and those of the midpoint and half-width of the box that they are computed
    from, change the result by at most e each. Differences of weights and of logits add a few unit roundoffs. The total
    is below 8 e.

    Args:
        layer: Final linear layer.
        box: Lower and upper bounds of its inputs, (B, I).
        labels: (B,) true classes y.
        sound: If True, account for rounding.
    """
    center, spread = _final_layer_ranges(layer, box, labels)
    differences = center.scatter(1, labels[:, None], -math.inf) + spread
    if not sound:
        return differences
    affine = affine_map(layer, box.lower.shape[1:])
    assert affine is not None
    error = 8 * affine.rounding_error(max_magnitude(box), differences.dtype)
    return differences + error + error.gather(1, labels[:, None])


def _final_layer_ranges(layer: nn.Module, box: Box, labels: Tensor) -> tuple[Tensor, Tensor]:
    affine = affine_map(layer, box.lower.shape[1:])
    assert affine is not None
    center, radius, weight = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2, affine.weight
    samples = max(1, MAX_TABLE_ELEMENTS // weight.numel())
    spread = torch.cat(
        [
            torch.einsum("bki,bi->bk", (weight - weight[y][:, None]).abs(), r)
            for y, r in zip(labels.split(samples), radius.split(samples), strict=True)
        ]
    )
    logits = layer(center)
    return logits - logits.gather(1, labels[:, None]), spread


def trace_and_check(network: nn.Module, box: Box, earlier_trace: Trace | None = None) -> Trace:
    """Trace a network in evaluation mode, and check the trace on corners of a box.

    Args:
        network: Network in evaluation mode.
        box: Lower and upper bounds of inputs.
        earlier_trace: Earlier trace for inputs of the same shape, dtype and device. If given, this trace is only
            checked.

    Raises:
        TypeError: If a layer or operation has no rule, the network and its trace compute different outputs, or the
            network and the box differ in dtype.
        ValueError: If the network is in training mode or on another device.
    """
    check_network(network, box.lower)
    images = torch.cat([box.lower[:1], box.upper[-1:], box.lower[-1:]]).detach()
    traced = trace(network, has_rule, images) if earlier_trace is None else earlier_trace
    check_precision(nn.ModuleList([step.layer for step in traced.steps]), box.lower)  # also weights of functional calls
    check_trace(traced, network, images, TRACE_TOLERANCE)
    return traced


@torch.no_grad()
def check_trace(traced: Trace, network: nn.Module, images: Tensor, tolerance: float = 1e-3) -> None:
    """Check that a trace and its network, in evaluation mode, compute the same outputs.

    Raises:
        TypeError: If the outputs differ.
    """
    values, expected = {traced.input: images.clone()}, network(images.clone())
    try:
        for step in traced.steps:
            values[step.output] = step.layer(*(values[name] for name in step.inputs))
        outputs = values[traced.output]
    except RuntimeError:  # shapes depend on values that were not traced
        outputs = expected[:0]
    if outputs.shape == expected.shape:
        same = (
            (outputs - expected).abs() <= tolerance * expected.abs().nan_to_num().amax()
            if len(images)
            else outputs == 0
        )
        if bool((same | (outputs == expected) | (outputs.isnan() & expected.isnan())).all()):
            return
    raise TypeError(
        f"bounds: {type(network).__name__} and its traced layers compute different outputs; use a forward pass that "
        "applies the same function to each image, with torch operations only and without random numbers"
    )


def propagate_bounds(traced: Trace, box: Box, sound: bool = False) -> dict[str, Box]:
    """Return the boxes of all values of a network, by name, over a box of inputs."""
    boxes = {traced.input: box}
    for step in traced.steps:
        boxes[step.output] = propagate_step(step, boxes, sound)
    return boxes


def propagate_step(step: TraceStep, boxes: Mapping[str, Box], sound: bool) -> Box:
    """Return the box of the output of a step, from the boxes of its inputs."""
    inputs = [boxes[name] for name in step.inputs]
    return propagate_layer(step.layer, inputs if isinstance(step.layer, Add | Concat) else inputs[0], sound)
