"""Sweeps with killed processes, a locked tracking store or a full disk: no trial is lost or duplicated."""

import collections
import os
import random
import re
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

from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from linflab.reports.records import read_trials
from linflab.reports.sweep_tables import rank_trials
from tests.conftest import RECIPE

EPOCHS = 60
SHORT = [f"training.epochs={EPOCHS}", "training.checkpoint_interval=1"]
SHORT += ["evaluation.attack.steps=5", "evaluation.attack.restarts=1"]
TIMES = {schema.TRAIN_SECONDS, schema.EPOCH_SECONDS}


RUNNING: list[subprocess.Popen[bytes]] = []  # started by tests


@pytest.fixture(autouse=True)
def kill_running_sweeps() -> Iterator[None]:
    yield
    while RUNNING:
        RUNNING.pop().kill()


class Sweep:
    """A sweep in a separate process, as a user starts it."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.log = storage.parent / f"{storage.name}.log"

    def start(self, *arguments: str) -> None:
        command = [str(Path(sys.executable).with_name("linflab")), "sweep", *arguments, "--storage", str(self.storage)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        RUNNING.append(self.process)

    def processes(self, name: str) -> list[psutil.Process]:
        """Return the Ray processes of the current driver with this name."""
        found = []
        with suppress(psutil.Error):  # the driver has ended
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):  # the child has ended
                    if any(f"ray::{name}" in word for word in child.cmdline()):
                        found.append(child)
        return found

    def wait_for(self, text: str, times: int = 1) -> None:
        deadline = time.monotonic() + 240
        while self.log.read_text().count(text) < times:
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)

    def newest_checkpoint_time(self) -> int:
        """Return when the newest checkpoint was written, in nanoseconds; 0 without checkpoints."""
        return max((path.stat().st_mtime_ns for path in self.storage.glob("checkpoints/*/latest.pt")), default=0)

    def kill_trial_process(self, rng: random.Random) -> bool:
        processes = self.processes("ImplicitFunc")
        if not processes:
            return False
        rng.choice(processes).kill()
        return True

    def kill(self) -> None:
        """Kill only the driver; its processes notice, or Ray ends them."""
        self.process.kill()
        self.process.wait()

    def finish(self) -> None:
        assert self.process.wait(timeout=900) == 0, self.log.read_text()

    def trials(self, name: str) -> pd.DataFrame:
        return read_trials(Storage(self.storage).tracking_uri, name)

    def histories(self, name: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """Return steps and values of all metrics of each trial, except times."""
        client = MlflowClient(Storage(self.storage).tracking_uri)
        return {
            trial[schema.TRIAL]: {
                metric: [(entry.step, entry.value) for entry in client.get_metric_history(trial["run_id"], metric)]
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


def disturb(sweep: Sweep, rng: random.Random, name: str, kills: int, driver_kills: tuple[int, ...]) -> None:
    """Kill random trial processes, and after some of these kills the driver too; resume each time.

    Every other kill waits for a new trial. Otherwise all kills could hit the same trials where they start slowly.
    """
    num_kills = 0
    seen: set[str] = set()
    while num_kills < kills:
        before, known = sweep.newest_checkpoint_time(), set(seen)
        deadline = time.monotonic() + 300
        while (
            sweep.newest_checkpoint_time() == before or (num_kills % 2 == 0 and seen == known)
        ) and time.monotonic() < deadline:
            seen |= {path.parent.name for path in sweep.storage.glob("checkpoints/*/latest.pt")}
            assert sweep.process.poll() is None, f"the sweep ended after {num_kills} kills\n{sweep.log.read_text()}"
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 4))
        num_kills += sweep.kill_trial_process(rng)
        if num_kills in driver_kills:
            driver_kills = tuple(number for number in driver_kills if number != num_kills)
            sweep.kill()
            sweep.start("--resume", name)


@pytest.mark.slow
def test_sweep_with_random_kills_equals_an_undisturbed_one(tmp_path: Path) -> None:
    arguments = [RECIPE, "demo", *SHORT, "--budget", "5", "--sampler", "random", "--name", "many"]
    undisturbed, disturbed = Sweep(tmp_path / "calm"), Sweep(tmp_path / "wild")
    undisturbed.start(*arguments)
    undisturbed.finish()
    disturbed.start(*arguments)
    disturb(disturbed, random.Random(1), "many", kills=3, driver_kills=(1, 3))
    disturbed.finish()
    trials = disturbed.trials("many")
    assert collections.Counter(trials[schema.TRIAL]) == {str(number): 1 for number in range(1, 6)}
    assert set(trials["status"]) == {"FINISHED"}
    assert trials[schema.START_EPOCHS].str.contains("[,|]").sum() >= 2, "too few trials were killed"
    report, expected_report = (sweep.storage / "reports" / "sweep-many.csv" for sweep in (disturbed, undisturbed))
    assert report.read_bytes() == expected_report.read_bytes()
    assert disturbed.histories("many") == undisturbed.histories("many")
    weights, expected = disturbed.weights("many"), undisturbed.weights("many")
    for trial, tensors in expected.items():
        assert all(torch.equal(tensor, weights[trial][name]) for name, tensor in tensors.items()), trial
    client = MlflowClient(Storage(disturbed.storage).tracking_uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(runs) == 6 and {run.info.status for run in runs} == {"FINISHED"}  # includes the sweep's own run
    assert not list(disturbed.storage.glob("checkpoints/*")) and not list(disturbed.storage.glob("ray/*"))


@pytest.mark.slow
def test_tpe_halving_survives_random_kills(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "wild")
    sweep.start(RECIPE, "demo", *SHORT, "--budget", "9", "--halving", "3", "--seeds", "2", "--name", "race")
    disturb(sweep, random.Random(2), "race", kills=4, driver_kills=(3,))
    sweep.finish()
    trials = sweep.trials("race")
    assert set(trials["status"]) == {"FINISHED"} and trials[schema.TRIAL].is_unique
    full = trials[trials[schema.EPOCHS] == str(EPOCHS)]
    shortened = trials[trials[schema.EPOCHS] == str(round(EPOCHS / 3))]
    assert sorted(shortened[schema.TRIAL].astype(int)) == list(range(1, 10)) and len(full) == 4
    assert shortened[schema.TEST_CERTIFIED].isna().all() and full[schema.TEST_CERTIFIED].notna().all()
    best = rank_trials(shortened).head(3)
    searched = full[~full[schema.TRIAL].str.contains("seed")]
    assert {f"{number}.2" for number in best[schema.TRIAL]} == set(searched[schema.TRIAL])


@pytest.mark.slow
def test_two_worker_trial_resumes_when_a_worker_is_killed(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "runs")
    epochs = 10
    # One concurrent trial for any number of cores.
    half = f"compute.cpus_per_worker={max(1, (os.cpu_count() or 1) // 2)}"
    settings = [*SHORT, f"training.epochs={epochs}", "compute.workers=2", half]
    sweep.start(RECIPE, "demo", *settings, "--budget", "1", "--name", "pairs")
    before, deadline = sweep.newest_checkpoint_time(), time.monotonic() + 300
    while sweep.newest_checkpoint_time() == before and time.monotonic() < deadline:
        time.sleep(0.05)
    while not (workers := sweep.processes("RayTrainWorker")) and time.monotonic() < deadline:
        time.sleep(0.05)
    random.Random(0).choice(workers).kill()
    sweep.wait_for("trial=1 total=1 status=restarting")
    sweep.finish()
    trials = sweep.trials("pairs")
    (trial,) = [row for _, row in trials.iterrows()]
    assert trial["status"] == "FINISHED" and re.fullmatch(r"0(,[1-9]\d*)+", trial[schema.START_EPOCHS])
    (history,) = sweep.histories("pairs").values()
    assert [step for step, _ in history[schema.TRAIN_LOSS]] == list(range(1, epochs + 1))
    assert schema.TEST_CERTIFIED in history


@pytest.mark.slow
def test_sweep_waits_when_the_store_is_locked_for_a_minute(tmp_path: Path) -> None:
    """Another process locks the database; running trials wait, and so does a trial that starts during this time."""
    sweep = Sweep(tmp_path / "runs")
    sweep.start(RECIPE, "demo", *SHORT, "--budget", "3", "--sampler", "random", "--name", "locked")
    sweep.wait_for("status=started", times=2)
    deadline = time.monotonic() + 300  # a process that is killed before it trains logs no start
    while not 0 < len(sweep.processes("ImplicitFunc")) == len(list(sweep.storage.glob("checkpoints/*/latest.pt"))):
        assert time.monotonic() < deadline and sweep.process.poll() is None, sweep.log.read_text()
        time.sleep(0.1)
    connection = sqlite3.connect(Storage(sweep.storage).database, isolation_level=None, timeout=60)
    connection.execute("BEGIN EXCLUSIVE")
    time.sleep(5)
    assert sweep.kill_trial_process(random.Random(0))
    time.sleep(60)
    connection.execute("COMMIT")
    connection.close()
    sweep.finish()
    trials = sweep.trials("locked")
    assert len(trials) == 3 and set(trials["status"]) == {"FINISHED"}
    assert trials[schema.START_EPOCHS].eq("0").sum() == 2  # only the process that was killed restarted
    for trial, history in sweep.histories("locked").items():
        assert [step for step, _ in history[schema.TRAIN_LOSS]] == list(range(1, EPOCHS + 1)), trial
        assert schema.TEST_CERTIFIED in history, trial


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="requires root to mount a small file system")
def test_sweep_resumes_after_the_disk_was_full(tmp_path: Path) -> None:
    """The trial fails with a reason, keeps its last valid checkpoint, and resumes when space is free.

    The resumed sweep has a larger budget.
    """
    storage = tmp_path / "runs"
    (storage / "checkpoints").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(storage / "checkpoints")], check=True)
    try:
        filler = storage / "checkpoints" / "filler"
        sweep = Sweep(storage)
        sweep.start(RECIPE, "demo", *SHORT, "--budget", "1", "--name", "full")
        start = time.monotonic()
        while len(list(storage.glob("checkpoints/*/previous.pt"))) < 1:
            assert time.monotonic() < start + 120 and sweep.process.poll() is None
            time.sleep(0.02)
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert sweep.process.wait(timeout=120) == 1
        (trial,) = [row for _, row in sweep.trials("full").iterrows()]
        assert trial["status"] == "FAILED"
        assert trial[schema.FAILURE].startswith("TrainingError: checkpoint: ") and "0 MiB" in trial[schema.FAILURE]
        (checkpoint,) = storage.glob("checkpoints/*/latest.pt")
        assert torch.load(checkpoint, weights_only=True)["epoch"] > 1
        assert [path.name for path in checkpoint.parent.glob(".*")] == []
        filler.unlink()
        sweep.start("--resume", "full", "--retry-failed", "--budget", "2")
        sweep.finish()
        trials = sweep.trials("full")
        assert sorted(trials[schema.TRIAL]) == ["1", "2"] and set(trials["status"]) == {"FINISHED"}
        assert schema.FAILURE not in trials
        losses = sweep.histories("full")["1"][schema.TRAIN_LOSS]
        assert [step for step, _ in losses] == list(range(1, EPOCHS + 1))
    finally:
        subprocess.run(["umount", str(storage / "checkpoints")], check=True)
