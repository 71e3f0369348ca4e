"""Conformance tests of every registered objective."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from linflab.models.networks import NetworkConfig
from linflab.models.robustness.objectives import Batch, Objective, ObjectiveConfig, TAPSConfig
from linflab.models.robustness.objectives.taps import LatentAttackConfig
from tests.models.conformance.cases import SETTINGS, SHAPE, build_network, make_labeled_images

REQUIRED_VALUES = {"theta": 0.05, "eps_train": 0.02}
NETWORKS = ("linf_dist_mlp", "linf_dist_hybrid", "conv_net")


def list_cases() -> list[Any]:
    """Return every objective with each network that it supports."""
    return [
        pytest.param(cls, NetworkConfig.registry[network](**SETTINGS[network][0]), id=f"{kind}-{network}")
        for kind, cls in ObjectiveConfig.registry.items()
        for network in NETWORKS
        if NetworkConfig.registry[network].is_lipschitz or not cls.needs_lipschitz
        if NetworkConfig.registry[network].has_relu or not cls.needs_relu
        if not (issubclass(cls, LatentAttackConfig) and NetworkConfig.registry[network].has_only_distances)
    ]


def get_required_settings(cls: type[ObjectiveConfig]) -> dict[str, Any]:
    return {name: REQUIRED_VALUES[name] for name, field in cls.model_fields.items() if field.is_required()}


def prepare(cls: type[ObjectiveConfig], config: NetworkConfig) -> tuple[nn.Module, Objective, Batch]:
    network = build_network(config).train()
    objective = cls(**get_required_settings(cls)).build(getattr(network, "lipschitz_constant", float("nan")))
    objective.prepare(network, SHAPE)
    images, labels = make_labeled_images(32)
    starts = objective.draw_starts(images.shape, torch.Generator().manual_seed(0))
    return network, objective, Batch(images, labels, 16.0, None, 0.5, 0.02, starts)


@pytest.mark.parametrize(("cls", "config"), list_cases())
def test_loss_has_finite_gradients_and_falls(cls: type[ObjectiveConfig], config: NetworkConfig) -> None:
    network, objective, batch = prepare(cls, config)
    parameters = [*network.parameters(), *objective.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.01)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = objective.loss(network, batch)
        loss.backward()
        losses.append(loss.item())
        assert loss.shape == () and loss.isfinite()
        assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in parameters)
        assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in parameters)
        optimizer.step()
    assert network.training and min(losses[-5:]) < 0.95 * losses[0]


@pytest.mark.parametrize(("cls", "config"), list_cases())
def test_loss_is_finite_at_eps_zero(cls: type[ObjectiveConfig], config: NetworkConfig) -> None:
    network, objective, batch = prepare(cls, config)
    assert objective.loss(network, batch._replace(eps=0.0, starts=None)).isfinite()
    assert (batch.starts is not None) == (cls.attacks and cls is not TAPSConfig)  # TAPS draws by the seed


@pytest.mark.parametrize("kind", list(ObjectiveConfig.registry))
def test_invalid_settings_are_rejected(kind: str) -> None:
    cls = ObjectiveConfig.registry[kind]
    config = cls(**get_required_settings(cls))
    assert cls.model_validate_json(config.model_dump_json()) == config
    for invalid in ({name: -1.0} for name in get_required_settings(cls)):
        with pytest.raises(ValidationError):
            cls(**{**get_required_settings(cls), **invalid})
    with pytest.raises(ValidationError):
        cls(**get_required_settings(cls), no_such_setting=1)
