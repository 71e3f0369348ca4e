"""`linflab sweep`, interrupted at any stage or without its services: it ends soon and resumes completely."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from linflab.platform.cluster.ports import find_free_port
from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from tests.conftest import RECIPE
from tests.platform.interruptions import Command, Outcome, group_outcomes

SIGNALS = (signal.SIGTERM, signal.SIGKILL)  # SIGINT has the handler of SIGTERM
EPOCHS = 12
MANY_EPOCHS = 480  # 40 s on an idle machine: no trial ends before the sweep has noticed three failures
SETTINGS = [f"training.epochs={EPOCHS}", "training.checkpoint_interval=2", "model.width=16"]
SETTINGS += ["evaluation.attack.steps=20", "evaluation.attack.restarts=1", "compute.device=cpu"]
SPACE = "description: two\nparameters: {objective.theta: {distribution: uniform, low: 0.15, high: 0.3}}\n"


def start_sweep(storage: Path, *arguments: str, **environment: str) -> Command:
    space = storage.with_name("space.yaml")
    space.write_text(SPACE)
    defaults = [RECIPE, str(space), *SETTINGS, "--budget", "2", "--sampler", "random", "--name", "two"]
    return Command(storage, "sweep", *(arguments or defaults), **environment)


def resume_sweep(storage: Path, **environment: str) -> Command:
    return start_sweep(storage, "--resume", "two", **environment)


def read_outcomes(storage: Path) -> dict[str, Outcome]:
    """Return the outcomes of runs by trial, the sweep's own under ""; fail if a trial has two runs."""
    found = group_outcomes(storage, schema.TRIAL)
    assert all(len(runs) == 1 for runs in found.values()), {trial: len(runs) for trial, runs in found.items()}
    return {trial: run for trial, (run,) in found.items()}


def assert_complete(storage: Path, undisturbed: dict[str, Outcome]) -> None:
    """Assert one run for each trial that equals the undisturbed one, one model with figures, and no leftovers."""
    found = read_outcomes(storage)
    assert found.keys() == undisturbed.keys() == {"", "1", "2"}
    for trial, run in found.items():
        run.assert_equals(undisturbed[trial])
        assert schema.MISSING not in run.tags
    assert sorted(run.models for run in found.values()) == [0, 0, 1]
    assert {run.tags.get("mlflow.parentRunId", "") for run in found.values()} == {"", find_parent_id(storage)}
    assert not list((storage / "checkpoints").glob("*")) and not list((storage / "ray").glob("*"))
    lines = (storage / "reports" / "sweep-two.csv").read_text().splitlines()
    assert len(lines) == 3 and len(set(lines)) == 3


def find_parent_id(storage: Path) -> str:
    client = MlflowClient(Storage(storage).tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (parent,) = client.search_runs(experiments, f"tags.`{schema.KIND}` = 'sweep'")
    return str(parent.info.run_id)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    storage = tmp_path_factory.mktemp("undisturbed") / "runs"
    start_sweep(storage).finish()
    found = read_outcomes(storage)
    assert_complete(storage, found)
    return found


def make_plan_check(command: Command) -> Callable[[], bool]:
    """Return a check that plan and lock exist; the test removes the lock before each command."""
    folder = command.storage / "sweeps" / "two"
    return lambda: (folder / "lock").exists() and (folder / "sweep.yaml").exists()


STAGES: dict[str, Callable[[Command], None]] = {
    "start": lambda command: command.wait_for(make_plan_check(command)),
    "first trial": lambda command: command.wait_for_output("params="),
    # One trial has been evaluated and logged, and the other one is about to be.
    "last trial": lambda command: command.wait_for_output(" status=done "),
    "report": lambda command: command.wait_for_output("sweep-two.csv"),
}


def assert_ends_in_resume_command(output: str, storage: Path) -> None:
    """Assert that only the last line names the command that resumes the sweep."""
    (last,) = [line for line in output.splitlines() if f"--resume two --storage {storage}" in line]
    assert last.startswith("linflab: ") and last == output.splitlines()[-1] and "Traceback" not in output, output


def interrupt(command: Command, number: signal.Signals) -> None:
    """Interrupt a command and check its exit status and output."""
    status, output = command.interrupt(number)
    assert status == (-number if number == signal.SIGKILL else 130), output
    assert "Traceback" not in output
    if number != signal.SIGKILL:
        assert_ends_in_resume_command(output, command.storage)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_sweep_interrupted_at_each_stage_equals_undisturbed_one(
    tmp_path: Path, undisturbed: dict[str, Outcome], number: signal.Signals
) -> None:
    """A resumed sweep can be interrupted again, and removes what a killed one has left."""
    storage, command = tmp_path / "runs", None
    for stage, wait_for_stage in STAGES.items():
        (storage / "sweeps" / "two" / "lock").unlink(missing_ok=True)
        command = start_sweep(storage) if command is None else resume_sweep(storage)
        wait_for_stage(command)
        interrupt(command, number)
        if number == signal.SIGTERM and stage != "start":
            found = read_outcomes(storage)
            assert stage == "report" or found[""].status == "KILLED"
            trials = {run.status for trial, run in found.items() if trial}
            assert trials == {"KILLED"} if stage == "first trial" else trials <= {"KILLED", "FINISHED"}, stage
    (storage / "ray" / "two" / "left").mkdir(parents=True, exist_ok=True)
    resume_sweep(storage).finish()
    assert_complete(storage, undisturbed)


RAY = {"raylet": "raylet/raylet", "agent": "dashboard/agent.py", "head process": "gcs_server"}


def find_ray_processes(command: Command, name: str) -> list[psutil.Process]:
    """Return the command's own Ray processes of this kind."""
    children = psutil.Process(command.process.pid).children(recursive=True)
    return [child for child in children if RAY[name] in " ".join(child.cmdline())]


@pytest.mark.slow
def test_sweep_ends_soon_when_a_ray_process_is_killed(tmp_path: Path) -> None:
    """Kill each kind of Ray process while trials run; then resume the sweep to its end."""
    storage = tmp_path / "runs"
    arguments = long_sweep_arguments(storage)
    for name in RAY:
        command = start_sweep(storage, *arguments)
        command.wait_for_output("params=")  # started or resumed
        time.sleep(2)  # a trial's process needs time to start
        (process,) = find_ray_processes(command, name)
        process.kill()
        assert command.process.wait(timeout=60) == 1, command.output
        assert_ends_in_resume_command(command.output, storage)
        assert len(command.output) < 2000  # without Ray's own lines
        command.end()
        arguments = ["--resume", "two"]
    resume_sweep(storage).finish()
    found = read_outcomes(storage)
    assert found.keys() == {"", "1", "2"} and {run.status for run in found.values()} == {"FINISHED"}
    assert sorted(run.models for run in found.values()) == [0, 0, 1]
    for trial in "12":
        assert [step for step, _ in found[trial].metrics[schema.TRAIN_LOSS]] == list(range(1, MANY_EPOCHS + 1))


def long_sweep_arguments(storage: Path, epochs: int = MANY_EPOCHS) -> list[str]:
    """Return arguments of a sweep whose trials run for long; write its space."""
    space = storage.with_name("space.yaml")
    space.write_text(SPACE)
    settings = [*SETTINGS, f"training.epochs={epochs}", "training.checkpoint_interval=1"]
    return [RECIPE, str(space), *settings, "--budget", "2", "--sampler", "random", "--name", "two"]


class Server:
    """An MLflow server in its own process group, which can be killed and restarted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, find_free_port()
        folder.mkdir()
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 240
        while not self.is_ready():
            assert time.monotonic() < deadline and self.process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.2)

    def is_ready(self) -> bool:
        """Return True if the server answers; it listens some time before that."""
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
        return False

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_when_mlflow_is_gone(tmp_path: Path) -> None:
    """One Ctrl-C ends it within 20 seconds, a second one at once; no trial is lost or duplicated."""
    storage, server = tmp_path / "runs", Server(tmp_path / "server")
    environment = {"LINFLAB_TRACKING_URI": f"http://127.0.0.1:{server.port}"}
    try:
        arguments = long_sweep_arguments(storage, epochs=60)  # trials wait for the server, so they do not end
        for num_signals in (1, 2):
            command = start_sweep(storage, *arguments, **environment)
            command.wait_for_output("params=")  # started or resumed
            server.kill()
            time.sleep(3)  # for calls to the server to fail
            if num_signals == 2:
                command.process.send_signal(signal.SIGINT)
                time.sleep(1)
            start = time.monotonic()
            status, output = command.interrupt(signal.SIGINT)
            assert status == 130 and (num_signals == 1 or time.monotonic() - start < 5), output
            assert_ends_in_resume_command(output, storage)
            arguments = ["--resume", "two"]
            server.start()
        resume_sweep(storage, **environment).finish()
        found = read_statuses(environment["LINFLAB_TRACKING_URI"])
        assert sorted(found) == [("", "FINISHED"), ("1", "FINISHED"), ("2", "FINISHED")]
    finally:
        server.kill()


def read_statuses(uri: str) -> list[tuple[str, str]]:
    """Return trial and status of all runs on a server."""
    client = MlflowClient(uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return [(run.data.tags.get(schema.TRIAL, ""), run.info.status) for run in runs]
