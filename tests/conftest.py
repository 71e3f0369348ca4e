"""What several tests share: one trained network, one sweep, and the command as a user types it."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from linflab.platform.cli import main
from linflab.platform.config import Experiment, load_experiment
from linflab.platform.datasets import Dataset, load_dataset
from linflab.platform.training import Trained, fit

settings.register_profile("linflab", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("linflab")
torch.set_num_threads(1)

RECIPE = "digits_eps0.1_linf_dist_net"
QUICK = ["training.epochs=3", "evaluation.attack.steps=10", "evaluation.attack.restarts=1"]


@dataclass(frozen=True)
class TrainedOnDigits:
    experiment: Experiment
    dataset: Dataset
    trained: Trained


@pytest.fixture(scope="session")
def digits_net() -> TrainedOnDigits:
    """The demo's recipe, trained for 20 epochs: a few seconds."""
    experiment = load_experiment(RECIPE, ["training.epochs=20"])
    dataset = load_dataset("digits")
    return TrainedOnDigits(experiment, dataset, fit(experiment, dataset))


@pytest.fixture(scope="session")
def linflab() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the installed command with these arguments; extra environment by name."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).with_name("linflab")), *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@dataclass(frozen=True)
class Done:
    """A command that ran in this process: a new one would spend seconds on imports."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def run(*arguments: str, **environment: str) -> Done:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.argv", ["linflab", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Done(ended.value.code or 0, said.out, said.err)

    return run


Here = Callable[..., Done]


@dataclass(frozen=True)
class FinishedSweep:
    name: str
    storage: Path
    output: str


@pytest.fixture(scope="session")
def finished_sweep(tmp_path_factory: pytest.TempPathFactory, linflab: Callable[..., subprocess.CompletedProcess[str]]):
    """A real sweep of three short trials, by the command line."""
    storage = tmp_path_factory.mktemp("sweep")
    done = linflab(
        "sweep", RECIPE, "demo", *QUICK, "--budget", "3", "--name", "three", "--storage", str(storage), COLUMNS="100"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return FinishedSweep("three", storage, done.stdout)
