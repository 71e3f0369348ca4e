"""A training that is cut goes on from its checkpoint to the same bits; damaged checkpoints are named."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from linflab.platform.checkpoints import Checkpoints
from linflab.platform.config import Experiment, load_experiment
from linflab.platform.datasets import load_dataset
from linflab.platform.errors import Interrupted, SettingError, TrainingError, WorkerDied
from linflab.platform.storage import Storage
from linflab.platform.tracking import Run
from linflab.platform.training import EpochReport, StepReport, fit
from linflab.platform.trial import run_trial
from linflab.reports import schema
from tests.conftest import QUICK, RECIPE

AUGMENTED = [*QUICK, "augmentation.padding=1", "training.checkpoint_epochs=1"]


def experiment(*overrides: str) -> Experiment:
    return load_experiment(RECIPE, [*AUGMENTED, *overrides])


def facts(report: EpochReport) -> object:
    return report.epoch, report.at, report.train_loss, report.validation, report.best_certified


def until(
    checkpoints: Checkpoints,
    last_step: int,
    cut: Experiment,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
) -> None:
    """Train until this step of the run."""
    data, seen = load_dataset("digits", cut.augmentation), 0

    def on_step(report: StepReport) -> None:
        nonlocal seen
        seen = report.step

    with pytest.raises(Interrupted, match=f"step {last_step} of 111"):
        fit(cut, data, on_epoch, on_step, checkpoints, should_stop=lambda: seen >= last_step)


def test_cut_again_and_again_it_comes_to_the_same_bits(tmp_path: Path) -> None:
    data = load_dataset("digits", experiment().augmentation)
    epochs: list[object] = []
    whole = fit(experiment(), data, lambda report: epochs.append(facts(report)))
    checkpoints = Checkpoints(tmp_path / "run")
    parts: list[object] = []
    for stop in (1, 2, 37, 38, 80, 111):  # 37 steps an epoch: also at an epoch's very end
        until(checkpoints, stop, experiment(), lambda report: parts.append(facts(report)))
    trained = fit(experiment(), data, lambda report: parts.append(facts(report)), checkpoints=checkpoints)
    assert parts == epochs and (trained.epoch, trained.validation) == (whole.epoch, whole.validation)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, trained.network.state_dict()[name]), name


def test_cut_while_it_is_scored_it_goes_on_from_its_end(tmp_path: Path) -> None:
    checkpoints, data = Checkpoints(tmp_path / "run"), load_dataset("digits", experiment().augmentation)
    settings = ["training.checkpoint_epochs=100"]
    whole, steps = fit(experiment(*settings), data, checkpoints=checkpoints), []
    again = fit(experiment(*settings), data, on_step=steps.append, checkpoints=checkpoints)
    assert not steps and (again.epoch, again.validation) == (whole.epoch, whole.validation)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name]), name


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run")
    until(checkpoints, 50, experiment())
    until(checkpoints, 60, experiment())
    checkpoints.latest.write_bytes(checkpoints.latest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"latest\.pt.*previous\.pt"):
        until(checkpoints, 70, experiment())
    for path in (checkpoints.latest, checkpoints.previous):
        path.write_bytes(b"no checkpoint")
    with pytest.raises(SettingError, match=r"latest\.pt.*previous\.pt"):
        fit(experiment(), load_dataset("digits"), checkpoints=checkpoints)


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run")
    until(checkpoints, 50, experiment())
    os.replace(checkpoints.latest, checkpoints.previous)
    (checkpoints.folder / ".latest.pt.partial").write_bytes(b"half")
    assert checkpoints.exist() and checkpoints.load()["batch"] == 50 - 37


@pytest.mark.parametrize("other", ["model.width=32", "seed=5", "optimizer.learning_rate=0.5"])
def test_a_checkpoint_of_another_experiment_is_refused(tmp_path: Path, other: str) -> None:
    checkpoints = Checkpoints(tmp_path / "run")
    until(checkpoints, 5, experiment())
    with pytest.raises(SettingError, match=other.split("=")[0]):
        fit(experiment(other), load_dataset("digits"), checkpoints=checkpoints)


def test_two_processes_cannot_train_one_run(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run")
    with checkpoints.lock(), pytest.raises(SettingError, match="another process"), checkpoints.lock():
        pass
    with checkpoints.lock():  # free again
        pass


def weights(storage: Path) -> dict[str, torch.Tensor]:
    (path,) = storage.glob("artifacts/*/artifacts/weights.pt")
    return torch.load(path, weights_only=True)["network"]


def start(storage: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("linflab")), "train", RECIPE, *arguments, "--storage", str(storage)]
    log = (storage.parent / f"{storage.name}.log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "epochs", "times"), [(1, 200, 6), (2, 20, 2)])
def test_killed_again_and_again_it_comes_to_the_same_bits(
    tmp_path: Path, workers: int, epochs: int, times: int
) -> None:
    settings = [f"compute.workers={workers}", f"training.epochs={epochs}", "training.checkpoint_epochs=2", "seed=7"]
    settings += ["evaluation.attack.steps=5", "evaluation.attack.restarts=1"]
    assert start(tmp_path / "whole", *settings).wait(timeout=600) == 0
    chance, storage = random.Random(0), tmp_path / "cut"
    kills = 0
    process = start(storage, *settings)
    while kills < times:
        before = newest(storage)
        deadline = time.monotonic() + 120
        while newest(storage) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)  # a kill before the first checkpoint would only start anew
        time.sleep(chance.uniform(0, 0.3))
        assert process.poll() is None, f"it ended by itself, after {kills} kills"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        process = start(storage, *settings, "--resume")
    assert process.wait(timeout=600) == 0
    whole, cut = weights(tmp_path / "whole"), weights(storage)
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not list((storage / "checkpoints").iterdir())


def newest(storage: Path) -> int:
    """When the latest checkpoint was written, in nanoseconds; 0 where there is none."""
    return max((path.stat().st_mtime_ns for path in storage.glob("checkpoints/*/latest.pt")), default=0)


def test_sigterm_writes_a_checkpoint(tmp_path: Path, linflab: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    settings = ["training.epochs=2000", "training.checkpoint_epochs=2000"]
    process = start(tmp_path / "runs", *settings)
    deadline = time.monotonic() + 60
    while b"epoch 2/" not in (tmp_path / "runs.log").read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=30) == 130
    said = (tmp_path / "runs.log").read_text()
    assert "--resume" in said and f"--storage {tmp_path / 'runs'}" in said
    assert newest(tmp_path / "runs") > 0


def test_a_run_whose_processes_die_without_coming_further_fails(tmp_path: Path) -> None:
    """Where it is told how often that may happen, as by a sweep; one that comes further may die any number of times."""
    storage, settings = Storage.open(tmp_path), experiment("evaluation.attack.steps=1")
    for starts, fails in (("0,0,0,0", True), ("0,0,0", False), ("0,0,0,0|", False), ("0,0,0,0|0", False)):
        run = Run.start(storage, settings, "often", {schema.STARTS: starts})
        if fails:
            with pytest.raises(TrainingError, match="died 4 times after epoch 0"):
                run_trial(settings, storage, "", {}, checkpointed=True, resume=run.id, deaths=3)
        else:
            run_trial(settings, storage, "", {}, checkpointed=True, resume=run.id, deaths=3, scored=False)
        record = run.client.get_run(run.id)
        assert record.info.status == ("FAILED" if fails else "FINISHED")
        assert ("died 4 times" in record.data.tags.get(schema.FAILURE, "")) == fails
        assert schema.TEST_CERTIFIED not in record.data.metrics


def _train_with_the_checkpoint_of(rank: int, folder: Path, port: int, said: Path) -> None:
    """One of two workers, each of which has a folder of checkpoints of its own."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        fit(
            experiment(), load_dataset("digits", experiment().augmentation), checkpoints=Checkpoints(folder / str(rank))
        )
    except WorkerDied as error:
        (said / str(rank)).write_text(str(error))
    dist.destroy_process_group()


def test_workers_that_read_different_checkpoints_do_not_train(tmp_path: Path) -> None:
    for rank, step in enumerate((50, 30)):  # in the second epoch, and in the first
        until(Checkpoints(tmp_path / str(rank)), step, experiment())
    said = tmp_path / "said"
    said.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _train_with_the_checkpoint_of, (tmp_path, port, said), nprocs=2, start_method="spawn"
    )
    assert {path.read_text() for path in said.iterdir()} == {
        "workers read different checkpoints, of epochs 1 to 2"
    } and len(list(said.iterdir())) == 2
