"""Sweeps on real Ray and MLflow: logged runs, reproducible rows and failing trials."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from rich.console import Console

from linflab.platform.cli.sweep_view import SweepProgress
from linflab.platform.config.overrides import build_config
from linflab.platform.data.datasets import data_dir, load_dataset
from linflab.platform.distributed.train import _is_worker_loss
from linflab.platform.errors import InputError, RunLockedError, TrainingError, WorkerLostError
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.evaluation import EvaluationSpec, evaluate
from linflab.reports import schema
from linflab.reports.records import read_trials
from tests.conftest import QUICK, RECIPE, FinishedSweep, RunCli, assert_rejected, has_words

pytestmark = pytest.mark.integration

FRACTIONS = ("p_schedule.warmup_fraction", "p_schedule.inf_fraction")
Command = Callable[..., subprocess.CompletedProcess[str]]


def read_sweep_trials(sweep: FinishedSweep) -> pd.DataFrame:
    return read_trials(Storage(sweep.storage).tracking_uri, sweep.name)


def test_every_trial_is_logged(finished_sweep: FinishedSweep) -> None:
    trials = read_sweep_trials(finished_sweep)
    assert sorted(trials[schema.TRIAL].astype(int)) == [1, 2, 3]
    assert set(trials["status"]) == {"FINISHED"}
    assert trials["model.width"].nunique() + trials["objective.theta"].nunique() > 2  # they differ
    assert trials[schema.TEST_VIOLATIONS].eq(0).all()
    client = MlflowClient(Storage(finished_sweep.storage).tracking_uri)
    for _, trial in trials.iterrows():
        run = client.get_run(trial["run_id"])
        parent = client.get_run(run.data.tags["mlflow.parentRunId"])
        assert parent.data.tags[schema.KIND] == "sweep" and parent.info.status == "FINISHED"
        losses = client.get_metric_history(trial["run_id"], schema.TRAIN_LOSS)
        assert [metric.step for metric in losses] == [1, 2, 3]
        assert {"config.yaml", "weights.pt"} <= {file.path for file in client.list_artifacts(trial["run_id"])}


def test_weights_and_config_reproduce_the_accuracies(finished_sweep: FinishedSweep, tmp_path: Path) -> None:
    client = MlflowClient(Storage(finished_sweep.storage).tracking_uri)
    trial = read_sweep_trials(finished_sweep).iloc[0]
    path = client.download_artifacts(trial["run_id"], schema.WEIGHTS_FILE, str(tmp_path))
    saved = torch.load(path, weights_only=True)
    stored = Path(client.download_artifacts(trial["run_id"], schema.CONFIG_FILE, str(tmp_path))).read_text()
    assert saved["experiment"] == stored
    experiment = build_config(yaml.safe_load(stored), {})
    network = experiment.model.build((1, 8, 8), 10)
    network.load_state_dict(saved["network"])
    accuracy = evaluate(network, load_dataset("digits").test, EvaluationSpec((experiment.eps,), "lipschitz"), 1000)[0]
    assert accuracy.clean == trial[schema.TEST_CLEAN] and accuracy.certified == trial[schema.TEST_CERTIFIED]


@pytest.mark.slow
def test_row_is_reproduced_by_its_command(finished_sweep: FinishedSweep, tmp_path: Path, linflab: Command) -> None:
    trial = read_sweep_trials(finished_sweep).iloc[0]
    program, *arguments = shlex.split(trial[schema.COMMAND])
    assert program == "linflab"
    done = linflab(*arguments, "--storage", str(tmp_path))
    assert done.returncode == 0, done.stderr
    client = MlflowClient(Storage(tmp_path).tracking_uri)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    first = MlflowClient(Storage(finished_sweep.storage).tracking_uri)
    one = torch.load(first.download_artifacts(trial["run_id"], schema.WEIGHTS_FILE), weights_only=True)
    other = torch.load(client.download_artifacts(run.info.run_id, schema.WEIGHTS_FILE), weights_only=True)
    assert all(torch.equal(one["network"][name], other["network"][name]) for name in one["network"])
    assert run.data.metrics[schema.TEST_ROBUST] == trial[schema.TEST_ROBUST]


def test_sweep_prints_progress_table_and_commands(finished_sweep: FinishedSweep) -> None:
    table = ("Val.", "Certified", "three.md", "three.tex", "three.csv")
    commands = ("linflab train", f"linflab ui --storage {finished_sweep.storage}")
    for part in ("trial=1 total=3", "trial=3 total=3", *table, *commands):
        assert part in finished_sweep.output
    rows = pd.read_csv(finished_sweep.storage / "reports" / "sweep-three.csv")
    assert len(rows) == 3
    assert rows["Val. certified"].is_monotonic_decreasing


def test_sweeps_are_listed(finished_sweep: FinishedSweep, run_cli: RunCli) -> None:
    done = run_cli("sweeps", "--storage", str(finished_sweep.storage), "--json")
    (row,) = json.loads(done.stdout)
    best = read_sweep_trials(finished_sweep)[schema.BEST_VALIDATION_CERTIFIED].max()
    assert row | {"start_time": ""} == {
        "sweep": "three", "recipe": RECIPE, "start_time": "", "status": "finished",
        "budget": "3 trials", "finished": 3, "failed": 0, "best_val_certified": best,
    }  # fmt: skip
    text = run_cli("sweeps", "--storage", str(finished_sweep.storage)).stdout
    assert f"{100 * best:.2f}%" in text and "three" in text


def test_override_of_a_searched_setting_is_rejected(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("sweep", RECIPE, "demo", "model.width=32", "--storage", str(tmp_path))
    assert_rejected(done, "model.width", "demo")


def test_name_of_an_existing_sweep_is_rejected(finished_sweep: FinishedSweep, run_cli: RunCli) -> None:
    done = run_cli("sweep", RECIPE, "demo", "--name", "three", "--storage", str(finished_sweep.storage))
    assert_rejected(done, "name=three")


@pytest.mark.slow
def test_sweep_continues_after_failed_trials(tmp_path: Path, linflab: Command) -> None:
    """Some learning rates diverge, and two fractions that are valid separately leave no epochs for p to grow."""
    space = tmp_path / "space.yaml"
    space.write_text(
        "description: what can go wrong\nparameters:\n"
        "  optimizer.learning_rate: {distribution: categorical, choices: [0.1, 1.0e+30]}\n"
        "  p_schedule.warmup_fraction: {distribution: categorical, choices: [0.1, 0.8]}\n"
        "  p_schedule.inf_fraction: {distribution: categorical, choices: [0.1, 0.7]}\n"
        "  objective.theta: {distribution: uniform, low: 0.1, high: 0.3, "
        "when: {p_schedule.warmup_fraction: 0.1}}\n"
        "initial_points:\n"
        "- {optimizer.learning_rate: 0.1, p_schedule.warmup_fraction: 0.1, p_schedule.inf_fraction: 0.1}\n"
    )
    done = linflab(
        "sweep", RECIPE, str(space), *QUICK, "training.epochs=1", "--budget", "9", "--name", "some",
        "--storage", str(tmp_path),
    )  # fmt: skip
    trials = read_trials(Storage(tmp_path).tracking_uri, "some")
    invalid = trials["p_schedule.warmup_fraction"].eq("0.8") & trials["p_schedule.inf_fraction"].eq("0.7")
    diverged = trials["optimizer.learning_rate"].eq("1e+30") & ~invalid
    successful = trials[~invalid & ~diverged]
    first = trials[trials[schema.TRIAL] == "1"].iloc[0]  # from initial_points
    assert [first[path] for path in ("optimizer.learning_rate", *FRACTIONS)] == ["0.1", "0.1", "0.1"]
    drawn = trials[schema.SEARCHED_SETTINGS].str.contains("objective.theta")  # only for one of the choices
    assert drawn.equals(trials[FRACTIONS[0]].eq("0.1")) and trials[drawn]["objective.theta"].nunique() == drawn.sum()
    assert len(trials) == 9 and invalid.any() and diverged.any() and len(successful)  # the seed draws all three
    assert trials[invalid][schema.FAILURE].str.contains("InputError: p_schedule").all()
    assert trials[diverged][schema.FAILURE].str.contains("TrainingError: .*learning_rate").all()
    assert set(trials[invalid | diverged]["status"]) == {"FAILED"}
    assert set(successful["status"]) == {"FINISHED"} and successful[schema.TEST_CERTIFIED].notna().all()
    failed = 9 - len(successful)
    assert done.returncode == 1 and has_words(done.stderr.splitlines()[-1], str(failed))
    table = (tmp_path / "reports" / "sweep-some.md").read_text()
    assert len(re.findall(r"\| +- \|", table)) >= failed  # dashes, not zeros
    assert table.count("(failed)") == failed


@pytest.mark.slow
def test_the_best_trial_is_chosen_by_verified_accuracy(tmp_path: Path, linflab: Command) -> None:
    """The cascade certifies validation images for the two best trials; the better one gets a seed replicate."""
    space = tmp_path / "space.yaml"
    space.write_text(
        "description: epochs\nparameters:\n  training.epochs: {distribution: categorical, choices: [1, 2, 3]}\n"
    )
    arguments = ("sweep", "digits_eps0.1_ibp", str(space), *QUICK[1:], "--budget", "3", "--sampler", "grid")
    verification = ("--verify-front", "2", "--verify-images", "20", "--seeds", "2")
    limits = ("evaluation.time_limit=0.5", "evaluation.sound=false")
    done = linflab(*arguments, *limits, *verification, "--name", "verified", "--storage", str(tmp_path))
    assert done.returncode == 0, done.stderr
    trials = read_trials(Storage(tmp_path).tracking_uri, "verified").set_index(schema.TRIAL)
    verified = trials[schema.VERIFIED_VALIDATION].dropna()
    by_validation = trials.loc[["1", "2", "3"], schema.BEST_VALIDATION_CERTIFIED].sort_values(ascending=False)
    assert set(verified.index) == set(by_validation.index[:2]) and verified.between(0, 1).all()
    assert (20 * verified % 1).abs().max() < 1e-9
    assert set(trials[schema.VERIFICATION].dropna()) == {
        "20 validation images, up to 0.5 s of branch and bound per image, real arithmetic"
    }
    (replicate,) = [label for label in trials.index if label.endswith("-seed1")]
    assert verified[replicate.removesuffix("-seed1")] == verified.max()
    lines = (tmp_path / "reports" / "sweep-verified.csv").read_text().splitlines()
    assert "Val. verified" in lines[0] and lines[1].startswith(replicate.removesuffix("-seed1"))
    again = linflab("sweep", "--resume", "verified", "--storage", str(tmp_path))
    assert again.returncode == 0 and "Verifying" not in again.stdout + again.stderr, again.stderr


def interrupt_command(command: list[str], text: str, storage: Path) -> tuple[int, str, list[str]]:
    """Send Ctrl-C after a command has printed `text`; return exit status, remaining output and status of runs."""
    command = [str(Path(sys.executable).with_name("linflab")), *command, "--storage", str(storage)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # Background jobs of a shell, and their children, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if text in line:
                break
        time.sleep(5)  # a training that printed its start has created its run by now
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=120)
    client = MlflowClient(Storage(storage).tracking_uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return process.returncode, rest, [run.info.status for run in runs]


@pytest.mark.slow
def test_interrupted_training_on_two_workers_leaves_no_open_run(tmp_path: Path) -> None:
    command = ["train", RECIPE, "training.epochs=10000", "training.checkpoint_interval=1", "compute.workers=2"]
    status, rest, runs = interrupt_command(command, "epoch=2/", tmp_path)
    assert status == 130 and "--resume" in rest
    assert runs == ["KILLED"]


@pytest.mark.slow
@pytest.mark.skipif(
    not (data_dir() / "fashion_mnist").is_dir(), reason="requires prepared fashion_mnist in $LINFLAB_DATA"
)
def test_fashion_mnist_learns(tmp_path: Path, linflab: Command) -> None:
    done = linflab(
        "train",
        "fashion_mnist_eps0.1_linf_dist_net_cpu",
        "model.width=128",
        "model.depth=3",
        "training.epochs=3",
        "--storage",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    client = MlflowClient(Storage(tmp_path).tracking_uri)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.data.metrics[schema.TEST_CERTIFIED] > 0.6 and run.data.metrics[schema.TEST_VIOLATIONS] == 0


def test_trial_lost_before_its_start_is_shown() -> None:
    view = SweepProgress(Console(quiet=True))
    view.expect(["model.width"], 3)
    view.show_restart("1")
    assert view.rows["1"].state == "lost"


def test_log_lines_distinguish_started_and_resumed_trials() -> None:
    file = StringIO()
    view = SweepProgress(Console(file=file, width=200))
    view.expect(["model.width"], 3, resumed=["1"])
    for label in ("1", "2", "2"):  # 2 lost its worker, and starts again
        job = json.dumps({"params": {"model.width": 8}})
        view.on_trial_start(0, [], SimpleNamespace(config={"trial": label, "job": job}))  # type: ignore[arg-type]
    lines = file.getvalue().splitlines()
    assert ["status=resumed" in line for line in lines] == [True, False, True] and "status=started" in lines[1]


@pytest.mark.parametrize("result", [{schema.TRAIN_LOSS: 0.5}, {schema.TRAIN_LOSS: 0.5, schema.P: 24.0}])
def test_p_is_shown_for_distance_networks_only(result: dict[str, float]) -> None:
    console = Console(file=StringIO(), force_terminal=True, color_system=None, width=100, height=20)
    with SweepProgress(console) as view:
        view.expect(["model.width"], 3)
        view.show_end("1", {"model.width": 8}, result, None)
        with console.capture() as screen:
            console.print(view.live.get_renderable())
    header, *rows = (line.split() for line in screen.get().splitlines() if "Loss" in line or "done" in line)
    assert ("p" in header) == ("24" in rows[0]) == (schema.P in result) and "0.5000" in rows[0]


@pytest.mark.parametrize(
    ("failure", "is_lost"),
    [
        (RunLockedError("another process"), True),
        (MlflowException("gone"), True),
        (WorkerLostError("gone"), True),
        (TrainingError("the loss became nan in gloo"), False),
        (InputError("eps"), False),
    ],
)
def test_infrastructure_errors_do_not_fail_a_trial(failure: Exception, is_lost: bool) -> None:
    assert _is_worker_loss(failure) == is_lost
