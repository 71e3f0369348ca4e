"""Tests of SABR, MTL-IBP, CC-IBP and EXP-IBP against explicit interval arithmetic in float64."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.networks import NetworkConfig
from linflab.models.networks.convnets import ConvNetConfig
from linflab.models.networks.hybrid import LinfDistHybrid, LinfDistHybridConfig
from linflab.models.networks.layers import ScaledLinear
from linflab.models.networks.linf_dist import LinfDistMLPConfig
from linflab.models.networks.sort_net import sample_masks
from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.rules import propagate_layer
from linflab.models.robustness.bounds.steps import ShrunkReLU
from linflab.models.robustness.bounds.worst_case import WorstCaseBounds
from linflab.models.robustness.margins import log_cross_entropy_from_differences, logit_differences
from linflab.models.robustness.objectives import (
    AdversarialCrossEntropyConfig,
    Batch,
    ObjectiveConfig,
    WorstCaseCrossEntropyConfig,
)
from tests.models.conformance.cases import MLP, SETTINGS, SHAPE, SORT, build_network, make_labeled_images

EPS, RESTARTS = 0.06, 2
WEIGHTS = {"sabr": "box_ratio", "mtl_ibp": "alpha", "cc_ibp": "alpha", "exp_ibp": "alpha"}
METHODS = tuple(WEIGHTS)


def build_net(batch_norm: bool) -> nn.Sequential:
    torch.manual_seed(3)
    layers: list[nn.Module] = [nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 8)]
    layers += [nn.ReLU(), nn.Linear(8, 4)]
    if batch_norm:
        layers[1:1] = [nn.BatchNorm2d(3)]
        layers[5:5] = [nn.BatchNorm1d(8, affine=False)]
        nn.init.normal_(layers[1].weight)
    net = nn.Sequential(*layers).double()
    for _ in range(5):
        net(torch.rand(16, *SHAPE, dtype=torch.float64))
    return net.train()


def make_batch(restarts: int = 1, count: int = 6) -> Batch:
    images, labels = make_labeled_images(count)
    torch.manual_seed(5)
    images = (images + 0.2 * torch.randn_like(images)).clamp(0, 1).double()  # also pixels at the ends of [0, 1]
    shape = images.shape if restarts == 1 else (count, restarts, *SHAPE)
    return Batch(images, labels, math.inf, None, 0.0, EPS, torch.rand(shape, dtype=torch.float64))


def attack_by_hand(net: nn.Module, batch: Batch, eps: float, sizes: list[float], restarts: int) -> Tensor:
    """Return the adversarial images of a ReLU network with running statistics."""
    net.eval()
    low, high = (batch.images - eps).clamp(0, 1), (batch.images + eps).clamp(0, 1)
    ends = []
    for k in range(restarts):
        x = low + (high - low) * (batch.starts if restarts == 1 else batch.starts[:, k])
        for size in sizes:
            x = x.detach().requires_grad_()
            functional.cross_entropy(net(x), batch.labels, reduction="sum").backward()
            x = (x + size * eps * x.grad.sign()).clamp(low, high)
        ends.append(x.detach())
    losses = torch.stack([functional.cross_entropy(net(x), batch.labels, reduction="none") for x in ends])
    net.train()
    net.zero_grad()
    return torch.stack(ends)[losses.argmax(dim=0), torch.arange(len(batch.labels))]


def effective_weight(layer: nn.Module) -> Tensor:
    return layer.weight / math.sqrt(layer.in_features) if isinstance(layer, ScaledLinear) else layer.weight


class Propagation:
    """Values, lower and upper bounds after all layers, by positive and negative parts of the weights."""

    def __init__(self, net: nn.Sequential, statistics: Tensor, low: Tensor, high: Tensor, shrink: float = 1.0) -> None:
        *hidden, last = net
        self.steps: list[Callable[[Tensor], Tensor]] = []
        for layer in hidden:
            low, high = self.propagate(layer, statistics, low, high, shrink)
            statistics = self.steps[-1](statistics)
        self.last, self.low, self.high = last, low, high

    def propagate(
        self, layer: nn.Module, values: Tensor, low: Tensor, high: Tensor, shrink: float
    ) -> tuple[Tensor, Tensor]:
        if isinstance(layer, nn.Tanh):
            self.steps.append(torch.tanh)
            return torch.tanh(low), torch.tanh(high)
        if isinstance(layer, nn.ReLU):
            self.steps.append(lambda x: x.clamp(min=0))
            unstable = (low < 0) & (high > 0)
            return low.clamp(min=0), high.clamp(min=0) * (1 + (shrink - 1) * unstable.double())
        if isinstance(layer, nn.Flatten):
            self.steps.append(lambda x: x.flatten(1))
            return low.flatten(1), high.flatten(1)
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            rows = values.transpose(0, 1).flatten(1)  # a row for each feature or channel
            scale = (rows.var(dim=1, unbiased=False) + 1e-5) ** -0.5
            mean, offset = rows.mean(dim=1), 0.0
            if layer.affine:
                scale, offset = scale * layer.weight, layer.bias
            shape = (-1, 1, 1) if values.dim() == 4 else (-1,)
            scale, offset = scale.view(shape), (offset - mean * scale).view(shape)
            self.steps.append(lambda x: x * scale + offset)
            ends = low * scale + offset, high * scale + offset
            return torch.minimum(*ends), torch.maximum(*ends)

        def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if isinstance(layer, nn.Linear):
                return functional.linear(x, weight, bias)
            return functional.conv2d(x, weight, bias, layer.stride, layer.padding)

        weight = effective_weight(layer)
        positive, negative = weight.clamp(min=0), weight.clamp(max=0)
        self.steps.append(lambda x: apply(x, weight, layer.bias))
        return (
            apply(low, positive, layer.bias) + apply(high, negative, None),
            apply(high, positive, layer.bias) + apply(low, negative, None),
        )

    def logits(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x @ effective_weight(self.last).T + self.last.bias

    def worst_differences(self, labels: Tensor) -> Tensor:
        """Return upper bounds of z_j - z_y, 0 at y."""
        weight = effective_weight(self.last)
        rows = weight - weight[labels][:, None]  # (B, K, I)
        offsets = self.last.bias - self.last.bias[labels][:, None]
        return (rows.clamp(min=0) * self.high[:, None] + rows.clamp(max=0) * self.low[:, None]).sum(dim=2) + offsets


class HybridPropagation(Propagation):
    """The same for a hybrid at p = inf, whose features change by at most the half-width of the box over std."""

    def __init__(self, net: LinfDistHybrid, statistics: Tensor, center: Tensor, half: float) -> None:
        self.net, self.means = net, list[Tensor]()
        features, middle = self.features(statistics), self.features(center)
        radius = half / net.features.normalize.std
        super().__init__(net.head, features, middle - radius, middle + radius)

    def features(self, images: Tensor) -> Tensor:
        x = ((images - self.net.features.normalize.mean) / self.net.features.normalize.std).flatten(1)
        for k, layer in enumerate(self.net.features.distances):
            x = (x[:, None] - layer.weight).abs().amax(dim=2)
            if k == len(self.means):  # first batch
                self.means.append(x.mean(dim=0))
            x = x - self.means[k]
        return x

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(self.features(x))


def cross_entropy_by_hand(differences: Tensor) -> Tensor:
    """Return log sum_j exp m_j of differences that are 0 at the true class, averaged over the batch."""
    return differences.exp().sum(dim=1).log().mean()


def differences_by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    return logits - logits[torch.arange(len(labels)), labels][:, None]


def combine_by_hand(kind: str, alpha: float, adversarial: Tensor, worst: Tensor) -> Tensor:
    if kind == "sabr":
        return cross_entropy_by_hand(worst)
    if kind == "cc_ibp":
        return cross_entropy_by_hand((1 - alpha) * adversarial + alpha * worst)
    parts = cross_entropy_by_hand(adversarial), cross_entropy_by_hand(worst)
    if kind == "mtl_ibp":
        return (1 - alpha) * parts[0] + alpha * parts[1]
    return parts[0] ** (1 - alpha) * parts[1] ** alpha


def loss_by_hand(net: nn.Module, batch: Batch, config: Any) -> Tensor:
    attack_eps = config.attack_eps_factor * batch.eps
    sizes = [config.rel_step_size] * config.steps
    for after in config.step_decay_after:
        sizes[after:] = [size * config.step_decay_factor for size in sizes[after:]]
    points = attack_by_hand(net, batch, attack_eps, sizes, config.restarts)
    if config.kind == "sabr":
        half = config.box_ratio * attack_eps
        center = torch.maximum(
            torch.minimum(points, batch.images + attack_eps - half), batch.images - attack_eps + half
        )
    else:
        half, center = batch.eps, batch.images
    statistics = batch.images if config.batch_norm_statistics == "clean" else points
    if isinstance(net, LinfDistHybrid):
        result: Propagation = HybridPropagation(net, statistics, center, half)
    else:
        low, high = (center - half).clamp(0, 1), (center + half).clamp(0, 1)
        result = Propagation(net, statistics, low, high, getattr(config, "relu_shrink", 1.0))
    adversarial = differences_by_hand(result.logits(points), batch.labels)
    robust = combine_by_hand(
        config.kind, getattr(config, "alpha", 1.0), adversarial, result.worst_differences(batch.labels)
    )
    clean = cross_entropy_by_hand(differences_by_hand(result.logits(batch.images), batch.labels))
    return config.natural_weight * clean + (1 - config.natural_weight) * robust


@pytest.mark.parametrize("statistics", ["none", "clean", "adversarial"])
@pytest.mark.parametrize("kind", METHODS)
def test_losses_and_gradients_match_interval_arithmetic(kind: str, statistics: str) -> None:
    """Compare without batch normalization, with it, and with the statistics of adversarial images."""
    net = build_net(statistics != "none")
    settings: dict[str, Any] = {} if statistics == "none" else {
        "batch_norm_statistics": statistics, "natural_weight": 0.3, "attack_eps_factor": 1.7,
        "restarts": RESTARTS, "steps": 5, "step_decay_after": (1, 3), "step_decay_factor": 0.3,
    }  # fmt: skip
    if kind == "sabr" and statistics == "clean":
        settings["relu_shrink"] = 0.8
    for weight in (0.0, 0.35, 1.0):
        check_loss(net, kind, weight, settings)


@pytest.mark.parametrize("statistics", ["clean", "adversarial"])
@pytest.mark.parametrize("kind", METHODS)
def test_losses_of_hybrids_match_lipschitz_bounds(kind: str, statistics: str) -> None:
    net = build_network(LinfDistHybridConfig(backbone=MLP, hidden_size=8)).double().train()
    settings = {"batch_norm_statistics": statistics, "natural_weight": 0.2, "attack_eps_factor": 1.3, "steps": 3}
    check_loss(net, kind, 0.35, settings)


def check_loss(net: nn.Module, kind: str, weight: float, settings: dict[str, Any]) -> None:
    config = ObjectiveConfig.registry[kind](eps_train=EPS, **{WEIGHTS[kind]: weight}, **settings)
    batch = make_batch(config.restarts)
    expected = loss_by_hand(net, batch, config)
    actual = config.build(math.nan).loss(net, batch)
    assert net.training
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    parameters = list(net.parameters())
    pairs = zip(torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def make_case(config: NetworkConfig, p: float) -> tuple[nn.Module, Batch]:
    network = build_network(config).double().train()
    batch = make_batch(count=40)
    masks = sample_masks(network, 40, 1, torch.Generator().manual_seed(1))
    return network, batch._replace(p=p, masks=masks)


NETWORKS: dict[str, tuple[NetworkConfig, float]] = {
    "conv_net": (ConvNetConfig(**SETTINGS["conv_net"][0]), math.inf),
    "dist_net": (LinfDistMLPConfig(**MLP), 8.0),
    "hybrid": (LinfDistHybridConfig(backbone=MLP, hidden_size=8), math.inf),
    "sort_hybrid": (LinfDistHybridConfig(backbone=SORT, hidden_size=8), 16.0),
}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_limits_are_ibp_and_adversarial_training(name: str, kind: str) -> None:
    network, batch = make_case(*NETWORKS[name])
    cls = ObjectiveConfig.registry[kind]
    attack = {"steps": 3, "rel_step_size": 0.4}  # SABR decreases the size after 4 steps
    ibp = WorstCaseCrossEntropyConfig(eps_train=EPS, worst_case_weight=1).build(math.nan)
    adversarial = AdversarialCrossEntropyConfig(eps_train=EPS, **attack).build(math.nan)
    for value, limit, statistics in ((1, ibp, "clean"), (0, adversarial, "adversarial")):
        config = cls(eps_train=EPS, batch_norm_statistics=statistics, **{WEIGHTS[kind]: value}, **attack)
        results, states = [], []
        for objective in (config.build(math.nan), limit):
            copied_network = copy.deepcopy(network)  # a step updates running statistics
            loss = objective.loss(copied_network, batch)
            results.append([loss, *torch.autograd.grad(loss, list(copied_network.parameters()))])
            states.append(copied_network.state_dict())
        torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(*states)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("eps", [0.0, 0.04])
def test_warmup_is_standard_training_with_regularization(kind: str, eps: float) -> None:
    """While eps is 0; then the regularization is that of IBP, here on the same boxes."""
    network, batch = make_case(*NETWORKS["conv_net"])
    batch = batch._replace(eps=eps, starts=batch.starts if eps else None)
    for weight in (0.0, 0.7):
        config = ObjectiveConfig.registry[kind](eps_train=EPS, warmup_reg_weight=weight, **{WEIGHTS[kind]: 1})
        ibp = WorstCaseCrossEntropyConfig(eps_train=EPS, warmup_reg_weight=weight, worst_case_weight=1 if eps else 0)
        actual, expected = (one.build(math.nan).loss(network, batch) for one in (config, ibp))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)  # IBP has a radius of 1e-6 instead of 0
    assert weight * 0.01 < expected - functional.cross_entropy(network(batch.images), batch.labels) or eps


@pytest.mark.parametrize("scale", [1e-3, 40.0, 1e4])
@pytest.mark.parametrize("kind", METHODS)
def test_losses_of_confident_networks_have_finite_gradients(kind: str, scale: float) -> None:
    """In float32 the cross entropy of large margins underflows to 0."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        for layer in (network[1], network[3]):
            layer.weight.copy_(scale * torch.eye(2))
            layer.bias.zero_()
    for labels in (torch.tensor([0, 1]), torch.tensor([1, 0])):
        images = torch.eye(2).view(2, 1, 1, 2)
        batch = Batch(images, labels, math.inf, None, 0.0, 0.1, torch.full_like(images, 0.5))
        for weight in (0.0, 0.5, 1.0):
            config = ObjectiveConfig.registry[kind](eps_train=0.1, **{WEIGHTS[kind]: weight})
            loss = config.build(math.nan).loss(network, batch)
            assert loss.isfinite() and (loss > 100 or scale < 1e4 or not labels[0])
            assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, list(network.parameters())))


def test_logarithm_of_the_cross_entropy_is_accurate_when_tiny() -> None:
    margins = torch.tensor([-3.0, 0.0, 5.0, 30.0, 39.9, 40.1, 100.0, 700.0], dtype=torch.float64)
    differences = torch.stack([torch.full_like(margins, 9.0), -margins, -margins - 1], dim=1)
    expected = [math.log(math.log1p(math.exp(-m) + math.exp(-m - 1))) for m in margins.tolist()]
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        actual = log_cross_entropy_from_differences(differences.to(dtype), torch.zeros(8, dtype=torch.int64))
        assert actual.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_shrunk_relus_have_no_sound_box() -> None:
    box = Box(torch.tensor([[-1.0, 1.0, -2.0]]), torch.tensor([[2.0, 3.0, -1.0]]))
    assert propagate_layer(ShrunkReLU(0.5), box).upper.tolist() == [[1.0, 3.0, 0.0]]
    with pytest.raises(TypeError):
        propagate_layer(ShrunkReLU(0.5), box, sound=True)
    with pytest.raises(ValueError, match="relu_shrink"):
        WorstCaseBounds(nn.Linear(2, 2), "dual", relu_shrink=0.8)


def test_centers_and_points_share_statistics_and_dropout_with_the_images() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(72, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 4)]
    network = nn.Sequential(nn.Flatten(), *layers).double().train()
    images, labels = make_batch().images, make_batch().labels
    bounds = WorstCaseBounds(network)
    same = bounds(images, labels, 0.0, math.inf, points=images)
    torch.testing.assert_close(same.point_logits, same.logits)
    other = bounds(torch.rand_like(images), labels, 0.0, math.inf, centers=images, points=images)
    assert other.point_logits is not None and not torch.allclose(other.point_logits, same.logits)
    torch.testing.assert_close(logit_differences(other.point_logits, labels), other.logit_difference_bounds)


@pytest.mark.parametrize("kind", ["sabr", "taps", "staps"])
def test_shrinking_requires_relus(kind: str) -> None:
    layers = nn.Flatten(), nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, 4)
    without = [nn.Sequential(*layers), build_network(LinfDistHybridConfig(backbone=MLP, hidden_size=8))]
    config = ObjectiveConfig.registry[kind](eps_train=EPS, relu_shrink=0.8)
    for network in without:
        config.model_copy(update={"relu_shrink": 1.0}).check_network(network, SHAPE)
        for check in (config.check_network, config.build(math.nan).prepare):
            with pytest.raises(ValueError, match=r"^relu_shrink=0\.8\b"):
                check(network, SHAPE)
    config.check_network(build_net(True), SHAPE)


@pytest.mark.parametrize("kind", ["sabr", "colt"])
def test_modes_of_modules_survive_the_loss(kind: str) -> None:
    network = build_net(True)
    network[1].eval()
    modes = [module.training for module in network.modules()]
    ObjectiveConfig.registry[kind](eps_train=EPS).build(math.nan).loss(network, make_batch())
    assert [module.training for module in network.modules()] == modes
