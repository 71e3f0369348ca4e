"""Outputs of a network as a weighted sum of values, such as the logits of an ensemble's members."""

from typing import NamedTuple

from linflab.models.robustness.bounds.rounding import UNDERFLOW_SLACK
from linflab.models.robustness.bounds.steps import Add, Quotient, Scale, Trace, TraceStep

MAX_FACTOR = 2.0**60  # of products of larger factors, or smaller ones than its inverse, the rounding is not bounded


class WeightedSum(NamedTuple):
    """Outputs as a sum of values with positive weights.

    Attributes:
        parts: Names of the values, and their weights.
        roundings: Number R such that each relative rounding error of the sum is at most gamma(R), also if its terms are
            weighted and summed in another order; 0 if the only part is the output itself.
        underflow: Largest error of the sum by underflow.
    """

    parts: tuple[tuple[str, float], ...]
    roundings: int
    underflow: float


def split_sum(traced: Trace) -> WeightedSum:
    """Return the outputs as a weighted sum of values that are themselves no such sums.

    Sums, and products and quotients with positive numbers, are split. A product has two roundings: of the number to the
    dtype of the network, and of the product. A quotient has three, since GPUs multiply by the rounded inverse. The
    weighted sum of N other terms has N + 1. Tensors are not split off, since they may be trained.
    """
    weights, depths, underflow = {traced.output: 1.0}, {traced.output: 0}, 0.0
    for step in reversed(traced.steps):
        factor = _positive_factor(step)
        if step.output not in weights or factor is None or not _is_moderate(weights[step.output] * factor):
            continue
        own_roundings = 1 if isinstance(step.layer, Add) else 2 if isinstance(step.layer, Scale) else 3
        weight, depth = weights.pop(step.output), depths[step.output] + own_roundings
        for name in step.inputs:
            weights[name] = weights.get(name, 0.0) + weight * factor
            depths[name] = max(depths.get(name, 0), depth)
        underflow += weight * UNDERFLOW_SLACK
    depth = max(depths.values())
    roundings = max(depth, len(weights) + 1) + 2 if depth else 0  # 2 more cover the rounding of weights in float64
    return WeightedSum(tuple(weights.items()), roundings, underflow)


def _positive_factor(step: TraceStep) -> float | None:
    """Return the positive number that a step multiplies its inputs by before it sums them; None for other steps."""
    if isinstance(step.layer, Add):
        return 1.0
    if isinstance(step.layer, Scale | Quotient):
        number = step.layer.constant
        if isinstance(number, int | float) and number > 0 and _is_moderate(number):
            return float(number) if isinstance(step.layer, Scale) else 1 / number
    return None


def _is_moderate(factor: float) -> bool:
    return 1 / MAX_FACTOR <= factor <= MAX_FACTOR
