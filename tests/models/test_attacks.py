"""Tests of attacks: points stay in the ball, and attacks never succeed on certified images."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.optimize import linprog
from torch import nn

from linflab.models.distance import lp_distance, lp_distance_conv2d
from linflab.models.networks.layers import LpDistance, LpDistanceConv2d, SortDistance
from linflab.models.networks.linf_dist import LinfDistConvNetConfig, LinfDistMLPConfig
from linflab.models.robustness.attacks.apgd import apgd, attack_loss
from linflab.models.robustness.attacks.fab import fab, towards_plane
from linflab.models.robustness.attacks.linf_ball import linf_ball
from linflab.models.robustness.attacks.suite import Attack, AttackConfig, default_attacks, robust_under_attack
from linflab.models.robustness.attacks.surrogate import surrogate_gradients
from linflab.models.robustness.certification import certify, default_certifier
from linflab.models.robustness.margins import margin
from tests.conftest import TrainedOnDigits

pytestmark = pytest.mark.integration  # they compute for long

KINDS = tuple(kind for kind in Attack.registry if kind != "autoattack")
every_attack = pytest.mark.parametrize("kind", KINDS)


def make_generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Recorder(nn.Module):
    """A network that records its inputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.inputs = network, []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.inputs.append(images.detach())
        return self.network(images)


class Squeezed(nn.Module):
    """A network that fails on single images, since `squeeze` removes the batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.last = (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
            nn.Linear(4, 3),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.features(images).squeeze().flatten(1))


@every_attack
def test_attacks_run_on_single_images_and_without_gradients(kind: str) -> None:
    torch.manual_seed(0)
    net, images = Squeezed().eval(), torch.rand(6, 1, 5, 5)
    labels = net(images).argmax(dim=1)
    config = AttackConfig(methods=(kind,), steps=5, queries=20, target_classes=2)
    with torch.no_grad():
        alone = [
            robust_under_attack(net, image, label, 0.01, config, make_generator())
            for image, label in zip(images.split(1), labels.split(1), strict=True)
        ]
        together = robust_under_attack(net, images, labels, 0.01, config, make_generator())
    assert torch.cat(alone).shape == together.shape == (6,)
    assert robust_under_attack(net, images, labels, 0.0, config, make_generator()).all()


@every_attack
def test_attack_points_stay_in_the_ball_and_pixel_range(kind: str) -> None:
    torch.manual_seed(0)
    net = Recorder(LinfDistMLPConfig(depth=2, width=8, initialization="normal").build((1, 4, 4), 3)).eval()
    images = torch.rand(1, 1, 4, 4)
    images[0, 0, 0] = torch.tensor([0.0, 1.0, 0.01, 0.99])
    label = net(images).argmax(dim=1)
    net.inputs.clear()
    config = AttackConfig(methods=(kind,), steps=10, restarts=2, target_classes=2, queries=30)
    robust_under_attack(net, images, label, 0.005, config, make_generator())
    # Targeted attacks evaluate the image once more to find the target. FAB evaluates two points per step.
    num_evaluations = {"square": 30, "fab": 2 * 2 * 21, "targeted_apgd": 2 * 2 * 12, "targeted_apgd_dlr": 2 * 2 * 12}
    assert len(net.inputs) == 1 + num_evaluations.get(kind, 2 * 11)
    for point in net.inputs[1:]:
        assert point.min() >= 0 and point.max() <= 1
        if kind != "fab":
            assert (point.double() - images.double()).abs().max() <= 0.005  # exactly
    assert len({tuple(point.flatten().tolist()) for point in net.inputs}) > 2


@given(st.floats(0, 1, width=32), st.floats(0, 1))
def test_ball_contains_exactly_the_floats_within_eps(pixel: float, eps: float) -> None:
    ball = linf_ball(torch.full((1, 1, 1, 1), pixel), eps)
    for end, direction in ((ball.lower, -math.inf), (ball.upper, math.inf)):
        assert abs(float(end) - pixel) <= eps and 0 <= float(end) <= 1
        outside = float(torch.nextafter(end, torch.full_like(end, direction)))
        assert abs(outside - pixel) > eps or not 0 <= outside <= 1


def make_layers() -> Iterator[tuple[nn.Module, torch.Tensor, Callable[[nn.Module, torch.Tensor, float], torch.Tensor]]]:
    vectors = torch.rand(5, 12, dtype=torch.float64)
    maps = torch.rand(5, 2, 6, 6, dtype=torch.float64)
    yield LpDistance(12, 7), vectors, lambda layer, x, p: lp_distance(x, layer.weight, p)
    yield SortDistance(12, 7, 0.6), vectors, lambda layer, x, p: lp_distance(x, layer.weight, p)
    convolution = LpDistanceConv2d(2, 3, stride=2)
    yield convolution, maps, lambda layer, x, p: lp_distance_conv2d(x, layer.weight, p, 2, 1)


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("p", [2.0, 32.0, 1000.0])
def test_surrogate_keeps_values_and_uses_gradients_at_p(case: int, p: float) -> None:
    torch.manual_seed(case)
    layer, x, distance = list(make_layers())[case]
    layer = layer.double().eval()
    expected = layer(x)
    with surrogate_gradients(nn.Sequential(layer), p):
        x = x.requires_grad_()
        value = layer(x)
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    (expected_gradient,) = torch.autograd.grad(distance(layer, x, p).sum(), x)
    torch.testing.assert_close(gradient, expected_gradient)
    assert not layer._forward_hooks and torch.equal(layer(x.detach()), expected)


def test_hooks_are_removed_when_an_attack_fails() -> None:
    net = LinfDistConvNetConfig(width=2, hidden_size=8).build((1, 6, 6), 3).eval()
    with pytest.raises(ValueError, match="lp_distance_conv2d"):
        robust_under_attack(
            net, torch.rand(2, 3, 6, 6), torch.zeros(2, dtype=torch.int64), 0.1, AttackConfig(), make_generator()
        )
    assert all(not module._forward_hooks for module in net.modules())


def test_robust_images_of_the_suite_are_robust_to_each_attack(digits_net: TrainedOnDigits) -> None:
    """Surrogate PGD leaves almost no gap between robust and certified accuracy."""
    net, split = digits_net.trained.network, digits_net.dataset.test
    images, labels = split.batch(torch.arange(len(split)))
    config = AttackConfig(methods=KINDS, steps=20, target_classes=3, queries=100)
    robust_to_each = {
        kind: robust_under_attack(
            net, images, labels, 0.1, config.model_copy(update={"methods": (kind,)}), make_generator()
        )
        for kind in KINDS
    }
    robust_to_all = robust_under_attack(net, images, labels, 0.1, config, make_generator())
    certified = certify(net, images, labels, 0.1, default_certifier(net))
    clean = margin(net(images), labels) > 0
    for robust in (*robust_to_each.values(), robust_to_all):
        assert not (certified & ~robust).any() and not (robust & ~clean).any()
        assert robust.sum() < clean.sum()  # every attack succeeds on some image
    assert robust_to_all.sum() <= min(robust.sum() for robust in robust_to_each.values())
    assert robust_to_each["surrogate_pgd"].sum() - certified.sum() <= 4


def test_surrogate_pgd_succeeds_more_often_than_pgd(digits_net: TrainedOnDigits) -> None:
    """Both take the same number of steps. The gap allows for differences between instruction sets."""
    net, split = digits_net.trained.network, digits_net.dataset.test
    images, labels = split.batch(torch.arange(len(split)))
    robust_to_pgd, robust_to_surrogate_pgd = (
        robust_under_attack(net, images, labels, 0.2, AttackConfig(methods=(kind,), steps=20), make_generator()).sum()
        for kind in ("pgd", "surrogate_pgd")
    )
    assert robust_to_surrogate_pgd < robust_to_pgd - 5


def test_short_apgd_matches_long_pgd() -> None:
    """Compare 20 steps from one start with 100 steps from each of ten, on a briefly trained ReLU network."""
    torch.manual_seed(0)
    images, labels = torch.rand(256, 1, 6, 6), torch.randint(4, (256,))
    images[torch.arange(256), 0, labels] += 0.5
    images = images.clamp(0, 1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    net.eval()
    long_pgd = AttackConfig(methods=("pgd",), steps=100, restarts=10, rel_step_size=0.1)
    num_robust_to_pgd = int(robust_under_attack(net, images, labels, 0.1, long_pgd, make_generator()).sum())
    for kind in ("apgd", "targeted_apgd"):
        num_robust = int(
            robust_under_attack(
                net, images, labels, 0.1, AttackConfig(methods=(kind,), steps=20), make_generator()
            ).sum()
        )
        assert 50 < num_robust <= num_robust_to_pgd + 2 and num_robust_to_pgd < 200


def test_apgd_step_sizes_shrink() -> None:
    """The loss has a kink in each ball, at 0.3 and at 0.6; the last points are close to it."""
    kink = torch.tensor([0.3, 0.6]).double()

    class Peak(nn.Module):
        inputs: list[torch.Tensor]

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = images.flatten()
            self.inputs.append(x.detach())
            return torch.stack([torch.ones_like(x), -(x - kink).abs()], dim=1)

    net = Peak().eval()
    net.inputs = []
    images = torch.full((2, 1, 1, 1), 0.5).double()
    successes = apgd(net, linf_ball(images, 0.25), torch.zeros(2, dtype=torch.int64), None, 100, 0.25, make_generator())
    assert not successes.any() and len(net.inputs) == 101
    first, last = ((torch.stack(part) - kink).abs().amax(dim=0) for part in (net.inputs[:20], net.inputs[-6:]))
    assert (last < 0.02).all() and (first > 0.05).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([0.2, 1.0, 5.0]))
def test_moves_towards_a_plane_are_minimal(seed: int, size: int, spread: float) -> None:
    """Compare with linear programming: minimize t with <w, x + d> = level, |d_i| <= t, 0 <= x + d <= 1."""
    random = np.random.default_rng(seed)
    x, weights = random.random(size).round(2), (random.normal(size=size) * (random.random(size) > 0.2)).round(2)
    level = weights @ x + spread * random.normal()
    move = towards_plane(torch.tensor(x)[None], torch.tensor(weights)[None], torch.tensor([level]))[0].numpy()
    assert ((x + move >= -1e-12) & (x + move <= 1 + 1e-12)).all()
    eye, ones = np.eye(size), np.ones((size, 1))
    result = linprog(
        [*[0] * size, 1],
        A_ub=np.block([[eye, -ones], [-eye, -ones]]),
        b_ub=np.zeros(2 * size),
        A_eq=[[*weights, 0]],
        b_eq=[level - weights @ x],
        bounds=[*zip(-x, 1 - x, strict=True), (0, None)],
    )
    if result.status == 0:
        assert abs(weights @ (x + move) - level) < 1e-9
        assert abs(np.abs(move).max() - result.x[-1]) < 1e-9
    else:  # the plane misses the cube: each coordinate with a weight moves to its limit
        ends = np.where(weights * np.sign(level - weights @ x) > 0, 1 - x, -x)
        np.testing.assert_allclose(move, np.where(weights == 0, 0, ends), atol=1e-12)


def test_fab_succeeds_only_inside_the_ball() -> None:
    """The nearest image of the other class has distance 0.2, so it is in the ball only for eps > 0.2."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).double().eval()
    net[1].weight.data = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).double()
    net[1].bias.data = torch.tensor([-1.0, 1.0]).double()
    images, labels = torch.full((1, 1, 1, 2), 0.7).double(), torch.tensor([0])
    for eps, succeeds in ((0.1999, False), (0.202, True), (0.25, True)):
        result = fab(net, linf_ball(images, eps), labels, torch.tensor([1]), 20)
        assert bool(result) == succeeds


@given(st.integers(3, 6), st.integers(0, 2**32 - 1), st.floats(0.01, 100), st.floats(-5, 5))
def test_apgd_losses_match_their_definitions(classes: int, seed: int, scale: float, shift: float) -> None:
    torch.manual_seed(seed)
    logits, labels = torch.randn(4, classes).double(), torch.randint(classes, (4,))
    targets = (labels + 1 + torch.randint(classes - 1, (4,))) % classes
    for row in range(4):
        z, y, t = logits[row].tolist(), int(labels[row]), int(targets[row])
        descending = sorted(z, reverse=True) + [min(z)] * 3
        wrong = max(value for k, value in enumerate(z) if k != y)
        expected = {
            ("margin", None): wrong - z[y],
            ("margin", t): z[t] - z[y],
            ("cross_entropy", None): math.log(sum(map(math.exp, z))) - z[y],
            ("dlr", None): (wrong - z[y]) / (descending[0] - descending[2]),
            ("dlr", t): (z[t] - z[y]) / (descending[0] - (descending[2] + descending[3]) / 2),
        }
        for (loss, target), value in expected.items():
            selected = None if target is None else targets
            assert float(attack_loss(logits, labels, selected, loss)[row]) == pytest.approx(value, rel=1e-6)
    for selected in (None, targets):
        rescaled = attack_loss(scale * logits + shift, labels, selected, "dlr")
        torch.testing.assert_close(rescaled, attack_loss(logits, labels, selected, "dlr"), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["apgd_dlr", "targeted_apgd_dlr", "autoattack"])
def test_dlr_attacks_work_with_two_classes(kind: str) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double().eval()
    net[1].weight.data = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0]]).double()
    net[1].bias.data.zero_()
    images = torch.tensor([[[[0.6, 0.4], [0.6, 0.4]]]]).double()  # distance 0.1 to the boundary
    config = AttackConfig(methods=(kind,))
    for eps, is_robust in ((0.09, True), (0.11, False)):
        assert bool(robust_under_attack(net, images, torch.tensor([0]), eps, config, make_generator())) == is_robust


def test_attacks_ignore_enclosing_autocast(digits_net: TrainedOnDigits) -> None:
    images, _ = digits_net.dataset.test.batch(torch.arange(60))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    labels = net(images).argmax(dim=1)
    outside = robust_under_attack(net, images, labels, 0.01, AttackConfig(), make_generator())
    with torch.autocast("cpu", torch.bfloat16):
        assert net(images).dtype == torch.bfloat16
        inside = robust_under_attack(net, images, labels, 0.01, AttackConfig(), make_generator())
    assert torch.equal(outside, inside)


def test_autoattack_uses_four_attacks_at_published_settings() -> None:
    config = AttackConfig(
        methods=("pgd", "autoattack"), steps=3, restarts=4, target_classes=1, queries=7, surrogate_p=8
    )
    first, *parts = config.attacks()
    assert [part.kind for part in parts] == ["apgd_ce", "targeted_apgd_dlr", "fab", "square"]
    assert first.config.steps == 3 and first.config.restarts == 4
    for settings in (part.config for part in parts):
        assert (settings.steps, settings.restarts, settings.target_classes, settings.queries) == (100, 1, 9, 5000)
        assert settings.surrogate_p == 8
    with pytest.raises(ValueError, match="methods"):
        AttackConfig().attacks()


def test_default_attacks_depend_on_distance_layers() -> None:
    distance = LinfDistMLPConfig(depth=2, width=8).build((1, 2, 2), 3)
    assert default_attacks(distance) == ("pgd", "surrogate_pgd")
    assert default_attacks(nn.Sequential(nn.Flatten(), nn.Linear(4, 3))) == ("pgd", "targeted_apgd")
    images, labels = torch.rand(6, 1, 2, 2), torch.zeros(6, dtype=torch.int64)
    results = [
        robust_under_attack(distance.eval(), images, labels, 0.1, config, make_generator())
        for config in (AttackConfig(), AttackConfig(methods=("pgd", "surrogate_pgd")))
    ]
    assert torch.equal(*results)


def test_description_includes_settings_of_all_attacks() -> None:
    description = AttackConfig(
        methods=KINDS, steps=7, restarts=2, queries=11, target_classes=3, surrogate_p=16
    ).describe()
    for part in ("PGD (7 steps of 0.25 eps, 2 restarts)", "p = 16", "up to 3 classes", "Square (11 queries)"):
        assert part in description
    assert description.count(";") == len(KINDS) - 1
    assert "AutoAttack" in AttackConfig(methods=("autoattack",)).describe()


def test_invalid_settings_are_rejected() -> None:
    net = LinfDistMLPConfig(depth=2, width=8).build((1, 2, 2), 3)
    images, labels = torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^network"):
        robust_under_attack(net, images, labels, 0.1, AttackConfig(), make_generator())
    for wrong in (
        {"methods": ()},
        {"methods": ("apgd", "apgd")},
        {"methods": ("magic",)},
        {"steps": 0},
        {"surrogate_p": math.inf},
        {"target_classes": 0},
    ):
        with pytest.raises(ValidationError):
            AttackConfig(**wrong)
