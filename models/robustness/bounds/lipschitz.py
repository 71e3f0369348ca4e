"""Rounding in networks that are Lipschitz by construction: logit error, and excess of the constant.

Sound Lipschitz certificates account for both effects. The computed logits of an image and of a perturbed image have an
error of at most E each. The weights as computed may have a slightly larger Lipschitz constant than in real arithmetic.
The bounds hold for all images in [0, 1] and in any order of summation (see `rounding`).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linflab.models.networks.ensemble import LipschitzEnsemble
from linflab.models.networks.group_sort import GroupSortNet
from linflab.models.networks.layers import DistanceLayer, GroupSort, L1ProjectedLinear, SortDistance
from linflab.models.networks.linf_dist import LinfDistNet
from linflab.models.robustness.bounds.rounding import ROOM, UNDERFLOW_SLACK, gamma, unit_roundoff
from linflab.models.robustness.bounds.steps import is_library_layer


class LipschitzRounding(NamedTuple):
    """Effects of rounding on a Lipschitz certificate.

    Attributes:
        logit_rounding_error: E, the largest error of a logit, for images in [0, 1], against real arithmetic on the
            computed weights.
        excess: Largest ratio of the Lipschitz constant of the computed weights to that of the network.
        largest_logit: Largest magnitude of a computed logit, for images in [0, 1].
    """

    logit_rounding_error: float
    excess: float
    largest_logit: float


def lipschitz_rounding(network: nn.Module) -> LipschitzRounding:
    """Bound the rounding of a network in evaluation mode at p = inf.

    Raises:
        TypeError: If no bound is known for the class of the network or of one of its layers, or hooks may change the
            computation.
    """
    for name, module in network.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            location = f" of layer '{name}'" if name else ""
            raise TypeError(
                f"sound=True: forward hooks or a replaced forward{location} are not supported, since they may change "
                "the computation; remove them"
            )
    if type(network) is LinfDistNet:
        error, largest_logit = _distance_error(network)
        return LipschitzRounding(error, _distance_excess(network), largest_logit)
    if type(network) is GroupSortNet:
        return _group_sort_rounding(network)
    if type(network) is LipschitzEnsemble:
        return _ensemble_rounding(network)
    raise TypeError(
        f"sound=True: {type(network).__name__} is not supported by certifier=lipschitz, since its rounding has no "
        "known bound; use certifier=ibp if its layers have rules, or sound=False for a certificate in real arithmetic"
    )


def _ensemble_rounding(network: LipschitzEnsemble) -> LipschitzRounding:
    """Bound the rounding of the weighted mean of K logits, which has K products with rounded shares, and K - 1 sums.

    A member that is averaged over mirror images, which have the same bounds, has two of the K logits. The mean passes
    on the mean of the members' errors. Its own rounding is relative to the mean of their magnitudes, by gamma(K + 1) in
    any order of summation. Products can underflow. The excess is at most the largest of the members, and includes the
    rounding of the shares and of the mean of the constants in float64.
    """
    members = [lipschitz_rounding(member) for member in network.members]
    count = len(members) + sum(network.mirror)
    largest = network.mean_over_members(member.largest_logit for member in members)
    error = network.mean_over_members(member.logit_rounding_error for member in members)
    error += ROOM * (gamma(count + 1, _dtype(network)) * largest + count * UNDERFLOW_SLACK)
    excess = max(member.excess for member in members) * (1 + gamma(count + 8, torch.float64))
    return LipschitzRounding(error * (1 + gamma(count + 8, torch.float64)), excess, ROOM * largest)


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def _distance_error(network: LinfDistNet) -> tuple[float, float]:
    """Return the error bound E of every logit, and the largest magnitude of a computed logit.

    Each layer is 1-Lipschitz, so it passes on errors of its inputs unchanged. The rounding errors of the layer itself
    are added. They are relative to magnitudes, which are bounded by the largest inputs and weights. A distance has one
    rounded difference |x_i - w_i|, and a mean shift has one more. SortNet's sum adds a relative error of gamma for its
    number of terms. Underflow adds far less than `ROOM` allows.
    """
    u = unit_roundoff(network.bias.dtype)
    normalize = network.features.normalize
    for layer in (normalize, *network.features.shifts):
        if not is_library_layer(layer):
            raise _unknown_rounding(layer, network)
    mean, std = normalize.mean.double(), normalize.std.item()
    size = torch.maximum(mean.abs(), (1 - mean).abs()).max().item() / std  # largest magnitude of a layer's inputs
    error = 2 * u * size
    for k, layer in enumerate([*network.features.distances, network.last]):
        if not isinstance(layer, DistanceLayer) or not is_library_layer(layer):
            raise _unknown_rounding(layer, network)
        distances = size + error + layer.weight.detach().flatten(1).abs().amax(dim=1).double()
        largest = distances.max().item()
        error += u * largest
        if isinstance(layer, SortDistance):
            error += gamma(layer.top_k + 1, network.bias.dtype) * largest
        shift = -network.bias if k == len(network.features.shifts) else network.features.shifts[k].running_mean
        assert isinstance(shift, Tensor)
        # Distances are not negative, so a shift of nearly their size leaves small values; it must not be added to them.
        shift = shift.detach().double()
        size = torch.maximum(shift.abs(), (distances - shift).abs()).max().item()
        error += u * size
    return ROOM * error, size + ROOM * error


def _distance_excess(network: LinfDistNet) -> float:
    """Return the largest factor by which sums of SortNet's rounded coefficients exceed 1."""
    layers = [layer for layer in network.modules() if isinstance(layer, SortDistance)]
    return math.prod(1 + gamma(layer.top_k + 1, layer.weight.dtype) for layer in layers)


@torch.no_grad()
def _group_sort_rounding(network: GroupSortNet) -> LipschitzRounding:
    """Propagate boxes of values, and errors, from layer to layer, in float64.

    A linear layer of computed rows w and biases b computes w x + b. Its error is at most gamma(n + 2) times |w| |x| +
    |b|, where n counts the nonzero weights of a row: products with 0 and sums with them are exact. An error e of its
    inputs becomes |w| e. Sorting is exact, and moves an error within its group. The rows are in the l_1 unit ball
    except for the rounding of their projection. The excess is the product, over the layers, of the largest l_1 norm of
    a row, where norms below 1 count as 1.
    """
    normalize, dtype = network.normalize, network.normalize.std.dtype
    first = next(layer for layer in network.layers if isinstance(layer, L1ProjectedLinear))
    mean, std = normalize.mean.double().flatten(), normalize.std.double()
    per_pixel = first.in_features // len(mean)
    lower, upper = ((corner / std).repeat_interleave(per_pixel) for corner in (-mean, 1 - mean))
    error = 2 * unit_roundoff(dtype) * torch.maximum(lower.abs(), upper.abs()) + UNDERFLOW_SLACK
    excess = 1.0
    for layer in network.layers:
        if not is_library_layer(layer):
            raise _unknown_rounding(layer, network)
        if isinstance(layer, L1ProjectedLinear):
            rows = layer.projected_weight.double()
            bias = rows.new_zeros(len(rows)) if layer.bias is None else layer.bias.double()
            sizes, terms = rows.abs(), (rows != 0).sum(dim=1)
            largest = torch.maximum(lower.abs(), upper.abs()) + error
            relative_error = (terms + 2).double() * unit_roundoff(dtype)
            shares = torch.where(
                relative_error < 1, relative_error / (1 - relative_error), math.inf
            )  # gamma(terms + 2)
            error = sizes @ error + shares * (sizes @ largest + bias.abs()) + (terms + 1) * UNDERFLOW_SLACK
            center, radius = rows @ ((lower + upper) / 2) + bias, sizes @ ((upper - lower) / 2)
            lower, upper = center - radius, center + radius
            norm = sizes.sum(dim=1).max().item() * (1 + gamma(layer.in_features + 8, torch.float64))
            excess *= max(1.0, norm)
        elif isinstance(layer, GroupSort):
            lower, upper = (layer(bound[None])[0] for bound in (lower, upper))
            error = (
                error.unflatten(0, (-1, layer.group_size))
                .amax(dim=1, keepdim=True)
                .expand(-1, layer.group_size)
                .flatten()
            )
        elif not isinstance(layer, nn.Flatten):
            raise _unknown_rounding(layer, network)
    largest_error = ROOM * error.max().item()
    largest_logit = ROOM * torch.maximum(lower.abs(), upper.abs()).max().item() + largest_error
    return LipschitzRounding(largest_error, excess, largest_logit)


def _unknown_rounding(layer: nn.Module, network: nn.Module) -> TypeError:
    return TypeError(
        f"sound=True: {type(layer).__name__} in {type(network).__name__} is not supported by certifier=lipschitz, "
        "since its rounding has no known bound; use certifier=ibp, or sound=False"
    )
