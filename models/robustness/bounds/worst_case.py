"""Logits and worst-case margins for training: differentiable, at any p, cheap.

The features of a distance net move by at most eps times their Lipschitz constant; a net's logits likewise, and a
hybrid's head is bounded by intervals over that box of features. At p = inf the margins are proven, at finite p they
are what Zhang et al. (2021, Section 5) minimise on the way there. Certificates use `interval`, which is tighter.
"""

import torch
from torch import Tensor

from linflab.models.networks.hybrid import LinfDistHybrid
from linflab.models.networks.linf_dist import LinfDistNet, Subsets
from linflab.models.robustness.bounds.interval import Box, layer_bounds, linear_margins
from linflab.models.robustness.objectives import wrong_class_margins


def logits_and_worst_margins(
    network: LinfDistNet | LinfDistHybrid,
    images: Tensor,
    labels: Tensor,
    eps: float,
    p: float,
    subsets: Subsets | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits z (B, K), and worst-case margins M (B, K): how far z_j - z_y can come within eps, -inf at y itself.

    Args:
        network: a net of distance layers, or a hybrid.
        images: (B, C, H, W) in pixels of [0, 1].
        labels: (B), the right classes.
        eps: radius of the l_inf ball, in pixels; not cut to [0, 1].
        p: of the distance layers.
        subsets: SortNet's, in training.
    """
    if not isinstance(network, LinfDistHybrid):
        logits = network(images, p, subsets)
        return logits, wrong_class_margins(logits, labels) + 2 * eps * network.lipschitz_constant
    features = network.features(images, p, subsets)
    radius = torch.full_like(features[:1], eps * network.features.lipschitz_constant)
    box = Box(features - radius, features + radius)
    for layer in network.head[:-1]:
        box = layer_bounds(layer, box)
    return network.head(features), linear_margins(network.last, box, labels)
