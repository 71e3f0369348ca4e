"""Weights of an ensemble's members, chosen on validation images.

Bounds of logit differences of a weighted mean are the weighted means of the members' bounds. They are therefore
computed once per member, and any weights are tried without further forward passes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from linflab.models.networks.ensemble import MAX_WEIGHT_RATIO
from linflab.models.robustness.bounds.boxes import perturbation_box
from linflab.models.robustness.bounds.ibp import ibp_logit_differences
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.data.datasets import Split
from linflab.platform.errors import InputError
from linflab.platform.training.evaluation import batch_indices
from linflab.reports.tables import format_eps

MAX_REFINED_MEMBERS = 6  # weights of larger ensembles only undo the scales
EXPONENTS = range(-6, 7)  # tried factors of a weight, as powers of 2


def choose_weights(
    networks: Sequence[nn.Module], runs: Sequence[str], validation: Split, experiment: ExperimentConfig
) -> tuple[float, ...]:
    """Return weights of networks with high certified accuracy of their mean on validation images, by IBP.

    A weight is the inverse of the network's scale: the mean magnitude of its worst-case margins. In ensembles of at
    most `MAX_REFINED_MEMBERS`, weights are then multiplied by powers of 2 (see `refine_weights`). Ratios of weights are
    at most those that an ensemble accepts.

    Args:
        networks: Networks in evaluation mode, on the device of the images.
        runs: Names of their runs, for messages.
        validation: Validation images, on which no network was trained.
        experiment: Settings of the evaluation.

    Raises:
        InputError: If bounds of a network are not finite or all 0.
        TypeError: If a layer of a network has no rule.
    """
    scales, parts, is_refined = [], list[Tensor](), 1 < len(networks) <= MAX_REFINED_MEMBERS
    for network, run in zip(networks, runs, strict=True):
        differences = _worst_case_differences(network, validation, experiment)
        scale = differences.amax(dim=1).abs().double().mean().item()
        if not 0 < scale < float("inf"):
            raise InputError(
                f"weights=auto: the worst-case margins of {run} at eps={format_eps(experiment.eps)} have the mean "
                f"magnitude {scale:g}, which gives no weight; give numbers, as in --weights 1,10"
            )
        scales.append(scale)
        if is_refined:
            parts.append(differences)
    weights = [float(f"{max(scales) / scale:.3g}") for scale in scales]
    if is_refined:
        weights = refine_weights(weights, parts)
    return tuple(limit_ratios(weights))


def limit_ratios(weights: Sequence[float]) -> list[float]:
    """Return positive weights, the smallest of them raised so that ratios are at most `MAX_WEIGHT_RATIO`."""
    smallest = max(weights) / MAX_WEIGHT_RATIO * (1 + 1e-9)  # divisions round, so their ratio stays below the limit
    return [max(weight, smallest) for weight in weights]


def refine_weights(weights: Sequence[float], parts: Sequence[Tensor]) -> list[float]:
    """Return weights times powers of 2, which coordinate search selects to certify as many images as possible.

    Of equal results, the search prefers powers with a smaller spread, so that weights stay close to those given.

    Args:
        weights: Weights of K networks.
        parts: For each network, upper bounds (N, classes) of z_j - z_y, -inf at the true class y.
    """
    scaled = [weight * part for weight, part in zip(weights, parts, strict=True)]
    exponents = [0] * len(scaled)
    best = (_count_certified(torch.stack(scaled).sum(dim=0)), 0.0)
    is_better = True
    while is_better:
        is_better = False
        for k, part in enumerate(scaled):
            rest = [2.0 ** exponents[i] * other for i, other in enumerate(scaled) if i != k]
            others = torch.stack(rest).sum(dim=0)
            for exponent in EXPONENTS:
                candidate = [*exponents[:k], exponent, *exponents[k + 1 :]]
                result = (_count_certified(others + 2.0**exponent * part), -_spread(candidate))
                if result > best:
                    best, exponents, is_better = result, candidate, True
    return [weight * 2.0**exponent for weight, exponent in zip(weights, exponents, strict=True)]


@torch.no_grad()
def _worst_case_differences(network: nn.Module, split: Split, experiment: ExperimentConfig) -> Tensor:
    """Return upper bounds (N, classes) of z_j - z_y for all images of a split by IBP, on the CPU; -inf at y."""
    parts = []
    for positions in batch_indices(split, experiment.evaluation.batch_size):
        images, labels = split.batch(positions)
        box = perturbation_box(images, experiment.eps)
        parts.append(ibp_logit_differences(network, box, labels, experiment.evaluation.sound).cpu())
    return torch.cat(parts)


def _count_certified(differences: Tensor) -> int:
    return int((differences.amax(dim=1) < 0).sum())


def _spread(exponents: Sequence[int]) -> float:
    center = sum(exponents) / len(exponents)
    return sum((exponent - center) ** 2 for exponent in exponents)
