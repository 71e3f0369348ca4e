"""Tests of dual bounds with any multipliers, and of the objective whose verifier network predicts them."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.networks.linf_dist import LinfDistMLPConfig
from linflab.models.robustness.bounds.boxes import perturbation_box
from linflab.models.robustness.bounds.dual_bound import dual_bound
from linflab.models.robustness.bounds.ibp import logit_difference_ranges, propagate_bounds, trace_and_check
from linflab.models.robustness.bounds.linear_bounds import LinearBounds
from linflab.models.robustness.bounds.loss_fusion import fused_cross_entropy
from linflab.models.robustness.bounds.steps import TraceStep
from linflab.models.robustness.bounds.worst_case import WorstCaseBounds
from linflab.models.robustness.margins import logit_differences
from linflab.models.robustness.objectives import PVT, Batch, PVTConfig
from tests.models.real_arithmetic import crown_logit_differences
from tests.models.relu_networks import RELU_NETS, SHAPE, build_relu_network
from tests.models.test_crown import to_affine_chain
from tests.models.test_worst_case import sample_points

every_chain = pytest.mark.parametrize("kind", [kind for kind in RELU_NETS if kind != "residual"])


def make_objective(net: nn.Module, noise: float = 0.0, eps: float = 0.05, **settings: float) -> PVT:
    """Return an objective in float64 with normally distributed noise on all parameters of its verifier."""
    objective = PVTConfig(eps_train=eps, **settings).build(math.nan)
    objective.prepare(net, SHAPE)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return objective.double()


def select_difference_functions(labels: Tensor, classes: int) -> Tensor:
    """Return the functions z_j - z_y of the logits, (B, K, K)."""
    identity = torch.eye(classes, dtype=torch.float64)
    return identity[None] - identity[labels][:, None]


def bound_differences(objective: PVT, net: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    traced, values = WorstCaseBounds(net).trace_batch(images)
    boxes = propagate_bounds(traced, perturbation_box(images, eps))
    return objective.bound_functions(traced, values, boxes, select_difference_functions(labels, 5))


def compute_loss(objective: PVT, net: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    return objective.loss(net, Batch(images, labels, math.inf, None, 0.0, eps, None))


@every_chain
@pytest.mark.parametrize("eps", [0.0, 0.02, 0.3])
def test_dual_bound_matches_an_independent_computation(kind: str, eps: float) -> None:
    """Maximize the Lagrangian neuron by neuron with dense matrices, for normally distributed multipliers."""
    net = build_relu_network(kind, 1).double()
    images, functions = torch.rand(3, *SHAPE, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)
    box, chain, drawn = perturbation_box(images, eps), to_affine_chain(net), list[np.ndarray]()

    def draw(step: TraceStep, a: Tensor) -> Tensor:
        drawn.insert(0, torch.randn_like(a).flatten(2).numpy())
        return torch.from_numpy(drawn[0]).view_as(a)

    with torch.no_grad():
        traced = trace_and_check(net, box)
        actual = dual_bound(traced, propagate_bounds(traced, box), functions, draw)
    for b in range(3):
        for r in range(2):
            low, high = (end[b].flatten().numpy() for end in box)
            multipliers, total = [*(mu[b, r] for mu in drawn), functions[b, r].numpy()], 0.0
            for k, (matrix, constant, _) in enumerate(chain):
                a, mu = matrix.T @ multipliers[k], multipliers[k - 1]
                total += multipliers[k] @ constant
                for i in range(len(a)):
                    if k == 0:
                        total += max(a[i] * low[i], a[i] * high[i])
                        continue
                    points = [low[i], high[i]] + ([0.0] if low[i] < 0 < high[i] else [])
                    total += max(a[i] * max(z, 0.0) - mu[i] * z for z in points)
                if k:
                    low, high = np.maximum(low, 0), np.maximum(high, 0)
                positive, negative = np.maximum(matrix, 0), np.minimum(matrix, 0)
                low, high = positive @ low + negative @ high + constant, positive @ high + negative @ low + constant
            assert actual[b, r].item() == pytest.approx(total, rel=1e-9)


def find_exact_maximum(net: nn.Sequential, low: float, high: float, function: Tensor) -> float:
    """Return the exact maximum over an interval of a function of a network with one input and two hidden layers."""

    def find_zeros(layers: nn.Sequential, points: list[float]) -> list[float]:
        """Return the zeros of functions that are linear between the points."""
        zeros = []
        for left, right in pairwise(points):
            start, end = (layers(torch.tensor([[x]], dtype=torch.float64))[0].tolist() for x in (left, right))
            zeros += [left - f * (right - left) / (g - f) for f, g in zip(start, end, strict=True) if f * g < 0]
        return sorted({*points, *zeros})

    points = find_zeros(net[:3], find_zeros(net[:1], [low, high]))
    return max((net(torch.tensor([[x]], dtype=torch.float64))[0] @ function).item() for x in points)


@given(seed=st.integers(0, 2**32 - 1), eps=st.floats(0.01, 0.5), scale=st.floats(0, 3))
def test_dual_bound_is_above_the_exact_maximum(seed: int, eps: float, scale: float) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double().eval()
    image, functions = torch.full((1, 1), 0.5, dtype=torch.float64), torch.randn(1, 1, 3, dtype=torch.float64)
    box = perturbation_box(image, eps)
    with torch.no_grad():
        traced = trace_and_check(net, box)
        boxes = propagate_bounds(traced, box)
        exact = find_exact_maximum(net, box.lower.item(), box.upper.item(), functions[0, 0])
        bound = dual_bound(
            traced, boxes, functions, lambda step, a: scale * torch.randn_like(a) + torch.rand_like(a) * a
        )
    assert bound.item() >= exact - 1e-9


@every_chain
def test_untrained_verifier_gives_the_parallel_relaxation(kind: str) -> None:
    """Multipliers without corrections are those of Wong and Kolter with IBP boxes."""
    net = build_relu_network(kind, 2).double()
    images, labels = torch.rand(6, *SHAPE, dtype=torch.float64), torch.arange(6) % 5
    objective, box = make_objective(net), perturbation_box(images, 0.05)
    with torch.no_grad():
        actual = bound_differences(objective, net, images, labels, 0.05)
        expected = crown_logit_differences(net, box, labels, "ibp", relaxation="parallel")
        wrong = expected > -math.inf
        torch.testing.assert_close(actual[wrong], expected[wrong])
        traced = trace_and_check(net, box)
        boxes = propagate_bounds(traced, box)
        center, spread = logit_difference_ranges(traced, boxes, labels)
        bounds = LinearBounds(traced, box, "ibp", "parallel", boxes=boxes)
        fused = fused_cross_entropy(bounds, center - spread, center + spread, labels).mean()
    torch.testing.assert_close(compute_loss(objective, net, images, labels, 0.05), fused)
    clean = functional.cross_entropy(net(images), labels)
    half = compute_loss(make_objective(net, worst_case_weight=0.5), net, images, labels, 0.05)
    torch.testing.assert_close(half, (fused + clean) / 2)
    torch.testing.assert_close(compute_loss(objective, net, images, labels, 0.0), clean)  # the weight starts at 0


@every_chain
@given(seed=st.integers(0, 2**32 - 1), eps=st.floats(0, 0.3), noise=st.floats(0, 1))
def test_any_verifier_bounds_every_point_in_the_box(kind: str, seed: int, eps: float, noise: float) -> None:
    net = build_relu_network(kind, seed).double()
    images, labels = torch.rand(3, *SHAPE, dtype=torch.float64), torch.randint(5, (3,))
    objective = make_objective(net, noise, eps=max(eps, 1e-3), worst_case_weight_start=1)
    with torch.no_grad():
        differences = bound_differences(objective, net, images, labels, eps)
        loss = compute_loss(objective, net, images, labels, eps)
        for _ in range(10):
            logits = net(sample_points(perturbation_box(images, eps)))
            assert (logit_differences(logits, labels) <= differences + 1e-9).all()
            assert functional.cross_entropy(logits, labels) <= loss + 1e-9


@every_chain
def test_verifier_learns_tighter_bounds(kind: str) -> None:
    """The network is fixed. Trained multipliers beat untrained and random ones, also on images not trained on."""
    net = build_relu_network(kind, 3).double()
    objective = make_objective(net, worst_case_weight_start=1)
    weights = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.Adam(objective.parameters(), 0.02)
    images = torch.rand(64, *SHAPE, dtype=torch.float64)
    labels = net(images).argmax(dim=1)
    train, test = (images[:32], labels[:32], 0.05), (images[32:], labels[32:], 0.05)
    random = make_objective(net, 1.0)
    with torch.no_grad():
        before, noisy = (bound_differences(one, net, *test).mean() for one in (objective, random))
    for _ in range(40):
        optimizer.zero_grad()
        compute_loss(objective, net, *train).backward()
        optimizer.step()
    after = bound_differences(objective, net, *test).mean()
    assert after < before - 0.02 * before.abs() and after < noisy
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in weights.items())


def test_objective_keeps_the_verifier_out_of_the_network() -> None:
    net = build_relu_network("batchnorm", 0).train()
    names = set(net.state_dict())
    objective = PVTConfig(eps_train=0.1).build(math.nan)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    objective.prepare(net, SHAPE)
    assert net.training and set(net.state_dict()) == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert len(list(objective.parameters())) > 0
    assert all(name.startswith("verifier.") for name in objective.state_dict())


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (RELU_NETS["residual"](), "shortcuts"),
        (nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.Tanh(), nn.Linear(5, 5)), "Tanh"),
        (nn.Sequential(nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 5)), "MaxPool2d"),
        (nn.Sequential(nn.Flatten(), nn.Linear(72, 5)), "ReLU"),
        (LinfDistMLPConfig(depth=2, width=5).build(SHAPE, 5), "distance layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_networks_are_rejected(net: nn.Module, reason: str) -> None:
    with pytest.raises(TypeError, match=rf"^objective\.kind=pvt: .*{reason}"):
        PVTConfig(eps_train=0.1).build(math.nan).prepare(net, SHAPE)
    with pytest.raises(TypeError, match=rf"^objective\.kind=pvt: .*{reason}"):
        PVTConfig(eps_train=0.1).check_network(net, SHAPE)
