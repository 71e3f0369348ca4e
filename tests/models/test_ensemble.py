"""Ensembles: Lipschitz constant, bounds of rounding, and certificates against attacks."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from linflab.models.networks import (
    ConvNetConfig,
    Ensemble,
    EnsembleConfig,
    GroupSortConfig,
    LinfDistHybridConfig,
    LinfDistMLPConfig,
    LipschitzEnsemble,
    NetworkConfig,
    SortNetConfig,
)
from linflab.models.robustness.attacks import AttackConfig, robust_under_attack
from linflab.models.robustness.bounds.boxes import perturbation_box
from linflab.models.robustness.bounds.lipschitz import lipschitz_rounding
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.certification import certified_radius, certify, default_certifier, make_certifier
from linflab.models.robustness.margins import margin
from tests.models.conformance.cases import fit_briefly, make_labeled_images, sample_points

SHAPE, CLASSES = (2, 6, 6), 4
CONFIGS = (
    LinfDistMLPConfig(depth=2, width=9, initialization="normal"),
    SortNetConfig(depth=3, width=8, q=0.6),
    GroupSortConfig(depth=3, width=8),
)
ATTACK = AttackConfig(methods=("pgd", "surrogate_pgd", "targeted_apgd"), steps=6, target_classes=3)

members = st.lists(st.tuples(st.sampled_from(CONFIGS), st.sampled_from([0.2, 0.35, 1.0])), min_size=2, max_size=5)
seeds = st.integers(0, 1000)


def build(parts: list[tuple[NetworkConfig, float]], seed: int, scale: float = 1.0) -> LipschitzEnsemble:
    """Return a float32 ensemble, in evaluation mode, of networks with their own standard deviations."""
    torch.manual_seed(seed)
    networks = [config.build(SHAPE, CLASSES, (0.4, 0.5), std) for config, std in parts]
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                parameter *= scale
    return LipschitzEnsemble(networks).eval()


def mean_of_logits(network: Ensemble, images: Tensor) -> Tensor:
    """Return the mean of the members' logits in float64, as a reference."""
    return torch.stack([copy.deepcopy(member).double()(images.double()) for member in network.members]).mean(dim=0)


@given(members, seeds, st.floats(1e-6, 1))
def test_the_constant_is_the_mean_of_the_members(
    parts: list[tuple[NetworkConfig, float]], seed: int, size: float
) -> None:
    network = build(parts, seed).double()
    expected = sum(1 / std for _, std in parts) / len(parts)
    assert network.lipschitz_constant == pytest.approx(expected, rel=1e-6)  # members store the deviation in float32
    images = torch.rand(16, *SHAPE, dtype=torch.float64)
    steps = torch.rand_like(images) * 2 - 1
    steps[::2] = steps[::2].sign()
    with torch.no_grad():
        difference = (network(images + size * steps) - network(images)).abs().amax()
    assert 0 < difference <= network.lipschitz_constant * size * (1 + 1e-9) + 1e-12


def test_the_constant_is_attained() -> None:
    """The pixel moves every logit of each member by the member's whole constant."""
    config = LinfDistMLPConfig(depth=1, initialization="normal")
    network = LipschitzEnsemble([config.build((1, 1, 1), 2, (0.0,), std) for std in (0.5, 1.0)]).eval()
    with torch.no_grad():
        for member in network.members:
            member.last.weight.zero_()
        difference = network(torch.ones(1, 1, 1, 1)) - network(torch.zeros(1, 1, 1, 1))
    assert (difference.abs() == 1.5).all() and network.lipschitz_constant == 1.5


@given(members, seeds, st.sampled_from([0.01, 1.0, 100.0]))
def test_rounding_is_within_its_bound(parts: list[tuple[NetworkConfig, float]], seed: int, scale: float) -> None:
    network = build(parts, seed, scale)
    rounding = lipschitz_rounding(network)
    images = torch.rand(16, *SHAPE)
    images[::2] = images[::2].round()
    with torch.no_grad(), strict_float32():
        logits = network(images)
        assert (logits.double() - mean_of_logits(network, images)).abs().max() <= rounding.logit_rounding_error
        for member in network.members:
            assert member(images).abs().max() <= lipschitz_rounding(member).largest_logit
    assert logits.abs().max() <= rounding.largest_logit
    assert rounding.logit_rounding_error < 1e-4 * max(1.0, rounding.largest_logit)


@given(members, seeds)
def test_certified_images_survive_attacks(parts: list[tuple[NetworkConfig, float]], seed: int) -> None:
    network = build(parts, seed)
    fit_briefly(network)
    images, _ = make_labeled_images(8)
    with torch.no_grad(), strict_float32():
        labels = network(images).argmax(dim=1)
    radii = certified_radius(network, images, labels, "lipschitz")
    exact = margin(mean_of_logits(network, images), labels) / (2 * network.lipschitz_constant)
    assert (radii <= exact).all() and (radii > 0.9 * exact - 1e-5).all()
    eps = radii.median().item()
    certified = certify(network, images, labels, eps, "lipschitz")
    assert (certified <= certify(network, images, labels, eps, "ibp") | (radii < eps + 1e-6)).all()
    with strict_float32():
        robust = robust_under_attack(network, images, labels, eps, ATTACK, torch.Generator().manual_seed(seed))
        assert robust[certified].all()
        for points in sample_points(perturbation_box(images, eps), 10):
            assert (margin(network(points), labels) > 0)[certified].all()


def test_other_networks_are_certified_by_ibp() -> None:
    config = EnsembleConfig(members=(CONFIGS[0], LinfDistHybridConfig(backbone=CONFIGS[0], hidden_size=4)))
    network = config.build(SHAPE, CLASSES).eval()
    assert not config.is_lipschitz and type(network) is Ensemble and default_certifier(network) == "ibp"
    images, labels = make_labeled_images(2)
    with pytest.raises(TypeError, match=r"certifier=lipschitz.*Ensemble.*use certifier=ibp"):
        certify(network, images, labels, 0.1, "lipschitz")


def test_members_whose_rounding_is_unknown_are_rejected() -> None:
    class Own(nn.Module):
        lipschitz_constant = 1.0

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :CLASSES]

    network = LipschitzEnsemble([build([(CONFIGS[0], 1.0)], 0).members[0], Own()]).eval()
    images, labels = make_labeled_images(2)
    with pytest.raises(TypeError, match=r"^sound=True: Own"):
        certify(network, images, labels, 0.1, "lipschitz")
    assert certify(network, images, labels, 0.1, "lipschitz", sound=False).shape == (2,)


def test_hooks_of_members_are_rejected() -> None:
    network = build([(CONFIGS[0], 1.0), (CONFIGS[2], 1.0)], 0)
    network.members[1].register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"hooks.*members\.1"):
        make_certifier(network, "lipschitz").compute_radius(*make_labeled_images(1))


def test_invalid_members_are_rejected() -> None:
    inner = EnsembleConfig(members=(CONFIGS[0], CONFIGS[0]))
    for invalid in ((), (CONFIGS[0],), (CONFIGS[0], inner)):
        with pytest.raises(ValueError, match="members"):
            EnsembleConfig(members=invalid)
    mixed = EnsembleConfig(members=(CONFIGS[0], ConvNetConfig(per_channel_std=True)))
    with pytest.raises(ValueError, match=r"^model\.members: .*per_channel_std"):
        mixed.check()
