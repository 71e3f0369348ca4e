"""Tests of TAPS against independent float64 computations."""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from linflab.models.networks import NetworkConfig
from linflab.models.networks.convnets import WideResNetConfig
from linflab.models.networks.hybrid import LinfDistHybrid
from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.steps import compute_output
from linflab.models.robustness.bounds.two_part import TwoPartBounds
from linflab.models.robustness.margins import cross_entropy_from_differences
from linflab.models.robustness.objectives import (
    Batch,
    SABRConfig,
    STAPSConfig,
    TAPSConfig,
    WorstCaseCrossEntropyConfig,
    latent_attack,
)
from linflab.models.robustness.objectives.latent_attack import attacked_differences, find_worst_points, link_to_box
from linflab.models.robustness.objectives.taps import LatentAttackConfig
from tests.models.relu_networks import RELU_NETS, SHAPE, build_relu_network

EPS = 0.05


def make_batch(
    network: nn.Module, config: LatentAttackConfig, shape: Sequence[int], classes: int, count: int = 6
) -> Batch:
    objective = config.build(math.nan)
    objective.prepare(network, shape)
    images, labels = torch.rand(count, *shape, dtype=torch.float64), torch.arange(count) % classes
    starts = objective.draw_starts(images.shape, torch.Generator().manual_seed(0))
    starts = starts if starts is None else starts.double()
    return Batch(images, labels, math.inf, None, 0.0, config.eps_train, starts)


def draw_latent_starts(batch: Batch, latent: Box, restarts: int = 1) -> Tensor:
    return batch.draw_uniform((restarts, *latent.lower.shape[1:]))


def compute_loss(network: nn.Module, config: LatentAttackConfig, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Return loss and gradients of all parameters."""
    objective = config.build(math.nan)
    objective.prepare(network, batch.images.shape[1:])
    loss = objective.loss(network, batch)
    return loss.detach(), list(torch.autograd.grad(loss, list(network.parameters())))


def build_convex_net(hidden: int) -> nn.Sequential:
    """Return a net whose logit differences to class 0 are convex functions of its first activations."""
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 8), nn.ReLU(), nn.Linear(8, 3)
    ).double()
    with torch.no_grad():
        net[5].weight[0] = 0
        net[5].weight[1:].abs_()
        net[1].weight.mul_(4)
        net[3].weight.mul_(3)
    return net


@pytest.mark.parametrize("weight", [0.5, 5.0])
def test_loss_and_gradients_match_exact_maxima(weight: float) -> None:
    """The maxima are at corners of the latent box, which are enumerated; IBP is computed by hand."""
    net, hidden = build_convex_net(2), 2
    config = TAPSConfig(eps_train=0.2, latent_restarts=16, latent_steps=10, taps_gradient_weight=weight)
    batch = make_batch(net, config, (1, 2, 2), 1)
    actual, gradients = compute_loss(net, config, batch)
    x = batch.images.flatten(1)
    low, high = (x - 0.2).clamp(0, 1), (x + 0.2).clamp(0, 1)
    first, second, last = net[1], net[3], net[5]

    def affine(layer: nn.Linear, box: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        positive, negative = layer.weight.clamp_min(0), layer.weight.clamp_max(0)
        return (
            box[0] @ positive.T + box[1] @ negative.T + layer.bias,
            box[1] @ positive.T + box[0] @ negative.T + layer.bias,
        )

    latent = tuple(bound.tanh() for bound in affine(first, (low, high)))
    inner = tuple(bound.relu() for bound in affine(second, latent))
    rows, offsets = last.weight[1:] - last.weight[0], last.bias[1:] - last.bias[0]
    bounds = inner[1] @ rows.clamp_min(0).T + inner[0] @ rows.clamp_max(0).T + offsets
    corners = torch.stack(
        [
            second(torch.stack([latent[side][:, k] for k, side in enumerate(sides)], 1)).relu() @ rows.T + offsets
            for sides in product((0, 1), repeat=hidden)
        ]
    )
    exact = corners.amax(dim=0)
    taps, ibp = (torch.log1p(d.exp().sum(dim=1)).mean() for d in (exact, bounds))
    assert exact.mean() < bounds.mean() - 0.01  # the losses differ
    torch.testing.assert_close(actual, (taps * ibp).detach(), rtol=1e-6, atol=0)
    parameters = list(net.parameters())
    of_taps, of_ibp = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (taps, ibp))
    for gradient, one, other in zip(gradients, of_taps, of_ibp, strict=True):
        expected = 2 * (weight * ibp * one + taps * other) / (1 + weight)
        torch.testing.assert_close(gradient, expected.detach(), rtol=1e-6, atol=1e-9)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1))
def test_gradients_of_bounds_match_the_estimator(seed: int, fade: float) -> None:
    torch.manual_seed(seed)
    lower = torch.randn(2, 3, dtype=torch.float64)
    upper = lower + torch.rand(2, 3, dtype=torch.float64) * (torch.rand(2, 3) > 0.2)
    shares = torch.rand(4, 2, 3, dtype=torch.float64)
    shares[::2] = shares[::2].round()
    points, slopes = lower + shares * (upper - lower), torch.randn(4, 2, 3, dtype=torch.float64)
    box = Box(lower.requires_grad_(), upper.requires_grad_())
    linked = link_to_box(box, points.detach(), fade)
    assert torch.equal(linked, points)
    actual = torch.autograd.grad((slopes * linked).sum(), box)
    expected = np.zeros((2, 2, 3))
    for j, b, i in np.ndindex(4, 2, 3):
        low, high, x = lower[b, i].item(), upper[b, i].item(), points[j, b, i].item()
        shares_of_bounds = (0.5, 0.5)
        if high > low:
            rest = fade * (high - low)
            shares_of_bounds = (max(0.0, (low + rest - x) / rest), max(0.0, (x - high + rest) / rest))
        for side, share in enumerate(shares_of_bounds):
            expected[side, b, i] += share * slopes[j, b, i].item()
    np.testing.assert_allclose(torch.stack(actual).numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(RELU_NETS))
@pytest.mark.parametrize("training", [False, True])
def test_attacks_stay_in_the_box_and_below_ibp(kind: str, training: bool) -> None:
    """Whatever the cut is, the second part maps the clean latent values to the clean logits."""
    net = build_relu_network(kind, 1).double().train(training)
    config = TAPSConfig(eps_train=EPS)
    total = {"dense": 2, "convolutional": 2, "batchnorm": 2, "residual": 3}[kind]
    for activations in range(total + 1):
        config = TAPSConfig(eps_train=EPS, attacked_activations=activations, latent_steps=5, latent_restarts=2)
        batch = make_batch(net, config, SHAPE, 5)
        worst, latent, second = TwoPartBounds(net, activations).propagate(batch.images, batch.labels, EPS, math.inf)
        starts = draw_latent_starts(batch, latent, 2)
        targets = (batch.labels + torch.tensor([[1], [3]])) % 5
        points = find_worst_points(second, latent, batch.labels, targets, starts, 5)
        assert ((points >= latent.lower) & (points <= latent.upper)).all()
        found = attacked_differences(second, latent, batch.labels, 5, starts, 5, 0.5)
        assert (found <= worst.logit_difference_bounds + 1e-9).all()
        assert torch.equal(found.isinf(), worst.logit_difference_bounds.isinf())
        clean = TwoPartBounds(net, activations).propagate(batch.images, batch.labels, 0.0, math.inf)
        torch.testing.assert_close(compute_output(clean.second, clean.latent.lower), clean.worst.logits)
        if activations == 0:
            torch.testing.assert_close(found, worst.logit_difference_bounds)
        elif activations == total:
            assert torch.equal(latent.lower, (batch.images - EPS).clamp(0, 1))
            assert found.isfinite().sum() and (found < worst.logit_difference_bounds - 0.01).any()
        loss, gradients = compute_loss(net, config, batch)
        expected = cross_entropy_from_differences(found, batch.labels).mean()
        expected *= cross_entropy_from_differences(worst.logit_difference_bounds, batch.labels).mean()
        torch.testing.assert_close(loss, expected.detach())
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("size", [1, 2**26])
def test_dropout_masks_belong_to_their_samples(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a linear second part behind dropout, attacks find the IBP bounds, also chunk by chunk."""
    monkeypatch.setattr(latent_attack, "MAX_LATENT_ELEMENTS", size)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(72, 30), nn.ReLU(), nn.Dropout(), nn.Linear(30, 9), nn.Dropout(0.2), nn.Linear(9, 5)
    ).double()
    config = TAPSConfig(eps_train=EPS, attacked_activations=0)
    batch = make_batch(net, config, SHAPE, 5)
    parts = TwoPartBounds(net, 0).propagate(batch.images, batch.labels, EPS, math.inf)
    points = torch.rand(4, *parts.latent.lower.shape, dtype=torch.float64)
    together = compute_output(parts.second, points.flatten(0, 1), 4).unflatten(0, (4, -1))
    for values, logits in zip(points, together, strict=True):
        torch.testing.assert_close(compute_output(parts.second, values), logits)
    starts = draw_latent_starts(batch, parts.latent)
    found = attacked_differences(parts.second, parts.latent, batch.labels, 5, starts, 20, 0.5)
    assert (found <= parts.worst.logit_difference_bounds + 1e-9).all()
    gradients = torch.autograd.grad(found.relu().sum(), list(net.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in gradients[:-1])


def test_chunks_of_classes_give_equal_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    net, config = build_relu_network("batchnorm", 3).double().train(), TAPSConfig(eps_train=EPS)
    batch = make_batch(net, config, SHAPE, 5)
    whole = compute_loss(net, config, batch)
    monkeypatch.setattr(latent_attack, "MAX_LATENT_ELEMENTS", 1)
    chunked = compute_loss(net, config, batch)
    torch.testing.assert_close(chunked, whole)


def test_ramp_is_ibp_with_clean_loss_and_regularization() -> None:
    net = build_relu_network("convolutional", 0).double()
    config = TAPSConfig(eps_train=EPS, natural_weight=0.3, warmup_reg_weight=0.5, latent_restarts=3)
    batch = make_batch(net, config, SHAPE, 5)
    objective = config.build(math.nan)
    ibp = WorstCaseCrossEntropyConfig(eps_train=EPS, worst_case_weight=0.7, warmup_reg_weight=0.5).build(math.nan)
    for eps in (0.0, EPS / 3):
        ramp = batch._replace(eps=eps)
        torch.testing.assert_close(objective.loss(net, ramp), ibp.loss(net, ramp))
    clean = nn.functional.cross_entropy(net(batch.images), batch.labels)
    robust, _ = compute_loss(net, config.model_copy(update={"natural_weight": 0.0}), batch)
    torch.testing.assert_close(objective.loss(net, batch), 0.7 * robust + 0.3 * clean)


def build_hybrid() -> LinfDistHybrid:
    torch.manual_seed(0)
    config = NetworkConfig.registry["linf_dist_hybrid"](
        backbone={"kind": "linf_dist_mlp", "depth": 3, "width": 10}, hidden_size=7
    )
    net = config.build(SHAPE, 5, (0.4, 0.5), 0.4).double()
    assert isinstance(net, LinfDistHybrid)
    return net


@pytest.mark.parametrize("activations", [0, 1])
def test_hybrid_is_cut_at_its_features_or_in_its_head(activations: int) -> None:
    net = build_hybrid()
    settings = TAPSConfig(eps_train=EPS, attacked_activations=activations)
    batch = make_batch(net, settings, SHAPE, 5)
    worst, latent, second = TwoPartBounds(net, activations).propagate(batch.images, batch.labels, EPS, 16.0)
    features = net.features(batch.images, 16.0)
    ends = [features - EPS / 0.4, features + EPS / 0.4]
    if activations == 0:
        weight, bias = net.head[0].weight / math.sqrt(10), net.head[0].bias
        center, radius = features @ weight.T + bias, EPS / 0.4 * weight.abs().sum(dim=1)
        ends = [(center - radius).tanh(), (center + radius).tanh()]
    torch.testing.assert_close(latent, Box(*ends))
    found = attacked_differences(second, latent, batch.labels, 5, draw_latent_starts(batch, latent), 20, 0.5)
    wrong = found > -math.inf
    gap = (worst.logit_difference_bounds - found)[wrong]
    assert gap.min() > -1e-9
    assert gap.max() < 1e-9 if activations == 0 else gap.mean() > 0.1


def build_net(kind: str) -> nn.Module:
    return build_hybrid() if kind == "hybrid" else build_relu_network(kind, 2).double().train()


@pytest.mark.parametrize("kind", ["batchnorm", "hybrid"])
def test_staps_of_the_whole_box_is_taps(kind: str) -> None:
    net = build_net(kind)
    taps = TAPSConfig(eps_train=EPS, latent_restarts=2)
    staps = STAPSConfig(eps_train=EPS, latent_restarts=2, box_ratio=1.0, restarts=3, steps=2)
    batch = make_batch(net, staps, SHAPE, 5)._replace(p=16.0)
    torch.testing.assert_close(compute_loss(net, staps, batch), compute_loss(net, taps, batch._replace(starts=None)))
    smaller, _ = compute_loss(net, staps.model_copy(update={"box_ratio": 0.3}), batch)
    assert smaller < 0.9 * compute_loss(net, staps, batch)[0]


@pytest.mark.parametrize("kind", ["batchnorm", "hybrid"])
@pytest.mark.parametrize("statistics", ["clean", "adversarial"])
def test_staps_propagates_the_box_of_sabr(kind: str, statistics: str) -> None:
    """With a linear second part, both factors are SABR's loss, which is tested against independent bounds.

    Each loss updates the running statistics of its own copy, since attacks use them.
    """
    net = build_net(kind)
    shared = {"eps_train": EPS, "box_ratio": 0.4, "restarts": 2, "batch_norm_statistics": statistics,
              "attack_eps_factor": 1.2, "relu_shrink": 1.0 if kind == "hybrid" else 0.8}  # fmt: skip
    config = STAPSConfig(**shared, attacked_activations=0)
    batch = make_batch(net, config, SHAPE, 5)._replace(p=16.0)

    def compute_sabr(eps: float, natural_weight: float) -> float:
        objective = SABRConfig(**shared, natural_weight=natural_weight).build(math.nan)
        return objective.loss(copy.deepcopy(net), batch._replace(eps=eps)).item()

    def compute_staps(eps: float, natural_weight: float) -> float:
        objective = config.model_copy(update={"natural_weight": natural_weight}).build(math.nan)
        objective.prepare(net, SHAPE)
        return objective.loss(copy.deepcopy(net), batch._replace(eps=eps)).item()

    for weight in (0.0, 0.3):
        assert compute_staps(EPS / 2, weight) == pytest.approx(compute_sabr(EPS / 2, weight))
    robust, clean = compute_sabr(EPS, 0.0), compute_sabr(EPS, 1.0)
    assert compute_staps(EPS, 0.3) == pytest.approx(0.7 * robust**2 + 0.3 * clean)


def build_linear_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 5))


@pytest.mark.parametrize(
    ("build", "activations", "valid"),
    [
        (build_linear_net, 1, "0"),
        (lambda: build_relu_network("dense", 0), 3, "2"),
        (lambda: WideResNetConfig(widen_factor=1).build(SHAPE, 5), 2, "0, 1, 3, 5, 7"),
        (lambda: NetworkConfig.registry["linf_dist_mlp"](depth=2, width=4).build(SHAPE, 5), 1, "linf_dist_hybrid"),
    ],
)
def test_impossible_cuts_are_rejected(build: Callable[[], nn.Module], activations: int, valid: str) -> None:
    with pytest.raises(ValueError, match=f"^attacked_activations={activations}: .*{valid}"):
        TAPSConfig(eps_train=EPS, attacked_activations=activations).build(math.nan).prepare(build(), SHAPE)
    with torch.device("meta"), pytest.raises(ValueError, match=f"^attacked_activations={activations}: .*{valid}"):
        TAPSConfig(eps_train=EPS, attacked_activations=activations).check_network(build(), SHAPE)


def test_latent_starts_are_drawn_only_for_the_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    net = build_relu_network("dense", 0).double()
    config = TAPSConfig(eps_train=EPS, attacked_activations=2, latent_steps=1)
    batch, objective, sizes, draw = make_batch(net, config, SHAPE, 5), config.build(math.nan), list[Any](), torch.rand

    def record(size: Any, **settings: Any) -> Tensor:
        sizes.append(tuple(size))
        return draw(size, **settings)

    monkeypatch.setattr(torch, "rand", record)
    ramp = {objective.loss(net, batch._replace(eps=0.99 * EPS, seed=seed)).item() for seed in (1, 2)}
    assert len(ramp) == 1 and not sizes
    full = {objective.loss(net, batch._replace(seed=seed)).item() for seed in (1, 2, 1)}
    assert len(full) == 2 and sizes == [(6, 1, *SHAPE)] * 3


def test_workers_draw_the_numbers_of_their_samples() -> None:
    batch = Batch(torch.rand(6, *SHAPE), torch.zeros(6, dtype=torch.int64), math.inf, None, 0.0, EPS, None, seed=3)
    whole = batch.draw_uniform((4, 2))
    assert whole.shape == (6, 4, 2) and len(whole.unique()) == 48 and 0.3 < whole.mean() < 0.7
    for rank in range(3):
        part = batch._replace(images=batch.images[rank::3], rank=rank, workers=3)
        assert torch.equal(part.draw_uniform((4, 2)), whole[rank::3])
