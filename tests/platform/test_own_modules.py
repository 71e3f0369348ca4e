"""Modules of LINFLAB_IMPORT, which register a user's own parts in every process."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import linflab
from linflab.models.networks import NetworkConfig
from linflab.models.robustness.objectives import ObjectiveConfig
from linflab.platform.config import own_parts
from linflab.platform.config.overrides import build_config, load_config
from linflab.platform.config.own_parts import UnknownObjectiveConfig, copy_own_modules, used_modules
from linflab.platform.data.datasets import load_dataset
from linflab.platform.errors import InputError, RunInterrupted
from linflab.platform.training.checkpoints import CheckpointStore
from linflab.platform.training.fit import fit
from linflab.platform.training.trainer import Trainer
from linflab.platform.training.weights import build_network, load_weights, save_weights
from linflab.reports import schema
from tests.conftest import RunCli, assert_rejected

Command = Callable[..., subprocess.CompletedProcess[str]]
RECIPE = "digits_eps0.1_ibp"
QUICK = ["training.epochs=1", "evaluation.attack.steps=1", "evaluation.attack.restarts=1"]
MODULE = """
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from linflab.models.networks import NetworkConfig
from linflab.models.robustness.objectives import Objective, ObjectiveConfig


class WideConfig(NetworkConfig):
    has_relu: ClassVar[bool] = True

    kind: Literal["my_wide"] = Field("my_wide", description="one hidden layer")

    def build(self, input_shape: Sequence[int], classes: int, mean=(0.0,), std=1.0) -> nn.Module:
        hidden = nn.Linear(torch.Size(input_shape).numel(), 8)
        return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, classes))


class SmallConfig(ObjectiveConfig):
    kind: Literal["my_small"] = Field("my_small", description="cross entropy and the l_1 norm of the logits")
    weight: float = Field(0.01, description="weight of the norm")

    def build(self, lipschitz_constant: float) -> Objective:
        return Small(self.weight)


class Small(Objective):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def loss(self, network, batch):
        logits = network(batch.images)
        return functional.cross_entropy(logits, batch.labels) + self.weight * logits.abs().mean()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module with a network `my_wide` and an objective `my_small`, in the current directory."""
    (tmp_path / "my_parts.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_parts"
    forget()


def forget() -> None:
    """Forget the module, as a new process without LINFLAB_IMPORT."""
    sys.modules.pop("my_parts", None)
    ObjectiveConfig.registry.pop("my_small", None)
    NetworkConfig.registry.pop("my_wide", None)


def test_networks_load_without_the_objective(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_IMPORT", module)
    experiment = load_config(RECIPE, ["objective.kind=my_small", "objective.weight=0.5"])
    save_weights(tmp_path / "w.pt", build_network(experiment), experiment, 1)
    monkeypatch.delenv("LINFLAB_IMPORT")
    forget()
    weights = load_weights(tmp_path / "w.pt")
    objective = weights.experiment.objective
    assert isinstance(objective, UnknownObjectiveConfig) and weights.modules == (module,)
    assert weights.experiment.model_dump() == experiment.model_dump()
    assert weights.experiment.config_hash() == experiment.config_hash()
    assert weights.experiment.method == experiment.method
    with pytest.raises(InputError, match=r"objective\.kind=my_small.*LINFLAB_IMPORT"):
        objective.build(1.0)
    with pytest.raises(InputError, match=r"objective\.kind=my_small.*LINFLAB_IMPORT"):
        build_config(experiment.model_dump(mode="json"), {})


def has_ended(calls: Iterator[int]) -> bool:
    return next(calls, None) is None


def test_interrupted_training_with_dropout_is_deterministic(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINFLAB_IMPORT", module)
    experiment = load_config(RECIPE, ["model.kind=my_wide", "training.epochs=2"])
    data, checkpoints = load_dataset(experiment.dataset, experiment.augmentation), CheckpointStore(tmp_path / "run")
    uninterrupted = fit(experiment, data)
    for num_steps in (3, 47):
        calls = iter(range(num_steps))
        with pytest.raises(RunInterrupted):
            fit(experiment, data, checkpoints=checkpoints, should_stop=partial(has_ended, calls))
        torch.rand(7)  # the masks do not depend on earlier draws
    resumed = fit(experiment, data, checkpoints=checkpoints)
    for name, tensor in uninterrupted.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name


def test_workers_draw_their_own_dropout_masks(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_IMPORT", module)
    experiment = load_config(RECIPE, ["model.kind=my_wide"])
    data, seeds = load_dataset(experiment.dataset, experiment.augmentation), set()
    for rank in range(2):
        trainer = Trainer(experiment, data, rank, 2)
        for step in range(2):
            trainer.step(step, *trainer.epoch_order(1))
            seeds.add(torch.initial_seed())
    assert len(seeds) == 4


def test_unknown_networks_name_their_module(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_IMPORT", module)
    experiment = load_config(RECIPE, ["model.kind=my_wide"])
    save_weights(tmp_path / "w.pt", build_network(experiment), experiment, 1)
    monkeypatch.delenv("LINFLAB_IMPORT")
    forget()
    with pytest.raises(InputError, match=r"model\.kind=my_wide.*LINFLAB_IMPORT=my_parts"):
        load_weights(tmp_path / "w.pt")
    monkeypatch.setenv("LINFLAB_IMPORT", module)
    assert load_weights(tmp_path / "w.pt").network(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_modules_are_copied_for_cluster_jobs(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "part.py").touch()
    monkeypatch.setenv("LINFLAB_IMPORT", f"{module}, my_package.part,numpy")
    (tmp_path / "job").mkdir()
    copy_own_modules(tmp_path / "job")
    copied = {str(path.relative_to(tmp_path / "job")) for path in (tmp_path / "job").rglob("*.py")}
    assert copied == {"my_parts.py", "my_package/__init__.py", "my_package/part.py"}
    for name in ("my_package", "my_package.part"):
        del sys.modules[name]


def test_installed_modules_are_not_copied(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_parts.site, "getusersitepackages", lambda: str(tmp_path))
    monkeypatch.setenv("LINFLAB_IMPORT", f"{module},numpy")
    (tmp_path / "job").mkdir()
    copy_own_modules(tmp_path / "job")
    assert not list((tmp_path / "job").iterdir())


def test_modules_without_a_file_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_IMPORT", "sys")
    with pytest.raises(InputError, match="LINFLAB_IMPORT=sys"):
        copy_own_modules(tmp_path)


@pytest.mark.parametrize("name", ["my-parts", "my_parts.py.", "folder/my_parts", "linflab.models", "linflab"])
def test_names_that_cannot_be_recorded_are_rejected(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-parts.py").write_text(MODULE)
    monkeypatch.setenv("LINFLAB_IMPORT", f"{module},{name}")
    with pytest.raises(InputError, match=f"LINFLAB_IMPORT={module},{name}: "):
        load_config(RECIPE, [])
    assert "my-parts" not in sys.modules


def test_invalid_recorded_names_do_not_prevent_loading(tmp_path: Path) -> None:
    experiment = load_config(RECIPE, [])
    save_weights(tmp_path / "w.pt", build_network(experiment), experiment, 1)
    content = torch.load(tmp_path / "w.pt", weights_only=True)
    for names, expected in ((["my-nets", "my_parts", 3], ("my_parts",)), ("my_parts", ())):
        torch.save(content | {"modules": names}, tmp_path / "w.pt")
        assert load_weights(tmp_path / "w.pt").modules == expected


def test_modules_of_ensemble_members_are_recorded(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_IMPORT", module)
    tree = load_config(RECIPE, ["model.kind=my_wide"]).model_dump(mode="json")
    tree["model"] = {"kind": "ensemble", "members": [tree["model"], tree["model"]]}
    experiment = build_config(tree, {})
    monkeypatch.delenv("LINFLAB_IMPORT")
    assert used_modules(experiment) == [module]


def test_current_directory_leaves_the_path(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_IMPORT", module)
    for path in (["/x"], ["/x", str(tmp_path)]):
        monkeypatch.setattr(sys, "path", [*path, *(one for one in sys.path if one and one != str(tmp_path))])
        before = list(sys.path)
        load_config(RECIPE, ["model.kind=my_wide"])
        assert sys.path == before
        forget()


def test_missing_and_broken_modules_are_rejected(run_cli: RunCli, module: str, tmp_path: Path) -> None:
    (tmp_path / "my_parts.py").write_text("1 / 0")
    for name, reason in (("my_parts", "ZeroDivisionError"), ("no_such_parts", "ModuleNotFoundError")):
        for command in (["describe", RECIPE], ["train", RECIPE, "--dry-run"], ["schema", "recipe"]):
            assert_rejected(run_cli(*command, LINFLAB_IMPORT=name), f"LINFLAB_IMPORT={name}", reason)


def test_run_is_evaluated_without_its_objective(
    module: str, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = ("--storage", str(tmp_path / "runs"))
    done = run_cli("train", RECIPE, "objective.kind=my_small", *QUICK, *storage, LINFLAB_IMPORT=module)
    assert done.returncode == 0, done.stderr
    monkeypatch.delenv("LINFLAB_IMPORT")
    forget()
    (run,) = linflab.records(tmp_path / "runs").to_dict("records")
    assert run[schema.MODULES] == module
    done = run_cli("evaluate", run["run_id"], "--attacks", "none", *storage)
    assert done.returncode == 0, done.stderr
    assert linflab.load(run["run_id"], tmp_path / "runs")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    done = run_cli("train", RECIPE, *QUICK, *storage, "--name", "plain")
    assert done.returncode == 0, done.stderr
    done = run_cli("ensemble", run["run_id"], "plain", "--name", "mean", *storage)
    assert done.returncode == 0, done.stderr
    done = run_cli("train", RECIPE, "objective.kind=my_small", *QUICK, *storage, "--resume")
    assert_rejected(done, "objective.kind=my_small", "LINFLAB_IMPORT")


@pytest.mark.slow
def test_sweeps_and_workers_import_the_modules(module: str, linflab: Command, tmp_path: Path) -> None:
    settings = ["model.kind=my_wide", "objective.kind=my_small", *QUICK, "compute.workers=2"]
    (tmp_path / "space.yaml").write_text(
        "description: weights of the norm\n"
        "parameters: {objective.weight: {distribution: categorical, choices: [0.1, 0.2]}}\n"
    )
    storage = ("--storage", str(tmp_path / "runs"))
    done = linflab("sweep", RECIPE, "space.yaml", *settings, "--budget", "1", *storage, LINFLAB_IMPORT=module)
    assert done.returncode == 0, done.stdout + done.stderr
