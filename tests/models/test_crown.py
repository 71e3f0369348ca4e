"""Interval and CROWN bounds of ReLU networks against an independent computation in float64 with dense matrices."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from linflab.models.networks.layers import Normalize
from linflab.models.networks.linf_dist import LinfDistMLPConfig
from linflab.models.robustness.bounds.crown import crown_bounds, crown_margins
from linflab.models.robustness.bounds.interval import Box, interval_bounds, interval_margins, pixel_box
from linflab.models.robustness.bounds.lines import lines_of
from linflab.models.robustness.objectives import wrong_class_margins
from tests.models.relu_networks import RELU_NETS, SHAPE, Residual, relu_network

Affine = tuple[np.ndarray, np.ndarray, int]  # matrix, constant, and how many of the outputs, from the first, go to ReLU


def matrix_of(
    function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The matrix and constant of an affine function of inputs of a shape, from its values."""
    inputs = math.prod(shape)
    with torch.no_grad():
        zero = function(torch.zeros(1, *shape, dtype=torch.float64)).flatten(1)
        units = function(torch.eye(inputs, dtype=torch.float64).view(inputs, *shape)).flatten(1)
    return (units - zero).T.numpy(), zero[0].numpy()


def chain_of(net: nn.Module) -> list[Affine]:
    """A network as affine maps, each followed by a ReLU of its first outputs."""
    if isinstance(net, Residual):
        return chain_of_residual(net)
    assert isinstance(net, nn.Sequential)
    chain, shape = [], SHAPE
    groups: list[list[nn.Module]] = [[]]
    for layer in net:
        groups[-1].append(layer)
        if isinstance(layer, nn.ReLU):
            groups.append([])
    for group in groups:
        affine = nn.Sequential(*(layer for layer in group if not isinstance(layer, nn.ReLU)))
        matrix, constant = matrix_of(affine, shape)
        with torch.no_grad():
            shape = tuple(affine(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
        chain.append((matrix, constant, len(matrix) if isinstance(group[-1], nn.ReLU) else 0))
    return chain


def chain_of_residual(net: Residual) -> list[Affine]:
    """What the shortcut carries past a ReLU is part of the state, and passes it as it is."""
    stem, c0 = matrix_of(net.stem, SHAPE)
    inner, c1 = matrix_of(lambda x: net.norm(net.inner(x)), (4, 6, 6))
    outer, c2 = matrix_of(net.outer, (4, 6, 6))
    shortcut, c3 = matrix_of(net.shortcut, (4, 6, 6))
    last, c4 = matrix_of(lambda x: net.last(x.flatten(1)), (4, 6, 6))
    n = len(stem)
    return [
        (stem, c0, n),
        (np.vstack([inner, shortcut]), np.concatenate([c1, c3]), n),
        (np.hstack([outer, np.eye(n)]), c2, n),
        (last, c4, 0),
    ]


def lower_of(
    rows: np.ndarray,
    chain: list[Affine],
    ranges: list[tuple[np.ndarray, np.ndarray]],
    box: Box,
    relaxation: str = "adaptive",
) -> np.ndarray:
    """Lower bounds of linear functions of what the chain computes, before its last ReLU, for one box."""
    a, total = rows, np.zeros(len(rows))
    for k in reversed(range(len(chain))):
        matrix, constant, _ = chain[k]
        total = total + a @ constant
        a = a @ matrix
        if k == 0:
            break
        relu = chain[k - 1][2]
        before = a.copy()
        for i in range(relu):
            low, high = ranges[k - 1][0][i], ranges[k - 1][1][i]
            if low >= 0:
                continue
            if high <= 0:
                before[:, i] = 0
                continue
            upper, constant = (0.0, high) if relaxation == "box" else (high / (high - low), -high * low / (high - low))
            lower = float(high > -low) if relaxation == "adaptive" else upper
            before[:, i] = np.where(a[:, i] >= 0, lower, upper) * a[:, i]
            total = total + np.minimum(a[:, i], 0) * constant
        a = before
    low, high = box.lower[0].flatten().numpy(), box.upper[0].flatten().numpy()
    return total + np.maximum(a, 0) @ low + np.minimum(a, 0) @ high


def bounds_by_hand(
    chain: list[Affine], box: Box, intermediate: str, last: str, relaxation: str = "adaptive"
) -> tuple[np.ndarray, np.ndarray]:
    ranges: list[tuple[np.ndarray, np.ndarray]] = []
    low, high = box.lower[0].flatten().numpy(), box.upper[0].flatten().numpy()
    for k, (matrix, constant, relu) in enumerate(chain):
        positive, negative = np.maximum(matrix, 0), np.minimum(matrix, 0)
        low, high = positive @ low + negative @ high + constant, positive @ high + negative @ low + constant
        if (last if k == len(chain) - 1 else intermediate) == "crown":
            unit = np.eye(len(matrix))
            ends = [lower_of(sign * unit, chain[: k + 1], ranges, box, relaxation) for sign in (1, -1)]
            ranges.append((ends[0], -ends[1]))
        else:
            ranges.append((low, high))
        low, high = low.copy(), high.copy()
        low[:relu], high[:relu] = np.maximum(low[:relu], 0), np.maximum(high[:relu], 0)
    return ranges[-1]


@pytest.mark.parametrize("kind", sorted(RELU_NETS))
@pytest.mark.parametrize("eps", [0.003, 0.05, 0.3])
def test_bounds_are_those_of_an_independent_computation(kind: str, eps: float) -> None:
    net = relu_network(kind, 1).double()
    images = torch.rand(3, *SHAPE, dtype=torch.float64)
    box, chain = pixel_box(images, eps), chain_of(net)
    with torch.no_grad():
        found = {
            ("interval", "interval"): interval_bounds(net, box),
            ("interval", "crown"): crown_bounds(net, box, "interval"),
            ("crown", "crown"): crown_bounds(net, box, "crown"),
        }
    for (intermediate, last), bounds in found.items():
        for k in range(len(images)):
            one = Box(box.lower[k : k + 1], box.upper[k : k + 1])
            low, high = bounds_by_hand(chain, one, intermediate, last)
            np.testing.assert_allclose(bounds.lower[k].numpy(), low, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(bounds.upper[k].numpy(), high, rtol=1e-9, atol=1e-9)
    width = {key: (bounds.upper - bounds.lower).mean().item() for key, bounds in found.items()}
    if eps < 0.3:  # no theorem, and not so where nearly all is unstable
        assert width["crown", "crown"] <= width["interval", "crown"] + 1e-12 < width["interval", "interval"]


@pytest.mark.parametrize("kind", sorted(RELU_NETS))
def test_margins_are_bounds_of_differences(kind: str) -> None:
    """By the network with a last layer of differences appended."""
    net = relu_network(kind, 2).double()
    images, labels = torch.rand(4, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2, 4])
    box = pixel_box(images, 0.05)
    with torch.no_grad():
        margins = crown_margins(net, box, labels)
        for k, label in enumerate(labels):
            differences = nn.Linear(5, 5, bias=False).double()
            differences.weight.copy_(torch.eye(5) - torch.eye(5)[label])
            one = Box(box.lower[k : k + 1], box.upper[k : k + 1])
            expected = crown_bounds(nn.Sequential(net, differences).eval(), one).upper[0]
            expected[label] = -math.inf
            torch.testing.assert_close(margins[k], expected)


@pytest.mark.parametrize("kind", sorted(RELU_NETS))
@given(seed=st.integers(0, 2**32 - 1), eps=st.floats(0, 0.5))
def test_bounds_hold_everything_in_the_box(kind: str, seed: int, eps: float) -> None:
    net = relu_network(kind, seed).double()
    images, labels = torch.rand(4, *SHAPE, dtype=torch.float64), torch.randint(5, (4,))
    box = pixel_box(images, eps)
    with torch.no_grad():
        bounds = [interval_bounds(net, box), crown_bounds(net, box, "interval"), crown_bounds(net, box)]
        margins = [interval_margins(net, box, labels), crown_margins(net, box, labels, "interval")]
        for k in range(10):
            share = torch.rand_like(images)
            share = share.round() if k % 2 else share
            logits = net(box.lower + share * (box.upper - box.lower))
            for lower, upper in bounds:
                assert (logits >= lower - 1e-9).all() and (logits <= upper + 1e-9).all()
            for margin in margins:
                assert (wrong_class_margins(logits, labels) <= margin + 1e-9).all()


@given(st.floats(-20, 20), st.floats(0, 20), st.booleans())
def test_lines_hold_activations(lower: float, width: float, sound: bool) -> None:
    box = Box(*torch.tensor([[lower], [lower + width]], dtype=torch.float64))
    x = torch.linspace(lower, lower + width, 1001, dtype=torch.float64)
    for layer in (nn.ReLU(), nn.Tanh()):
        lines = lines_of(layer, box, sound=sound)
        assert lines is not None
        slack = 0 if sound else 1e-12
        assert (lines.lower_slope * x + lines.lower_intercept <= layer(x) + slack).all()
        assert (lines.upper_slope * x + lines.upper_intercept >= layer(x) - slack).all()


@pytest.mark.parametrize("ends", [(-3.0, 2.0), (-0.5, 4.0), (0.5, 2.0), (-2.0, -0.5), (-1.0, 0.1)])
def test_lines_of_tanh_touch_it(ends: tuple[float, float]) -> None:
    box = Box(*torch.tensor(ends, dtype=torch.float64)[:, None])
    x = torch.linspace(*ends, 100_001, dtype=torch.float64)
    lines = lines_of(nn.Tanh(), box)
    assert lines is not None
    above = lines.upper_slope * x + lines.upper_intercept - x.tanh()
    below = x.tanh() - lines.lower_slope * x - lines.lower_intercept
    assert above.min() < 1e-9 and below.min() < 1e-9
    # where the ends are of two signs, both lines also go through an end
    if ends[0] < 0 < ends[1]:
        assert above[0] < 1e-6 and below[-1] < 1e-6


def test_values_that_are_joined() -> None:
    """Concatenation, functions in place of layers, constants: the same bounds as of what they are."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(72, 6), nn.Linear(72, 4), nn.Linear(10, 5)
            self.offset = nn.Parameter(torch.randn(6))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = torch.flatten(images, 1)
            x = torch.cat([x], 1)
            x = torch.cat([functional.relu(self.first(x) + self.offset), -torch.tanh(self.second(x))], dim=1)
            return self.last(x) + 0.5

    torch.manual_seed(0)
    net = Joined().double().eval()
    box = pixel_box(torch.rand(3, *SHAPE, dtype=torch.float64), 0.05)
    with torch.no_grad():
        for bounds in (interval_bounds(net, box), crown_bounds(net, box)):
            for _ in range(200):
                logits = net(box.lower + torch.rand_like(box.lower).round() * (box.upper - box.lower))
                assert (logits >= bounds.lower).all() and (logits <= bounds.upper).all()
        # with the two halves apart, bounds add up
        halves = [nn.Linear(72, 6).double(), nn.Linear(6, 5).double()]
        halves[0].weight.copy_(net.first.weight)
        halves[0].bias.copy_(net.first.bias + net.offset)
        halves[1].weight.copy_(net.last.weight[:, :6])
        halves[1].bias.copy_(net.last.bias + 0.5)
        relu = interval_bounds(nn.Sequential(nn.Flatten(), halves[0], nn.ReLU(), halves[1]).eval(), box)
        halves = [nn.Linear(72, 4).double(), nn.Linear(4, 5, bias=False).double()]
        halves[0].load_state_dict(net.second.state_dict())
        halves[1].weight.copy_(-net.last.weight[:, 6:])
        tanh = interval_bounds(nn.Sequential(nn.Flatten(), halves[0], nn.Tanh(), halves[1]).eval(), box)
        whole = interval_bounds(net, box)
        torch.testing.assert_close(whole.lower, relu.lower + tanh.lower)
        torch.testing.assert_close(whole.upper, relu.upper + tanh.upper)


def test_refusals() -> None:
    box = pixel_box(torch.rand(2, *SHAPE), 0.1)
    with pytest.raises(TypeError, match="no ReLU or tanh"):
        crown_bounds(LinfDistMLPConfig(depth=2, width=8).build(SHAPE, 5).eval(), box)
    double = Box(*(corner.double() for corner in box))
    with pytest.raises(ValueError, match="float32"):
        crown_bounds(relu_network("dense", 0).double(), double, sound=True)

    class InPlace(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return functional.relu(images.flatten(1) + 0.0, inplace=True) + images.flatten(1)

    class Overwriting(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = images.flatten(1)
            return functional.relu(x, inplace=True) + x

    class Added(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = images.flatten(1)
            y = x + 0.0
            y += 1.0
            return functional.relu(x) + y

    class AddedToItsInput(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = images.flatten(1)
            y = x
            y += 1.0
            return functional.relu(x) + y

    class Random(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return functional.relu(images.flatten(1)) + torch.randn(72)

    for works in (InPlace(), Added()):
        crown_bounds(works.eval(), box)
    for overwriting in (Overwriting(), AddedToItsInput()):
        with pytest.raises(TypeError, match="in place"):
            interval_bounds(overwriting.eval(), box)
    with pytest.raises(TypeError, match="something else"):
        interval_bounds(Random().eval(), box)
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(TypeError, match="global forward hooks"):
            interval_bounds(InPlace().eval(), box)
    finally:
        hook.remove()
    before = [corner.clone() for corner in box]
    crown_bounds(nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 5)).eval(), box)
    assert all(torch.equal(corner, then) for corner, then in zip(box, before, strict=True))
    for layer in (nn.Conv2d(2, 2, 3, padding="same"), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")):
        with pytest.raises(TypeError, match="Conv2d"):
            interval_bounds(nn.Sequential(layer).eval(), box)
    with pytest.raises(TypeError, match="running statistics"):
        interval_bounds(nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)).eval(), box)
    with pytest.raises(TypeError, match="Flatten"):
        interval_bounds(nn.Sequential(Normalize((0.0,), 1.0), nn.Flatten(0)).eval(), box)
