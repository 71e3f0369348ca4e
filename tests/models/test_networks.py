"""Tests of l_inf-distance nets: Lipschitz constant, published sizes, and the behavior of their layers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from linflab.models.networks.base import NetworkConfig
from linflab.models.networks.cost import count_flops, count_parameters, layer_costs
from linflab.models.networks.group_sort import GroupSortConfig
from linflab.models.networks.layers import (
    BatchNorm2d,
    LpDistance,
    LpDistanceConv2d,
    MeanShift,
    Normalize,
    ScaledLinear,
    lp_weight_decay_,
)
from linflab.models.networks.linf_dist import LinfDistConvNetConfig, LinfDistMLPConfig, LinfDistNet
from linflab.models.networks.running_statistics import BATCH_NORMS, MEAN_SHIFTS, recalibrate_running_statistics


def make_random_net(seed: int, depth: int, width: int, std: float, initialization: str = "normal") -> LinfDistNet:
    """Return a net in float64 and evaluation mode, with running means of random images."""
    torch.manual_seed(seed)
    config = LinfDistMLPConfig(depth=depth, width=width, initialization=initialization)
    net = config.build((1, 4, 4), 5, mean=(0.3,), std=std).double()
    for _ in range(3):
        net(torch.rand(16, 1, 4, 4, dtype=torch.float64))
    return net.eval()


@given(
    seed=st.integers(0, 2**32 - 1),
    depth=st.integers(1, 5),
    width=st.integers(1, 24),
    std=st.floats(0.05, 2),
    size=st.floats(1e-6, 3),
    initialization=st.sampled_from(["normal", "identity"]),
)
def test_logits_respect_the_lipschitz_constant(
    seed: int, depth: int, width: int, std: float, size: float, initialization: str
) -> None:
    net = make_random_net(seed, depth, width, std, initialization)
    x = torch.rand(32, 1, 4, 4, dtype=torch.float64)
    # Half of the steps go to a corner of the box, where the bound is often tight.
    step = torch.rand_like(x) * 2 - 1
    step[::2] = step[::2].sign()
    z = net(x) - net(x + size * step)
    limit = net.lipschitz_constant * size * step.flatten(1).abs().amax(dim=1)
    assert net.lipschitz_constant == pytest.approx(1 / std, rel=1e-6)
    assert (z.abs().amax(dim=1) <= limit * (1 + 1e-12) + 1e-12).all()


def test_lipschitz_constant_is_attained() -> None:
    """With one neuron and one pixel, logits change by 1/std per unit; a smaller constant is unsound."""
    net = LinfDistMLPConfig(depth=1, width=1).build((1, 1, 1), 2, std=0.25).double().eval()
    with torch.no_grad():
        net.last.weight.copy_(torch.tensor([[-1.0], [1.0]]))
    difference = net(torch.tensor([[[[0.1]]]]).double()) - net(torch.tensor([[[[0.2]]]]).double())
    assert difference.abs().max().item() == pytest.approx(0.1 * net.lipschitz_constant)


def test_parameter_counts_match_the_paper() -> None:
    with torch.device("meta"):
        mnist = LinfDistMLPConfig(depth=5, width=5120, initialization="normal").build((1, 28, 28), 10)
        cifar = LinfDistMLPConfig(depth=6, width=5120, initialization="normal").build((3, 32, 32), 10)
    sizes = [sum(p.numel() for p in net.parameters()) - 10 for net in (mnist, cifar)]  # without the 10 biases
    assert [f"{size / 1e6:.3g}" for size in sizes] == ["82.7", "121"]


def test_costs_of_a_small_net_match_by_hand() -> None:
    net = LinfDistMLPConfig(depth=3, width=7).build((2, 3, 3), 4)
    assert count_flops(net, (2, 3, 3)) == 18 * 7 + 7 * 7 + 7 * 4
    assert count_parameters(net) == 18 * 7 + 7 * 7 + 7 * 4 + 4
    assert net.training  # counting does not change the mode


def test_identity_initialization_preserves_differences() -> None:
    """At p = inf, each hidden neuron is one input plus a constant, so differences of images are preserved."""
    net = make_random_net(0, depth=4, width=20, std=1.0, initialization="identity")
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    hidden = net.features(x)
    torch.testing.assert_close((hidden[0] - hidden[1])[:16], (x[0] - x[1]).flatten())


def test_mean_shift_subtracts_the_mean() -> None:
    shift = MeanShift(3).double()
    y = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    out = shift(y)
    assert out.mean(dim=0).abs().max() < 1e-12
    torch.testing.assert_close(shift.running_mean, 0.1 * y.detach().mean(dim=0))
    (gradient,) = torch.autograd.grad(out[:, 0].sum(), y)  # zero: the gradient passes through the mean
    assert gradient.abs().max() < 1e-12
    shift.eval()
    torch.testing.assert_close(shift(y), y - shift.running_mean)


def test_mean_shift_of_maps_averages_over_positions() -> None:
    shift, y = MeanShift(3).double(), torch.randn(4, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(shift(y), y - y.mean(dim=(0, 2, 3), keepdim=True))
    torch.testing.assert_close(shift.eval()(y), y - shift.running_mean[:, None, None])


def test_running_means_are_recalibrated_layer_by_layer() -> None:
    """Each layer subtracts the mean of one batch, or the average of the means of several batches."""
    net = make_random_net(0, depth=4, width=8, std=0.5)
    batches = torch.rand(3, 16, 1, 4, 4, dtype=torch.float64)
    with recalibrate_running_statistics(net, MEAN_SHIFTS):
        training_logits = net(batches[0])
    torch.testing.assert_close(net(batches[0]), training_logits)
    assert not any(module.training for module in net.modules())
    with recalibrate_running_statistics(net, MEAN_SHIFTS):
        for batch in batches:
            net(batch)
    first = net.features.distances[0]
    means = [first(net.features.normalize(batch)).mean(dim=0) for batch in batches]
    torch.testing.assert_close(net.features.shifts[0].running_mean, torch.stack(means).mean(dim=0).detach())
    assert net.features.shifts[0].momentum == 0.1


def test_batch_norm_is_recalibrated_by_batch_statistics() -> None:
    """Each batch is normalized by its own statistics; running statistics are averages over batches."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3), BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5)
    net = nn.Sequential(*layers, nn.BatchNorm1d(5, track_running_stats=False)).double().eval()
    batches = 3 * torch.rand(4, 16, 2, 6, 6, dtype=torch.float64)
    for norm in (net[1], net[5]):
        nn.init.normal_(norm.weight)
        norm.running_mean.fill_(7)
    net[5].momentum = None
    with recalibrate_running_statistics(net, BATCH_NORMS):
        for batch in batches:
            net(batch)
    statistics: list[list[torch.Tensor]] = [[], [], [], []]
    for batch in batches:
        maps = net[0](batch).detach()
        mean, var = maps.mean((0, 2, 3)), maps.var((0, 2, 3), correction=1)
        by_position = (slice(None), None, None)
        own = (maps - mean[by_position]) / (maps.var((0, 2, 3), correction=0) + 1e-5).sqrt()[by_position]
        features = net[4]((own * net[1].weight[by_position] + net[1].bias[by_position]).relu().flatten(1)).detach()
        for one, part in zip(statistics, (mean, var, features.mean(0), features.var(0, correction=1)), strict=True):
            one.append(part)
    expected = [torch.stack(parts).mean(0) for parts in statistics]
    actual = [net[1].running_mean, net[1].running_var, net[5].running_mean, net[5].running_var]
    torch.testing.assert_close(actual, expected)
    assert (net[1].momentum, net[5].momentum) == (0.1, None) and not any(one.training for one in net.modules())
    with recalibrate_running_statistics(net, MEAN_SHIFTS):
        net(batches[0])
    torch.testing.assert_close([net[1].running_mean, net[5].running_var], [expected[0], expected[3]])


def test_scaled_linear_divides_by_sqrt_of_in_features() -> None:
    torch.manual_seed(0)
    layer, x = ScaledLinear(400, 300), torch.randn(200, 400)
    assert layer.weight.std().item() == pytest.approx(1, abs=0.01) and not layer.bias.any()
    torch.testing.assert_close(layer(x), x @ layer.weight.T / 20)


def test_conv_net_has_expected_shapes_and_costs() -> None:
    net = LinfDistConvNetConfig(width=6, hidden_size=20).build((3, 8, 8), 10)
    shapes = [cost.output_shape for cost in layer_costs(net, (3, 8, 8))]
    assert shapes == [(6, 8, 8), (6, 8, 8), (12, 4, 4), (12, 4, 4), (12, 4, 4), (20,), (10,)]
    first, strided = 3 * 9 * 6 * 64, 6 * 9 * 12 * 16
    assert [cost.flops for cost in layer_costs(net, (3, 8, 8))][:3] == [first, 2 * first, strided]
    layer = net.features.distances[0]
    before = layer.weight.detach().clone()
    lp_weight_decay_(layer, math.inf, 0.5)
    changed = (layer.weight != before).flatten(1)
    assert changed.sum(dim=1).tolist() == [1] * 6  # at p = inf, only the largest weight of a filter


@pytest.mark.parametrize("initialization", ["identity", "normal"])
def test_conv_net_initialization_follows_its_setting(initialization: str) -> None:
    """Filter o has -10 at the center of channel o mod C. Dense layers have fewer outputs than inputs."""
    torch.manual_seed(0)
    config = LinfDistConvNetConfig(width=6, hidden_size=20, initialization=initialization)
    net = config.build((3, 8, 8), 10)
    for layer in (*net.features.distances, net.last):
        weight = layer.weight.detach()
        assert (weight == -10).sum() == (len(weight) if initialization == "identity" and weight.dim() == 4 else 0)
        if weight.dim() == 4 and initialization == "identity":
            outputs, channels = weight.shape[:2]
            assert all(weight[o, o % channels, 1, 1] == -10 for o in range(outputs))
    assert LinfDistConvNetConfig().initialization == "identity"


def test_identity_initialization_passes_channels_on() -> None:
    torch.manual_seed(0)
    layer, images = LpDistanceConv2d(3, 7), torch.rand(2, 3, 6, 6)
    layer.init_identity_()
    torch.testing.assert_close(layer(images), images[:, [0, 1, 2, 0, 1, 2, 0]] + 10)
    narrow = LpDistanceConv2d(3, 2)
    before = narrow.weight.clone()
    narrow.init_identity_()
    assert torch.equal(narrow.weight, before)


def test_evaluation_is_independent_of_the_batch() -> None:
    net = make_random_net(1, depth=3, width=8, std=0.5)
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(net(x)[2:3], net(x[2:3]), rtol=0, atol=0)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf, (0.3, 0.0), (0.3,), (0.3, 0.2, 0.1), ()])
def test_normalize_rejects_invalid_std(std: float | tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="std"):
        Normalize((0.5, 0.4), std)


def test_normalize_scales_each_channel() -> None:
    images = torch.rand(3, 2, 4, 5)
    expected = [(images[:, 0] - 0.5) / 0.25, (images[:, 1] - 0.125) / 2]
    assert torch.equal(Normalize((0.5, 0.125), (0.25, 2.0))(images), torch.stack(expected, dim=1))
    assert torch.equal(Normalize((0.5,), (0.25,))(images[:, 0].flatten(1)), expected[0].flatten(1))


@pytest.mark.parametrize("config", [LinfDistMLPConfig(depth=2, width=3), GroupSortConfig(depth=2, width=4)])
def test_lipschitz_networks_require_a_single_std(config: NetworkConfig) -> None:
    with pytest.raises(ValueError, match=r"std=\(0\.3, 0\.2\)"):
        config.build((2, 4, 4), 5, (0.4, 0.5), (0.3, 0.2))


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 8.0, 9.7, 1000.0, math.inf])
def test_lp_weight_decay_matches_the_formula(p: float) -> None:
    torch.manual_seed(0)
    layer = LpDistance(17, 5)
    with torch.no_grad():
        layer.weight[2] = 0
        layer.weight[3, 4] = 0
    w = layer.weight.detach().double()
    lp_weight_decay_(layer, p, 0.1)
    largest = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-300)  # divided out to avoid overflow of powers
    norm = largest * torch.linalg.vector_norm(w / largest, ord=p, dim=1, keepdim=True)
    if math.isinf(p):
        decay = torch.where(w.abs() == norm, w, 0.0)
    else:
        decay = torch.where(w == 0, 0.0, (w.abs() / norm) ** (p - 2) * w)
    torch.testing.assert_close(layer.weight.detach().double(), w - 0.1 * decay, rtol=1e-4, atol=1e-6)
