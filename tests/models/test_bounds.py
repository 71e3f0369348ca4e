"""Tests of IBP bounds and worst-case logit differences of distance networks."""

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
from linflab.models.networks.sort_net import SortNetConfig, sample_masks
from linflab.models.robustness.bounds.boxes import Box, perturbation_box
from linflab.models.robustness.bounds.rules import propagate_layer
from linflab.models.robustness.bounds.worst_case import WorstCaseBounds
from linflab.models.robustness.margins import logit_differences
from tests.models.real_arithmetic import ibp_bounds, ibp_logit_differences

pytestmark = pytest.mark.integration  # they compute for long

SHAPE, CLASSES = (1, 6, 6), 5
NETS: dict[str, DistanceNetConfig] = {
    "mlp": LinfDistMLPConfig(depth=3, width=14),
    "conv": LinfDistConvNetConfig(width=3, hidden_size=12),
    "sort": SortNetConfig(depth=3, width=14, q=0.6),
    "hybrid": LinfDistHybridConfig(backbone=LinfDistMLPConfig(depth=3, width=14), hidden_size=8),
    "conv hybrid": LinfDistHybridConfig(backbone=LinfDistConvNetConfig(width=3, hidden_size=12), hidden_size=8),
    "sort hybrid": LinfDistHybridConfig(backbone=SortNetConfig(depth=3, width=14, q=0.6), hidden_size=8),
}
every_net = pytest.mark.parametrize("kind", sorted(NETS))


def build_network(kind: str, seed: int) -> nn.Module:
    """Return a network in float64 and evaluation mode, with running means of random images."""
    torch.manual_seed(seed)
    net = NETS[kind].build(SHAPE, CLASSES, (0.4,), 0.5).double()
    images = torch.rand(16, *SHAPE, dtype=torch.float64)
    net(images, math.inf, sample_masks(net, 16, 1, torch.Generator().manual_seed(seed)))
    return net.eval()


@pytest.mark.integration
@every_net
@given(seed=st.integers(0, 2**32 - 1), eps=st.floats(0, 0.5))
def test_bounds_contain_all_outputs_in_the_box(kind: str, seed: int, eps: float) -> None:
    net = build_network(kind, seed)
    images, labels = torch.rand(8, *SHAPE, dtype=torch.float64), torch.randint(CLASSES, (8,))
    box = perturbation_box(images, eps)
    assert box.lower.min() >= 0 and box.upper.max() <= 1
    with torch.no_grad():
        outputs, differences = ibp_bounds(net, box), ibp_logit_differences(net, box, labels)
        for k in range(20):
            fraction = torch.rand_like(images)
            fraction = fraction.round() if k % 2 else fraction  # odd steps are corners
            logits = net(box.lower + fraction * (box.upper - box.lower))
            assert (logits >= outputs.lower - 1e-9).all() and (logits <= outputs.upper + 1e-9).all()
            assert (logit_differences(logits, labels) <= differences + 1e-9).all()


@every_net
def test_bounds_at_eps_zero_equal_the_outputs(kind: str) -> None:
    net = build_network(kind, 0)
    images, labels = torch.rand(8, *SHAPE, dtype=torch.float64), torch.randint(CLASSES, (8,))
    with torch.no_grad():
        lower, upper = ibp_bounds(net, perturbation_box(images, 0))
        torch.testing.assert_close(lower, net(images))
        torch.testing.assert_close(upper, net(images))
        differences = ibp_logit_differences(net, perturbation_box(images, 0), labels)
        torch.testing.assert_close(differences, logit_differences(net(images), labels))


SINGLE_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(7, 4),
    "scaled linear": lambda: ScaledLinear(7, 4),
    "distance": lambda: LpDistance(7, 4),
    "sort distance": lambda: SortDistance(7, 4, 0.4),
}


@pytest.mark.parametrize("kind", sorted(SINGLE_LAYERS))
@given(seed=st.integers(0, 2**32 - 1), width=st.floats(0, 4))
def test_bounds_of_single_layers_are_exact(kind: str, seed: int, width: float) -> None:
    """Compare with brute force: each coordinate is at a bound of the box or at its breakpoint x_i = w_i."""
    torch.manual_seed(seed)
    layer = SINGLE_LAYERS[kind]().double().eval()
    lower = torch.randn(1, 7, dtype=torch.float64)
    box = Box(lower, lower + width * torch.rand_like(lower))
    choices = torch.arange(3**7)[:, None] // 3 ** torch.arange(7) % 3
    with torch.no_grad():
        bounds = propagate_layer(layer, box)
        for output, weight in enumerate(layer.weight):
            breakpoint_ = weight.clamp(box.lower[0], box.upper[0])
            points = torch.where(choices == 0, box.lower, torch.where(choices == 1, box.upper, breakpoint_))
            outputs = layer(points)[:, output]
            torch.testing.assert_close(outputs.min(), bounds.lower[0, output])
            torch.testing.assert_close(outputs.max(), bounds.upper[0, output])


def test_last_linear_layer_is_merged_with_the_differences() -> None:
    net = build_network("hybrid", 1)
    images, labels = torch.rand(8, *SHAPE, dtype=torch.float64), torch.randint(CLASSES, (8,))
    box = perturbation_box(images, 0.1)
    with torch.no_grad():
        lower, upper = ibp_bounds(net, box)
        separate = upper - lower.gather(1, labels[:, None])
        merged = ibp_logit_differences(net, box, labels)
    wrong = merged > -math.inf
    assert wrong.sum() == 8 * (CLASSES - 1)
    assert (merged[wrong] <= separate[wrong] + 1e-12).all() and (merged[wrong] < separate[wrong] - 1e-3).any()


@every_net
@pytest.mark.parametrize("eps", [0.01, 0.1])
def test_worst_case_differences_are_sound_at_p_inf(kind: str, eps: float) -> None:
    net = build_network(kind, 2)
    images, labels = torch.rand(8, *SHAPE, dtype=torch.float64), torch.randint(CLASSES, (8,))
    with torch.no_grad():
        logits, worst, *_ = WorstCaseBounds(net)(images, labels, eps, math.inf)
        torch.testing.assert_close(logits, net(images))
        for _ in range(50):
            step = eps * (torch.rand_like(images) * 2 - 1).sign()
            assert (logit_differences(net(images + step), labels) <= worst + 1e-9).all()
        # IBP through all layers is at least as tight as IBP through the head only.
        inside = images.clamp(eps, 1 - eps)  # balls that lie in [0, 1]
        worst = WorstCaseBounds(net)(inside, labels, eps, math.inf).logit_difference_bounds
        assert (ibp_logit_differences(net, perturbation_box(inside, eps), labels) <= worst + 1e-9).all()


def test_worst_case_differences_match_lipschitz_constant() -> None:
    net = build_network("mlp", 3)
    images, labels = torch.rand(8, *SHAPE, dtype=torch.float64), torch.randint(CLASSES, (8,))
    with torch.no_grad():
        worst = WorstCaseBounds(net)(images, labels, 0.1, 8.0).logit_difference_bounds
        torch.testing.assert_close(worst, logit_differences(net(images, 8.0), labels) + 2 * 0.1 / 0.5)


def test_worst_case_differences_of_a_hybrid_match_by_hand() -> None:
    """Compare with interval arithmetic of the head, written out; every parameter has a gradient."""
    net = build_network("hybrid", 4)
    assert isinstance(net, LinfDistHybrid)
    images, labels = torch.rand(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 3, 4])
    worst = WorstCaseBounds(net)(images, labels, 0.05, 8.0).logit_difference_bounds
    with torch.no_grad():
        features = net.features(images, 8.0)
        first, _, last = net.head
        w, v = first.weight / math.sqrt(14), last.weight / math.sqrt(8)
        center, radius = features @ w.T + first.bias, 0.05 / 0.5 * w.abs().sum(dim=1)
        low, high = torch.tanh(center - radius), torch.tanh(center + radius)
        for b, y in enumerate(labels.tolist()):
            for j in range(CLASSES):
                row = v[j] - v[y]
                expected = torch.where(row > 0, row * high[b], row * low[b]).sum() + last.bias[j] - last.bias[y]
                if j != y:
                    assert worst[b, j].item() == pytest.approx(expected.item())
    worst[worst > -math.inf].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in net.parameters())


def test_invalid_settings_are_rejected() -> None:
    net = NETS["mlp"].build(SHAPE, CLASSES)
    box = perturbation_box(torch.rand(2, *SHAPE), 0.1)
    with pytest.raises(ValueError, match=r"^network"):
        ibp_bounds(net, box)
    with pytest.raises(TypeError, match="GroupNorm"):
        ibp_bounds(nn.Sequential(nn.Flatten(), nn.GroupNorm(2, 36)).eval(), box)

    class Squared(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.square(images)

    class Overridden(nn.Tanh):  # its forward differs from that of the registered class
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.sinh(images)

    class FiniteExponent(nn.Module):
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

    cases = ((Squared, "square"), (Overridden, "sinh"), (FiniteExponent, "2.0"), (Product, "mul"), (Pair, "Pair"))
    for make, name in cases:
        with pytest.raises(TypeError, match=name):
            ibp_bounds(make().eval(), box)
