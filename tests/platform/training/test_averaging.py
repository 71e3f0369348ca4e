"""Weight averaging: means of the trained weights, with statistics of their own, that survive interruptions."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.errors import InputError, RunInterrupted
from linflab.platform.training.checkpoints import CheckpointStore
from linflab.platform.training.evaluation import evaluate, evaluation_spec
from linflab.platform.training.fit import fit
from linflab.platform.training.trainer import Trainer
from tests.conftest import RECIPE

pytestmark = pytest.mark.integration

KINDS = {
    "batch norm": ["model.kind=cnn7", "model.variant=cifar", "model.width=2", "model.hidden_size=8"],
    "l_inf-dist": ["model.width=16", "model.depth=3"],
    "SortNet": ["model.kind=sort_net", "model.width=16", "model.depth=3"],
}
KINDS["batch norm"] += ["objective.kind=worst_case_cross_entropy", "objective.eps_train=0.01"]
KINDS["batch norm"] += ["optimizer.learning_rate=0.003", "optimizer.adam_epsilon=1e-5"]


def make_config(kind: str, start: str = "0.3", interval: int = 4) -> ExperimentConfig:
    """Return a config of 5 epochs of 6 steps; the batch size divides the number of training images."""
    settings = [f"training.averaging_start={start}", f"training.averaging_interval={interval}"]
    settings += ["training.epochs=5", "training.batch_size=200", "training.checkpoint_interval=2"]
    return load_config(RECIPE, [*KINDS[kind], *settings, "evaluation.calibration_images=400"])


@pytest.mark.parametrize(("kind", "start"), [("batch norm", "0.3"), ("l_inf-dist", "0.3"), ("SortNet", "0")])
def test_selected_network_is_the_mean_of_weights(kind: str, start: str) -> None:
    experiment, data = make_config(kind, start), load_dataset("digits")
    result, trainer = fit(experiment, data), Trainer(experiment, data)
    averaged: list[list[np.ndarray]] = []
    for step in range(6 * result.epoch):
        trainer.step(step, *trainer.epoch_order(1 + step // 6))
        if step in range(int(30 * float(start)), 30, 4):
            averaged.append([one.detach().double().numpy().copy() for one in trainer.network.parameters()])
    assert len(averaged) > 1  # an epoch after the start of averaging is selected
    for actual, *weights in zip(result.network.parameters(), *averaged, strict=True):
        np.testing.assert_allclose(actual.detach().numpy(), np.mean(weights, axis=0), rtol=1e-4, atol=1e-6)
    images, network = data.train.batch(torch.arange(1200))[0], result.network
    with torch.no_grad():
        if kind == "batch norm":
            torch.testing.assert_close(network[2].running_mean, network[:2](images).mean((0, 2, 3)))
        else:
            features = network.features
            distances = features.distances[0](features.normalize(images)).mean(0)
            torch.testing.assert_close(features.shifts[0].running_mean, distances)
    spec = evaluation_spec(experiment, network, with_attacks=False)
    assert evaluate(network, data.validation, spec, 1000) == [result.validation]


@pytest.mark.parametrize("kind", ["batch norm", "SortNet"])
def test_resumed_average_is_bitwise_equal(tmp_path: Path, kind: str) -> None:
    """Interruptions before the start of averaging, and between two averaged steps; training itself is unchanged."""
    experiment, data = make_config(kind), load_dataset("digits")
    checkpoints, steps = CheckpointStore(tmp_path / "run"), []
    for stop in (8, 17):
        with pytest.raises(RunInterrupted):
            fit(
                experiment,
                data,
                on_step=lambda report: steps.append(report.step),
                checkpoints=checkpoints,
                should_stop=lambda stop=stop: steps[-1] >= stop,
            )
    damaged, state = CheckpointStore(tmp_path / "damaged"), checkpoints.load()
    assert state["average"]["count"] == 2  # after steps 10 and 14, counted from 1
    for change in ({"count": 3}, {"weights": {}}, {"weights": {**state["average"]["weights"], "other": torch.ones(1)}}):
        damaged.save({**state, "average": {**state["average"], **change}})
        with pytest.raises(InputError, match="invalid checkpoint"):
            fit(experiment, data, checkpoints=damaged)
    resumed, whole = fit(experiment, data, checkpoints=checkpoints), fit(experiment, data)
    assert (resumed.epoch, resumed.validation) == (whole.epoch, whole.validation)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name
    plain, plain_checkpoints = load_config(RECIPE, [*KINDS[kind]]), CheckpointStore(tmp_path / "plain")
    training = experiment.training.model_copy(update={"averaging_start": None})
    fit(plain.model_copy(update={"training": training}), data, checkpoints=plain_checkpoints)
    for name, parameter in plain_checkpoints.load()["loss"].items():
        if not name.endswith(("running_mean", "num_batches_tracked")) or kind == "batch norm":
            assert torch.equal(parameter, checkpoints.load()["loss"][name]), name


WORKER = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.training.fit import fit
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
network = fit(load_config(str(folder / "config.yaml")), load_dataset("digits")).network
torch.save(network.state_dict(), folder / f"{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["batch norm", "SortNet"])
def test_two_workers_agree_on_the_average(tmp_path: Path, kind: str) -> None:
    """They also match the logits of one worker, up to rounding."""
    experiment, data = make_config(kind), load_dataset("digits")
    (tmp_path / "config.yaml").write_text(experiment.to_yaml())
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    network, images = fit(experiment, data).network, data.test.batch(torch.arange(360))[0]
    with torch.no_grad():
        expected = network(images)
        for name in network.state_dict():
            assert torch.equal(states[0][name], states[1][name]), name
        network.load_state_dict(states[0])
        torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-3)
