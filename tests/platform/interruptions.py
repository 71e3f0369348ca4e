"""Commands that are interrupted in a given state, resumed, and compared with uninterrupted ones.

`Command` starts `linflab` in its own process group and ends it by a signal; `group_outcomes` reads the resulting runs.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mlflow.tracking import MlflowClient

from linflab.platform.tracking.storage import Storage
from linflab.reports import schema

# Metrics that depend on the clock and the machine, which a resumed run does not repeat.
TIME_METRICS = {schema.TRAIN_SECONDS, schema.EPOCH_SECONDS, schema.SWEEP_SECONDS}


class Command:
    """One command of `linflab` on a storage folder; its output goes to a file next to it."""

    def __init__(self, storage: Path, *arguments: str, **environment: str) -> None:
        self.storage = storage
        self.log = storage.with_name(f"{storage.name}-{time.monotonic_ns()}.log")
        # The installed script calls the same entry point.
        command = [sys.executable, "-m", "linflab.platform", *arguments, "--storage", str(storage)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                start_new_session=True,
                # background jobs of a shell ignore SIGINT, as do their children
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], object], timeout: float = 240) -> None:
        """Wait until `condition()` is true; fail if the command ends before that."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"ended early with status {self.process.returncode}\n{self.output}"
            assert time.monotonic() < deadline, f"not reached within {timeout:g} s\n{self.output}"
            time.sleep(0.01)

    def wait_for_output(self, text: str, timeout: float = 240) -> None:
        """Wait until the command has printed `text`."""
        self.wait_for(lambda: text in self.output, timeout)

    def wait_for_handlers(self) -> None:
        """Wait until the command has installed its SIGTERM handler, which is its first action."""
        status, bit = Path(f"/proc/{self.process.pid}/status"), 1 << (signal.SIGTERM - 1)

        def is_handled() -> bool:
            (caught,) = [line for line in status.read_text().splitlines() if line.startswith("SigCgt")]
            return bool(int(caught.split()[1], 16) & bit)

        self.wait_for(is_handled, 60)

    def interrupt(self, number: signal.Signals, timeout: float = 20) -> tuple[int, str]:
        """Send a signal to the command, or SIGKILL to its process group; return exit status and output.

        Fails if the command does not end within `timeout` seconds.
        """
        try:
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)
            return self.process.wait(timeout), self.output
        finally:
            self.end()

    def finish(self, timeout: float = 600) -> str:
        """Wait for the command to succeed and return its output."""
        try:
            assert self.process.wait(timeout) == 0, self.output
            return self.output
        finally:
            self.end()

    def end(self) -> None:
        """Kill the remaining processes of the command's process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Outcome:
    """One run of the tracking store, without its time measurements."""

    name: str
    status: str
    metrics: dict[str, list[tuple[int, float]]]  # name -> (step, value) pairs
    weights: dict[str, torch.Tensor] = field(default_factory=dict)  # empty if the run has none
    models: int = 0  # logged models, loadable by mlflow.pytorch.load_model
    figures: set[str] = field(default_factory=set)  # file names
    tags: dict[str, str] = field(default_factory=dict)

    def assert_equals(self, other: "Outcome") -> None:
        """Assert the same status, metrics, figures and number of models, and bitwise equal weights."""
        assert (self.status, self.models, self.figures) == (other.status, other.models, other.figures)
        assert self.metrics == other.metrics
        assert self.weights.keys() == other.weights.keys()
        for name, tensor in self.weights.items():
            assert torch.equal(tensor, other.weights[name]), name


def group_outcomes(storage: Path, key: str = "mlflow.runName") -> dict[str, list[Outcome]]:
    """Return the runs of a storage grouped by a tag, without deleted runs.

    Args:
        storage: The storage folder.
        key: The tag, such as `schema.TRIAL`; runs without it are under "".
    """
    client = MlflowClient(Storage(storage).tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found: dict[str, list[Outcome]] = {}
    for run in client.search_runs(experiments):
        found.setdefault(run.data.tags.get(key, ""), []).append(_read_outcome(client, run))
    return found


def _read_outcome(client: MlflowClient, run: Any) -> Outcome:
    run_id = run.info.run_id
    metrics = {
        name: [(one.step, one.value) for one in client.get_metric_history(run_id, name)]
        for name in run.data.metrics
        if name not in TIME_METRICS and not name.startswith("system/")
    }
    files = {Path(file.path).name for file in client.list_artifacts(run_id)}
    weights = {}
    if schema.WEIGHTS_FILE in files:
        path = client.download_artifacts(run_id, schema.WEIGHTS_FILE)
        weights = torch.load(path, weights_only=True)["network"]
    figures = {Path(file.path).name for file in client.list_artifacts(run_id, schema.FIGURES_DIR)}
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
    return Outcome(run.info.run_name, run.info.status, metrics, weights, len(models), figures, dict(run.data.tags))
