"""Sweeps on real Ray and real MLflow: what they record, that rows repeat, and what a failing trial leaves behind."""

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

import pandas as pd
import pytest
import torch
import yaml
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from rich.console import Console

from linflab.platform.config import build_experiment
from linflab.platform.datasets import data_folder, load_dataset
from linflab.platform.errors import Busy, SettingError, TrainingError, WorkerDied
from linflab.platform.evaluation import Scoring, evaluate
from linflab.platform.progress import SweepView
from linflab.platform.storage import Storage
from linflab.platform.workers import _lost
from linflab.reports import schema
from linflab.reports.records import read_trials
from tests.conftest import QUICK, RECIPE, FinishedSweep, Here

SHARES = ("p_schedule.warmup_share", "p_schedule.infinity_share")
Command = Callable[..., subprocess.CompletedProcess[str]]


def trials_of(sweep: FinishedSweep) -> pd.DataFrame:
    return read_trials(Storage(sweep.storage).tracking_uri, sweep.name)


def test_every_trial_is_recorded(finished_sweep: FinishedSweep) -> None:
    trials = trials_of(finished_sweep)
    assert sorted(trials[schema.TRIAL].astype(int)) == [1, 2, 3]
    assert set(trials["status"]) == {"FINISHED"}
    assert trials["model.width"].nunique() + trials["objective.theta"].nunique() > 2  # they differ
    assert trials[schema.TEST_BROKEN].eq(0).all()
    client = MlflowClient(Storage(finished_sweep.storage).tracking_uri)
    for _, trial in trials.iterrows():
        run = client.get_run(trial["run_id"])
        parent = client.get_run(run.data.tags["mlflow.parentRunId"])
        assert parent.data.tags[schema.KIND] == "sweep" and parent.info.status == "FINISHED"
        losses = client.get_metric_history(trial["run_id"], schema.TRAIN_LOSS)
        assert [metric.step for metric in losses] == [1, 2, 3]
        assert {"experiment.yaml", "weights.pt"} <= {file.path for file in client.list_artifacts(trial["run_id"])}


def test_weights_and_experiment_reproduce_the_scores(finished_sweep: FinishedSweep, tmp_path: Path) -> None:
    client = MlflowClient(Storage(finished_sweep.storage).tracking_uri)
    trial = trials_of(finished_sweep).iloc[0]
    path = client.download_artifacts(trial["run_id"], schema.WEIGHTS_FILE, str(tmp_path))
    saved = torch.load(path, weights_only=True)
    recorded = Path(client.download_artifacts(trial["run_id"], schema.EXPERIMENT_FILE, str(tmp_path))).read_text()
    assert saved["experiment"] == recorded
    experiment = build_experiment(yaml.safe_load(recorded), {})
    network = experiment.model.build((1, 8, 8), 10)
    network.load_state_dict(saved["network"])
    accuracy = evaluate(network, load_dataset("digits").test, Scoring((experiment.eps,), "lipschitz"), 1000)[0]
    assert accuracy.clean == trial[schema.TEST_CLEAN] and accuracy.certified == trial[schema.TEST_CERTIFIED]


@pytest.mark.slow
def test_a_row_is_repeated_by_its_command(finished_sweep: FinishedSweep, tmp_path: Path, linflab: Command) -> None:
    trial = trials_of(finished_sweep).iloc[0]
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


def test_output_of_a_sweep(finished_sweep: FinishedSweep) -> None:
    for words in (
        "trial 3 of 3 started",
        "trial 1 of 3 done",
        "Val.",
        "Certified",
        "three.md",
        "three.tex",
        "three.csv",
        "linflab train",
        f"linflab ui --storage {finished_sweep.storage}",
    ):
        assert words in finished_sweep.output
    rows = pd.read_csv(finished_sweep.storage / "reports" / "sweep-three.csv")
    assert len(rows) == 3
    assert rows["Val. certified"].is_monotonic_decreasing


def test_sweeps_are_listed(finished_sweep: FinishedSweep, here: Here) -> None:
    done = here("sweeps", "--storage", str(finished_sweep.storage), "--json")
    (row,) = json.loads(done.stdout)
    best = trials_of(finished_sweep)[schema.BEST_VALIDATION_CERTIFIED].max()
    assert row | {"started": ""} == {
        "sweep": "three", "recipe": RECIPE, "started": "", "state": "finished",
        "budget": "3 trials", "finished": 3, "failed": 0, "best": best,
    }  # fmt: skip
    said = here("sweeps", "--storage", str(finished_sweep.storage)).stdout
    assert f"{100 * best:.2f}%" in said and "three" in said


def test_a_setting_that_the_space_varies_is_refused(here: Here, tmp_path: Path) -> None:
    done = here("sweep", RECIPE, "demo", "model.width=32", "--storage", str(tmp_path))
    assert done.returncode == 2 and "model.width: the space demo varies it" in done.stderr


def test_name_is_taken(finished_sweep: FinishedSweep, linflab: Command) -> None:
    done = linflab("sweep", RECIPE, "demo", "--name", "three", "--storage", str(finished_sweep.storage))
    assert done.returncode == 2 and "choose another name" in done.stderr


@pytest.mark.slow
def test_sweep_goes_on_past_failing_trials(tmp_path: Path, linflab: Command) -> None:
    """Some learning rates diverge; and two shares, each fine alone, together leave no room for p to grow."""
    space = tmp_path / "space.yaml"
    space.write_text(
        "description: what can go wrong\nparameters:\n"
        "  optimizer.learning_rate: {distribution: categorical, choices: [0.1, 1.0e+30]}\n"
        "  p_schedule.warmup_share: {distribution: categorical, choices: [0.1, 0.8]}\n"
        "  p_schedule.infinity_share: {distribution: categorical, choices: [0.1, 0.7]}\n"
        "  objective.theta: {distribution: uniform, low: 0.1, high: 0.3, "
        "when: {p_schedule.warmup_share: 0.1}}\n"
        "try_first: [{optimizer.learning_rate: 0.1, p_schedule.warmup_share: 0.1, p_schedule.infinity_share: 0.1}]\n"
    )
    done = linflab(
        "sweep", RECIPE, str(space), *QUICK, "training.epochs=1", "--budget", "9", "--name", "some",
        "--storage", str(tmp_path),
    )  # fmt: skip
    trials = read_trials(Storage(tmp_path).tracking_uri, "some")
    refused = trials["p_schedule.warmup_share"].eq("0.8") & trials["p_schedule.infinity_share"].eq("0.7")
    diverged = trials["optimizer.learning_rate"].eq("1e+30") & ~refused
    fine = trials[~refused & ~diverged]
    first = trials[trials[schema.TRIAL] == "1"].iloc[0]  # as the space says
    assert [first[path] for path in ("optimizer.learning_rate", *SHARES)] == ["0.1", "0.1", "0.1"]
    drawn = trials[schema.SEARCHED].str.contains("objective.theta")  # under one of the choices alone
    assert drawn.equals(trials[SHARES[0]].eq("0.1")) and trials[drawn]["objective.theta"].nunique() == drawn.sum()
    assert len(trials) == 9 and refused.any() and diverged.any() and len(fine)  # the seed draws all three
    assert trials[refused][schema.FAILURE].str.contains("SettingError: p_schedule").all()
    assert trials[diverged][schema.FAILURE].str.contains("TrainingError: the loss became .*learning_rate").all()
    assert set(trials[refused | diverged]["status"]) == {"FAILED"}
    assert set(fine["status"]) == {"FINISHED"} and fine[schema.TEST_CERTIFIED].notna().all()
    failed = 9 - len(fine)
    assert done.returncode == 1 and f"{failed} trials have no result" in done.stderr
    table = (tmp_path / "reports" / "sweep-some.md").read_text()
    assert len(re.findall(r"\| +- \|", table)) >= failed  # dashes, not zeros
    assert table.count("has no result (failed)") == failed


@pytest.mark.slow
def test_two_ray_train_workers_agree_with_one_and_repeat_their_bits(tmp_path: Path, linflab: Command) -> None:
    losses, weights = [], []
    for number, workers in enumerate((1, 2, 2)):
        storage = tmp_path / str(number)
        done = linflab("train", RECIPE, *QUICK, f"compute.workers={workers}", "--storage", str(storage))
        assert done.returncode == 0, done.stdout + done.stderr
        client = MlflowClient(Storage(storage).tracking_uri)
        (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
        assert run.info.status == "FINISHED" and run.data.params["compute.workers"] == str(workers)
        losses.append([metric.value for metric in client.get_metric_history(run.info.run_id, schema.TRAIN_LOSS)])
        path = client.download_artifacts(run.info.run_id, schema.WEIGHTS_FILE)
        weights.append(torch.load(path, weights_only=True)["network"])
        assert "epoch 3/3" in done.stdout
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # equal but for the order of sums
    assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[1])


def interrupted(command: list[str], sign: str, storage: Path) -> tuple[int, str, list[str]]:
    """Ends a command by Ctrl-C some time after it printed the sign: status, rest of its output, status of its runs."""
    command = [str(Path(sys.executable).with_name("linflab")), *command, "--storage", str(storage)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # of a shell's background jobs Ctrl-C is ignored, and so it would be here
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if sign in line:
                break
        time.sleep(5)  # of a training that says it starts, the run is open by now
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=120)
    client = MlflowClient(Storage(storage).tracking_uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return process.returncode, rest, [run.info.status for run in runs]


@pytest.mark.slow
def test_interrupted_sweep_leaves_no_open_run(tmp_path: Path) -> None:
    command = ["sweep", RECIPE, "demo", "training.epochs=10000", "--budget", "4", "--name", "cut"]
    status, rest, runs = interrupted(command, "started", tmp_path)
    assert status == 130 and "linflab: interrupted" in rest
    assert len(runs) >= 2 and set(runs) == {"KILLED"}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_training_leaves_no_open_run(tmp_path: Path, workers: int) -> None:
    command = ["train", RECIPE, "training.epochs=10000", "training.checkpoint_epochs=1", f"compute.workers={workers}"]
    status, rest, runs = interrupted(command, "epoch 2/", tmp_path)
    assert status == 130 and "--resume" in rest
    assert runs == ["KILLED"]


@pytest.mark.slow
@pytest.mark.skipif(
    not (data_folder() / "fashion_mnist").is_dir(), reason="needs fashion_mnist in prepared form in $LINFLAB_DATA"
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
    assert run.data.metrics[schema.TEST_CERTIFIED] > 0.6 and run.data.metrics[schema.TEST_BROKEN] == 0


def test_a_trial_whose_process_could_not_even_start_is_shown() -> None:
    view = SweepView(Console(quiet=True), ["model.width"], 3)
    view.lost("1")
    assert view.rows["1"].state == "lost"


@pytest.mark.parametrize("result", [{schema.TRAIN_LOSS: 0.5}, {schema.TRAIN_LOSS: 0.5, schema.P: 24.0}])
def test_p_is_shown_of_networks_with_distances(result: dict[str, float]) -> None:
    console = Console(file=StringIO(), force_terminal=True, color_system=None, width=100, height=20)
    with SweepView(console, ["model.width"], 3) as view:
        view.ended("1", {"model.width": 8}, result, None)
        with console.capture() as screen:
            console.print(view.live.get_renderable())
    header, *rows = (line.split() for line in screen.get().splitlines() if "Loss" in line or "done" in line)
    assert ("p" in header) == ("24" in rows[0]) == (schema.P in result) and "0.5000" in rows[0]


@pytest.mark.parametrize(
    ("failure", "lost"),
    [
        (Busy("another process"), True),
        (MlflowException("gone"), True),
        (WorkerDied("gone"), True),
        (TrainingError("the loss became nan in gloo"), False),
        (SettingError("eps"), False),
    ],
)
def test_what_says_nothing_of_a_training_is_no_failure_of_it(failure: Exception, lost: bool) -> None:
    assert _lost(failure) == lost
