"""Small networks of every registered kind, for the conformance suites."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linflab.models.networks import Ensemble, NetworkConfig
from linflab.models.networks.linf_dist import DistanceNet
from linflab.models.networks.sort_net import sample_masks
from linflab.models.robustness.bounds.boxes import Box

SHAPE, CLASSES, MEAN, STD = (2, 6, 6), 4, (0.4, 0.5), 0.4
MLP = {"kind": "linf_dist_mlp", "depth": 3, "width": 14, "initialization": "normal"}
CONV = {"kind": "linf_dist_conv_net", "width": 3, "hidden_size": 12, "initialization": "normal"}
GROUP_SORT = {"kind": "group_sort", "depth": 3, "width": 14}
RELU = {"kind": "conv_net", "size": "strided"}
SORT = {"kind": "sort_net", "depth": 3, "width": 14, "q": 0.6}
# Small settings for the shipped kinds; other kinds are tested with their defaults.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "linf_dist_mlp": [MLP],
    "linf_dist_conv_net": [CONV],
    "sort_net": [SORT],
    "linf_dist_hybrid": [{"backbone": net, "hidden_size": 8} for net in (MLP, CONV, SORT)],
    "l_inf_nearest": [{"samples": 12}],
    "group_sort": [{"depth": 3, "width": 14}],
    "ensemble": [
        {"members": [MLP], "mirror": [True]},
        {"members": [MLP, GROUP_SORT, CONV], "mirror": [False, True, False]},
        {"members": [SORT, RELU]},
    ],
    "conv_net": [{"size": "strided", "batch_norm": True}],
    "cnn7": [{"width": 2, "hidden_size": 10}],
    "wide_resnet": [{"widen_factor": 1}],
}
LARGE_KINDS = ("resnext", "dense_net", "wide_resnet")  # bounds take seconds, and other kinds have the same layers


def list_network_configs() -> list[Any]:
    """Return the network configurations to test, as pytest parameters."""
    return [
        pytest.param(cls.model_validate({**settings, "kind": kind}), id="-".join([kind, *_inner_kinds(settings)]))
        for kind, cls in NetworkConfig.registry.items()
        for settings in SETTINGS.get(kind, [{}])
    ]


def _inner_kinds(settings: dict[str, Any]) -> list[str]:
    """Return the kinds of the networks that a network contains."""
    inner = [settings["backbone"]] if "backbone" in settings else settings.get("members", [])
    return [network["kind"] for network in inner]


def build_network(config: NetworkConfig, seed: int = 0) -> nn.Module:
    """Return the network in float32 and evaluation mode, with running statistics of random images."""
    torch.manual_seed(seed)
    network = config.build(SHAPE, CLASSES, MEAN, STD)
    images = torch.rand(16, *SHAPE)
    for _ in range(3):
        for part in network.members if isinstance(network, Ensemble) else [network]:
            if isinstance(part, DistanceNet):
                part(images, math.inf, sample_masks(part, 16, 1, torch.Generator().manual_seed(seed)))
            else:
                part(images)
    return network.eval()


def make_labeled_images(count: int) -> tuple[Tensor, Tensor]:
    """Return images with a bright pixel at a position that depends on the class, and their labels."""
    labels = torch.arange(count) % CLASSES
    images = 0.3 * torch.rand(count, *SHAPE) + 0.2
    images[torch.arange(count), 0, labels] += 0.4
    return images, labels


def fit_briefly(network: nn.Module) -> None:
    """Train for a few steps in evaluation mode, so that the network predicts more than one class."""
    images, labels = make_labeled_images(64)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()


def sample_points(box: Box, count: int) -> Tensor:
    """Return float points of a box (B, ...), every second one a corner, as (count, B, ...)."""
    fractions = torch.rand(count, *box.lower.shape, dtype=box.lower.dtype)
    fractions[::2] = fractions[::2].round()
    inside = torch.lerp(box.lower, box.upper, fractions)
    return torch.minimum(torch.maximum(inside, box.lower), box.upper)
