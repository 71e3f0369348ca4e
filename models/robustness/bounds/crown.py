"""CROWN bounds of outputs and of logit differences (see `linear_bounds` for the method)."""

import math

import torch
from torch import Tensor, nn

from linflab.models.robustness.bounds.boxes import Box, all_finite, one_point
from linflab.models.robustness.bounds.ibp import propagate_bounds, trace_and_check
from linflab.models.robustness.bounds.linear_bounds import MAX_COEFFICIENTS, IntermediateMethod, LinearBounds
from linflab.models.robustness.bounds.relaxations import RelaxationKind
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.bounds.steps import Trace
from linflab.models.robustness.inputs import check_box, check_classes, check_labels


@strict_float32()
def crown_bounds(
    network: nn.Module,
    box: Box,
    intermediate: IntermediateMethod = "crown",
    sound: bool = True,
    relaxation: RelaxationKind = "adaptive",
) -> Box:
    """Return CROWN bounds of a network's outputs (B, K) over a box of inputs, with distance layers at p = inf.

    Args:
        network: Network in evaluation mode.
        box: Lower and upper bounds of inputs (B, ...); an empty batch gives empty bounds.
        intermediate: Method of the pre-activation bounds, `crown` or `ibp`.
        sound: If True, bound the outputs as computed in float32, rounding included; the result is in float64. If False,
            bound them in real arithmetic.
        relaxation: Linear relaxation of activations (see `relax`).

    Returns:
        Lower and upper bounds of the outputs, (B, ...).

    Raises:
        TypeError: If a layer or operation has no rule (the message names it), no layer has a linear relaxation, or
            dtypes of network and box differ; also if `sound` and the network is not in float32.
        ValueError: If the network is in training mode, or the box is not finite or on another device.
    """
    check_box(*box)
    if not len(box.lower):
        return Box(*(x[:0] for x in crown_bounds(network, one_point(box), intermediate, sound, relaxation)))
    crown = LinearBounds(trace_and_check(network, box), box, intermediate, relaxation, sound)
    lower, upper = crown.bounds(crown.output)
    if sound:  # an overflowing bound proves nothing about its sample
        overflows = ~all_finite(crown.boxes).view(-1, *[1] * (lower.dim() - 1))
        lower, upper = lower.masked_fill(overflows, -math.inf), upper.masked_fill(overflows, math.inf)
    return Box(lower, upper)


@strict_float32()
def crown_logit_differences(
    network: nn.Module,
    box: Box,
    labels: Tensor,
    intermediate: IntermediateMethod = "crown",
    sound: bool = True,
    relaxation: RelaxationKind = "adaptive",
) -> Tensor:
    """Return upper bounds M (B, K) of z_j - z_y over a box of images, -inf at the true class y.

    If all M_j < 0, every image in the box has the true class.

    Args:
        network: Network in evaluation mode.
        box: Lower and upper bounds of images, (B, C, H, W) or (B, D); an empty batch gives an empty result, (0, K).
        labels: (B,) true classes y, of any integer dtype.
        intermediate: Method of the pre-activation bounds, `crown` or `ibp`.
        sound: If True, M_j < 0 proves z_j < z_y as computed in float32, rounding included; the result is in float64. If
            False, it is proven in real arithmetic.
        relaxation: Linear relaxation of activations (see `relax`).

    Returns:
        (B, K) worst-case logit differences M.

    Raises:
        TypeError: If a layer or operation has no rule (the message names it), no layer has a linear relaxation, or
            dtypes of network and box differ; also if labels are not integers, or if `sound` and the network is not in
            float32.
        ValueError: If the network is in training mode, the box is not finite or on another device, or a label is not
            below K.
    """
    check_box(*box)
    labels = check_labels(labels, box.lower)
    if not len(labels):
        return crown_logit_differences(network, one_point(box), labels.new_zeros(1), intermediate, sound, relaxation)[
            :0
        ]
    return crown_margins(trace_and_check(network, box), box, labels, intermediate, sound, relaxation)


def crown_margins(
    traced: Trace,
    box: Box,
    labels: Tensor,
    intermediate: IntermediateMethod = "crown",
    sound: bool = True,
    relaxation: RelaxationKind = "adaptive",
) -> Tensor:
    """Return `crown_logit_differences` of a traced network, for a checked box and checked labels.

    Raises:
        TypeError: If no layer has a linear relaxation, or if `sound` and the network is not in float32.
        ValueError: If a label is not below the number of classes.
    """
    boxes = propagate_bounds(traced, Box(box.lower[:1], box.upper[:1]))
    check_classes(boxes[traced.output].lower.shape[1:], labels)
    # Process the samples in chunks whose coefficients stay within MAX_COEFFICIENTS.
    sizes = [value.lower.numel() for value in boxes.values()]
    samples = max(1, MAX_COEFFICIENTS // (max(sizes) * sizes[-1]))
    return torch.cat(
        [
            LinearBounds(traced, Box(lower, upper), intermediate, relaxation, sound).logit_differences(y)
            for lower, upper, y in zip(*(x.split(samples) for x in (*box, labels)), strict=True)
        ]
    )
