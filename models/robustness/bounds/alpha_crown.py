"""Alpha-CROWN: CROWN with optimized relaxation slopes (Xu et al., "Fast and Complete", ICLR 2021)."""

import torch
from torch import Tensor, nn

from linflab.models.robustness.bounds.backward_steps import check_sound_dtype
from linflab.models.robustness.bounds.boxes import Box, all_finite
from linflab.models.robustness.bounds.ibp import propagate_bounds, propagate_step
from linflab.models.robustness.bounds.linear_bounds import MAX_COEFFICIENTS, LinearBounds
from linflab.models.robustness.bounds.pooling import is_max_pooling
from linflab.models.robustness.bounds.reduction import Reduction, ReductionTooLargeError
from linflab.models.robustness.bounds.relaxations import has_relaxation
from linflab.models.robustness.bounds.steps import Trace


def has_linear_bounds(traced: Trace) -> bool:
    """Return True if a layer of a network has a linear relaxation, so that CROWN applies."""
    return any(has_relaxation(step.layer) or is_max_pooling(step.layer) for step in traced.steps)


def tight_boxes(traced: Trace, box: Box, sound: bool) -> dict[str, Box]:
    """Return the intersections of the boxes of IBP and CROWN of all values, by name."""
    boxes = propagate_bounds(traced, box, sound)
    if not has_linear_bounds(traced):
        return boxes
    crown = LinearBounds(traced, box, "crown", "adaptive", sound)
    for name, other in crown.boxes.items():
        lower, upper = (torch.where(new.isfinite(), new, old) for new, old in zip(other, boxes[name], strict=True))
        lower = torch.maximum(lower, boxes[name].lower)
        boxes[name] = Box(lower, torch.maximum(torch.minimum(upper, boxes[name].upper), lower))
    for step in traced.steps:
        new, old = propagate_step(step, boxes, sound), boxes[step.output]
        lower = torch.maximum(new.lower, old.lower)
        boxes[step.output] = Box(lower, torch.maximum(torch.minimum(new.upper, old.upper), lower))
    return boxes


def alpha_crown_margins(
    traced: Trace, box: Box, labels: Tensor, steps: int, neuron_steps: int, sound: bool = True
) -> Tensor:
    """Return upper bounds M (B, K) of z_j - z_y over a box of images, -inf at the true class y.

    Bounds are inf for images whose functions, without those of other images, exceed the memory limit of `Reduction`.

    Args:
        traced: Steps of the network, one with a linear relaxation.
        box: Lower and upper bounds of images, (B, C, H, W) or (B, D), not empty.
        labels: (B,) true classes y as int64, below K.
        steps: Optimization steps of the slopes for the margins.
        neuron_steps: Optimization steps of the slopes for the bounds of neurons.
        sound: If True, M_j < 0 proves z_j < z_y as computed in float32, rounding included.

    Raises:
        TypeError: If `sound` and the network is not in float32.
    """
    check_sound_dtype("alpha_crown", sound, box)
    results = []
    for part, y in _chunks(traced, box, labels, sound):
        boxes = tight_boxes(traced, part, sound)
        samples = max(1, MAX_COEFFICIENTS // max(1, _max_rows_size(traced, boxes)))
        for first in range(0, len(y), samples):
            some = slice(first, first + samples)
            picked = {name: Box(lower[some], upper[some]) for name, (lower, upper) in boxes.items()}
            results.append(_bound_margins(traced, picked, y[some], steps, neuron_steps, sound))
    return torch.cat(results)


def _bound_margins(
    traced: Trace, boxes: dict[str, Box], labels: Tensor, steps: int, neuron_steps: int, sound: bool
) -> Tensor:
    try:
        reduction = Reduction(traced, boxes, sound, neuron_steps, split_distances=False)
    except ReductionTooLargeError:
        if len(labels) > 1:  # the limit must not depend on the other images of a batch
            half = len(labels) // 2
            parts = []
            for some in (slice(half), slice(half, None)):
                picked = {name: Box(lower[some], upper[some]) for name, (lower, upper) in boxes.items()}
                parts.append(_bound_margins(traced, picked, labels[some], steps, neuron_steps, sound))
            return torch.cat(parts)
        infinite = torch.full_like(boxes[traced.output].lower, torch.inf, dtype=torch.float64)
        return infinite.scatter(1, labels[:, None], -torch.inf)
    functions, others = reduction.logit_difference_rows(labels)
    network = reduction.network
    params = network.start_params(len(network.levels), functions.constant.shape[1])
    bounds, _ = network.optimize(functions, params, steps)
    margins = torch.full((len(labels), others.shape[1] + 1), -torch.inf, dtype=bounds.dtype, device=bounds.device)
    return margins.scatter(1, others, (-bounds).masked_fill(~all_finite(boxes)[:, None], torch.inf))


def _max_rows_size(traced: Trace, boxes: dict[str, Box]) -> int:
    """Return the largest number of coefficients of a reduced network, over the images of a batch."""
    counts = torch.zeros(len(boxes[traced.input].lower), dtype=torch.long)
    for step in traced.steps:
        lower, upper = (end.flatten(1) for end in boxes[step.inputs[0]])
        if isinstance(step.layer, nn.ReLU):
            counts += ((lower < 0) & (upper > 0)).sum(dim=1).cpu()
        elif has_relaxation(step.layer) or is_max_pooling(step.layer):
            counts += lower.shape[1]
    return int((counts * (counts + boxes[traced.input].lower[0].numel())).max())


def _chunks(traced: Trace, box: Box, labels: Tensor, sound: bool) -> list[tuple[Box, Tensor]]:
    """Return parts of a batch whose coefficients stay within MAX_COEFFICIENTS."""
    boxes = propagate_bounds(traced, Box(box.lower[:1], box.upper[:1]), sound)
    sizes = [value.lower.numel() for value in boxes.values()]
    samples = max(1, MAX_COEFFICIENTS // (max(sizes) * max(sizes[-1], 64)))
    corners = zip(box.lower.split(samples), box.upper.split(samples), labels.split(samples), strict=True)
    return [(Box(lower, upper), y) for lower, upper, y in corners]
