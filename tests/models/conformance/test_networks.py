"""Conformance tests of every registered network."""

import copy
import io

import pytest
import torch
from pydantic import ValidationError

from linflab.models.networks import NetworkConfig
from linflab.models.networks.cost import count_flops, count_parameters, layer_costs
from linflab.models.networks.linf_dist import DistanceNet
from linflab.models.robustness.bounds.boxes import perturbation_box
from linflab.models.robustness.bounds.ibp import ibp_bounds
from tests.models.conformance.cases import CLASSES, SHAPE, STD, build_network, list_network_configs, sample_points

every_network = pytest.mark.parametrize("config", list_network_configs())


@every_network
def test_evaluation_logits_are_reproducible(config: NetworkConfig) -> None:
    """Logits agree when repeated, for single images, in float64, and after a round trip of the state."""
    network = build_network(config)
    before = copy.deepcopy(network.state_dict())
    images = torch.rand(5, *SHAPE)
    with torch.no_grad():
        logits = network(images)
        assert logits.shape == (5, CLASSES) and logits.dtype == torch.float32 and logits.isfinite().all()
        assert torch.equal(network(images), logits)
        separate = torch.cat([network(image[None]) for image in images])
        torch.testing.assert_close(separate, logits, rtol=1e-4, atol=1e-4)
        exact = copy.deepcopy(network).double()(images.double())
        torch.testing.assert_close(logits.double(), exact, rtol=1e-4, atol=1e-4)
        for name, value in network.state_dict().items():
            assert torch.equal(value, before[name])
        buffer = io.BytesIO()
        torch.save(network.state_dict(), buffer)
        buffer.seek(0)
        other = build_network(config, seed=1)
        assert not torch.equal(other(images), logits)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(other(images), logits)


@every_network
def test_settings_survive_a_round_trip_and_reject_unknown(config: NetworkConfig) -> None:
    assert type(config).model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError):
        type(config).model_validate({**config.model_dump(), "no_such_setting": 1})


@every_network
def test_costs_cover_every_weight(config: NetworkConfig) -> None:
    with torch.device("meta"):
        meta = config.build(SHAPE, CLASSES)
    network = build_network(config)
    costs = layer_costs(meta, SHAPE)
    assert count_flops(network, SHAPE) == count_flops(meta, SHAPE) == sum(cost.flops for cost in costs)
    assert costs[-1].output_shape == (CLASSES,) and all(cost.flops >= cost.parameters // 2 for cost in costs)
    matrices = sum(parameter.numel() for parameter in network.parameters() if parameter.dim() > 1)
    assert matrices <= sum(cost.flops for cost in costs) and matrices <= count_parameters(network)


@every_network
def test_networks_match_their_declared_properties(config: NetworkConfig) -> None:
    network = build_network(config)
    assert hasattr(network, "lipschitz_constant") == config.is_lipschitz
    assert isinstance(network, DistanceNet) == config.has_distances
    assert any(isinstance(module, torch.nn.ReLU) for module in network.modules()) == config.has_relu


@pytest.mark.parametrize(
    "config", [case for case in list_network_configs() if case.values[0].is_lipschitz or case.values[0].has_distances]
)
@pytest.mark.parametrize("size", [1e-6, 0.01, 1.0])
def test_outputs_respect_the_lipschitz_constant(config: NetworkConfig, size: float) -> None:
    """The steps go to corners and to inner points of balls. For hybrids, the features have the constant."""
    network = build_network(config).double()
    function = network if config.is_lipschitz else network.features
    images = torch.rand(64, *SHAPE, dtype=torch.float64)
    steps = torch.rand_like(images) * 2 - 1
    steps[::2] = steps[::2].sign()
    with torch.no_grad():
        difference = (function(images + size * steps) - function(images)).abs().amax()
    assert function.lipschitz_constant == pytest.approx(1 / STD)
    assert 0 < difference <= function.lipschitz_constant * size * (1 + 1e-9) + 1e-12


@every_network
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.02])
def test_sound_bounds_contain_computed_logits(config: NetworkConfig, eps: float) -> None:
    """Bounds contain float32 logits for any batch size, and float64 logits up to rounding."""
    network = build_network(config)
    box = perturbation_box(torch.rand(2, *SHAPE), eps)
    with torch.no_grad():
        lower, upper = (bound.double() for bound in ibp_bounds(network, box))
        points = sample_points(box, 12)
        logits = network(points.flatten(0, 1)).unflatten(0, (12, 2))
        computed = torch.cat([logits, torch.stack([network(point) for point in points])])
        assert (computed.double() >= lower).all() and (computed.double() <= upper).all()
        exact = copy.deepcopy(network).double()(points[:4].flatten(0, 1).double()).unflatten(0, (4, 2))
        slack = 1e-5 * exact.abs().max()
        assert (exact >= lower - slack).all() and (exact <= upper + slack).all()
