"""`linflab train`, interrupted at every stage: the resumed run equals an uninterrupted one."""

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from linflab.reports import schema
from tests.conftest import QUICK, RECIPE
from tests.platform.interruptions import Command, Outcome, group_outcomes

SETTINGS = ["model.width=16", "training.epochs=40", "training.checkpoint_interval=3"]
SETTINGS += ["evaluation.attack.steps=300", "evaluation.attack.restarts=5"]


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    storage = tmp_path_factory.mktemp("undisturbed") / "runs"
    Command(storage, "train", RECIPE, *SETTINGS).finish()
    ((run,),) = group_outcomes(storage).values()
    assert run.status == "FINISHED" and run.models == 1 and run.figures and schema.MISSING not in run.tags
    return run


STAGES: dict[str, Callable[[Command], None]] = {
    "start": lambda command: command.wait_for((command.storage / "mlflow.db").exists),
    "training": lambda command: command.wait_for_output("epoch=5/"),
    "last epoch": lambda command: command.wait_for_output("epoch=39/"),
    "scoring": lambda command: command.wait_for_output("stage=evaluation"),
    "publishing": lambda command: command.wait_for_output("Test set"),
}
# SIGINT and SIGTERM have the same handler.
SIGNALS = {
    "killed": {stage: signal.SIGKILL for stage in STAGES},
    "stopped": {
        "start": signal.SIGINT,
        "training": signal.SIGTERM,
        "scoring": signal.SIGINT,
        "publishing": signal.SIGTERM,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("signals", SIGNALS.values(), ids=SIGNALS)
def test_resumed_training_equals_uninterrupted_training(
    tmp_path: Path, uninterrupted_run: Outcome, signals: dict[str, signal.Signals]
) -> None:
    """Interrupt one training at every stage."""
    storage, is_trained = tmp_path / "runs", False
    for stage, number in signals.items():
        command = Command(storage, "train", RECIPE, *SETTINGS, *([] if stage == "start" else ["--resume"]))
        STAGES[stage](command)
        status, output = command.interrupt(number)
        assert status == (-number if number == signal.SIGKILL else 130), f"{stage}\n{output}"
        assert not (is_trained and re.search("^epoch=", output, re.MULTILINE)), f"{stage}\n{output}"
        is_trained = stage in ("scoring", "publishing")
        if number != signal.SIGKILL:
            assert_one_line(output)
            assert stage == "start" or "--resume" in output.splitlines()[-1], f"{stage}\n{output}"
            if stage == "training":
                ((run,),) = group_outcomes(storage).values()
                assert run.status == "KILLED"
    output = Command(storage, "train", RECIPE, *SETTINGS, "--resume").finish()
    assert not re.search("^epoch=", output, re.MULTILINE)
    ((run,),) = group_outcomes(storage).values()
    run.assert_equals(uninterrupted_run)
    assert schema.MISSING not in run.tags
    assert not list((storage / "checkpoints").glob("*"))


def assert_one_line(output: str) -> None:
    """Assert that the command's last line reports the interruption, without a traceback."""
    assert "Traceback" not in output and "Exception" not in output, output
    last = output.splitlines()[-1]
    assert last.startswith("linflab: "), output


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM), ids=lambda number: number.name)
@pytest.mark.parametrize("seconds", [0.0, 0.3, 2.0])
def test_interruption_during_imports_prints_one_line(tmp_path: Path, number: signal.Signals, seconds: float) -> None:
    command = Command(tmp_path / "runs", "train", RECIPE, *SETTINGS)
    command.wait_for_handlers()
    time.sleep(seconds)
    status, output = command.interrupt(number)
    assert status == 130
    assert_one_line(output)


@pytest.mark.slow
def test_finished_run_is_reported_and_trained_again_on_request(tmp_path: Path) -> None:
    storage, quick = tmp_path / "runs", [RECIPE, *QUICK, "model.width=8"]
    first = Command(storage, "train", *quick).finish()
    resumed = Command(storage, "train", *quick, "--resume").finish()
    ((run,),) = group_outcomes(storage).values()
    assert run.status == "FINISHED" and "epoch=1/" not in resumed
    (results,) = [line for line in first.splitlines() if line.startswith("Test set")]
    assert results in resumed.splitlines()
    assert "epoch=1/3" in Command(storage, "train", *quick, "--resume", "--again").finish()
    (runs,) = group_outcomes(storage).values()
    assert len(runs) == 2
    runs[0].assert_equals(runs[1])


@pytest.mark.slow
def test_killed_raylet_interrupts_training_on_workers(tmp_path: Path) -> None:
    settings = [
        RECIPE,
        "model.width=16",
        "training.epochs=10000",
        "training.checkpoint_interval=2",
        "compute.workers=2",
    ]
    command = Command(tmp_path / "runs", "train", *settings)
    try:
        command.wait_for_output("epoch=4/")
        (raylet,) = [one for one in psutil.Process(command.process.pid).children() if one.name() == "raylet"]
        raylet.kill()
        assert command.process.wait(60) == 130
    finally:
        command.end()
    assert "--resume" in command.output.splitlines()[-1]
    ((run,),) = group_outcomes(command.storage).values()
    assert run.status == "KILLED" and schema.FAILURE not in run.tags
