"""Interval bounds and worst-case margins: sound for every kind of network, exact where they should be."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from linflab.models.networks.hybrid import LinfDistHybrid, LinfDistHybridConfig
from linflab.models.networks.layers import LpDistance, ScaledLinear, SortDistance
from linflab.models.networks.linf_dist import DistanceNetConfig, LinfDistConvNetConfig, LinfDistMLPConfig
from linflab.models.networks.sort_net import SortNetConfig, draw_subsets
from linflab.models.robustness.attacks.suite import AttackConfig, withstands
from linflab.models.robustness.bounds.interval import Box, interval_bounds, interval_margins, layer_bounds, pixel_box
from linflab.models.robustness.bounds.worst_case import WorstCaseBounds
from linflab.models.robustness.certification import certified, certifier_of, lipschitz_radius
from linflab.models.robustness.objectives import wrong_class_margins

SHAPE, CLASSES = (1, 6, 6), 5
NETS: dict[str, DistanceNetConfig] = {
    "mlp": LinfDistMLPConfig(depth=3, width=14),
    "conv": LinfDistConvNetConfig(width=3, dense_width=12),
    "sort": SortNetConfig(depth=3, width=14, q=0.6),
    "hybrid": LinfDistHybridConfig(net=LinfDistMLPConfig(depth=3, width=14), hidden=8),
    "conv hybrid": LinfDistHybridConfig(net=LinfDistConvNetConfig(width=3, dense_width=12), hidden=8),
    "sort hybrid": LinfDistHybridConfig(net=SortNetConfig(depth=3, width=14, q=0.6), hidden=8),
}
every_net = pytest.mark.parametrize("kind", sorted(NETS))


def network(kind: str, seed: int) -> nn.Module:
    """In float64 and evaluation mode, with running means of random images."""
    torch.manual_seed(seed)
    net = NETS[kind].build(SHAPE, CLASSES, (0.4,), 0.5).double()
    images = torch.rand(16, *SHAPE, dtype=torch.float64)
    net(images, math.inf, draw_subsets(net, 16, 1, torch.Generator().manual_seed(seed)))
    return net.eval()


@every_net
@given(seed=st.integers(0, 2**32 - 1), eps=st.floats(0, 0.5))
def test_bounds_hold_everything_in_the_box(kind: str, seed: int, eps: float) -> None:
    net = network(kind, seed)
    images, labels = torch.rand(8, *SHAPE, dtype=torch.float64), torch.randint(CLASSES, (8,))
    box = pixel_box(images, eps)
    assert box.lower.min() >= 0 and box.upper.max() <= 1
    with torch.no_grad():
        outputs, margins = interval_bounds(net, box), interval_margins(net, box, labels)
        for k in range(20):
            share = torch.rand_like(images)
            share = share.round() if k % 2 else share  # corners, too
            logits = net(box.lower + share * (box.upper - box.lower))
            assert (logits >= outputs.lower - 1e-9).all() and (logits <= outputs.upper + 1e-9).all()
            assert (wrong_class_margins(logits, labels) <= margins + 1e-9).all()


@every_net
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(1e-6, 3))
def test_lipschitz_in_pixels(kind: str, seed: int, size: float) -> None:
    """Logits of nets, and features of hybrids."""
    net = network(kind, seed)
    net = net.features if isinstance(net, LinfDistHybrid) else net
    images = torch.rand(16, *SHAPE, dtype=torch.float64)
    step = torch.rand_like(images) * 2 - 1
    step[::2] = step[::2].sign()
    with torch.no_grad():
        moved = (net(images) - net(images + size * step)).abs().amax()
    assert net.lipschitz_constant == pytest.approx(2) and moved <= 2 * size * (1 + 1e-12) + 1e-12


@every_net
def test_bounds_of_a_point_are_its_outputs(kind: str) -> None:
    net = network(kind, 0)
    images, labels = torch.rand(8, *SHAPE, dtype=torch.float64), torch.randint(CLASSES, (8,))
    with torch.no_grad():
        lower, upper = interval_bounds(net, pixel_box(images, 0))
        torch.testing.assert_close(lower, net(images))
        torch.testing.assert_close(upper, net(images))
        margins = interval_margins(net, pixel_box(images, 0), labels)
        torch.testing.assert_close(margins, wrong_class_margins(net(images), labels))


SINGLE_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(7, 4),
    "scaled linear": lambda: ScaledLinear(7, 4),
    "distance": lambda: LpDistance(7, 4),
    "sort distance": lambda: SortDistance(7, 4, 0.4),
}


@pytest.mark.parametrize("kind", sorted(SINGLE_LAYERS))
@given(seed=st.integers(0, 2**32 - 1), width=st.floats(0, 4))
def test_single_layers_are_exact_for_each_output(kind: str, seed: int, width: float) -> None:
    """Brute force over all corners of the box and, coordinate by coordinate, the breakpoints: where x_i is w_i."""
    torch.manual_seed(seed)
    layer = SINGLE_LAYERS[kind]().double().eval()
    lower = torch.randn(1, 7, dtype=torch.float64)
    box = Box(lower, lower + width * torch.rand_like(lower))
    choices = torch.arange(3**7)[:, None] // 3 ** torch.arange(7) % 3
    with torch.no_grad():
        bounds = layer_bounds(layer, box)
        for output, weight in enumerate(layer.weight):
            breakpoint_ = weight.clamp(box.lower[0], box.upper[0])
            points = torch.where(choices == 0, box.lower, torch.where(choices == 1, box.upper, breakpoint_))
            reached = layer(points)[:, output]
            torch.testing.assert_close(reached.min(), bounds.lower[0, output])
            torch.testing.assert_close(reached.max(), bounds.upper[0, output])


def test_the_last_linear_layer_is_merged_with_the_margin() -> None:
    net = network("hybrid", 1)
    images, labels = torch.rand(8, *SHAPE, dtype=torch.float64), torch.randint(CLASSES, (8,))
    box = pixel_box(images, 0.1)
    with torch.no_grad():
        lower, upper = interval_bounds(net, box)
        apart = upper - lower.gather(1, labels[:, None])
        merged = interval_margins(net, box, labels)
    wrong = merged > -math.inf
    assert wrong.sum() == 8 * (CLASSES - 1)
    assert (merged[wrong] <= apart[wrong] + 1e-12).all() and (merged[wrong] < apart[wrong] - 1e-3).any()


@every_net
@pytest.mark.parametrize("eps", [0.01, 0.1])
def test_worst_margins_hold_at_p_inf(kind: str, eps: float) -> None:
    net = network(kind, 2)
    images, labels = torch.rand(8, *SHAPE, dtype=torch.float64), torch.randint(CLASSES, (8,))
    with torch.no_grad():
        logits, worst, *_ = WorstCaseBounds(net)(images, labels, eps, math.inf)
        torch.testing.assert_close(logits, net(images))
        for _ in range(50):
            step = eps * (torch.rand_like(images) * 2 - 1).sign()
            assert (wrong_class_margins(net(images + step), labels) <= worst + 1e-9).all()
        # intervals through all layers are at least as tight as those through the head alone
        inside = images.clamp(eps, 1 - eps)  # boxes that [0, 1] does not cut
        worst = WorstCaseBounds(net)(inside, labels, eps, math.inf).margins
        assert (interval_margins(net, pixel_box(inside, eps), labels) <= worst + 1e-9).all()


def test_worst_margins_of_a_net_are_those_of_its_lipschitz_constant() -> None:
    net = network("mlp", 3)
    images, labels = torch.rand(8, *SHAPE, dtype=torch.float64), torch.randint(CLASSES, (8,))
    with torch.no_grad():
        worst = WorstCaseBounds(net)(images, labels, 0.1, 8.0).margins
        torch.testing.assert_close(worst, wrong_class_margins(net(images, 8.0), labels) + 2 * 0.1 / 0.5)


def test_worst_margins_of_a_hybrid_by_hand() -> None:
    """The head's interval arithmetic written out for one image, and gradients that reach every parameter."""
    net = network("hybrid", 4)
    assert isinstance(net, LinfDistHybrid)
    images, labels = torch.rand(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 3, 4])
    worst = WorstCaseBounds(net)(images, labels, 0.05, 8.0).margins
    with torch.no_grad():
        features = net.features(images, 8.0)
        first, _, last = net.head
        w, v = first.weight / math.sqrt(14), last.weight / math.sqrt(8)
        centre, radius = features @ w.T + first.bias, 0.05 / 0.5 * w.abs().sum(dim=1)
        low, high = torch.tanh(centre - radius), torch.tanh(centre + radius)
        for b, y in enumerate(labels.tolist()):
            for j in range(CLASSES):
                row = v[j] - v[y]
                expected = torch.where(row > 0, row * high[b], row * low[b]).sum() + last.bias[j] - last.bias[y]
                if j != y:
                    assert worst[b, j].item() == pytest.approx(expected.item())
    worst[worst > -math.inf].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in net.parameters())


@every_net
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_certified_images_withstand_attacks(kind: str, share: float) -> None:
    net = network(kind, 5)
    images = torch.rand(64, *SHAPE, dtype=torch.float64)
    labels = net(images).argmax(dim=1)
    margins = -wrong_class_margins(net(images), labels).amax(dim=1).detach()
    eps = share * margins.median().item()
    safe = certified(net, images, labels, eps, "interval")
    assert safe.any() or share > 0.05, "none certified: nothing is tested"
    attack = AttackConfig(steps=30, restarts=2)
    assert withstands(net, images, labels, eps, attack, torch.Generator().manual_seed(0))[safe].all()
    if certifier_of(net) == "lipschitz":  # intervals are at least as tight
        assert safe[lipschitz_radius(net, images, labels) > eps].all()
    else:
        with pytest.raises(TypeError, match="lipschitz_constant"):
            lipschitz_radius(net, images, labels)


def test_refusals() -> None:
    net = NETS["mlp"].build(SHAPE, CLASSES)
    box = pixel_box(torch.rand(2, *SHAPE), 0.1)
    with pytest.raises(ValueError, match="evaluation mode"):
        interval_bounds(net, box)
    with pytest.raises(TypeError, match="GELU"):
        interval_bounds(nn.Sequential(nn.Flatten(), nn.GELU()).eval(), box)

    class Squared(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.square(images)

    class Otherwise(nn.Tanh):  # its own forward is not that of the rule
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.sinh(images)

    class Finite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.distance = LpDistance(36, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.distance(images, 2.0)

    class Product(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images * images

    class Pair(nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return images, images

    cases = ((Squared, "square"), (Otherwise, "sinh"), (Finite, "2.0"), (Product, "mul"), (Pair, "several outputs"))
    for make, says in cases:
        with pytest.raises(TypeError, match=says):
            interval_bounds(make().eval(), box)
