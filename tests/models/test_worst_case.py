"""Tests of worst-case losses of the baselines: relaxations, loss fusion and regularization."""

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
from linflab.models.robustness.bounds.boxes import Box, perturbation_box
from linflab.models.robustness.bounds.centered import propagate_centered
from linflab.models.robustness.bounds.coefficients import DenseCoefficients, PatchCoefficients
from linflab.models.robustness.bounds.ibp import propagate_bounds, trace_and_check
from linflab.models.robustness.bounds.linear_bounds import LinearBounds
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.bounds.worst_case import WorstCaseBounds, warmup_regularization
from linflab.models.robustness.margins import cross_entropy_from_differences, logit_differences
from linflab.models.robustness.objectives import BoundMethod, WorstCaseCrossEntropyConfig, WorstCaseOutput
from tests.models.real_arithmetic import crown_bounds, crown_logit_differences, ibp_bounds, ibp_logit_differences
from tests.models.relu_networks import RELU_NETS, SHAPE, build_relu_network
from tests.models.test_crown import compute_lower_bounds, compute_reference_bounds, to_affine_chain

every_net = pytest.mark.parametrize("kind", sorted(RELU_NETS))


def make_case(kind: str, seed: int = 1, images: int = 3) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    net = build_relu_network(kind, seed).double()
    return net, torch.rand(images, *SHAPE, dtype=torch.float64), torch.randint(5, (images,))


def sample_points(box: Box) -> torch.Tensor:
    """Return random images in the box, half of them corners, where bounds are often tight."""
    fraction = torch.rand_like(box.lower)
    fraction[::2] = fraction[::2].round()
    return box.lower + fraction * (box.upper - box.lower)


@every_net
@pytest.mark.parametrize("relaxation", ["parallel", "box"])
@pytest.mark.parametrize("eps", [0.003, 0.05, 0.3])
def test_relaxations_match_an_independent_computation(kind: str, relaxation: str, eps: float) -> None:
    net, images, _ = make_case(kind)
    box, chain = perturbation_box(images, eps), to_affine_chain(net)
    with torch.no_grad():
        actual = crown_bounds(net, box, relaxation=relaxation)
    for k in range(len(images)):
        single = Box(box.lower[k : k + 1], box.upper[k : k + 1])
        low, high = compute_reference_bounds(chain, single, "crown", "crown", relaxation)
        np.testing.assert_allclose(actual.lower[k].numpy(), low, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(actual.upper[k].numpy(), high, rtol=1e-9, atol=1e-9)


@every_net
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), eps=st.floats(0, 0.5))
def test_hybrid_zonotopes_are_at_least_as_tight_as_ibp(kind: str, seed: int, eps: float) -> None:
    net, images, labels = make_case(kind, seed)
    box = perturbation_box(images, eps)
    with torch.no_grad():
        ibp, zonotope = ibp_bounds(net, box), crown_bounds(net, box, relaxation="box")
        assert (zonotope.lower >= ibp.lower - 1e-9).all() and (zonotope.upper <= ibp.upper + 1e-9).all()
        differences = crown_logit_differences(net, box, labels, relaxation="box")
        for relaxation in ("parallel", "box"):
            bounds = crown_bounds(net, box, relaxation=relaxation)
            for _ in range(5):
                logits = net(sample_points(box))
                assert (logits >= bounds.lower - 1e-9).all() and (logits <= bounds.upper + 1e-9).all()
                assert (logit_differences(logits, labels) <= differences + 1e-9).all()
    if eps < 0.01:
        assert (zonotope.upper - zonotope.lower).mean() < (ibp.upper - ibp.lower).mean() or eps < 1e-9


class IrregularNet(nn.Module):
    """A network with shapes and branches that test patch coefficients beyond the shipped networks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.near, self.far = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, (3, 5), padding=(1, 2), groups=2)
        self.pool, self.columns = nn.AvgPool2d(2, padding=1), nn.Linear(7, 3)  # over the last dimension of maps
        self.next, self.last = nn.Conv2d(8, 3, 2, padding=1), nn.Linear(45, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem(images))
        x = functional.relu(self.near(x) + self.far(x))
        x = torch.cat([self.pool(x), self.pool(-x)], dim=1)
        x = functional.relu(self.next(functional.relu(x)))
        return self.last(functional.relu(self.columns(x)).flatten(1))


def test_linear_layer_on_maps_has_sound_bounds() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Linear(6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)
    ).eval()
    box = perturbation_box(torch.rand(4, 1, 6, 6), 0.05)
    with torch.no_grad():
        for relaxation in ("adaptive", "parallel", "box"):
            with strict_float32():
                lower, upper = crown_bounds(net, box, sound=True, relaxation=relaxation)
            for _ in range(200):
                logits = net(sample_points(box)).double()
                assert (logits >= lower).all() and (logits <= upper).all()


@pytest.mark.parametrize("relaxation", ["adaptive", "parallel", "box"])
@pytest.mark.parametrize("size", ["small", "cnn7", "residual", "odd"])
def test_patches_match_dense_coefficients(size: str, relaxation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks have padding, strides, batch normalization and a shortcut."""
    torch.manual_seed(0)
    if size == "residual":
        net, shape = build_relu_network("residual", 0).double(), SHAPE
    elif size == "odd":
        net, shape = IrregularNet().double().eval(), (2, 11, 12)
    else:
        config = ConvNetConfig(size="small") if size == "small" else CNN7Config(width=3, hidden_size=8)
        shape = (2, 11, 12)
        net = config.build(shape, 4, (0.4, 0.5), 0.3).double()
        for _ in range(3):
            net(torch.rand(8, *shape, dtype=torch.float64))
        net.eval()
    box = perturbation_box(torch.rand(2, *shape, dtype=torch.float64), 0.02)
    num_patch_calls = 0
    identity = PatchCoefficients.identity

    def count_and_create(*arguments: object) -> PatchCoefficients:
        nonlocal num_patch_calls
        num_patch_calls += 1
        return identity(*arguments)

    with torch.no_grad():
        monkeypatch.setattr(PatchCoefficients, "identity", staticmethod(count_and_create))
        patches = crown_bounds(net, box, relaxation=relaxation)
        monkeypatch.setattr(LinearBounds, "_max_patch_elements", lambda self, name: None)
        num_calls = num_patch_calls
        dense = crown_bounds(net, box, relaxation=relaxation)
    assert num_calls == num_patch_calls > 0
    for actual, expected in zip(patches, dense, strict=True):
        torch.testing.assert_close(actual, expected)


@every_net
@pytest.mark.parametrize("bound", ["ibp", "crown_ibp", "dual", "hybrid_zonotope"])
def test_training_differences_equal_certified_ones(kind: str, bound: BoundMethod) -> None:
    net, images, labels = make_case(kind)
    box = perturbation_box(images, 0.05)
    worst = WorstCaseBounds(net, bound)(images, labels, 0.05, math.inf)
    with torch.no_grad():
        ibp = ibp_logit_differences(net, box, labels)
        expected = {
            "ibp": lambda: ibp,
            "crown_ibp": lambda: crown_logit_differences(net, box, labels, "ibp"),
            "dual": lambda: crown_logit_differences(net, box, labels, relaxation="parallel"),
            "hybrid_zonotope": lambda: crown_logit_differences(net, box, labels, relaxation="box"),
        }[bound]()
    torch.testing.assert_close(worst.logit_difference_bounds, expected)
    torch.testing.assert_close(worst.logits, net(images))
    cross_entropy_from_differences(worst.logit_difference_bounds, labels).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in list(net.parameters())[:-1])
    if bound == "crown_ibp":  # weighted mean with IBP
        weighted = WorstCaseBounds(net, bound)(
            images, labels, 0.05, math.inf, crown_weight=0.25
        ).logit_difference_bounds
        wrong = weighted > -math.inf
        torch.testing.assert_close(weighted[wrong], (0.25 * expected + 0.75 * ibp)[wrong])


@pytest.mark.parametrize("bound", ["ibp", "crown_ibp", "crown_ibp_fused", "dual"])
def test_batch_norm_uses_statistics_of_the_images(bound: BoundMethod) -> None:
    """Compare with a network that has the batch's running statistics; the running statistics are updated."""
    torch.manual_seed(0)
    net = CNN7Config(width=2, hidden_size=6).build((1, 6, 6), 3, (0.4,), 0.3).double()
    images, labels = torch.rand(5, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        net(images)
    frozen_net = CNN7Config(width=2, hidden_size=6).build((1, 6, 6), 3, (0.4,), 0.3).double()
    frozen_net.load_state_dict(net.state_dict())
    worst = WorstCaseBounds(net, bound)(images, labels, 0.03, math.inf)
    assert net.training
    x = images
    with torch.no_grad():
        for layer in frozen_net:
            if isinstance(layer, BatchNorm2d):
                layer.running_mean.copy_(x.mean(dim=(0, 2, 3)))
                layer.running_var.copy_(x.var(dim=(0, 2, 3), unbiased=False))
                layer.eval()
            x = layer(x)
    expected = WorstCaseBounds(frozen_net.eval(), bound)(images, labels, 0.03, math.inf)
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
def test_fused_loss_matches_an_independent_computation(kind: str, eps: float) -> None:
    """Use chords of exp over the IBP logit differences and one backward pass with dense matrices."""
    net, images, labels = make_case(kind)
    box, chain = perturbation_box(images, eps), to_affine_chain(net)
    matrix, constant, _ = chain[-1]
    with torch.no_grad():
        actual = WorstCaseBounds(net, "crown_ibp_fused")(images, labels, eps, math.inf).loss_upper_bound
    assert actual is not None
    for k, y in enumerate(labels.tolist()):
        single = Box(box.lower[k : k + 1], box.upper[k : k + 1])
        ranges = [compute_reference_bounds(chain[: n + 1], single, "ibp", "ibp") for n in range(len(chain))]
        low, high = (np.maximum(end, 0) for end in ranges[-2])
        inner = chain[-2][2]  # outputs that bypass the ReLU
        low[inner:], high[inner:] = ranges[-2][0][inner:], ranges[-2][1][inner:]
        total, coefficients = 1.0, np.zeros(len(matrix))
        for j in range(len(matrix)):
            if j == y:
                continue
            row = matrix[j] - matrix[y]
            middle = row @ (low + high) / 2 + constant[j] - constant[y]
            spread = np.abs(row) @ (high - low) / 2
            slope = (np.exp(middle + spread) - np.exp(middle - spread)) / (2 * spread) if spread else np.exp(middle)
            total += np.exp(middle + spread) - slope * (middle + spread)
            coefficients[j] += slope
            coefficients[y] -= slope
        expected = np.log(total - compute_lower_bounds(-coefficients[None], chain, ranges, single)[0])
        assert actual[k].item() == pytest.approx(expected, rel=1e-6)


@every_net
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), eps=st.floats(0, 0.3))
def test_fused_loss_bounds_every_loss_in_the_box(kind: str, seed: int, eps: float) -> None:
    net, images, labels = make_case(kind, seed)
    with torch.no_grad():
        fused = WorstCaseBounds(net, "crown_ibp_fused")(images, labels, eps, math.inf).loss_upper_bound
        unfused = cross_entropy_from_differences(
            WorstCaseBounds(net, "crown_ibp")(images, labels, eps, math.inf).logit_difference_bounds, labels
        )
        assert fused is not None and fused.isfinite().all()
        for _ in range(10):
            loss = functional.cross_entropy(net(sample_points(perturbation_box(images, eps))), labels, reduction="none")
            assert (loss <= fused + 1e-9).all() and (loss <= unfused + 1e-9).all()
    if eps < 0.001:  # both are close to the loss
        torch.testing.assert_close(fused, unfused, atol=0.02, rtol=0.02)


def test_fused_loss_is_tighter_when_differences_conflict() -> None:
    """One logit falls as the other grows, so their worst cases are at different points."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 3)).double().eval()
    with torch.no_grad():
        for layer, weight, bias in ((net[1], [[1.0]], [1.0]), (net[3], [[0.0], [1.0], [-1.0]], [0.0, -1.5, 1.5])):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
        image, label = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), torch.tensor([0])
        fused = WorstCaseBounds(net, "crown_ibp_fused")(image, label, 0.5, math.inf).loss_upper_bound
        differences = WorstCaseBounds(net, "crown_ibp")(image, label, 0.5, math.inf).logit_difference_bounds
    assert fused is not None
    assert fused.item() == pytest.approx(math.log(1 + 2 * math.cosh(0.5)))  # exact worst-case loss
    assert cross_entropy_from_differences(differences, label).item() == pytest.approx(math.log(1 + 2 * math.exp(0.5)))


def test_fused_loss_is_finite_for_large_differences() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[1].weight.mul_(1e3)
    images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    fused = WorstCaseBounds(net, "crown_ibp_fused")(images, labels, 0.3, math.inf).loss_upper_bound
    assert fused is not None and (fused > 100).all() and fused.isfinite().all()
    fused.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_regularization_applies_at_eps_zero() -> None:
    """The regularization has its largest weight at eps = 0."""
    torch.manual_seed(0)
    net = ConvNetConfig(size="small").build((1, 10, 10), 3, (0.3,), 0.3)
    images, labels = torch.rand(4, 1, 10, 10), torch.tensor([0, 1, 2, 0])
    small, zero = (
        WorstCaseBounds(net)(images, labels, eps, math.inf, with_regularization=True).regularization
        for eps in (1e-5, 0.0)
    )
    assert isinstance(small, torch.Tensor) and small > 0.5
    torch.testing.assert_close(zero, small, rtol=0.02, atol=0)


def test_regularization_matches_by_hand() -> None:
    net, images, _ = make_case("convolutional", 3, 6)
    box = perturbation_box(images, 0.05)
    traced = trace_and_check(net, box)
    with torch.no_grad():
        boxes = propagate_bounds(traced, box)
        actual = warmup_regularization(traced, propagate_centered(traced, box)).item()
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
    assert layers == 2 and actual == pytest.approx(expected / (0.5 * layers))


def test_loss_weights_follow_eps() -> None:
    config = WorstCaseCrossEntropyConfig(
        eps_train=0.2,
        worst_case_weight_start=0.0,
        worst_case_weight=0.6,
        warmup_reg_weight=0.5,
        bound="crown_ibp",
        crown_weight_start=0.8,
        crown_weight_end=0.2,
    )
    objective, labels = config.build(math.nan), torch.tensor([1, 0])
    z = torch.randn(2, 3)
    worst = WorstCaseOutput(z, logit_differences(z, labels) + 0.7, regularization=torch.tensor(2.0))
    clean, bounded = (
        functional.cross_entropy(z, labels),
        cross_entropy_from_differences(worst.logit_difference_bounds, labels).mean(),
    )
    for eps, weight, regularization, crown_weight in ((0.0, 0.0, 1.0, 0.8), (0.1, 0.3, 0.5, 0.5), (0.2, 0.6, 0.0, 0.2)):
        expected = weight * bounded + (1 - weight) * clean + regularization
        torch.testing.assert_close(objective(worst, labels, 0.0, eps), expected)
        assert objective.crown_weight(eps) == pytest.approx(crown_weight)
    assert WorstCaseCrossEntropyConfig(eps_train=0.1, bound="dual").build(math.nan).crown_weight(0.1) == 1.0


def test_difference_bounds_match_class_by_class() -> None:
    net, images, labels = make_case("dense")
    box = perturbation_box(images, 0.05)
    bounds = LinearBounds(trace_and_check(net, box), box, "ibp")
    with torch.no_grad():
        differences = bounds.logit_differences(labels)
        for k, y in enumerate(labels.tolist()):
            for j in range(5):
                row = torch.zeros(1, 1, 5, dtype=torch.float64)
                row[0, 0, y] += 1
                row[0, 0, j] -= 1
                expected = (
                    -bounds.lower(bounds.output, DenseCoefficients(row))[k, 0] if j != y else torch.tensor(-math.inf)
                )
                assert differences[k, j].item() == pytest.approx(expected.item())
