"""Branch and bound on the box of inputs, for networks with layers that are no maxima and have no linear relaxation.

The bounds of a part of the box come from IBP and, where layers have relaxations, from CROWN. Parts are halved at the
input with the largest product of width and influence. The influence is the size of a gradient at the center, plus a
small constant, since gradients of distances reach few inputs. The number of parts grows exponentially with the number
of inputs, so the search ends in time only for few inputs or nearly sufficient bounds.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from linflab.models.robustness.bounds.alpha_crown import has_linear_bounds
from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.branch_and_bound import SearchResult
from linflab.models.robustness.bounds.crown import crown_margins
from linflab.models.robustness.bounds.ibp import ibp_margins
from linflab.models.robustness.bounds.linear_bounds import MAX_COEFFICIENTS
from linflab.models.robustness.bounds.steps import Trace, compute_output
from linflab.models.robustness.margins import margin

MIN_INFLUENCE = 1e-2  # relative to the largest influence of an input


def margins_of_box(traced: Trace, box: Box, labels: Tensor, sound: bool) -> Tensor:
    """Return upper bounds (B, K) of z_j - z_y in float64, -inf at y: the best of IBP and CROWN."""
    best = ibp_margins(traced, box, labels, sound).double()
    if has_linear_bounds(traced):
        is_open = is_undecided(best, labels)
        if bool(is_open.any()):
            corners = Box(box.lower[is_open], box.upper[is_open])
            found = crown_margins(traced, corners, labels[is_open], sound=sound).double()
            best[is_open] = torch.minimum(best[is_open], torch.where(found.isnan(), torch.inf, found))
    return best


def is_undecided(margins: Tensor, labels: Tensor) -> Tensor:
    """Return for which boxes (B,) upper bounds (B, K) of logit differences do not prove the class."""
    return ~is_proven(margins.scatter(1, labels[:, None], -1.0)).all(dim=1)


def is_proven(margins: Tensor) -> Tensor:
    """Return which upper bounds of logit differences prove that the difference is negative."""
    # Infinite logits make bounds of -inf, which prove nothing; in float32 rounded up, the least finite number.
    return (margins < 0) & (margins > torch.finfo(torch.float32).min)


def split_inputs(
    traced: Trace,
    box: Box,
    label: Tensor,
    sound: bool,
    is_counterexample: Callable[[Tensor], Tensor],
    batch_size: int,
    max_subproblems: float,
    is_over: Callable[[], bool],
) -> SearchResult:
    """Return whether all images of a box (1, *shape) have a class (1,), by splitting the box.

    Args:
        traced: Steps of the network.
        box: Lower and upper bounds of one image.
        label: Its true class as int64.
        sound: If True, account for rounding in float32.
        is_counterexample: Function that returns which images (M, *shape) are counterexamples, (M,) bool.
        batch_size: Number of parts that are bounded at once.
        max_subproblems: Largest number of parts.
        is_over: Function that returns True when the search must end.
    """
    parts, scores, count = box, box.lower.new_full((1,), math.inf), 0
    size = max(1, min(batch_size, MAX_COEFFICIENTS // (64 * box.lower.numel())))
    while len(parts.lower):
        if is_over() or count >= max_subproblems:
            return SearchResult("unknown", None, count)
        chosen = scores.topk(min(size, len(scores))).indices
        rest = torch.ones(len(scores), dtype=torch.bool, device=chosen.device)
        rest[chosen] = False
        lower, upper = (end[chosen] for end in parts)
        labels = label.expand(len(lower))
        margins = margins_of_box(traced, Box(lower, upper), labels, sound)
        count += len(lower)
        is_open = is_undecided(margins, labels)
        lower, upper, worst = lower[is_open], upper[is_open], margins[is_open].amax(dim=1)
        if not len(lower):
            parts, scores = Box(*(end[rest] for end in parts)), scores[rest]
            continue
        gradient = _gradient(traced, (lower + upper) / 2, label.expand(len(lower)))
        corners = torch.where(gradient > 0, lower, upper)  # towards a smaller margin
        points = torch.cat([(lower + upper) / 2, corners])
        found = is_counterexample(points).nonzero()[:, 0]
        if len(found):
            return SearchResult("falsified", points[found[0]], count)
        halves = _halve(Box(lower, upper), gradient)
        if halves is None:
            return SearchResult("unknown", None, count)
        parts = Box(*(torch.cat([end[rest], half]) for end, half in zip(parts, halves, strict=True)))
        scores = torch.cat([scores[rest], worst.repeat(2).to(scores)])
    return SearchResult("certified", None, count)


def _gradient(traced: Trace, points: Tensor, labels: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = points.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(margin(compute_output(traced, leaf), labels).sum(), leaf)
    return gradient


def _halve(box: Box, gradient: Tensor) -> Box | None:
    """Return both halves of each box; None if a box has a single float."""
    width, influence = (box.upper - box.lower).flatten(1), gradient.abs().flatten(1)
    influence = influence + MIN_INFLUENCE * influence.amax(dim=1, keepdim=True).clamp_min(1e-6)
    middle = ((box.lower + box.upper) / 2).flatten(1)
    can_split = (middle > box.lower.flatten(1)) & (middle < box.upper.flatten(1))
    if not bool(can_split.any(dim=1).all()):
        return None
    place = (width * influence).masked_fill(~can_split, -1).argmax(dim=1, keepdim=True)
    cut = middle.gather(1, place)
    low = box.upper.flatten(1).scatter(1, place, cut).view_as(box.upper)
    high = box.lower.flatten(1).scatter(1, place, cut).view_as(box.lower)
    return Box(torch.cat([box.lower, high]), torch.cat([low, box.upper]))
