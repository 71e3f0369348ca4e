"""Sweeps whose processes are killed, whose store is out of reach, whose disk is full: nothing is lost or doubled."""

import collections
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from mlflow.tracking import MlflowClient

from linflab.platform.storage import Storage
from linflab.reports import schema
from linflab.reports.records import read_trials
from linflab.reports.sweep_tables import in_order
from tests.conftest import RECIPE

EPOCHS = 60
SHORT = [f"training.epochs={EPOCHS}", "training.checkpoint_epochs=1"]
SHORT += ["evaluation.attack.steps=5", "evaluation.attack.restarts=1"]
TIMES = {schema.TRAIN_SECONDS, schema.EPOCH_SECONDS}


RUNNING: list[subprocess.Popen[bytes]] = []  # what tests have started


@pytest.fixture(autouse=True)
def leave_nothing_running() -> Iterator[None]:
    yield
    while RUNNING:
        RUNNING.pop().kill()


class Sweep:
    """A sweep in a process of its own, as a user starts it."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.log = storage.parent / f"{storage.name}.log"

    def start(self, *arguments: str) -> None:
        command = [str(Path(sys.executable).with_name("linflab")), "sweep", *arguments, "--storage", str(self.storage)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        RUNNING.append(self.process)

    def processes(self, name: str) -> list[psutil.Process]:
        """Ray's processes of this name, of the driver that runs now."""
        found = []
        with suppress(psutil.Error):  # the driver has ended
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):  # it has ended meanwhile
                    if any(f"ray::{name}" in word for word in child.cmdline()):
                        found.append(child)
        return found

    def wait_for(self, sign: str, times: int = 1) -> None:
        deadline = time.monotonic() + 240
        while self.log.read_text().count(sign) < times:
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)

    def checkpoints(self) -> int:
        """A number that grows with every checkpoint."""
        return max((path.stat().st_mtime_ns for path in self.storage.glob("checkpoints/*/latest.pt")), default=0)

    def kill_a_trial(self, chance: random.Random) -> bool:
        processes = self.processes("ImplicitFunc")
        if not processes:
            return False
        chance.choice(processes).kill()
        return True

    def kill(self) -> None:
        """The driver alone: what it had started notices, or is ended by Ray."""
        self.process.kill()
        self.process.wait()

    def finish(self) -> None:
        assert self.process.wait(timeout=900) == 0, self.log.read_text()

    def trials(self, name: str) -> pd.DataFrame:
        return read_trials(Storage(self.storage).tracking_uri, name)

    def histories(self, name: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """All that was logged of each trial, but for times: by metric, steps and values."""
        client = MlflowClient(Storage(self.storage).tracking_uri)
        return {
            trial[schema.TRIAL]: {
                metric: [(one.step, one.value) for one in client.get_metric_history(trial["run_id"], metric)]
                for metric in client.get_run(trial["run_id"]).data.metrics
                if metric not in TIMES and not metric.startswith("system/")
            }
            for _, trial in self.trials(name).iterrows()
        }

    def weights(self, name: str) -> dict[str, dict[str, torch.Tensor]]:
        client = MlflowClient(Storage(self.storage).tracking_uri)
        return {
            trial[schema.TRIAL]: torch.load(
                client.download_artifacts(trial["run_id"], schema.WEIGHTS_FILE), weights_only=True
            )["network"]
            for _, trial in self.trials(name).iterrows()
        }


def disturb(sweep: Sweep, chance: random.Random, name: str, kills: int, driver_kills: tuple[int, ...]) -> None:
    """Kill trial processes at random, so many, and after some of these the driver too; resume each time."""
    killed = 0
    while killed < kills:
        before = sweep.checkpoints()
        deadline = time.monotonic() + 120
        while sweep.checkpoints() == before and time.monotonic() < deadline:
            assert sweep.process.poll() is None, f"it ended after {killed} kills\n{sweep.log.read_text()}"
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 4))
        killed += sweep.kill_a_trial(chance)
        if killed in driver_kills:
            driver_kills = tuple(at for at in driver_kills if at != killed)
            sweep.kill()
            sweep.start("--resume", name)


@pytest.mark.slow
def test_a_sweep_in_chaos_comes_to_the_table_of_a_calm_one(tmp_path: Path) -> None:
    asked = [RECIPE, "demo", *SHORT, "--budget", "12", "--sampler", "random", "--name", "twelve"]
    calm, wild = Sweep(tmp_path / "calm"), Sweep(tmp_path / "wild")
    calm.start(*asked)
    calm.finish()
    wild.start(*asked)
    disturb(wild, random.Random(1), "twelve", kills=10, driver_kills=(3, 7))
    wild.finish()
    trials = wild.trials("twelve")
    assert collections.Counter(trials[schema.TRIAL]) == {str(number): 1 for number in range(1, 13)}
    assert set(trials["status"]) == {"FINISHED"}
    assert trials[schema.STARTS].str.contains("[,|]").sum() >= 3, "too few trials were hit"
    ours, theirs = (sweep.storage / "reports" / "sweep-twelve.csv" for sweep in (wild, calm))
    assert ours.read_bytes() == theirs.read_bytes()
    assert wild.histories("twelve") == calm.histories("twelve")
    weights, expected = wild.weights("twelve"), calm.weights("twelve")
    for trial, tensors in expected.items():
        assert all(torch.equal(tensor, weights[trial][name]) for name, tensor in tensors.items()), trial
    client = MlflowClient(Storage(wild.storage).tracking_uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(runs) == 13 and {run.info.status for run in runs} == {"FINISHED"}  # the sweep's own included
    assert not list(wild.storage.glob("checkpoints/*")) and not list(wild.storage.glob("ray/*"))


@pytest.mark.slow
def test_a_race_by_tpe_in_chaos_loses_and_doubles_nothing(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "wild")
    sweep.start(RECIPE, "demo", *SHORT, "--budget", "12", "--race", "3", "--seeds", "2", "--name", "race")
    disturb(sweep, random.Random(2), "race", kills=5, driver_kills=(3,))
    sweep.finish()
    trials = sweep.trials("race")
    assert set(trials["status"]) == {"FINISHED"} and trials[schema.TRIAL].is_unique
    full = trials[trials[schema.EPOCHS] == str(EPOCHS)]
    shortened = trials[trials[schema.EPOCHS] == str(round(EPOCHS / 3))]
    assert sorted(shortened[schema.TRIAL].astype(int)) == list(range(1, 13)) and len(full) == 5
    assert shortened[schema.TEST_CERTIFIED].isna().all() and full[schema.TEST_CERTIFIED].notna().all()
    best = in_order(shortened).head(4)
    searched = full[~full[schema.TRIAL].str.contains("seed")]
    assert {f"{number}.2" for number in best[schema.TRIAL]} == set(searched[schema.TRIAL])


@pytest.mark.slow
def test_a_trial_of_two_workers_goes_on_when_one_is_killed(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "runs")
    epochs = 20
    # one trial at a time, however many cores there are
    half = f"compute.cpus_per_worker={max(1, (os.cpu_count() or 1) // 2)}"
    settings = [*SHORT, f"training.epochs={epochs}", "compute.workers=2", half]
    sweep.start(RECIPE, "demo", *settings, "--budget", "2", "--name", "pairs")
    before, deadline = sweep.checkpoints(), time.monotonic() + 120
    while sweep.checkpoints() == before and time.monotonic() < deadline:
        time.sleep(0.05)
    while not (workers := sweep.processes("RayTrainWorker")) and time.monotonic() < deadline:
        time.sleep(0.05)
    random.Random(0).choice(workers).kill()
    sweep.wait_for("trial 1 of 2 lost its process")
    sweep.finish()
    trials = sweep.trials("pairs")
    assert sorted(trials[schema.TRIAL]) == ["1", "2"] and set(trials["status"]) == {"FINISHED"}
    starts = dict(zip(trials[schema.TRIAL], trials[schema.STARTS], strict=True))
    assert re.fullmatch(r"0(,[1-9]\d*)+", starts["1"]) and starts["2"] == "0"
    for history in sweep.histories("pairs").values():
        assert [step for step, _ in history[schema.TRAIN_LOSS]] == list(range(1, epochs + 1))
        assert schema.TEST_CERTIFIED in history


@pytest.mark.slow
def test_the_store_is_out_of_reach_for_a_minute(tmp_path: Path) -> None:
    """Another process holds the database: those that train wait, and one that starts meanwhile does, too."""
    sweep = Sweep(tmp_path / "runs")
    sweep.start(RECIPE, "demo", *SHORT, "--budget", "3", "--sampler", "random", "--name", "locked")
    sweep.wait_for("started", times=2)
    deadline = time.monotonic() + 120  # a process killed before it trains is no start on record
    while not 0 < len(sweep.processes("ImplicitFunc")) == len(list(sweep.storage.glob("checkpoints/*/latest.pt"))):
        assert time.monotonic() < deadline and sweep.process.poll() is None, sweep.log.read_text()
        time.sleep(0.1)
    connection = sqlite3.connect(Storage(sweep.storage).database, isolation_level=None, timeout=60)
    connection.execute("BEGIN EXCLUSIVE")
    time.sleep(5)
    assert sweep.kill_a_trial(random.Random(0))
    time.sleep(60)
    connection.execute("COMMIT")
    connection.close()
    sweep.finish()
    trials = sweep.trials("locked")
    assert len(trials) == 3 and set(trials["status"]) == {"FINISHED"}
    assert trials[schema.STARTS].eq("0").sum() == 2  # but for the one that was killed, no process had to start again
    for trial, history in sweep.histories("locked").items():
        assert [step for step, _ in history[schema.TRAIN_LOSS]] == list(range(1, EPOCHS + 1)), trial
        assert schema.TEST_CERTIFIED in history, trial


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_disk_full_while_checkpointing(tmp_path: Path) -> None:
    """The trial fails and says why; its last good checkpoint is intact, and it goes on once there is room."""
    storage = tmp_path / "runs"
    (storage / "checkpoints").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(storage / "checkpoints")], check=True)
    try:
        filler = storage / "checkpoints" / "filler"
        sweep = Sweep(storage)
        sweep.start(RECIPE, "demo", *SHORT, "--budget", "1", "--name", "full")
        before = time.monotonic()
        while len(list(storage.glob("checkpoints/*/previous.pt"))) < 1:
            assert time.monotonic() < before + 120 and sweep.process.poll() is None
            time.sleep(0.02)
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert sweep.process.wait(timeout=120) == 1
        (trial,) = [row for _, row in sweep.trials("full").iterrows()]
        assert trial["status"] == "FAILED"
        for words in (
            "TrainingError: checkpoint: can't be written to",
            "0 MiB are free",
            "the one before it is intact",
        ):
            assert words in trial[schema.FAILURE]
        (checkpoint,) = storage.glob("checkpoints/*/latest.pt")
        assert torch.load(checkpoint, weights_only=True)["epoch"] > 1
        assert [path.name for path in checkpoint.parent.glob(".*")] == []
        filler.unlink()
        sweep.start("--resume", "full", "--retry-failed")
        sweep.finish()
        (trial,) = [row for _, row in sweep.trials("full").iterrows()]
        assert trial["status"] == "FINISHED" and schema.FAILURE not in trial
        losses = sweep.histories("full")["1"][schema.TRAIN_LOSS]
        assert [step for step, _ in losses] == list(range(1, EPOCHS + 1))
    finally:
        subprocess.run(["umount", str(storage / "checkpoints")], check=True)


@pytest.mark.slow
def test_ctrl_c_says_how_to_resume_and_that_does_it(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "runs")
    sweep.start(RECIPE, "demo", *SHORT, "--budget", "2", "--name", "cut")
    sweep.wait_for("started", times=2)
    time.sleep(2)
    sweep.process.send_signal(signal.SIGTERM)  # as Ctrl-C, which a shell's background jobs ignore
    assert sweep.process.wait(timeout=60) == 130
    assert f"`linflab sweep --resume cut --storage {sweep.storage}` goes on" in sweep.log.read_text()
    assert "KILLED" in set(sweep.trials("cut")["status"])
    sweep.start("--resume", "cut", "--budget", "3")
    sweep.finish()
    trials = sweep.trials("cut")
    assert sorted(trials[schema.TRIAL]) == ["1", "2", "3"] and set(trials["status"]) == {"FINISHED"}
