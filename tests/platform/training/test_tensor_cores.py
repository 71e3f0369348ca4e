"""The setting compute.tensor_cores: which layers use it, what it changes, and runs of versions without it."""

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
import yaml

from linflab.models.distance import tensor_cores
from linflab.models.networks.layers import LpDistance
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.errors import InputError, RunInterrupted
from linflab.platform.tracking.runs import Run, find_runs
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.checkpoints import CheckpointStore
from linflab.platform.training.evaluation import evaluate, evaluation_spec
from linflab.platform.training.fit import fit
from linflab.platform.training.trainer import Trainer
from linflab.reports import schema
from linflab.reports.added_settings import ADDED_SETTINGS
from linflab.reports.renames import CONFIG_HASH
from tests.conftest import QUICK, RECIPE

pytestmark = pytest.mark.integration

ON = "compute.tensor_cores=true"
LINE = "  tensor_cores: false\n"
CONV = ("model.kind=linf_dist_conv_net", "model.width=2")
HYBRID = ("model.kind=linf_dist_hybrid", "objective.kind=cross_entropy")


def layers_on_tensor_cores(*overrides: str) -> list[str]:
    trainer = Trainer(load_config(RECIPE, [*QUICK, *overrides]), load_dataset("digits"))
    return [
        name
        for name, layer in trainer.network.named_modules()
        if isinstance(layer, LpDistance) and layer.on_tensor_cores
    ]


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ((), ["features.distances.0", "features.distances.1"]),
        (CONV, ["features.distances.5"]),
        ((*HYBRID, "model.backbone.kind=linf_dist_mlp", "model.backbone.depth=2"), ["features.distances.0"]),
    ],
)
def test_hidden_dense_distance_layers_use_tensor_cores(overrides: tuple[str, ...], names: list[str]) -> None:
    assert layers_on_tensor_cores(*overrides, ON) == names
    assert layers_on_tensor_cores(*overrides) == []


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.kind=sort_net", "model.q=0.7"),
        (*HYBRID, "model.backbone.kind=sort_net", "model.backbone.q=0.7", "model.backbone.depth=2"),
        ("model.kind=conv_net", "objective.kind=cross_entropy"),
    ],
)
def test_tensor_cores_require_distance_layers_without_masks(overrides: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"compute\.tensor_cores=true"):
        load_config(RECIPE, [*QUICK, *overrides, ON])


def test_trained_networks_compute_exact_distances() -> None:
    result = fit(load_config(RECIPE, [*QUICK, ON]), load_dataset("digits"))
    assert not any(getattr(layer, "on_tensor_cores", False) for layer in result.network.modules())


def test_training_uses_tensor_cores_and_evaluation_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = tensor_cores.forward

    def counted(x: torch.Tensor, weight: torch.Tensor, p: int) -> object:
        calls.append(p)
        return forward(x, weight, p)

    monkeypatch.setattr(tensor_cores, "forward", counted)
    experiment, data = load_config(RECIPE, [*QUICK, ON]), load_dataset("digits")
    steps: list[float] = []
    trained = fit(experiment, data, on_step=lambda report: steps.append(report.p))
    assert sorted(calls) == sorted(2 * [p for p in steps if p in (8, 12)])  # two hidden layers
    plain = Trainer(load_config(RECIPE, QUICK), data).network.eval()
    plain.load_state_dict(trained.network.state_dict())
    spec = dataclasses.replace(evaluation_spec(experiment, plain, with_attacks=True), radii=True)
    results = []
    for network in (trained.network, plain):
        radii: list[torch.Tensor] = []
        scored = evaluate(network, data.test, spec, 100, lambda part, radii=radii: radii.append(part.radii))
        results.append((scored, torch.cat(radii)))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_same_seed_same_bits() -> None:
    experiment, data = load_config(RECIPE, [*QUICK, ON]), load_dataset("digits")
    one, other, plain = (
        fit(config, data).network.state_dict() for config in (experiment, experiment, load_config(RECIPE, QUICK))
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], plain[name]) for name in one)


def interrupted(experiment: ExperimentConfig, folder: Path) -> CheckpointStore:
    """Train a step, and remove the setting from the checkpoint."""
    checkpoints = CheckpointStore(folder)
    with pytest.raises(RunInterrupted):
        fit(experiment, load_dataset("digits"), checkpoints=checkpoints, should_stop=lambda: True)
    state = checkpoints.load()
    state["experiment"] = state["experiment"].replace(LINE, "")
    assert "tensor_cores" not in state["experiment"]
    checkpoints.save(state)
    return checkpoints


def test_checkpoint_without_the_setting_is_resumed(tmp_path: Path) -> None:
    experiment, data = load_config(RECIPE, QUICK), load_dataset("digits")
    checkpoints = interrupted(experiment, tmp_path)
    with pytest.raises(InputError, match=r"compute\.tensor_cores"):
        fit(load_config(RECIPE, [*QUICK, ON]), data, checkpoints=checkpoints)
    resumed, whole = fit(experiment, data, checkpoints=checkpoints), fit(experiment, data)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name


def test_runs_without_the_setting_are_found(tmp_path: Path) -> None:
    """Of the last version, by their hash, and of those before, by their parameters."""
    experiment, storage = load_config(RECIPE, QUICK), Storage.open(tmp_path / "runs")
    settings, tree = experiment.to_flat_dict(), yaml.safe_load(experiment.to_yaml())
    assert settings["compute.tensor_cores"] is False
    for path in ADDED_SETTINGS.keys() & settings.keys():
        section, name = path.split(".")
        del settings[path], tree[section][name]
    digest = hashlib.sha256(yaml.safe_dump(tree, sort_keys=False).encode()).hexdigest()[:32]
    for tag, value in ((schema.CONFIG_HASH, digest), (CONFIG_HASH, "of old names")):
        with Run.start(storage, experiment, "earlier", {}, settings) as run:
            run.client.delete_tag(run.id, schema.CONFIG_HASH)
            run.client.set_tag(run.id, tag, value)
        assert [found.info.run_id for found in find_runs(storage, experiment)] == [run.id]
        assert find_runs(storage, load_config(RECIPE, [*QUICK, ON])) == []
        run.client.delete_run(run.id)
