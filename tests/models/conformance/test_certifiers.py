"""Conformance tests of every registered certifier."""

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linflab.models.networks import NetworkConfig
from linflab.models.networks.group_sort import GroupSortNet
from linflab.models.networks.layers import SortDistance
from linflab.models.networks.linf_dist import LinfDistNet
from linflab.models.robustness.attacks import AttackConfig, robust_under_attack
from linflab.models.robustness.bounds import ibp
from linflab.models.robustness.bounds.boxes import perturbation_box
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.certification import CascadeCertifier, Certifier, TracingCertifier, make_certifier
from linflab.models.robustness.margins import margin
from tests.models.conformance.cases import (
    CLASSES,
    LARGE_KINDS,
    build_network,
    fit_briefly,
    list_network_configs,
    make_labeled_images,
    sample_points,
)

ATTACK = AttackConfig(
    methods=("pgd", "surrogate_pgd", "targeted_apgd", "square"), steps=6, target_classes=3, queries=30
)

SEARCHES = ("alpha_crown", "complete", "cascade")  # their radii take many optimizations
# Searches of these networks take minutes, and others have the same layers.
LONG_SEARCHES = (
    "cnn7",
    "linf_dist_conv_net",
    "linf_dist_hybrid-linf_dist_conv_net",
    "ensemble-linf_dist_mlp-group_sort-linf_dist_conv_net",
)
# The last stage of the cascade is `complete`, which is tested on these networks and takes half a minute on each.
REPEATED_SEARCHES = ("cascade-group_sort", "cascade-ensemble-sort_net-conv_net")
QUICK_SEARCHES = ("complete-linf_dist_mlp", "alpha_crown-linf_dist_hybrid-linf_dist_mlp")


def is_applicable(kind: str, config: NetworkConfig) -> bool:
    """Return whether a certifier supports a network; certifiers that are not shipped must support all."""
    has_relaxation = config.has_relu or (config.has_distances and not config.is_lipschitz)  # hybrids use tanh
    requirements = {"lipschitz": config.is_lipschitz, "crown": has_relaxation, "alpha_crown": has_relaxation}
    return requirements.get(kind, True)


def make_small(network: nn.Module, kind: str, sound: bool = True) -> Certifier:
    """Return a certifier that takes seconds on these networks, and gives the same results on any machine."""
    # Few subproblems decide these small networks. Under a limit that cuts the search off, certificates can be lost as
    # eps decreases.
    is_small = isinstance(network, LinfDistNet | GroupSortNet)
    is_exact = is_small and not any(isinstance(layer, SortDistance) for layer in network.modules())
    limits = {"max_subproblems": 1000 * is_exact, "time_limit": math.inf}
    return make_certifier(network, kind, sound, **(limits if kind in ("complete", "cascade") else {}))


def list_cases(applicable: bool) -> list[Any]:
    """Return certifiers and networks; searches for a radius that take more than a second are slow tests."""
    configs = [case for case in list_network_configs() if case.values[0].kind not in LARGE_KINDS]
    return [
        pytest.param(
            kind,
            case.values[0],
            id=f"{kind}-{case.id}",
            marks=[pytest.mark.slow]
            if applicable and kind in SEARCHES and f"{kind}-{case.id}" not in QUICK_SEARCHES
            else [],
        )
        for kind in Certifier.registry
        for case in configs
        if is_applicable(kind, case.values[0]) == applicable
        and not (applicable and kind in SEARCHES and case.id in LONG_SEARCHES)
        and f"{kind}-{case.id}" not in REPEATED_SEARCHES
    ]


@cache
def prepare(config: NetworkConfig) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network, images and labels. Only the first image is misclassified."""
    network = build_network(config)
    fit_briefly(network)
    images, _ = make_labeled_images(4)
    with torch.no_grad(), strict_float32():
        labels = network(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % CLASSES
    return network, images, labels


@cache
def compute_radii(kind: str, config: NetworkConfig, sound: bool) -> Tensor:
    network, images, labels = prepare(config)
    return make_small(network, kind, sound).compute_radius(images, labels).double()


@pytest.mark.parametrize(("kind", "config"), list_cases(applicable=True))
def test_certified_images_keep_their_class(kind: str, config: NetworkConfig) -> None:
    """Images keep their class within their radius. At eps = 1, the attack succeeds on some image."""
    (network, images, labels), radii = prepare(config), compute_radii(kind, config, True)
    assert radii.shape == (4,) and radii[0] <= 0 and (radii[1:] > 0).all() and radii.max() < 0.99
    images, labels, radii = images[1:], labels[1:], radii[1:]
    box = perturbation_box(images, radii.view(-1, 1, 1, 1))
    points = [*sample_points(box, 40)]
    for other in range(CLASSES):
        leaf = images.clone().requires_grad_()
        logits = network(leaf)
        (gradient,) = torch.autograd.grad(logits[:, other].sum() - margin(logits, labels).sum(), leaf)
        points.append(torch.where(gradient > 0, box.upper, box.lower))
    exact = copy.deepcopy(network).double()
    with torch.no_grad(), strict_float32():
        for point in points:
            assert (margin(network(point), labels) > 0).all()
            assert (margin(exact(point.double()), labels) > -1e-6).all()
    with strict_float32():
        for eps in (radii.min().item(), radii.max().item()):
            assert robust_under_attack(network, images, labels, eps, ATTACK, torch.Generator())[radii >= eps].all()
        assert not robust_under_attack(network, images, labels, 1.0, ATTACK, torch.Generator()).all()


@pytest.mark.parametrize(("kind", "config"), list_cases(applicable=True))
@pytest.mark.parametrize("sound", [True, False])
def test_certificates_agree_with_radii(kind: str, config: NetworkConfig, sound: bool) -> None:
    """Images are certified just below their radius, but not above it by more than the bisection tolerance."""
    (network, images, labels), radii = prepare(config), compute_radii(kind, config, sound)
    certifier = make_small(network, kind, sound)
    assert torch.equal(certifier.certify(images, labels, 0.0), radii > 0)
    for radius in radii[1:].tolist():
        below = certifier.certify(images, labels, max(0.0, radius * 0.999 - 1e-6))
        above = certifier.certify(images, labels, radius + 2e-6)
        assert below[radii >= radius].all() and not above[radii <= radius].any()
    assert (compute_radii(kind, config, True) <= radii + 1e-6).all()


@pytest.mark.parametrize(("kind", "config"), list_cases(applicable=False))
def test_unsupported_networks_are_rejected(kind: str, config: NetworkConfig) -> None:
    network, images, labels = prepare(config)
    for call in (
        lambda certifier: certifier.certify(images, labels, 0.01),
        lambda certifier: certifier.compute_radius(images, labels),
    ):
        with pytest.raises(TypeError, match=kind):
            call(make_small(network, kind))


def prepare_any_network(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    network, images, labels = prepare(
        next(case.values[1] for case in list_cases(applicable=True) if case.values[0] == kind)
    )
    return copy.deepcopy(network), images, labels


@pytest.mark.parametrize("kind", list(Certifier.registry))
@pytest.mark.parametrize(
    ("name", "make_invalid"),
    [
        ("images", lambda net, x, y, eps: (net, 2 * x - 0.5, y, eps)),
        ("images", lambda net, x, y, eps: (net, x * math.nan, y, eps)),
        ("images", lambda net, x, y, eps: (net, (255 * x).byte(), y, eps)),
        ("images", lambda net, x, y, eps: (net, x[0], y, eps)),
        ("images", lambda net, x, y, eps: (net, x.repeat(1, 1, 2, 2), y, eps)),
        ("labels", lambda net, x, y, eps: (net, x, y.float(), eps)),
        ("labels", lambda net, x, y, eps: (net, x, y + CLASSES, eps)),
        ("labels", lambda net, x, y, eps: (net, x, y[:-1], eps)),
        ("eps", lambda net, x, y, eps: (net, x, y, -eps)),
        ("eps", lambda net, x, y, eps: (net, x, y, math.nan)),
        ("network", lambda net, x, y, eps: (net.train(), x, y, eps)),
        ("network", lambda net, x, y, eps: (net.half(), x, y, eps)),
    ],
)
def test_invalid_inputs_are_rejected_by_name(kind: str, name: str, make_invalid: Any) -> None:
    network, images, labels, eps = make_invalid(*prepare_any_network(kind), 0.01)
    certifier = make_small(network, kind)
    with pytest.raises((TypeError, ValueError), match=f"^{name}"):
        certifier.certify(images, labels, eps)
    if name != "eps":
        with pytest.raises((TypeError, ValueError), match=f"^{name}"):
            certifier.compute_radius(images, labels)


@pytest.mark.parametrize("kind", list(Certifier.registry))
def test_one_certifier_can_be_reused_for_many_batches(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results equal those of a new certifier for each batch. The network is traced only once."""
    network, images, labels = prepare_any_network(kind)
    sizes = (slice(0, 0), slice(0, 1), slice(0, 4))
    expected = [make_small(network, kind).certify(images[part], labels[part], 0.001) for part in sizes]
    trace_calls, trace = [], ibp.trace
    monkeypatch.setattr(ibp, "trace", lambda *arguments: trace_calls.append(1) or trace(*arguments))
    certifier = make_small(network, kind)
    for part, certificates in zip(sizes, expected, strict=True):
        assert torch.equal(certifier.certify(images[part], labels[part], 0.001), certificates)
    radii = certifier.compute_radius(images[:2], labels[:2])
    empty = certifier.compute_radius(images[:0], labels[:0])
    assert empty.shape == (0,) and empty.dtype == radii.dtype and radii[1] > 0
    assert len(trace_calls) == isinstance(certifier, TracingCertifier | CascadeCertifier)


def test_changed_networks_are_rejected() -> None:
    """The trace contains a constant of the forward pass; after a change, a new certifier is required."""

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.last = 1.0, nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.last(images.relu() * self.gain)

    network = Gain().eval()
    for kind in ("ibp", "crown"):
        network.gain = 1.0
        certifier = make_small(network, kind)
        images, labels = torch.rand(2, 4), torch.zeros(2, dtype=torch.long)
        certifier.certify(images, labels, 0.01)
        network.gain = 5.0
        with pytest.raises(TypeError, match="Gain"):
            certifier.certify(images, labels, 0.01)
