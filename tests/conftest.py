"""Fixtures and helpers of all tests: tiers, a trained network, a sweep, the command `linflab`, and error checks."""

import io
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from linflab.platform.cli.main import main
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import Dataset, load_dataset
from linflab.platform.tracking import database
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.fit import fit
from linflab.platform.training.loop import TrainingResult
from linflab.reports import schema

# CI sets more examples than contributors want to wait for.
EXAMPLES = int(os.environ.get("LINFLAB_EXAMPLES", "15"))
settings.register_profile("linflab", deadline=None, max_examples=EXAMPLES, derandomize=True)
settings.load_profile("linflab")
# Tests share cores, and threads of several processes wait for each other: two threads can take ten times as long.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for commands

RECIPE = "digits_eps0.1_linf_dist_net"
QUICK = ["training.epochs=3", "evaluation.attack.steps=10", "evaluation.attack.restarts=1"]

TIERS = ("integration", "slow", "cluster", "slurm", "browser")  # tests without these markers are unit tests
# Tests with these fixtures are integration tests.
COMMAND_FIXTURES = {"linflab", "run_cli", "digits_net", "finished_sweep", "finished_training"}


def is_unit_test(item: pytest.Item) -> bool:
    return not any(item.get_closest_marker(tier) for tier in TIERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that run commands as integration tests."""
    for item in items:
        if COMMAND_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.integration)


@pytest.fixture(autouse=True)
def enforce_tier(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a unit test that imports Ray or starts a process of linflab."""
    if not is_unit_test(request.node):
        yield
        return

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: object, *args: object, **kwargs: object) -> None:
            assert "linflab" not in str(command), f"{request.node.nodeid}: requires the marker `integration`"
            super().__init__(command, *args, **kwargs)  # type: ignore[call-overload]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)  # importing Ray now fails
        patch.setattr(subprocess, "Popen", Popen)
        yield


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer, instead of waiting forever."""

    def on_timeout(*_: object) -> None:
        pytest.fail(f"took longer than {seconds} s")  # `except Exception` does not catch this

    old_handler = signal.signal(signal.SIGALRM, on_timeout)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old_handler)


@pytest.fixture(scope="session", autouse=True)
def reuse_migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copy this process's first database for each new one, since MLflow's migrations take seconds."""
    template, migrate = tmp_path_factory.mktemp("database") / "mlflow.db", database._migrate

    def copy(path: Path, artifacts: Path) -> None:
        if not template.exists():
            migrate(template, artifacts)
        shutil.copy(template, path)
        with closing(sqlite3.connect(path)) as connection, connection:
            location = f"{artifacts.as_uri()}/0"
            connection.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0", (location,))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "_migrate", copy)
        yield


@dataclass(frozen=True)
class TrainedOnDigits:
    experiment: ExperimentConfig
    dataset: Dataset
    trained: TrainingResult


@pytest.fixture(scope="session")
def digits_net() -> TrainedOnDigits:
    """The network of the demo's recipe after 20 epochs, which take a few seconds."""
    experiment = load_config(RECIPE, ["training.epochs=20"])
    dataset = load_dataset("digits")
    return TrainedOnDigits(experiment, dataset, fit(experiment, dataset))


@pytest.fixture(scope="session")
def linflab() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Function that runs the installed command; keyword arguments are additional environment variables."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).with_name("linflab")), *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@dataclass(frozen=True)
class CompletedCommand:
    """Result of a command that ran in this process, since imports in a new process take seconds."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., CompletedCommand]:
    def run(*arguments: str, **environment: str) -> CompletedCommand:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.argv", ["linflab", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return CompletedCommand(caught.value.code or 0, captured.out, captured.err)

    return run


RunCli = Callable[..., CompletedCommand]
Rejection = CompletedCommand | subprocess.CompletedProcess[str] | pytest.ExceptionInfo[BaseException]


def assert_rejected(rejection: Rejection, *expected: str, status: int = 2) -> None:
    """Check that invalid input is rejected in one line with the expected words; the wording is free.

    Args:
        rejection: A finished command, or the result of `pytest.raises`.
        expected: Settings with or without values, files, names and commands to use instead, as whole words.
        status: Expected exit status of the command; with status 2, stdout must be empty.
    """
    if isinstance(rejection, pytest.ExceptionInfo):
        line = str(rejection.value)
        assert "\n" not in line
    else:
        assert rejection.returncode == status, rejection.stdout + rejection.stderr
        assert status != 2 or rejection.stdout == ""
        lines = rejection.stderr.rstrip("\n").split("\n")  # earlier lines may report waiting for a lock
        assert all(text.startswith("linflab: ") for text in lines), rejection.stderr
        line = lines[-1]
    assert [words for words in expected if not has_words(line, words)] == [], line


def has_words(text: str, words: str) -> bool:
    """Return whether a text contains these words, not as a part of a longer word or number."""
    before, after = r"(?<!\w)" if words[0].isalnum() else "", r"(?!\w)" if words[-1].isalnum() else ""
    return re.search(before + re.escape(words) + after, text) is not None


def copy_shared_storage(name: str, make: Callable[[Path], None], factory: pytest.TempPathFactory) -> Storage:
    """Return this process's copy of a storage that the first test process makes for all of them."""
    original = factory.getbasetemp()
    original = (original if "PYTEST_XDIST_WORKER" not in os.environ else original.parent) / f"{name}-original"
    with FileLock(f"{original}.lock"):
        if not (original / "made").exists():
            shutil.rmtree(original, ignore_errors=True)  # left by a process that failed to make it
            make(original)
            (original / "made").touch()
    return Storage.open(Path(shutil.copytree(original, factory.mktemp(name), dirs_exist_ok=True)))


@dataclass(frozen=True)
class FinishedSweep:
    name: str
    storage: Path
    output: str


@pytest.fixture(scope="session")
def finished_sweep(
    tmp_path_factory: pytest.TempPathFactory, linflab: Callable[..., subprocess.CompletedProcess[str]]
) -> FinishedSweep:
    """A sweep of three short trials, run by the installed command."""

    def make(folder: Path) -> None:
        command = ["sweep", RECIPE, "demo", *QUICK, "--budget", "3", "--name", "three", "--storage", str(folder)]
        done = linflab(*command, COLUMNS="100")
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "output").write_text(done.stdout.replace(str(folder), "STORAGE"))

    storage = copy_shared_storage("sweep", make, tmp_path_factory).root
    return FinishedSweep("three", storage, (storage / "output").read_text().replace("STORAGE", str(storage)))


@dataclass(frozen=True)
class FinishedTraining:
    id: str
    storage: Path
    output: str

    @property
    def weights(self) -> Path:
        return self.storage / "artifacts" / self.id / "artifacts" / schema.WEIGHTS_FILE


@pytest.fixture(scope="session")
def finished_training(tmp_path_factory: pytest.TempPathFactory) -> FinishedTraining:
    """A short run of `linflab train` in this process, with model and figures."""

    def make(folder: Path) -> None:
        stdout = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout):
            patch.setattr("sys.argv", ["linflab", "train", RECIPE, *QUICK, "--storage", str(folder)])
            with pytest.raises(SystemExit) as caught:
                main()
        assert not caught.value.code
        (folder / "output").write_text(stdout.getvalue().replace(str(folder), "STORAGE"))

    storage = copy_shared_storage("training", make, tmp_path_factory).root
    (run,) = storage.glob("artifacts/*/artifacts/weights.pt")
    output = (storage / "output").read_text().replace("STORAGE", str(storage))
    return FinishedTraining(run.parents[1].name, storage, output)
