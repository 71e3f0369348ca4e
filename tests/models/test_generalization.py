"""The generalization bound: rounding of nets as in its proof, and coverage in a distribution that can be sampled."""

import copy
import math

import pytest
import torch

from linflab.models.networks import (
    GroupSortConfig,
    LinfDistConvNetConfig,
    LinfDistMLPConfig,
    NetworkConfig,
    SortNetConfig,
)
from linflab.models.robustness.certification import lipschitz_radius
from linflab.models.robustness.generalization import (
    DELTAS,
    TRIED_PAIRS,
    generalization_bound,
    network_class,
    published_size_term,
    size_term,
)

CONFIGS = (
    LinfDistMLPConfig(depth=3, width=9, initialization="normal"),
    SortNetConfig(depth=3, width=9),
    LinfDistConvNetConfig(width=2, hidden_size=6, initialization="normal"),
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_rounded_nets_have_radii_within_half_of_delta(config: NetworkConfig) -> None:
    """Each parameter and running mean is rounded to the interval centers that the proof counts."""
    network = config.build((1, 6, 6), 3, (0.4,), 0.3).double().eval()
    for shift in network.features.shifts:
        shift.running_mean.normal_()
    nets, delta = network_class(network), 0.1
    assert nets.parameters == sum(p.numel() for p in network.parameters()) + sum(
        shift.running_mean.numel() for shift in network.features.shifts
    )
    half_width = delta / (2 * nets.std * nets.tensors)
    cells = math.ceil(nets.magnitude / half_width)
    assert cells == math.ceil(2 * nets.tensors * nets.magnitude * nets.std / delta)
    rounded = copy.deepcopy(network)
    tensors = [*rounded.parameters(), *(shift.running_mean for shift in rounded.features.shifts)]
    width = 2 * nets.magnitude / cells
    for tensor in tensors:
        index = ((tensor.detach() + nets.magnitude) / width).floor().clamp(0, cells - 1)
        tensor.detach().copy_(-nets.magnitude + (index + 0.5) * width)
    images, labels = torch.rand(200, 1, 6, 6, dtype=torch.float64), torch.arange(200) % 3
    change = lipschitz_radius(rounded, images, labels, sound=False) - lipschitz_radius(network, images, labels, False)
    assert 0 < change.abs().max() <= delta / 2


def test_bound_covers_the_error_of_a_tiny_net() -> None:
    """A trained net of two inputs has a bound below 1, which exceeds the error of other images of the distribution."""
    torch.manual_seed(0)
    config, eps = LinfDistMLPConfig(depth=2, width=4, initialization="normal"), 0.05

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.rand(count, 1, 1, 2)
        return images, (images[:, 0, 0, 0] > 0.5).long()

    network = config.build((1, 1, 2), 2)
    images, labels = draw(20_000)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for step in range(150):
        part = slice(step % 20 * 1000, step % 20 * 1000 + 1000)
        logits = network(images[part], 8.0)
        correct = logits.gather(1, labels[part, None])[:, 0] - logits.gather(1, 1 - labels[part, None])[:, 0]
        optimizer.zero_grad()
        torch.relu(0.4 - correct).mean().backward()
        optimizer.step()
    network.eval()
    bound = generalization_bound(network_class(network), lipschitz_radius(network, images, labels), eps, 0.95)
    others, other_labels = draw(20_000)
    error = float((lipschitz_radius(network, others, other_labels) <= eps).double().mean())
    assert error < bound.bound < 0.6 and not bound.is_vacuous
    assert bound.bound == bound.margin_share + bound.size_term
    sums = [
        float((lipschitz_radius(network, images, labels) <= eps + delta).double().mean())
        + size_term(bound.nets, 20_000, delta, 0.95)
        for delta in DELTAS
    ]
    assert bound.bound == pytest.approx(min(sums))


def test_terms_have_their_formulas() -> None:
    network = LinfDistMLPConfig(depth=2, width=3, initialization="normal").build((1, 2, 2), 2, (0.5,), 0.25).eval()
    network.features.distances[0].weight.detach().fill_(3.0)
    nets = network_class(network)
    assert (nets.parameters, nets.tensors, nets.magnitude, nets.depth, nets.width) == (23, 4, 4.0, 2, 3)
    expected = math.sqrt((23 * math.log(math.ceil(2 * 4 * 4 * 0.25 / 0.1)) + math.log(TRIED_PAIRS / 0.05)) / 200)
    assert size_term(nets, 100, 0.1, 0.95) == pytest.approx(expected)
    t = math.sqrt(math.log(2 / 0.05) / 2)
    published = 2 * 9 / 0.1 / 10 + math.sqrt(math.log(math.log2(20)) / 100) + t / 10
    assert published_size_term(nets, 100, 0.1, 0.95) == pytest.approx(published)


def test_needed_images_make_a_vacuous_bound_informative() -> None:
    nets = network_class(LinfDistMLPConfig(depth=2, width=30).build((1, 6, 6), 4).eval())
    radii = torch.full((100,), 0.5)
    bound = generalization_bound(nets, radii, 0.1, 0.95)
    assert bound.is_vacuous and bound.needed_images is not None
    more = generalization_bound(nets, torch.full((bound.needed_images,), 0.5), 0.1, 0.95)
    assert not more.is_vacuous and more.bound > 0.9
    assert generalization_bound(nets, torch.zeros(9), 0.1, 0.95).needed_images is None


def test_unsuitable_input_is_rejected() -> None:
    with pytest.raises(TypeError, match=r"^network"):
        network_class(GroupSortConfig(depth=2, width=4).build((1, 2, 2), 2))
    network = LinfDistMLPConfig(depth=2, width=3).build((1, 2, 2), 2).eval()
    nets = network_class(network)
    with pytest.raises(ValueError, match=r"^confidence"):
        generalization_bound(nets, torch.ones(3), 0.1, 1.0)
    with pytest.raises(ValueError, match=r"^radii"):
        generalization_bound(nets, torch.ones(0), 0.1, 0.95)
    network.bias.detach().fill_(2.0**26)
    with pytest.raises(ValueError, match=r"^network"):
        network_class(network)
