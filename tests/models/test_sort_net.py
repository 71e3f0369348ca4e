"""Tests of SortNet: equivalence at q = 1, unbiased masks in training, Lipschitz in evaluation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linflab.models.networks.layers import SortDistance
from linflab.models.networks.linf_dist import LinfDistMLPConfig
from linflab.models.networks.sort_net import MASK_GROUP_SIZE, SortNetConfig, sample_masks

SHAPE, CLASSES = (1, 4, 4), 5


def make_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("p", [8.0, 1000.0, math.inf])
def test_sort_net_with_q_1_equals_linf_dist_net(p: float) -> None:
    torch.manual_seed(0)
    sort_net = SortNetConfig(depth=4, width=24, q=1).build(SHAPE, CLASSES, (0.3,), 0.5)
    linf_net = LinfDistMLPConfig(depth=4, width=24).build(SHAPE, CLASSES, (0.3,), 0.5)
    linf_net.load_state_dict(sort_net.state_dict())
    images = torch.rand(40, *SHAPE)
    gradients = []
    for net, input_masks in ((sort_net, sample_masks(sort_net, 40, 1, make_generator())), (linf_net, None)):
        logits = net(images, p, input_masks)
        logits.square().sum().backward()
        gradients.append((logits, *(parameter.grad for parameter in net.parameters())))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)  # sums over groups have another order
    assert torch.equal(sort_net.eval()(images), linf_net.eval()(images))


@pytest.mark.slow
@pytest.mark.parametrize("q", [0.3, 0.6, 0.85])
def test_masked_neurons_are_unbiased_estimates(q: float) -> None:
    """For one layer at p = inf, the mean over masks is sum_k q (1 - q)^(k - 1) (k-th largest), over all k."""
    torch.manual_seed(1)
    inputs, outputs, num_masks = 12, 6, 40_000
    layer = SortDistance(inputs, outputs, q).double()
    x = torch.randn(1, inputs, dtype=torch.float64)
    ranked = (x - layer.weight).abs().sort(dim=1, descending=True).values
    expected = (ranked * q * (1 - q) ** torch.arange(inputs, dtype=torch.float64)).sum(dim=1)
    mask = layer.sample_masks(num_masks, make_generator())
    assert mask.double().mean().item() == pytest.approx(q, abs=5 * math.sqrt(q * (1 - q) / mask.numel()))
    with torch.no_grad():
        estimates = layer(x.expand(num_masks, -1), math.inf, mask, 1)
    error = (estimates.mean(dim=0) - expected).abs() / (estimates.std(dim=0) / math.sqrt(num_masks))
    assert error.max() < 4.5  # in standard errors; exceeded once in 25,000 tests


def test_evaluation_matches_the_formula() -> None:
    torch.manual_seed(2)
    layer = SortDistance(30, 4, 0.7).double().eval()
    x = torch.randn(3, 30, dtype=torch.float64)
    coefficients = 0.7 * 0.3 ** torch.arange(10, dtype=torch.float64)
    ranked = (x[:, None] - layer.weight).abs().sort(dim=2, descending=True).values[..., :10]
    torch.testing.assert_close(layer(x), (ranked * coefficients).sum(dim=2) / coefficients.sum())


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_use_the_masks_of_their_samples(workers: int) -> None:
    """Worker k has samples k, k + workers, ...; all workers compute the outputs of a single one."""
    torch.manual_seed(3)
    net = SortNetConfig(depth=3, width=16, q=0.5).build(SHAPE, CLASSES)
    images = torch.rand(80, *SHAPE)
    layer = net.last
    single_worker = sample_masks(net, 80, 1, make_generator())
    per_worker = sample_masks(net, 80, workers, make_generator())
    assert single_worker is not None and per_worker is not None
    x = torch.rand(80, 16)
    expected = layer(x, 8.0, single_worker.masks[-1], single_worker.group_size)
    for rank in range(workers):
        assert torch.equal(
            layer(x[rank::workers], 8.0, per_worker.masks[-1], per_worker.group_size), expected[rank::workers]
        )
    assert len(single_worker.masks) == 2 and single_worker.masks[0].shape == (math.ceil(80 / MASK_GROUP_SIZE), 16)
    assert not torch.equal(
        net(images, 8.0, single_worker), net(images, 8.0, sample_masks(net, 80, 1, make_generator(1)))
    )


@given(
    seed=st.integers(0, 2**32 - 1),
    q=st.floats(0.05, 1),
    std=st.floats(0.05, 2),
    size=st.floats(1e-6, 3),
)
def test_logits_respect_the_lipschitz_constant(seed: int, q: float, std: float, size: float) -> None:
    torch.manual_seed(seed)
    net = SortNetConfig(depth=4, width=12, q=q).build(SHAPE, CLASSES, (0.3,), std).double().eval()
    x = torch.rand(32, *SHAPE, dtype=torch.float64)
    step = torch.rand_like(x) * 2 - 1
    step[::2] = step[::2].sign()
    difference = (net(x) - net(x + size * step)).abs().amax(dim=1)
    assert (difference <= net.lipschitz_constant * size * (1 + 1e-9) + 1e-9).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_mean_over_kept_averages_samples_with_the_feature(workers: int) -> None:
    torch.manual_seed(4)
    net = SortNetConfig(depth=3, width=16, q=0.5, mean_over="kept").build(SHAPE, CLASSES).double()
    images = torch.rand(80, *SHAPE, dtype=torch.float64)[::workers]
    input_masks = sample_masks(net, 80, workers, make_generator())
    assert input_masks is not None
    input_masks.masks[0][:, 3] = False  # all samples drop feature 3
    features = net.features(images, 8.0, input_masks)
    y = net.features.distances[0](net.features.normalize(images), 8.0)
    groups = torch.arange(len(images)) // (MASK_GROUP_SIZE // workers)
    for o in range(16):
        mask = input_masks.masks[0][groups, o]
        expected = y[mask, o].mean() if mask.any() else torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(net.features.shifts[0].running_mean[o], 0.1 * expected.detach())
    over_batch = net.features(images, 8.0, input_masks._replace(mean_over="batch"))
    assert not torch.allclose(features, over_batch)


def test_mean_over_batch_is_the_default() -> None:
    """The default reproduces runs that were measured with it."""
    net = SortNetConfig(depth=3, width=16).build(SHAPE, CLASSES)
    images, input_masks = torch.rand(40, *SHAPE), sample_masks(net, 40, 1, make_generator())
    assert input_masks is not None and input_masks.mean_over == "batch"
    shifted = net.features.shifts[0](net.features.distances[0](net.features.normalize(images), 8.0))
    torch.testing.assert_close(shifted.mean(dim=0), torch.zeros(16), atol=1e-5, rtol=0)


def test_invalid_settings_are_rejected() -> None:
    net = SortNetConfig(depth=3, width=8).build(SHAPE, CLASSES)
    with pytest.raises(ValueError, match="masks"):
        net(torch.rand(4, *SHAPE), 8.0)
    with pytest.raises(ValueError, match=r"^p=8\.0"):
        net.eval()(torch.rand(4, *SHAPE), 8.0)
