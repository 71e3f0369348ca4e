"""SortNet: an l_inf-distance net at q = 1, an unbiased estimate in training, Lipschitz in evaluation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linflab.models.networks.layers import SortDistance
from linflab.models.networks.linf_dist import LinfDistMLPConfig
from linflab.models.networks.sort_net import GROUP, SortNetConfig, draw_subsets

SHAPE, CLASSES = (1, 4, 4), 5


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("p", [8.0, 1000.0, math.inf])
def test_with_q_1_it_is_the_linf_distance_net(p: float) -> None:
    torch.manual_seed(0)
    sorted_net = SortNetConfig(depth=4, width=24, q=1).build(SHAPE, CLASSES, (0.3,), 0.5)
    plain = LinfDistMLPConfig(depth=4, width=24).build(SHAPE, CLASSES, (0.3,), 0.5)
    plain.load_state_dict(sorted_net.state_dict())
    images = torch.rand(40, *SHAPE)
    gradients = []
    for net, subsets in ((sorted_net, draw_subsets(sorted_net, 40, 1, chance())), (plain, None)):
        logits = net(images, p, subsets)
        logits.square().sum().backward()
        gradients.append((logits, *(parameter.grad for parameter in net.parameters())))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)  # sums over groups, in another order
    assert torch.equal(sorted_net.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("q", [0.3, 0.6, 0.85])
def test_subsets_estimate_the_whole_neuron_without_bias(q: float) -> None:
    """For one layer at p = inf the mean over subsets is sum_k q (1 - q)^(k - 1) (k-th largest), of all k."""
    torch.manual_seed(1)
    inputs, outputs, draws = 12, 6, 40_000
    layer = SortDistance(inputs, outputs, q).double()
    x = torch.randn(1, inputs, dtype=torch.float64)
    ranked = (x - layer.weight).abs().sort(dim=1, descending=True).values
    expected = (ranked * q * (1 - q) ** torch.arange(inputs, dtype=torch.float64)).sum(dim=1)
    kept = layer.draw_subsets(draws, chance())
    assert kept.double().mean().item() == pytest.approx(q, abs=5 * math.sqrt(q * (1 - q) / kept.numel()))
    with torch.no_grad():
        estimates = layer(x.expand(draws, -1), math.inf, kept, 1)
    error = (estimates.mean(dim=0) - expected).abs() / (estimates.std(dim=0) / math.sqrt(draws))
    assert error.max() < 4.5  # standard errors; by chance once in 25 thousand such tests


def test_evaluation_is_the_neuron_by_its_formula() -> None:
    torch.manual_seed(2)
    layer = SortDistance(30, 4, 0.7).double().eval()
    x = torch.randn(3, 30, dtype=torch.float64)
    coefficients = 0.7 * 0.3 ** torch.arange(10, dtype=torch.float64)
    ranked = (x[:, None] - layer.weight).abs().sort(dim=2, descending=True).values[..., :10]
    torch.testing.assert_close(layer(x), (ranked * coefficients).sum(dim=2) / coefficients.sum())


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_see_the_subsets_of_their_samples(workers: int) -> None:
    """Samples k, k + workers, ... of a batch are a worker's: together they give what one worker gives."""
    torch.manual_seed(3)
    net = SortNetConfig(depth=3, width=16, q=0.5).build(SHAPE, CLASSES)
    images = torch.rand(80, *SHAPE)
    layer = net.last
    whole = draw_subsets(net, 80, 1, chance())
    part = draw_subsets(net, 80, workers, chance())
    assert whole is not None and part is not None
    x = torch.rand(80, 16)
    expected = layer(x, 8.0, whole.kept[-1], whole.group)
    for rank in range(workers):
        assert torch.equal(layer(x[rank::workers], 8.0, part.kept[-1], part.group), expected[rank::workers])
    assert len(whole.kept) == 2 and whole.kept[0].shape == (math.ceil(80 / GROUP), 16)
    assert not torch.equal(net(images, 8.0, whole), net(images, 8.0, draw_subsets(net, 80, 1, chance(1))))


@given(
    seed=st.integers(0, 2**32 - 1),
    q=st.floats(0.05, 1),
    std=st.floats(0.05, 2),
    size=st.floats(1e-6, 3),
)
def test_lipschitz_in_pixels(seed: int, q: float, std: float, size: float) -> None:
    torch.manual_seed(seed)
    net = SortNetConfig(depth=4, width=12, q=q).build(SHAPE, CLASSES, (0.3,), std).double().eval()
    x = torch.rand(32, *SHAPE, dtype=torch.float64)
    step = torch.rand_like(x) * 2 - 1
    step[::2] = step[::2].sign()
    moved = (net(x) - net(x + size * step)).abs().amax(dim=1)
    assert (moved <= net.lipschitz_constant * size * (1 + 1e-9) + 1e-9).all()


def test_refusals() -> None:
    net = SortNetConfig(depth=3, width=8).build(SHAPE, CLASSES)
    with pytest.raises(ValueError, match="subsets"):
        net(torch.rand(4, *SHAPE), 8.0)
    with pytest.raises(ValueError, match="p = inf"):
        net.eval()(torch.rand(4, *SHAPE), 8.0)
