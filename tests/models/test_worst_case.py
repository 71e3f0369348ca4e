"""What rivals train on: linear bounds of every relaxation, fused losses and penalties, against float64 by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from linflab.models.networks.convnets import CNN7Config, ConvNetConfig
from linflab.models.networks.layers import BatchNorm2d
from linflab.models.robustness.bounds.coefficients import Rows, Windows
from linflab.models.robustness.bounds.crown import LinearBounds, crown_bounds, crown_margins
from linflab.models.robustness.bounds.interval import (
    Box,
    interval_bounds,
    interval_margins,
    pixel_box,
    propagate,
    trace_layers,
)
from linflab.models.robustness.bounds.rounding import exact_products
from linflab.models.robustness.bounds.worst_case import WorstCaseBounds, looseness
from linflab.models.robustness.objectives import (
    Bound,
    WorstCase,
    WorstCaseCrossEntropyConfig,
    cross_entropies,
    wrong_class_margins,
)
from tests.models.relu_networks import RELU_NETS, SHAPE, relu_network
from tests.models.test_crown import bounds_by_hand, chain_of, lower_of

every_net = pytest.mark.parametrize("kind", sorted(RELU_NETS))


def case(kind: str, seed: int = 1, images: int = 3) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    net = relu_network(kind, seed).double()
    return net, torch.rand(images, *SHAPE, dtype=torch.float64), torch.randint(5, (images,))


def random_images_within(box: Box) -> torch.Tensor:
    """Half of them corners, where bounds are tight most often."""
    share = torch.rand_like(box.lower)
    share[::2] = share[::2].round()
    return box.lower + share * (box.upper - box.lower)


@every_net
@pytest.mark.parametrize("relaxation", ["parallel", "box"])
@pytest.mark.parametrize("eps", [0.003, 0.05, 0.3])
def test_relaxations_are_those_of_an_independent_computation(kind: str, relaxation: str, eps: float) -> None:
    net, images, _ = case(kind)
    box, chain = pixel_box(images, eps), chain_of(net)
    with torch.no_grad():
        found = crown_bounds(net, box, relaxation=relaxation)
    for k in range(len(images)):
        one = Box(box.lower[k : k + 1], box.upper[k : k + 1])
        low, high = bounds_by_hand(chain, one, "crown", "crown", relaxation)
        np.testing.assert_allclose(found.lower[k].numpy(), low, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.upper[k].numpy(), high, rtol=1e-9, atol=1e-9)


@every_net
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), eps=st.floats(0, 0.5))
def test_hybrid_zonotopes_are_never_wider_than_intervals(kind: str, seed: int, eps: float) -> None:
    net, images, labels = case(kind, seed)
    box = pixel_box(images, eps)
    with torch.no_grad():
        intervals, zonotopes = interval_bounds(net, box), crown_bounds(net, box, relaxation="box")
        assert (zonotopes.lower >= intervals.lower - 1e-9).all() and (zonotopes.upper <= intervals.upper + 1e-9).all()
        margins = crown_margins(net, box, labels, relaxation="box")
        for relaxation in ("parallel", "box"):
            bounds = crown_bounds(net, box, relaxation=relaxation)
            for _ in range(5):
                logits = net(random_images_within(box))
                assert (logits >= bounds.lower - 1e-9).all() and (logits <= bounds.upper + 1e-9).all()
                assert (wrong_class_margins(logits, labels) <= margins + 1e-9).all()
    if eps < 0.01:
        assert (zonotopes.upper - zonotopes.lower).mean() < (intervals.upper - intervals.lower).mean() or eps < 1e-9


class Odd(nn.Module):
    """Shapes and joints that the shipped networks do not have: all that windows must keep apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.near, self.far = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, (3, 5), padding=(1, 2), groups=2)
        self.pool, self.columns = nn.AvgPool2d(2, padding=1), nn.Linear(7, 3)  # of a map's last dimension
        self.next, self.last = nn.Conv2d(8, 3, 2, padding=1), nn.Linear(45, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem(images))
        x = functional.relu(self.near(x) + self.far(x))
        x = torch.cat([self.pool(x), self.pool(-x)], dim=1)
        x = functional.relu(self.next(functional.relu(x)))
        return self.last(functional.relu(self.columns(x)).flatten(1))


def test_a_linear_layer_of_maps_is_no_factor() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Linear(6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)
    ).eval()
    box = pixel_box(torch.rand(4, 1, 6, 6), 0.05)
    with torch.no_grad():
        for relaxation in ("adaptive", "parallel", "box"):
            with exact_products():
                lower, upper = crown_bounds(net, box, sound=True, relaxation=relaxation)
            for _ in range(200):
                logits = net(random_images_within(box)).double()
                assert (logits >= lower).all() and (logits <= upper).all()


@pytest.mark.parametrize("relaxation", ["adaptive", "parallel", "box"])
@pytest.mark.parametrize("size", ["small", "cnn7", "residual", "odd"])
def test_windows_are_rows_without_their_zeros(size: str, relaxation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With padding, strides, batch normalisation and a shortcut: what windows leave out is zero."""
    torch.manual_seed(0)
    if size == "residual":
        net, shape = relu_network("residual", 0).double(), SHAPE
    elif size == "odd":
        net, shape = Odd().double().eval(), (2, 11, 12)
    else:
        config = ConvNetConfig(size="small") if size == "small" else CNN7Config(width=3, hidden=8)
        shape = (2, 11, 12)
        net = config.build(shape, 4, (0.4, 0.5), 0.3).double()
        for _ in range(3):
            net(torch.rand(8, *shape, dtype=torch.float64))
        net.eval()
    box = pixel_box(torch.rand(2, *shape, dtype=torch.float64), 0.02)
    used = 0
    units = Windows.units

    def counted(*arguments: object) -> Windows:
        nonlocal used
        used += 1
        return units(*arguments)

    with torch.no_grad():
        monkeypatch.setattr(Windows, "units", staticmethod(counted))
        windows = crown_bounds(net, box, relaxation=relaxation)
        monkeypatch.setattr(LinearBounds, "_largest_window", lambda self, name: None)
        before = used
        rows = crown_bounds(net, box, relaxation=relaxation)
    assert before == used > 0
    for found, expected in zip(windows, rows, strict=True):
        torch.testing.assert_close(found, expected)


@every_net
@pytest.mark.parametrize("bound", ["interval", "crown_ibp", "dual", "hybrid_zonotope"])
def test_margins_in_training_are_those_of_certificates(kind: str, bound: Bound) -> None:
    net, images, labels = case(kind)
    box = pixel_box(images, 0.05)
    worst = WorstCaseBounds(net, bound)(images, labels, 0.05, math.inf)
    with torch.no_grad():
        intervals = interval_margins(net, box, labels)
        expected = {
            "interval": lambda: intervals,
            "crown_ibp": lambda: crown_margins(net, box, labels, "interval"),
            "dual": lambda: crown_margins(net, box, labels, relaxation="parallel"),
            "hybrid_zonotope": lambda: crown_margins(net, box, labels, relaxation="box"),
        }[bound]()
    torch.testing.assert_close(worst.margins, expected)
    torch.testing.assert_close(worst.logits, net(images))
    cross_entropies(worst.margins, labels).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in list(net.parameters())[:-1])
    if bound == "crown_ibp":  # a mixture of both
        mixed = WorstCaseBounds(net, bound)(images, labels, 0.05, math.inf, crown_share=0.25).margins
        wrong = mixed > -math.inf
        torch.testing.assert_close(mixed[wrong], (0.25 * expected + 0.75 * intervals)[wrong])


@pytest.mark.parametrize("bound", ["interval", "crown_ibp", "crown_ibp_fused", "dual"])
def test_batch_normalisation_is_by_the_batch_of_images(bound: Bound) -> None:
    """As by a network in evaluation with running statistics of the batch; the running ones move towards them."""
    torch.manual_seed(0)
    net = CNN7Config(width=2, hidden=6).build((1, 6, 6), 3, (0.4,), 0.3).double()
    images, labels = torch.rand(5, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        net(images)
    twin = CNN7Config(width=2, hidden=6).build((1, 6, 6), 3, (0.4,), 0.3).double()
    twin.load_state_dict(net.state_dict())
    worst = WorstCaseBounds(net, bound)(images, labels, 0.03, math.inf)
    assert net.training
    x = images
    with torch.no_grad():
        for layer in twin:
            if isinstance(layer, BatchNorm2d):
                layer.running_mean.copy_(x.mean(dim=(0, 2, 3)))
                layer.running_var.copy_(x.var(dim=(0, 2, 3), unbiased=False))
                layer.eval()
            x = layer(x)
    expected = WorstCaseBounds(twin.eval(), bound)(images, labels, 0.03, math.inf)
    torch.testing.assert_close(worst, expected)
    reference = nn.BatchNorm2d(2).double()
    first, norm = net[1], net[2]
    with torch.no_grad():
        for _ in range(2):
            reference(first(net[0](images)))
    torch.testing.assert_close(norm.running_mean, reference.running_mean)
    torch.testing.assert_close(norm.running_var, reference.running_var)


@every_net
@pytest.mark.parametrize("eps", [0.0, 0.01, 0.1])
def test_fused_loss_is_that_of_an_independent_computation(kind: str, eps: float) -> None:
    """Chords of exp over the interval margins, weighted rows passed back once, in float64 with dense matrices."""
    net, images, labels = case(kind)
    box, chain = pixel_box(images, eps), chain_of(net)
    matrix, constant, _ = chain[-1]
    with torch.no_grad():
        found = WorstCaseBounds(net, "crown_ibp_fused")(images, labels, eps, math.inf).fused
    assert found is not None
    for k, y in enumerate(labels.tolist()):
        one = Box(box.lower[k : k + 1], box.upper[k : k + 1])
        ranges = [bounds_by_hand(chain[: n + 1], one, "interval", "interval") for n in range(len(chain))]
        low, high = (np.maximum(end, 0) for end in ranges[-2])
        inner = chain[-2][2]  # what goes past the ReLU
        low[inner:], high[inner:] = ranges[-2][0][inner:], ranges[-2][1][inner:]
        total, rows = 1.0, np.zeros(len(matrix))
        for j in range(len(matrix)):
            if j == y:
                continue
            row = matrix[j] - matrix[y]
            middle = row @ (low + high) / 2 + constant[j] - constant[y]
            spread = np.abs(row) @ (high - low) / 2
            slope = (np.exp(middle + spread) - np.exp(middle - spread)) / (2 * spread) if spread else np.exp(middle)
            total += np.exp(middle + spread) - slope * (middle + spread)
            rows[j] += slope
            rows[y] -= slope
        expected = np.log(total - lower_of(-rows[None], chain, ranges, one)[0])
        assert found[k].item() == pytest.approx(expected, rel=1e-6)


@every_net
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), eps=st.floats(0, 0.3))
def test_fused_loss_is_above_every_loss_in_the_box(kind: str, seed: int, eps: float) -> None:
    net, images, labels = case(kind, seed)
    with torch.no_grad():
        fused = WorstCaseBounds(net, "crown_ibp_fused")(images, labels, eps, math.inf).fused
        unfused = cross_entropies(WorstCaseBounds(net, "crown_ibp")(images, labels, eps, math.inf).margins, labels)
        assert fused is not None and fused.isfinite().all()
        for _ in range(10):
            loss = functional.cross_entropy(net(random_images_within(pixel_box(images, eps))), labels, reduction="none")
            assert (loss <= fused + 1e-9).all() and (loss <= unfused + 1e-9).all()
    if eps < 0.001:  # both are close to it, and so to one another
        torch.testing.assert_close(fused, unfused, atol=0.02, rtol=0.02)


def test_fused_loss_may_be_tighter_than_that_of_margins() -> None:
    """Of two classes of which one falls as the other grows: the worst cases of both can't be at one point."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 3)).double().eval()
    with torch.no_grad():
        for layer, weight, bias in ((net[1], [[1.0]], [1.0]), (net[3], [[0.0], [1.0], [-1.0]], [0.0, -1.5, 1.5])):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
        image, label = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), torch.tensor([0])
        fused = WorstCaseBounds(net, "crown_ibp_fused")(image, label, 0.5, math.inf).fused
        margins = WorstCaseBounds(net, "crown_ibp")(image, label, 0.5, math.inf).margins
    assert fused is not None
    assert fused.item() == pytest.approx(math.log(1 + 2 * math.cosh(0.5)))  # exactly the worst loss
    assert cross_entropies(margins, label).item() == pytest.approx(math.log(1 + 2 * math.exp(0.5)))


def test_fused_loss_of_margins_that_exp_can_not_hold() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[1].weight.mul_(1e3)
    images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    fused = WorstCaseBounds(net, "crown_ibp_fused")(images, labels, 0.3, math.inf).fused
    assert fused is not None and (fused > 100).all() and fused.isfinite().all()
    fused.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(8)])
def test_what_is_random_or_of_the_batch_is_refused_in_training(layer: nn.Module) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), layer, nn.ReLU(), nn.Linear(8, 3))
    images, labels = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    bounds = WorstCaseBounds(net)
    with pytest.raises(TypeError, match=f"{type(layer).__name__} in training"):
        bounds(images, labels, 0.1, math.inf)
    net.eval()
    bounds(images, labels, 0.1, math.inf)


def test_loose_bounds_are_penalized_at_eps_0_too() -> None:
    """Where the penalty weighs most."""
    torch.manual_seed(0)
    net = ConvNetConfig(size="small").build((1, 10, 10), 3, (0.3,), 0.3)
    images, labels = torch.rand(4, 1, 10, 10), torch.tensor([0, 1, 2, 0])
    small, none = (WorstCaseBounds(net)(images, labels, eps, math.inf, penalized=True).penalty for eps in (1e-5, 0.0))
    assert isinstance(small, torch.Tensor) and small > 0.5
    torch.testing.assert_close(none, small, rtol=0.02, atol=0)


def test_penalty_by_hand() -> None:
    net, images, _ = case("conv", 3, 6)
    box = pixel_box(images, 0.05)
    traced = trace_layers(net, box, False)
    with torch.no_grad():
        boxes = propagate(traced, box)
        found = looseness(traced, boxes).item()
    expected, layers = 0.0, 0
    d0 = np.mean((box.upper - box.lower).numpy()) / 2
    for step in traced.steps:
        if isinstance(step.layer, nn.ReLU):
            low, high = (end.numpy() for end in boxes[step.inputs[0]])
            c, d = (low + high) / 2, np.mean(high - low) / 2
            expected += max(0.0, 0.5 - d0 / d)
            on, off = c[low > 0], -c[high < 0]
            mean = c.mean()
            for one, other in ((on.sum(), off.sum()), (((on - mean) ** 2).sum(), ((off + mean) ** 2).sum())):
                expected += max(0.0, 0.5 - min(one / other, other / one))
            layers += 1
    assert layers == 2 and found == pytest.approx(expected / (0.5 * layers))


def test_weights_move_with_eps() -> None:
    config = WorstCaseCrossEntropyConfig(
        eps_train=0.2,
        worst_case_weight_start=0.0,
        worst_case_weight=0.6,
        penalty=0.5,
        bound="crown_ibp",
        crown_share_start=0.8,
        crown_share_end=0.2,
    )
    objective, labels = config.build(math.nan), torch.tensor([1, 0])
    z = torch.randn(2, 3)
    worst = WorstCase(z, wrong_class_margins(z, labels) + 0.7, penalty=torch.tensor(2.0))
    clean, bounded = functional.cross_entropy(z, labels), cross_entropies(worst.margins, labels).mean()
    for eps, weight, penalty, share in ((0.0, 0.0, 1.0, 0.8), (0.1, 0.3, 0.5, 0.5), (0.2, 0.6, 0.0, 0.2)):
        expected = weight * bounded + (1 - weight) * clean + penalty
        torch.testing.assert_close(objective(worst, labels, 0.0, eps), expected)
        assert objective.crown_share(eps) == pytest.approx(share)
    assert WorstCaseCrossEntropyConfig(eps_train=0.1, bound="dual").build(math.nan).crown_share(0.1) == 1.0


def test_rows_of_the_margins_are_those_of_wrong_classes() -> None:
    net, images, labels = case("dense")
    box = pixel_box(images, 0.05)
    bounds = LinearBounds(trace_layers(net, box, False), box, "interval")
    with torch.no_grad():
        margins = bounds.margins(labels)
        for k, y in enumerate(labels.tolist()):
            for j in range(5):
                row = torch.zeros(1, 1, 5, dtype=torch.float64)
                row[0, 0, y] += 1
                row[0, 0, j] -= 1
                expected = -bounds.lower(bounds.output, Rows(row))[k, 0] if j != y else torch.tensor(-math.inf)
                assert margins[k, j].item() == pytest.approx(expected.item())
