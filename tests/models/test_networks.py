"""l_inf-distance nets: Lipschitz in pixels, as large as the paper says, and what their layers promise."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linflab.models.networks.cost import count_flops, count_parameters, layer_costs
from linflab.models.networks.layers import (
    LpDistance,
    MeanShift,
    Normalize,
    ScaledLinear,
    decay_distances,
    recomputed_means,
)
from linflab.models.networks.linf_dist import LinfDistConvNetConfig, LinfDistMLPConfig, LinfDistNet


def random_net(seed: int, depth: int, width: int, std: float, initialization: str = "normal") -> LinfDistNet:
    """A net in float64 whose running means are those of random images, in evaluation mode."""
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
def test_lipschitz_in_pixels(seed: int, depth: int, width: int, std: float, size: float, initialization: str) -> None:
    net = random_net(seed, depth, width, std, initialization)
    x = torch.rand(32, 1, 4, 4, dtype=torch.float64)
    # half of the steps go to a corner of the box, where the bound is tight most often
    step = torch.rand_like(x) * 2 - 1
    step[::2] = step[::2].sign()
    z = net(x) - net(x + size * step)
    allowed = net.lipschitz_constant * size * step.flatten(1).abs().amax(dim=1)
    assert net.lipschitz_constant == pytest.approx(1 / std, rel=1e-6)
    assert (z.abs().amax(dim=1) <= allowed * (1 + 1e-12) + 1e-12).all()


def test_lipschitz_constant_is_reached() -> None:
    """One neuron, one pixel: the logit moves by exactly 1/std a pixel, so a smaller constant would be unsound."""
    net = LinfDistMLPConfig(depth=1, width=1).build((1, 1, 1), 2, std=0.25).double().eval()
    with torch.no_grad():
        net.last.weight.copy_(torch.tensor([[-1.0], [1.0]]))
    moved = net(torch.tensor([[[[0.1]]]]).double()) - net(torch.tensor([[[[0.2]]]]).double())
    assert moved.abs().max().item() == pytest.approx(0.1 * net.lipschitz_constant)


def test_size_of_the_paper() -> None:
    with torch.device("meta"):
        mnist = LinfDistMLPConfig(depth=5, width=5120, initialization="normal").build((1, 28, 28), 10)
        cifar = LinfDistMLPConfig(depth=6, width=5120, initialization="normal").build((3, 32, 32), 10)
    sizes = [sum(p.numel() for p in net.parameters()) - 10 for net in (mnist, cifar)]  # but for biases
    assert [f"{size / 1e6:.3g}" for size in sizes] == ["82.7", "121"]


def test_cost_of_a_small_net() -> None:
    net = LinfDistMLPConfig(depth=3, width=7).build((2, 3, 3), 4)
    assert count_flops(net, (2, 3, 3)) == 18 * 7 + 7 * 7 + 7 * 4
    assert count_parameters(net) == 18 * 7 + 7 * 7 + 7 * 4 + 4
    assert net.training  # counting leaves the network as it was


def test_identity_initialization_passes_the_input_on() -> None:
    """At p = inf each neuron of a hidden layer is one input plus a constant, so distances between images survive."""
    net = random_net(0, depth=4, width=20, std=1.0, initialization="identity")
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    hidden = net.features(x)
    torch.testing.assert_close((hidden[0] - hidden[1])[:16], (x[0] - x[1]).flatten())


def test_mean_shift() -> None:
    shift = MeanShift(3).double()
    y = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    out = shift(y)
    assert out.mean(dim=0).abs().max() < 1e-12
    torch.testing.assert_close(shift.running_mean, 0.1 * y.detach().mean(dim=0))
    (gradient,) = torch.autograd.grad(out[:, 0].sum(), y)  # flows through the mean too: a common shift changes nothing
    assert gradient.abs().max() < 1e-12
    shift.eval()
    torch.testing.assert_close(shift(y), y - shift.running_mean)


def test_mean_shift_of_maps_is_over_positions_too() -> None:
    shift, y = MeanShift(3).double(), torch.randn(4, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(shift(y), y - y.mean(dim=(0, 2, 3), keepdim=True))
    torch.testing.assert_close(shift.eval()(y), y - shift.running_mean[:, None, None])


def test_means_are_recomputed_layer_by_layer() -> None:
    """From one batch: every layer then subtracts the mean of that batch. From several: the mean of their means."""
    net = random_net(0, depth=4, width=8, std=0.5)
    batches = torch.rand(3, 16, 1, 4, 4, dtype=torch.float64)
    with recomputed_means(net):
        in_training = net(batches[0])
    torch.testing.assert_close(net(batches[0]), in_training)
    assert not any(module.training for module in net.modules())
    with recomputed_means(net):
        for batch in batches:
            net(batch)
    first = net.features.distances[0]
    means = [first(net.features.normalize(batch)).mean(dim=0) for batch in batches]
    torch.testing.assert_close(net.features.shifts[0].running_mean, torch.stack(means).mean(dim=0).detach())
    assert net.features.shifts[0].momentum == 0.1


def test_scaled_linear_divides_by_the_root_of_its_inputs() -> None:
    torch.manual_seed(0)
    layer, x = ScaledLinear(400, 300), torch.randn(200, 400)
    assert layer.weight.std().item() == pytest.approx(1, abs=0.01) and not layer.bias.any()
    torch.testing.assert_close(layer(x), x @ layer.weight.T / 20)


def test_convolutional_net() -> None:
    net = LinfDistConvNetConfig(width=6, dense_width=20).build((3, 8, 8), 10)
    shapes = [cost.output_shape for cost in layer_costs(net, (3, 8, 8))]
    assert shapes == [(6, 8, 8), (6, 8, 8), (12, 4, 4), (12, 4, 4), (12, 4, 4), (20,), (10,)]
    first, strided = 3 * 9 * 6 * 64, 6 * 9 * 12 * 16
    assert [cost.flops for cost in layer_costs(net, (3, 8, 8))][:3] == [first, 2 * first, strided]
    layer = net.features.distances[0]
    before = layer.weight.detach().clone()
    decay_distances(layer, math.inf, 0.5)
    changed = (layer.weight != before).flatten(1)
    assert changed.sum(dim=1).tolist() == [1] * 6  # at p = inf the largest of a filter alone


def test_evaluation_does_not_depend_on_the_batch() -> None:
    net = random_net(1, depth=3, width=8, std=0.5)
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(net(x)[2:3], net(x[2:3]), rtol=0, atol=0)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_normalize_refuses_a_useless_std(std: float) -> None:
    with pytest.raises(ValueError, match="std"):
        Normalize((0.5,), std)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 8.0, 9.7, 1000.0, math.inf])
def test_weight_decay_of_a_distance_layer(p: float) -> None:
    torch.manual_seed(0)
    layer = LpDistance(17, 5)
    with torch.no_grad():
        layer.weight[2] = 0
        layer.weight[3, 4] = 0
    w = layer.weight.detach().double()
    decay_distances(layer, p, 0.1)
    largest = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-300)  # divided out, lest powers overflow
    norm = largest * torch.linalg.vector_norm(w / largest, ord=p, dim=1, keepdim=True)
    if math.isinf(p):
        pull = torch.where(w.abs() == norm, w, 0.0)
    else:
        pull = torch.where(w == 0, 0.0, (w.abs() / norm) ** (p - 2) * w)
    torch.testing.assert_close(layer.weight.detach().double(), w - 0.1 * pull, rtol=1e-4, atol=1e-6)
