"""Tests of IBP and CROWN bounds against an independent computation in float64 with dense matrices."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from linflab.models.networks.layers import Normalize
from linflab.models.networks.linf_dist import LinfDistMLPConfig
from linflab.models.robustness.bounds.boxes import Box, perturbation_box
from linflab.models.robustness.bounds.linear_bounds import LinearBounds
from linflab.models.robustness.bounds.relaxations import relax
from linflab.models.robustness.certification import certify
from linflab.models.robustness.margins import logit_differences
from tests.models.affine_maps import extract_affine
from tests.models.real_arithmetic import crown_bounds, crown_logit_differences, ibp_bounds, ibp_logit_differences
from tests.models.relu_networks import RELU_NETS, SHAPE, Residual, build_relu_network

Affine = tuple[np.ndarray, np.ndarray, int]  # matrix, constant, and number of leading outputs with a ReLU


def to_affine_chain(net: nn.Module) -> list[Affine]:
    """Return a network as affine maps, each followed by a ReLU on its first outputs."""
    if isinstance(net, Residual):
        return residual_to_affine_chain(net)
    assert isinstance(net, nn.Sequential)
    chain, shape = [], SHAPE
    groups: list[list[nn.Module]] = [[]]
    for layer in net:
        groups[-1].append(layer)
        if isinstance(layer, nn.ReLU):
            groups.append([])
    for group in groups:
        affine = nn.Sequential(*(layer for layer in group if not isinstance(layer, nn.ReLU)))
        matrix, constant = extract_affine(affine, shape)
        with torch.no_grad():
            shape = tuple(affine(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
        chain.append((matrix, constant, len(matrix) if isinstance(group[-1], nn.ReLU) else 0))
    return chain


def residual_to_affine_chain(net: Residual) -> list[Affine]:
    """Return the residual network as affine maps; the shortcut is part of the outputs without a ReLU."""
    stem, c0 = extract_affine(net.stem, SHAPE)
    inner, c1 = extract_affine(lambda x: net.norm(net.inner(x)), (4, 6, 6))
    outer, c2 = extract_affine(net.outer, (4, 6, 6))
    shortcut, c3 = extract_affine(net.shortcut, (4, 6, 6))
    last, c4 = extract_affine(lambda x: net.last(x.flatten(1)), (4, 6, 6))
    n = len(stem)
    return [
        (stem, c0, n),
        (np.vstack([inner, shortcut]), np.concatenate([c1, c3]), n),
        (np.hstack([outer, np.eye(n)]), c2, n),
        (last, c4, 0),
    ]


def compute_lower_bounds(
    rows: np.ndarray,
    chain: list[Affine],
    ranges: list[tuple[np.ndarray, np.ndarray]],
    box: Box,
    relaxation: str = "adaptive",
) -> np.ndarray:
    """Return lower bounds of linear functions of the chain's outputs, before its last ReLU, for one box."""
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


def compute_reference_bounds(
    chain: list[Affine], box: Box, intermediate: str, last: str, relaxation: str = "adaptive"
) -> tuple[np.ndarray, np.ndarray]:
    ranges: list[tuple[np.ndarray, np.ndarray]] = []
    low, high = box.lower[0].flatten().numpy(), box.upper[0].flatten().numpy()
    for k, (matrix, constant, relu) in enumerate(chain):
        positive, negative = np.maximum(matrix, 0), np.minimum(matrix, 0)
        low, high = positive @ low + negative @ high + constant, positive @ high + negative @ low + constant
        if (last if k == len(chain) - 1 else intermediate) == "crown":
            unit = np.eye(len(matrix))
            ends = [compute_lower_bounds(sign * unit, chain[: k + 1], ranges, box, relaxation) for sign in (1, -1)]
            ranges.append((ends[0], -ends[1]))
        else:
            ranges.append((low, high))
        low, high = low.copy(), high.copy()
        low[:relu], high[:relu] = np.maximum(low[:relu], 0), np.maximum(high[:relu], 0)
    return ranges[-1]


@pytest.mark.parametrize("kind", sorted(RELU_NETS))
@pytest.mark.parametrize("eps", [0.003, 0.05, 0.3])
def test_bounds_match_an_independent_computation(kind: str, eps: float) -> None:
    net = build_relu_network(kind, 1).double()
    images = torch.rand(3, *SHAPE, dtype=torch.float64)
    box, chain = perturbation_box(images, eps), to_affine_chain(net)
    with torch.no_grad():
        found = {
            ("ibp", "ibp"): ibp_bounds(net, box),
            ("ibp", "crown"): crown_bounds(net, box, "ibp"),
            ("crown", "crown"): crown_bounds(net, box, "crown"),
        }
    for (intermediate, last), bounds in found.items():
        for k in range(len(images)):
            one = Box(box.lower[k : k + 1], box.upper[k : k + 1])
            low, high = compute_reference_bounds(chain, one, intermediate, last)
            np.testing.assert_allclose(bounds.lower[k].numpy(), low, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(bounds.upper[k].numpy(), high, rtol=1e-9, atol=1e-9)
    width = {key: (bounds.upper - bounds.lower).mean().item() for key, bounds in found.items()}
    if eps < 0.3:  # not a theorem; fails when most ReLUs are unstable
        assert width["crown", "crown"] <= width["ibp", "crown"] + 1e-12 < width["ibp", "ibp"]


@pytest.mark.parametrize("kind", sorted(RELU_NETS))
def test_difference_bounds_match_an_appended_layer(kind: str) -> None:
    """The appended linear layer computes the logit differences."""
    net = build_relu_network(kind, 2).double()
    images, labels = torch.rand(4, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2, 4])
    box = perturbation_box(images, 0.05)
    with torch.no_grad():
        differences = crown_logit_differences(net, box, labels)
        for k, label in enumerate(labels):
            subtraction = nn.Linear(5, 5, bias=False).double()
            subtraction.weight.copy_(torch.eye(5) - torch.eye(5)[label])
            one = Box(box.lower[k : k + 1], box.upper[k : k + 1])
            expected = crown_bounds(nn.Sequential(net, subtraction).eval(), one).upper[0]
            expected[label] = -math.inf
            torch.testing.assert_close(differences[k], expected)


@pytest.mark.integration
@pytest.mark.parametrize("kind", sorted(RELU_NETS))
@given(seed=st.integers(0, 2**32 - 1), eps=st.floats(0, 0.5))
def test_bounds_contain_all_outputs_in_the_box(kind: str, seed: int, eps: float) -> None:
    net = build_relu_network(kind, seed).double()
    images, labels = torch.rand(4, *SHAPE, dtype=torch.float64), torch.randint(5, (4,))
    box = perturbation_box(images, eps)
    with torch.no_grad():
        bounds = [ibp_bounds(net, box), crown_bounds(net, box, "ibp"), crown_bounds(net, box)]
        differences = [ibp_logit_differences(net, box, labels), crown_logit_differences(net, box, labels, "ibp")]
        for k in range(10):
            fraction = torch.rand_like(images)
            fraction = fraction.round() if k % 2 else fraction
            logits = net(box.lower + fraction * (box.upper - box.lower))
            for lower, upper in bounds:
                assert (logits >= lower - 1e-9).all() and (logits <= upper + 1e-9).all()
            for difference in differences:
                assert (logit_differences(logits, labels) <= difference + 1e-9).all()


@pytest.mark.parametrize("ends", [(-3.0, 2.0), (-0.5, 4.0), (0.5, 2.0), (-2.0, -0.5), (-1.0, 0.1)])
def test_tanh_relaxation_touches_tanh(ends: tuple[float, float]) -> None:
    box = Box(*torch.tensor(ends, dtype=torch.float64)[:, None])
    x = torch.linspace(*ends, 100_001, dtype=torch.float64)
    linear = relax(nn.Tanh(), box)
    assert linear is not None
    above = linear.upper_slope * x + linear.upper_intercept - x.tanh()
    below = x.tanh() - linear.lower_slope * x - linear.lower_intercept
    assert above.min() < 1e-9 and below.min() < 1e-9


def test_tanh_relaxation_has_minimal_area_when_signs_differ() -> None:
    """No sound tangent, in steps of 0.01, is lower at the midpoint, which is the mean height."""
    for low, high in ((-0.01, 5.99), (-0.5, 4.0), (-3.0, 2.0), (-1.0, 0.1), (-2.0, 2.0)):
        for sign in (1, -1):  # -1 tests the lower bound by symmetry
            ends = sorted((sign * low, sign * high))
            linear = relax(nn.Tanh(), Box(*torch.tensor(ends, dtype=torch.float64)[:, None]))
            assert linear is not None
            middle = sign * (low + high) / 2
            slope, intercept = (
                (linear.upper_slope, linear.upper_intercept)
                if sign > 0
                else (linear.lower_slope, linear.lower_intercept)
            )
            found = sign * (slope * middle + torch.as_tensor(intercept)).item()
            touch = torch.arange(0.0, max(high, 0.01), 0.01, dtype=torch.float64)
            slopes = 1 - touch.tanh() ** 2
            is_sound = touch.tanh() + slopes * (low - touch) >= math.tanh(low)
            heights = (touch.tanh() + slopes * ((low + high) / 2 - touch))[is_sound]
            chord = (math.tanh(low) + math.tanh(high)) / 2
            assert found <= (heights.min().item() if len(heights) else chord) + 1e-9
    linear = relax(nn.Tanh(), Box(*torch.tensor([[-0.01], [5.99]], dtype=torch.float64)))
    assert linear is not None
    x = torch.linspace(-0.01, 5.99, 1001, dtype=torch.float64)
    assert (linear.upper_slope * x + linear.upper_intercept - x.tanh()).max() < 1.0  # 2.0 for the end's tangent


def test_concatenation_and_functions_have_sound_bounds() -> None:
    """The network uses concatenation, functions instead of layers, and constants."""

    class Concatenated(nn.Module):
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
    net = Concatenated().double().eval()
    box = perturbation_box(torch.rand(3, *SHAPE, dtype=torch.float64), 0.05)
    with torch.no_grad():
        for bounds in (ibp_bounds(net, box), crown_bounds(net, box)):
            for _ in range(200):
                logits = net(box.lower + torch.rand_like(box.lower).round() * (box.upper - box.lower))
                assert (logits >= bounds.lower).all() and (logits <= bounds.upper).all()
        # Bounds of the two halves add up.
        halves = [nn.Linear(72, 6).double(), nn.Linear(6, 5).double()]
        halves[0].weight.copy_(net.first.weight)
        halves[0].bias.copy_(net.first.bias + net.offset)
        halves[1].weight.copy_(net.last.weight[:, :6])
        halves[1].bias.copy_(net.last.bias + 0.5)
        relu = ibp_bounds(nn.Sequential(nn.Flatten(), halves[0], nn.ReLU(), halves[1]).eval(), box)
        halves = [nn.Linear(72, 4).double(), nn.Linear(4, 5, bias=False).double()]
        halves[0].load_state_dict(net.second.state_dict())
        halves[1].weight.copy_(-net.last.weight[:, 6:])
        tanh = ibp_bounds(nn.Sequential(nn.Flatten(), halves[0], nn.Tanh(), halves[1]).eval(), box)
        whole = ibp_bounds(net, box)
        torch.testing.assert_close(whole.lower, relu.lower + tanh.lower)
        torch.testing.assert_close(whole.upper, relu.upper + tanh.upper)


WINDOWS = [(k, stride, padding) for k in (1, 2, 3) for stride in (1, 2) for padding in (0, 1) if padding < k]
Window = tuple[int, int, int]


def build_branch(windows: list[Window], is_pooled: bool) -> nn.Sequential:
    layers = [nn.Conv2d(2, 2, k, stride, padding) for k, stride, padding in windows]
    return nn.Sequential(*([nn.MaxPool2d(2, 1), *layers] if is_pooled else layers))


@st.composite
def branches_of_equal_size(draw: st.DrawFn) -> list[nn.Sequential]:
    """Two branches with any strides whose outputs have the same shape, for images (2, 7, 6)."""
    chains = st.lists(st.sampled_from(WINDOWS), min_size=1, max_size=2)
    branches = [build_branch(draw(chains), draw(st.booleans())) for _ in range(6)]
    images = torch.zeros(1, 2, 7, 6)
    sizes = [tuple(branch(images).shape) if _fits(branch, images) else None for branch in branches]
    pairs = [(i, j) for j in range(6) for i in range(j) if sizes[i] is not None and sizes[i] == sizes[j]]
    assume(pairs)
    return [branches[index] for index in draw(st.sampled_from(pairs))]


def _fits(branch: nn.Module, images: torch.Tensor) -> bool:
    try:
        branch(images)
    except RuntimeError:  # a kernel is larger than its input
        return False
    return True


class Branched(nn.Module):
    """The sum or concatenation of two branches from the images, with a ReLU and a linear layer."""

    def __init__(self, branches: list[nn.Sequential], is_sum: bool) -> None:
        super().__init__()
        self.branches, self.is_sum = nn.ModuleList(branches), is_sum
        self.mixed = nn.Conv2d(2 if is_sum else 4, 2, 1)
        self.last = nn.LazyLinear(3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        a, b = (branch(images) for branch in self.branches)
        hidden = a + b if self.is_sum else torch.cat([a, b], dim=1)
        return self.last(self.mixed(hidden.relu()).relu().flatten(1))


@pytest.mark.integration
@given(branches=branches_of_equal_size(), is_sum=st.booleans(), eps=st.floats(0.001, 0.1), seed=st.integers(0, 99))
def test_branches_of_any_strides_have_sound_bounds(
    branches: list[nn.Sequential], is_sum: bool, eps: float, seed: int
) -> None:
    """Windows of coefficients give the same bounds as dense coefficients."""
    torch.manual_seed(seed)
    net, images = Branched(branches, is_sum).double(), torch.rand(2, 2, 7, 6, dtype=torch.float64)
    net(images)
    box = perturbation_box(images, eps)
    with torch.no_grad():
        bounds = crown_bounds(net.eval(), box)
        with mock.patch.object(LinearBounds, "_max_patch_elements", lambda self, name: None):
            dense = crown_bounds(net, box)
        torch.testing.assert_close(bounds.lower, dense.lower)
        torch.testing.assert_close(bounds.upper, dense.upper)
        for _ in range(10):
            logits = net(box.lower + torch.rand_like(images).round() * (box.upper - box.lower))
            assert (logits >= bounds.lower - 1e-9).all() and (logits <= bounds.upper + 1e-9).all()


def test_branches_with_strides_1_and_2_are_not_certified_wrongly() -> None:
    """A stride of 2 with kernel 1, and kernel 2 with stride 1, give maps of one size but read other pixels."""
    first, second, last = nn.Conv2d(1, 1, 1, stride=2), nn.Conv2d(1, 1, 2), nn.Linear(4, 2)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = first, second, last

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.last((self.first(images) + self.second(images)).relu().flatten(1))

    with torch.no_grad():
        for parameter in (first.weight, first.bias, second.weight, second.bias, last.weight, last.bias):
            parameter.zero_()
        first.weight.fill_(1)
        first.bias.fill_(-0.5)
        last.bias[0] = 0.2
        last.weight[1, 3] = 1
    images = torch.full((1, 1, 3, 3), 0.1)
    images[..., 2, 2] = 0.9  # the second logit is 0.4
    for kind in ("crown", "alpha_crown", "complete"):
        assert not certify(Net().eval(), images, torch.tensor([0]), 0.01, kind), kind
        assert certify(Net().eval(), images, torch.tensor([1]), 0.01, kind), kind


def test_invalid_settings_are_rejected() -> None:
    box = perturbation_box(torch.rand(2, *SHAPE), 0.1)
    with pytest.raises(TypeError, match="ibp"):
        crown_bounds(LinfDistMLPConfig(depth=2, width=8).build(SHAPE, 5).eval(), box)
    double = Box(*(corner.double() for corner in box))
    with pytest.raises(TypeError, match="float32"):
        crown_bounds(build_relu_network("dense", 0).double(), double, sound=True)

    class Random(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return functional.relu(images.flatten(1)) + torch.randn(72)

    with pytest.raises(TypeError, match="Random"):
        ibp_bounds(Random().eval(), box)
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(TypeError, match="global forward hooks"):
            ibp_bounds(Random().eval(), box)
    finally:
        hook.remove()
    before = [corner.clone() for corner in box]
    crown_bounds(nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 5)).eval(), box)
    assert all(torch.equal(corner, original) for corner, original in zip(box, before, strict=True))
    with pytest.raises(TypeError, match="Conv2d"):
        ibp_bounds(nn.Sequential(nn.Conv2d(2, 2, 2, padding="same")).eval(), box)
    with pytest.raises(TypeError, match="BatchNorm2d"):
        ibp_bounds(nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)).eval(), box)
    with pytest.raises(TypeError, match="Flatten"):
        ibp_bounds(nn.Sequential(Normalize((0.0,), 1.0), nn.Flatten(0)).eval(), box)
