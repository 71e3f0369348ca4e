"""Attacks: they keep to where they may go, break what can be broken, and nothing that is certified."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from linflab.models.distance import lp_distance, lp_distance_conv2d
from linflab.models.networks.layers import LpDistance, LpDistanceConv2d, SortDistance
from linflab.models.networks.linf_dist import LinfDistConvNetConfig, LinfDistMLPConfig
from linflab.models.robustness.attacks.apgd import apgd
from linflab.models.robustness.attacks.ball import ball
from linflab.models.robustness.attacks.suite import Attack, AttackConfig, withstands
from linflab.models.robustness.attacks.surrogate import dense_gradients
from linflab.models.robustness.certification import certified, certifier_of
from linflab.models.robustness.objectives import margin
from tests.conftest import TrainedOnDigits
from tests.models.test_robustness import one_pixel_net

KINDS: tuple[Attack, ...] = ("pgd", "surrogate_pgd", "apgd", "targeted_apgd", "square")
every_attack = pytest.mark.parametrize("kind", KINDS)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@every_attack
@pytest.mark.parametrize("restarts", [1, 2])
def test_what_can_be_broken_is_and_nothing_else(kind: Attack, restarts: int) -> None:
    images = torch.linspace(0, 0.49, 50).double().view(-1, 1, 1, 1)
    labels = torch.zeros(50, dtype=torch.int64)
    net = one_pixel_net(1.0)  # centres outside of the pixels: no plateau between them, where gradients are zero
    config = AttackConfig(kinds=(kind,), restarts=restarts)
    robust = withstands(net, images, labels, 0.205, config, generator())
    assert torch.equal(robust, 0.5 - images.flatten() > 0.205)


class Recorder(nn.Module):
    """Notes what the network is shown."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.detach())
        return self.network(images)


@every_attack
def test_attacks_keep_to_the_ball_and_to_pixels(kind: Attack) -> None:
    torch.manual_seed(0)
    net = Recorder(LinfDistMLPConfig(depth=2, width=8, initialization="normal").build((1, 4, 4), 3)).eval()
    images = torch.rand(1, 1, 4, 4)
    images[0, 0, 0] = torch.tensor([0.0, 1.0, 0.01, 0.99])
    label = net(images).argmax(dim=1)
    net.seen.clear()
    config = AttackConfig(kinds=(kind,), steps=10, restarts=2, targets=2, queries=30)
    withstands(net, images, label, 0.005, config, generator())
    looked = {"square": 30, "targeted_apgd": 2 * 2 * 12}.get(kind, 2 * 11)
    assert len(net.seen) == 1 + looked  # targeted, it looks once more for the target
    for attacked in net.seen[1:]:
        assert attacked.min() >= 0 and attacked.max() <= 1
        assert (attacked.double() - images.double()).abs().max() <= 0.005  # exactly
    assert len({tuple(attacked.flatten().tolist()) for attacked in net.seen}) > 2


@given(st.floats(0, 1, width=32), st.floats(0, 1))
def test_the_ball_is_that_of_exact_numbers(pixel: float, eps: float) -> None:
    around = ball(torch.full((1, 1, 1, 1), pixel), eps)
    for end, other in ((around.low, -math.inf), (around.high, math.inf)):
        assert abs(float(end) - pixel) <= eps and 0 <= float(end) <= 1
        beyond = float(torch.nextafter(end, torch.full_like(end, other)))
        assert abs(beyond - pixel) > eps or not 0 <= beyond <= 1


def layers() -> Iterator[tuple[nn.Module, torch.Tensor, Callable[[nn.Module, torch.Tensor, float], torch.Tensor]]]:
    dense = torch.rand(5, 12, dtype=torch.float64)
    maps = torch.rand(5, 2, 6, 6, dtype=torch.float64)
    yield LpDistance(12, 7), dense, lambda layer, x, p: lp_distance(x, layer.weight, p)
    yield SortDistance(12, 7, 0.6), dense, lambda layer, x, p: lp_distance(x, layer.weight, p)
    convolution = LpDistanceConv2d(2, 3, stride=2)
    yield convolution, maps, lambda layer, x, p: lp_distance_conv2d(x, layer.weight, p, 2, 1)


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("p", [2.0, 32.0, 1000.0])
def test_the_surrogate_has_the_networks_values_and_gradients_at_p(case: int, p: float) -> None:
    torch.manual_seed(case)
    layer, x, distance = list(layers())[case]
    layer = layer.double().eval()
    expected = layer(x)
    with dense_gradients(nn.Sequential(layer), p):
        x = x.requires_grad_()
        found = layer(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(found.sum(), x)
    (of_p,) = torch.autograd.grad(distance(layer, x, p).sum(), x)
    torch.testing.assert_close(gradient, of_p)
    assert not layer._forward_hooks and torch.equal(layer(x.detach()), expected)


def test_hooks_are_gone_where_an_attack_fails() -> None:
    net = LinfDistConvNetConfig(width=2, dense_width=8).build((1, 6, 6), 3).eval()
    with pytest.raises(ValueError, match="lp_distance_conv2d"):
        withstands(net, torch.rand(2, 3, 6, 6), torch.zeros(2, dtype=torch.int64), 0.1, AttackConfig(), generator())
    assert all(not module._forward_hooks for module in net.modules())


def test_each_attack_alone_breaks_no_less_than_all_leave(digits_net: TrainedOnDigits) -> None:
    """The union is at most each part; surrogate gradients leave next to nothing between attack and certificate."""
    net, split = digits_net.trained.network, digits_net.dataset.test
    images, labels = split.batch(torch.arange(len(split)))
    config = AttackConfig(kinds=KINDS, steps=20, targets=3, queries=100)
    alone = {
        kind: withstands(net, images, labels, 0.1, config.model_copy(update={"kinds": (kind,)}), generator())
        for kind in KINDS
    }
    together = withstands(net, images, labels, 0.1, config, generator())
    safe = certified(net, images, labels, 0.1, certifier_of(net))
    clean = margin(net(images), labels) > 0
    for robust in (*alone.values(), together):
        assert not (safe & ~robust).any() and not (robust & ~clean).any()
        assert robust.sum() < clean.sum()  # it is no attack that breaks nothing
    assert together.sum() <= min(robust.sum() for robust in alone.values())
    assert alone["surrogate_pgd"].sum() - safe.sum() <= 4


def test_surrogate_gradients_break_more_than_sparse_ones(digits_net: TrainedOnDigits) -> None:
    """At as many steps, and by more than single images, which differ between instruction sets."""
    net, split = digits_net.trained.network, digits_net.dataset.test
    images, labels = split.batch(torch.arange(len(split)))
    sparse, dense = (
        withstands(net, images, labels, 0.2, AttackConfig(kinds=(kind,), steps=20), generator()).sum()
        for kind in ("pgd", "surrogate_pgd")
    )
    assert dense < sparse - 5


def test_apgd_breaks_what_long_pgd_breaks() -> None:
    """A ReLU network trained for a moment: 20 steps from one start, against 100 from each of ten."""
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
    long = AttackConfig(kinds=("pgd",), steps=100, restarts=10, step_size=0.1)
    least = int(withstands(net, images, labels, 0.1, long, generator()).sum())
    for kind in ("apgd", "targeted_apgd"):
        found = int(withstands(net, images, labels, 0.1, AttackConfig(kinds=(kind,), steps=20), generator()).sum())
        assert 50 < found <= least + 2 and least < 200


def test_steps_of_apgd_shrink() -> None:
    """A loss with a kink within the ball, at 0.3 of one image and 0.6 of the other: the steps end near to it."""
    kink = torch.tensor([0.3, 0.6]).double()

    class Peak(nn.Module):
        seen: list[torch.Tensor]

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = images.flatten()
            self.seen.append(x.detach())
            return torch.stack([torch.ones_like(x), -(x - kink).abs()], dim=1)

    net = Peak().eval()
    net.seen = []
    images = torch.full((2, 1, 1, 1), 0.5).double()
    broken = apgd(net, ball(images, 0.25), torch.zeros(2, dtype=torch.int64), None, 100, 0.25, generator())
    assert not broken.any() and len(net.seen) == 101
    first, last = ((torch.stack(part) - kink).abs().amax(dim=0) for part in (net.seen[:20], net.seen[-6:]))
    assert (last < 0.02).all() and (first > 0.05).all()


def test_chance_comes_from_the_generator(digits_net: TrainedOnDigits) -> None:
    net = Recorder(digits_net.trained.network).eval()
    images, labels = digits_net.dataset.test.batch(torch.arange(20))
    config = AttackConfig(kinds=KINDS, steps=3, queries=5, targets=2)
    seen = []
    for seed in (1, 1, 2):
        net.seen.clear()
        torch.rand(3)
        withstands(net, images, labels, 0.1, config, torch.Generator().manual_seed(seed))
        seen.append(torch.cat(net.seen))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_what_ran_is_said() -> None:
    said = AttackConfig(kinds=KINDS, steps=7, restarts=2, queries=11, targets=3, surrogate_p=16).describe()
    for part in ("PGD (7 steps of 0.25 eps, 2 restarts)", "p = 16", "up to 3 classes", "Square (11 queries)"):
        assert part in said
    assert AttackConfig().describe().count(";") == 1


def test_refusals() -> None:
    net = LinfDistMLPConfig(depth=2, width=8).build((1, 2, 2), 3)
    images, labels = torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="evaluation mode"):
        withstands(net, images, labels, 0.1, AttackConfig(), generator())
    for wrong in ({"kinds": ()}, {"kinds": ("magic",)}, {"steps": 0}, {"surrogate_p": math.inf}, {"targets": 0}):
        with pytest.raises(ValidationError):
            AttackConfig(**wrong)
