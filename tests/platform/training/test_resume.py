"""Resumed trainings equal uninterrupted ones bit by bit; damaged checkpoints are reported."""

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

from linflab.models.robustness.attacks import PGD, Attack
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.errors import InputError, RunInterrupted, RunLockedError, TrainingError, WorkerLostError
from linflab.platform.results.load import find_weights
from linflab.platform.tracking.runs import Run, find_runs
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.checkpoints import CheckpointStore
from linflab.platform.training.fit import fit
from linflab.platform.training.loop import EpochMetrics, StepMetrics
from linflab.platform.trial import TrialRequest, run_trial
from linflab.reports import schema
from tests.conftest import QUICK, RECIPE, has_words
from tests.platform.interruptions import group_outcomes

pytestmark = pytest.mark.integration

AUGMENTED = [*QUICK, "augmentation.padding=1", "augmentation.gamma_range=0.2", "training.checkpoint_interval=1"]


def make_config(*overrides: str) -> ExperimentConfig:
    return load_config(RECIPE, [*AUGMENTED, *overrides])


def select_results(report: EpochMetrics) -> object:
    return report.epoch, report.at, report.train_loss, report.validation, report.best_certified


def train_until(
    checkpoints: CheckpointStore,
    last_step: int,
    config: ExperimentConfig,
    on_epoch: Callable[[EpochMetrics], None] = lambda report: None,
    device: str = "cpu",
) -> None:
    """Train until this step and interrupt."""
    data, step = load_dataset("digits", config.augmentation).to(torch.device(device)), 0

    def on_step(report: StepMetrics) -> None:
        nonlocal step
        step = report.step

    with pytest.raises(RunInterrupted, match=rf"\b{last_step}\b.*\b111\b"):
        fit(config, data, on_epoch, on_step, checkpoints, should_stop=lambda: step >= last_step)


def test_training_with_many_interruptions_is_deterministic(tmp_path: Path) -> None:
    data = load_dataset("digits", make_config().augmentation)
    epochs: list[object] = []
    uninterrupted = fit(make_config(), data, lambda report: epochs.append(select_results(report)))
    checkpoints = CheckpointStore(tmp_path / "run")
    resumed_epochs: list[object] = []
    for stop in (1, 2, 37, 38, 80, 111):  # 37 steps per epoch: includes an epoch's last step
        train_until(checkpoints, stop, make_config(), lambda report: resumed_epochs.append(select_results(report)))
    trained = fit(
        make_config(), data, lambda report: resumed_epochs.append(select_results(report)), checkpoints=checkpoints
    )
    assert resumed_epochs == epochs and (trained.epoch, trained.validation) == (
        uninterrupted.epoch,
        uninterrupted.validation,
    )
    for name, tensor in uninterrupted.network.state_dict().items():
        assert torch.equal(tensor, trained.network.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["linf_dist_mlp", "sort_net"])
def test_training_interrupted_in_validation_is_deterministic(tmp_path: Path, kind: str) -> None:
    """The finished epoch is kept, and its validation is repeated."""
    config = make_config(f"model.kind={kind}", "evaluation.batch_size=100", "training.checkpoint_interval=100")
    data, checkpoints = load_dataset("digits", config.augmentation), CheckpointStore(tmp_path / "run")
    uninterrupted, steps, num_calls = fit(config, data), [], 0

    def is_in_validation() -> bool:
        nonlocal num_calls
        num_calls += 1
        return num_calls == 39  # 37 steps, and the second batch of validation images

    with pytest.raises(RunInterrupted, match="validation after epoch 1 of"):
        fit(config, data, checkpoints=checkpoints, should_stop=is_in_validation)
    resumed = fit(config, data, on_step=lambda report: steps.append(report.step), checkpoints=checkpoints)
    assert steps[0] == 38 and (resumed.epoch, resumed.validation) == (uninterrupted.epoch, uninterrupted.validation)
    for name, tensor in uninterrupted.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name


def test_training_interrupted_in_evaluation_resumes_at_its_end(tmp_path: Path) -> None:
    checkpoints, data = CheckpointStore(tmp_path / "run"), load_dataset("digits", make_config().augmentation)
    settings = ["training.checkpoint_interval=100"]
    uninterrupted, steps = fit(make_config(*settings), data, checkpoints=checkpoints), []
    resumed = fit(make_config(*settings), data, on_step=steps.append, checkpoints=checkpoints)
    assert not steps and (resumed.epoch, resumed.validation) == (uninterrupted.epoch, uninterrupted.validation)
    for name, tensor in uninterrupted.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a CUDA device")
@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")])
def test_training_resumes_on_another_device(tmp_path: Path, devices: tuple[str, str]) -> None:
    checkpoints = CheckpointStore(tmp_path / "run")
    train_until(checkpoints, 50, make_config("compute.device=auto"), device=devices[0])
    train_until(checkpoints, 60, make_config("compute.device=auto"), device=devices[1])


def test_weights_are_kept_if_evaluation_fails(tmp_path: Path) -> None:
    class Wasteful(PGD):
        kind = "wasteful"

        def run(self, *arguments: object) -> torch.Tensor:
            return torch.empty(2**45)  # more than any machine has

    try:
        config, storage = make_config("evaluation.attack.methods=[wasteful]"), Storage.open(tmp_path)
        with pytest.raises(TrainingError, match=r"out of memory.*is kept.*evaluate \w+ evaluation\.batch_size=100"):
            run_trial(TrialRequest(config, storage, "wasteful", {schema.KIND: "trial"}))
        (run,) = find_runs(storage, config)
        assert run.info.status == "FAILED" and schema.TEST_CERTIFIED not in run.data.metrics
        assert find_weights(run.info.run_id, tmp_path)[2] == run.info.run_id
    finally:
        Attack.registry.pop("wasteful")
    trained = fit(make_config(), load_dataset("digits", config.augmentation))
    for name, tensor in trained.network.state_dict().items():
        assert torch.equal(tensor, load_weights(tmp_path)[name]), name


def test_damaged_checkpoint_is_replaced_by_the_previous_one(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path / "run")
    train_until(checkpoints, 50, make_config())
    train_until(checkpoints, 60, make_config())
    checkpoints.latest.write_bytes(checkpoints.latest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"latest\.pt.*previous\.pt"):
        train_until(checkpoints, 70, make_config())
    for path in (checkpoints.latest, checkpoints.previous):
        path.write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match=r"latest\.pt.*previous\.pt"):
        fit(make_config(), load_dataset("digits"), checkpoints=checkpoints)


def test_crash_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path / "run")
    train_until(checkpoints, 50, make_config())
    os.replace(checkpoints.latest, checkpoints.previous)
    (checkpoints.folder / ".latest.pt.partial").write_bytes(b"half")
    assert checkpoints.exist() and checkpoints.load()["batch"] == 50 - 37


@pytest.mark.parametrize("other", ["model.width=32", "seed=5", "optimizer.learning_rate=0.5"])
def test_checkpoint_of_another_config_is_rejected(tmp_path: Path, other: str) -> None:
    checkpoints = CheckpointStore(tmp_path / "run")
    train_until(checkpoints, 5, make_config())
    with pytest.raises(InputError, match=other.split("=")[0]):
        fit(make_config(other), load_dataset("digits"), checkpoints=checkpoints)


@pytest.mark.parametrize("steps", [-1.0, 0.0, 1.5, float("nan")])
def test_checkpoint_with_impossible_steps_is_rejected(tmp_path: Path, steps: float) -> None:
    """With -1, the next step of Adam would divide by zero."""
    checkpoints = CheckpointStore(tmp_path / "run")
    train_until(checkpoints, 2, make_config())
    state = checkpoints.load()
    state["optimizer"]["state"][0]["step"].fill_(steps)
    checkpoints.save(state)
    with pytest.raises(InputError, match=f"{steps:g} steps"):
        fit(make_config(), load_dataset("digits"), checkpoints=checkpoints)


def test_checkpoint_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path / "run")
    train_until(checkpoints, 60, make_config())
    state = checkpoints.load()
    validation = state["best"]["validation"]
    validation["certified_exact"] = validation.pop("certified_real")
    validation["certified_but_broken"] = validation.pop("certificate_violations")
    checkpoints.save(state)
    data = load_dataset("digits", make_config().augmentation)
    resumed = fit(make_config(), data, checkpoints=checkpoints)
    assert resumed.validation == fit(make_config(), data).validation


def test_two_processes_cannot_train_one_run(tmp_path: Path) -> None:
    checkpoints = CheckpointStore(tmp_path / "run")
    with checkpoints.lock(), pytest.raises(RunLockedError), checkpoints.lock():
        pass
    with checkpoints.lock():  # the lock is free again
        pass


def load_weights(storage: Path) -> dict[str, torch.Tensor]:
    (path,) = storage.glob("artifacts/*/artifacts/weights.pt")
    return torch.load(path, weights_only=True)["network"]


def read_losses(storage: Path) -> list[float]:
    ((run,),) = group_outcomes(storage).values()
    return [loss for _, loss in run.metrics[schema.TRAIN_LOSS]]


def start_training(storage: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("linflab")), "train", RECIPE, *arguments, "--storage", str(storage)]
    log = (storage.parent / f"{storage.name}.log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "epochs", "times"), [(1, 100, 3), (2, 10, 1)])
def test_killed_training_is_deterministic(tmp_path: Path, workers: int, epochs: int, times: int) -> None:
    settings = [f"compute.workers={workers}", f"training.epochs={epochs}", "training.checkpoint_interval=2", "seed=7"]
    settings += ["evaluation.attack.steps=5", "evaluation.attack.restarts=1"]
    assert start_training(tmp_path / "whole", *settings).wait(timeout=600) == 0
    rng, storage = random.Random(0), tmp_path / "cut"
    kills = 0
    process = start_training(storage, *settings)
    while kills < times:
        before = newest_checkpoint_time(storage)
        deadline = time.monotonic() + 300
        while newest_checkpoint_time(storage) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)  # a kill before the first checkpoint would only restart
        time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None, f"the training ended by itself after {kills} kills"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        process = start_training(storage, *settings, "--resume")
    assert process.wait(timeout=600) == 0
    expected, resumed = load_weights(tmp_path / "whole"), load_weights(storage)
    assert expected.keys() == resumed.keys() and all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert not list((storage / "checkpoints").iterdir())
    if workers > 1:  # one worker has the same losses, except for the order of sums
        alone = [*settings, "compute.workers=1"]
        assert start_training(tmp_path / "alone", *alone).wait(timeout=600) == 0
        assert read_losses(storage)[:3] == pytest.approx(read_losses(tmp_path / "alone")[:3], rel=1e-2)


def newest_checkpoint_time(storage: Path) -> int:
    """Return when the newest checkpoint was written, in nanoseconds; 0 without checkpoints."""
    return max((path.stat().st_mtime_ns for path in storage.glob("checkpoints/*/latest.pt")), default=0)


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint(tmp_path: Path) -> None:
    settings = ["training.epochs=2000", "training.checkpoint_interval=2000"]
    process = start_training(tmp_path / "runs", *settings)
    deadline = time.monotonic() + 180
    while b"epoch=2/" not in (tmp_path / "runs.log").read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=30) == 130
    output = (tmp_path / "runs.log").read_text()
    assert "--resume" in output and f"--storage {tmp_path / 'runs'}" in output
    assert newest_checkpoint_time(tmp_path / "runs") > 0


def test_run_fails_after_repeated_failures_at_one_epoch(tmp_path: Path) -> None:
    """Only with `max_failures`, as in a sweep; failures at different epochs are not limited."""
    storage, settings = Storage.open(tmp_path), make_config("evaluation.attack.steps=1")
    for starts, is_failed in (("0,0,0,0", True), ("0,0,0", False), ("0,0,0,0|", False), ("0,0,0,0|0", False)):
        run = Run.start(storage, settings, "often", {schema.START_EPOCHS: starts})
        if is_failed:
            with pytest.raises(TrainingError, match=r"\b4\b.*\bepoch 0\b"):
                run_trial(TrialRequest(settings, storage, resume_run_id=run.id, max_failures=3))
        else:
            run_trial(TrialRequest(settings, storage, resume_run_id=run.id, max_failures=3, evaluate_test=False))
        logged = run.client.get_run(run.id)
        assert logged.info.status == ("FAILED" if is_failed else "FINISHED")
        assert (schema.FAILURE in logged.data.tags) == is_failed
        assert schema.TEST_CERTIFIED not in logged.data.metrics


def _train_with_own_checkpoints(rank: int, folder: Path, port: int, messages: Path) -> None:
    """Train as one of two workers, which have separate checkpoint folders."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        fit(
            make_config(),
            load_dataset("digits", make_config().augmentation),
            checkpoints=CheckpointStore(folder / str(rank)),
        )
    except WorkerLostError as error:
        (messages / str(rank)).write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.slow
def test_workers_that_read_different_checkpoints_do_not_train(tmp_path: Path) -> None:
    for rank, step in enumerate((50, 30)):  # in the second epoch, and in the first
        train_until(CheckpointStore(tmp_path / str(rank)), step, make_config())
    messages = tmp_path / "messages"
    messages.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _train_with_own_checkpoints, (tmp_path, port, messages), nprocs=2, start_method="spawn"
    )
    assert sorted(path.name for path in messages.iterdir()) == ["0", "1"]
    (message,) = {path.read_text() for path in messages.iterdir()}  # both workers stop for the same reason
    assert has_words(message, "1") and has_words(message, "2"), message
