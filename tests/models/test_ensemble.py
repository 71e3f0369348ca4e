"""Ensembles: Lipschitz constant, bounds of rounding, and certificates against attacks."""

import copy
import math

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
from linflab.models.robustness.bounds.boxes import Box, perturbation_box
from linflab.models.robustness.bounds.ibp import ibp_bounds, ibp_logit_differences
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

HYBRID = LinfDistHybridConfig(backbone=CONFIGS[0], hidden_size=8)
RELU = ConvNetConfig(size="strided")
MIXTURES = (
    ((CONFIGS[0], HYBRID, CONFIGS[1], RELU), (1.0, 2.5, 3.0, 0.1)),
    ((CONFIGS[0], RELU), (80.0, 1.0)),
    ((HYBRID, RELU), (1.0, 1.0)),
    ((CONFIGS[1], CONFIGS[0]), (0.3, 7.0)),
)

members = st.lists(
    st.tuples(st.sampled_from(CONFIGS), st.sampled_from([0.2, 0.35, 1.0]), st.sampled_from([1.0, 0.02, 30.0])),
    min_size=2,
    max_size=5,
)
Parts = list[tuple[NetworkConfig, float, float]]
seeds = st.integers(0, 1000)
mirrors = st.sampled_from(["no", "all", "some"])  # whose logits are averaged over mirror images


def flags(mirror: str, count: int) -> list[bool]:
    """Return for each member whether it is mirrored."""
    return {"no": [], "all": [True] * count, "some": [k % 2 == 1 for k in range(count)]}[mirror]


def build(parts: Parts, seed: int, scale: float = 1.0, mirror: str = "no") -> LipschitzEnsemble:
    """Return a float32 ensemble, in evaluation mode, of networks with their own standard deviations and weights."""
    torch.manual_seed(seed)
    networks = [config.build(SHAPE, CLASSES, (0.4, 0.5), std) for config, std, _ in parts]
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                parameter *= scale
    return LipschitzEnsemble(networks, [weight for *_, weight in parts], flags(mirror, len(parts))).eval()


def mean_of_logits(network: Ensemble, parts: Parts, images: Tensor) -> Tensor:
    """Return the weighted mean of the members' logits in float64, as a reference."""
    weights = torch.tensor([weight for *_, weight in parts], dtype=torch.float64)
    copies, images = [copy.deepcopy(member).double() for member in network.members], images.double()
    columns = torch.arange(images.shape[3] - 1, -1, -1)
    pairs = [(member(images), member(images[:, :, :, columns])) for member in copies]
    logits = [sum(pair) / 2 if mirror else pair[0] for pair, mirror in zip(pairs, network.mirror, strict=True)]
    return torch.tensordot(weights, torch.stack(logits), 1) / weights.sum()


@given(members, seeds, st.floats(1e-6, 1), mirrors)
def test_the_constant_is_the_mean_of_the_members(parts: Parts, seed: int, size: float, mirror: str) -> None:
    network = build(parts, seed, mirror=mirror).double()
    expected = sum(weight / std for _, std, weight in parts) / sum(weight for *_, weight in parts)
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


@given(members, seeds, st.sampled_from([0.01, 1.0, 100.0]), mirrors)
def test_rounding_is_within_its_bound(parts: Parts, seed: int, scale: float, mirror: str) -> None:
    network = build(parts, seed, scale, mirror)
    rounding = lipschitz_rounding(network)
    images = torch.rand(16, *SHAPE)
    images[::2] = images[::2].round()
    with torch.no_grad(), strict_float32():
        logits = network(images)
        assert (logits.double() - mean_of_logits(network, parts, images)).abs().max() <= rounding.logit_rounding_error
        for member in network.members:
            assert member(images).abs().max() <= lipschitz_rounding(member).largest_logit
    assert logits.abs().max() <= rounding.largest_logit
    assert rounding.logit_rounding_error < 1e-4 * max(1.0, rounding.largest_logit)


@given(members, seeds, mirrors)
def test_certified_images_survive_attacks(parts: Parts, seed: int, mirror: str) -> None:
    network = build(parts, seed, mirror=mirror)
    fit_briefly(network)
    images, _ = make_labeled_images(8)
    with torch.no_grad(), strict_float32():
        labels = network(images).argmax(dim=1)
    radii = certified_radius(network, images, labels, "lipschitz")
    exact = margin(mean_of_logits(network, parts, images), labels) / (2 * network.lipschitz_constant)
    assert (radii <= exact).all() and (radii > 0.9 * exact - 3e-5).all()
    eps = radii.median().item()
    certified = certify(network, images, labels, eps, "lipschitz")
    assert (certified <= certify(network, images, labels, eps, "ibp") | (radii < eps + 1e-6)).all()
    with strict_float32():
        robust = robust_under_attack(network, images, labels, eps, ATTACK, torch.Generator().manual_seed(seed))
        assert robust[certified].all()
        for points in sample_points(perturbation_box(images, eps), 10):
            assert (margin(network(points), labels) > 0)[certified].all()


def build_mixture(index: int, mirror: str = "no") -> tuple[Ensemble, Tensor]:
    """Return a mixture of networks whose logits vary, in evaluation mode, and the weights as float64."""
    configs, weights = MIXTURES[index]
    torch.manual_seed(index)
    config = EnsembleConfig(members=configs, weights=weights, mirror=tuple(flags(mirror, len(configs))))
    network = config.build(SHAPE, CLASSES, (0.4, 0.5), 0.4)
    assert isinstance(network, Ensemble)
    for member in network.members:
        fit_briefly(member.eval())
    return network.eval(), torch.tensor(weights, dtype=torch.float64)


def bound_differences(network: nn.Module, images: Tensor, labels: Tensor, sound: bool = False) -> Tensor:
    """Return IBP bounds (B, K) of z_j - z_y at eps = 0.03, 0 at y."""
    with torch.no_grad():
        bounds = ibp_logit_differences(network, perturbation_box(images, 0.03), labels, sound)
    return bounds.scatter(1, labels[:, None], 0.0)


@pytest.mark.parametrize("mirror", ["no", "all", "some"])
@pytest.mark.parametrize("index", range(len(MIXTURES)))
def test_bounds_of_differences_are_the_weighted_mean_of_the_members(index: int, mirror: str) -> None:
    """For merged last layers, differences of the mean's interval are looser."""
    network, weights = build_mixture(index, mirror)
    images, labels = make_labeled_images(8)
    exact, points = copy.deepcopy(network).double(), images.double()

    def bound_members(one: Ensemble, inputs: Tensor, sound: bool = False) -> Tensor:
        rows = []
        for member, is_mirrored in zip(one.members, flags(mirror, len(weights)) or [False] * len(weights), strict=True):
            views = [inputs, inputs[..., [5, 4, 3, 2, 1, 0]]] if is_mirrored else [inputs]
            rows.append(torch.stack([bound_differences(member, view, labels, sound) for view in views]).mean(dim=0))
        return torch.stack(rows)

    parts = bound_members(exact, points)
    expected = torch.tensordot(weights, parts, 1) / weights.sum()
    computed = bound_differences(exact, points, labels)
    torch.testing.assert_close(computed, expected, rtol=1e-6, atol=1e-12)
    with torch.no_grad():
        box = ibp_bounds(exact, perturbation_box(points, 0.03), sound=False)
    interval = (box.upper - box.lower.gather(1, labels[:, None])).scatter(1, labels[:, None], 0.0)
    excess = (interval - computed).amax() / computed.abs().amax()
    assert excess > 1e-3 if {HYBRID, RELU} & set(MIXTURES[index][0]) else excess.abs() < 1e-9
    for inputs, one in ((images, network), (points, exact)):
        sound = bound_differences(one, inputs, labels, sound=True).double()
        assert (sound >= expected - 1e-12).all()
        parts = bound_members(one, inputs, sound=True)
        mean = torch.tensordot(weights, parts.double(), 1) / weights.sum()
        torch.testing.assert_close(sound, mean, rtol=0, atol=1e-5 * mean.abs().amax().item())


@pytest.mark.parametrize("mirror", ["no", "all", "some"])
@pytest.mark.parametrize("index", range(len(MIXTURES)))
def test_sound_bounds_of_mixtures_cover_computed_logits(index: int, mirror: str) -> None:
    """At one point, nothing but rounding separates bound and difference; in a ball, no point exceeds the bound."""
    network, _ = build_mixture(index, mirror)
    images, labels = make_labeled_images(64)
    rows = labels[:, None]
    for eps in (0.0, 0.03):
        box = perturbation_box(images, eps)
        bounds = ibp_logit_differences(network, box, labels).double()
        with torch.no_grad(), strict_float32():
            for point in [images, *sample_points(box, 10)]:
                for order in (slice(None), slice(0, 1)):  # other batch sizes sum in other orders
                    logits = network(point[order]).double()
                    differences = (logits - logits.gather(1, rows[order])).scatter(1, rows[order], -torch.inf)
                    assert (differences <= bounds[order]).all()


def test_rounding_of_the_sum_is_part_of_the_bound() -> None:
    """Large logits of opposite sign cancel in the mean, which leaves rounding errors only."""

    class Constant(nn.Module):
        def __init__(self, logits: Tensor) -> None:
            super().__init__()
            self.last = nn.Linear(1, len(logits))
            with torch.no_grad():
                self.last.weight.zero_()
                self.last.bias.copy_(logits)

        def forward(self, images: Tensor) -> Tensor:
            return self.last(images.flatten(1)[:, :1] if images.dim() > 2 else images[:, :1])

    generator, images = torch.Generator().manual_seed(0), torch.full((1, 1), 0.5)
    exceeded = 0
    for _ in range(60):
        logits, weights = 100 * torch.randn(4, 3, generator=generator), torch.rand(4, generator=generator).tolist()
        logits[3] = -(torch.tensor(weights[:3]) @ logits[:3]) / weights[3]
        network = Ensemble([Constant(one) for one in logits], weights).eval()
        with torch.no_grad(), strict_float32():
            computed = network(images).double()[0]
        labels = torch.tensor([0])
        differences = computed[1:] - computed[0]
        assert (differences <= ibp_logit_differences(network, Box(images, images), labels)[0, 1:].double()).all()
        exact = torch.tensor(network.shares, dtype=torch.float64) @ logits.double()
        exceeded += bool((differences > exact[1:] - exact[0]).any())
    assert exceeded > 15


def test_the_mean_over_mirror_images_does_not_depend_on_the_side() -> None:
    network = EnsembleConfig(members=(RELU,), mirror=(True,)).build(SHAPE, CLASSES).eval()
    images, _ = make_labeled_images(4)
    with torch.no_grad():
        torch.testing.assert_close(network(images), network(images.flip(3)))
        assert (network.members[0](images) - network.members[0](images.flip(3))).abs().amax() > 1e-3
    with pytest.raises(ValueError, match=r"^images: .*\(4, 72\)"):
        network(images.flatten(1))


def test_other_networks_are_certified_by_ibp() -> None:
    config = EnsembleConfig(members=(CONFIGS[0], HYBRID))
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

    network = LipschitzEnsemble([build([(CONFIGS[0], 1.0, 1.0)], 0).members[0], Own()]).eval()
    images, labels = make_labeled_images(2)
    with pytest.raises(TypeError, match=r"^sound=True: Own"):
        certify(network, images, labels, 0.1, "lipschitz")
    assert certify(network, images, labels, 0.1, "lipschitz", sound=False).shape == (2,)


def test_hooks_of_members_are_rejected() -> None:
    network = build([(CONFIGS[0], 1.0, 1.0), (CONFIGS[2], 1.0, 1.0)], 0)
    network.members[1].register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"hooks.*members\.1"):
        make_certifier(network, "lipschitz").compute_radius(*make_labeled_images(1))


def test_invalid_members_are_rejected() -> None:
    inner = EnsembleConfig(members=(CONFIGS[0], CONFIGS[0]))
    with pytest.raises(ValueError, match=r"^model\.members: .*at least 2.*model\.mirror=\[true\]"):
        EnsembleConfig(members=(CONFIGS[0],)).check()
    EnsembleConfig(members=(CONFIGS[0],), mirror=(True,)).check()
    with pytest.raises(ValueError, match=r"^model\.mirror=\[true\]: .*each of the 2 members"):
        EnsembleConfig(members=(CONFIGS[0], CONFIGS[0]), mirror=(True,)).check()
    with pytest.raises(ValueError, match=r"^mirror=\[True\]: .*each of the 2 members"):
        Ensemble([nn.Identity(), nn.Identity()], mirror=(True,))
    for invalid in ((), (CONFIGS[0], inner)):
        with pytest.raises(ValueError, match="members"):
            EnsembleConfig(members=invalid)
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="weights"):
            EnsembleConfig(members=(CONFIGS[0], CONFIGS[0]), weights=(1.0, weight))
    for weights, reason in (((1.0,), "each of the 2 members"), ((1e-5, 1e5), "factor of 1e")):
        with pytest.raises(ValueError, match=rf"^model\.weights=1.*{reason}"):
            EnsembleConfig(members=(CONFIGS[0], CONFIGS[0]), weights=weights).check()
    mixed = EnsembleConfig(members=(CONFIGS[0], ConvNetConfig(per_channel_std=True)))
    with pytest.raises(ValueError, match=r"^model\.members: .*per_channel_std"):
        mixed.check()


@pytest.mark.parametrize("weights", [(2.0, -1.0), (1.0, 0.0), (1.0, math.nan), (1.0,), (1.0, math.inf)])
def test_weights_must_be_positive_numbers(weights: tuple[float, ...]) -> None:
    """With a negative weight, the Lipschitz constant would be larger than the mean of the members'."""
    members = [LinfDistMLPConfig(depth=2, width=4).build((1, 2, 2), 3) for _ in range(2)]
    with pytest.raises(ValueError, match="positive"):
        LipschitzEnsemble(members, weights)
