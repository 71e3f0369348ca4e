"""Sweeps on real Ray and real MLflow: what they record, that rows repeat, and what a failing trial leaves behind."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient

from linflab.platform.config import build_experiment
from linflab.platform.datasets import load_dataset
from linflab.platform.evaluation import evaluate
from linflab.platform.storage import Storage
from linflab.reports import schema
from linflab.reports.records import read_trials
from tests.conftest import QUICK, RECIPE, FinishedSweep

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
        assert {file.path for file in client.list_artifacts(trial["run_id"])} == {"experiment.yaml", "weights.pt"}


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
    accuracy = evaluate(network, load_dataset("digits").test, experiment.eps, 1000)
    assert accuracy.clean == trial[schema.TEST_CLEAN] and accuracy.certified == trial[schema.TEST_CERTIFIED]


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
        "trial 3/3 started",
        "trial 1/3 done",
        "Val.",
        "Certified",
        "three.md",
        "three.tex",
        "three.csv",
        "linflab train",
        f"linflab ui --storage {finished_sweep.storage}",
    ):
        assert words in finished_sweep.output
    rows = pd.read_csv(finished_sweep.storage / "reports" / "three.csv")
    assert len(rows) == 3
    assert rows["Val. certified"].is_monotonic_decreasing


def test_name_is_taken(finished_sweep: FinishedSweep, linflab: Command) -> None:
    done = linflab("sweep", RECIPE, "demo", "--name", "three", "--storage", str(finished_sweep.storage))
    assert done.returncode == 2 and "choose another name" in done.stderr


def test_sweep_goes_on_past_a_failing_trial(tmp_path: Path, linflab: Command) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(
        "description: a learning rate that works and one that does not\nparameters:\n"
        "  optimizer.learning_rate: {distribution: categorical, choices: [0.1, 1.0e+30]}\n"
    )
    done = linflab(
        "sweep", RECIPE, str(space), *QUICK, "seed=1", "--trials", "6", "--name", "some", "--storage", str(tmp_path)
    )
    trials = read_trials(Storage(tmp_path).tracking_uri, "some")
    failed = trials[trials["optimizer.learning_rate"] == "1e+30"]
    assert len(trials) == 6 and 0 < len(failed) < 6  # the seed draws both
    assert set(failed["status"]) == {"FAILED"} and failed[schema.FAILURE].str.contains("learning_rate").all()
    rest = trials.drop(failed.index)
    assert set(rest["status"]) == {"FINISHED"} and rest[schema.TEST_CERTIFIED].notna().all()
    assert done.returncode == 1 and f"{len(failed)} of 6 trials have no result" in done.stderr
    table = (tmp_path / "reports" / "some.md").read_text()
    assert table.count("| - ") >= len(failed)  # dashes, not zeros
    assert "has no result (failed): TrainingError" in table


def test_two_ray_train_workers_agree_with_one(tmp_path: Path, linflab: Command) -> None:
    accuracies = []
    for workers in (1, 2):
        storage = tmp_path / str(workers)
        done = linflab("train", RECIPE, *QUICK, f"compute.workers={workers}", "--storage", str(storage))
        assert done.returncode == 0, done.stdout + done.stderr
        client = MlflowClient(Storage(storage).tracking_uri)
        (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
        assert run.info.status == "FINISHED" and run.data.params["compute.workers"] == str(workers)
        losses = client.get_metric_history(run.info.run_id, schema.TRAIN_LOSS)
        accuracies.append([metric.value for metric in losses])
        assert "epoch 3/3" in done.stdout
    assert accuracies[0] == pytest.approx(accuracies[1], rel=1e-2)  # equal but for the order of sums


@pytest.mark.slow
def test_trials_of_several_workers(tmp_path: Path, linflab: Command) -> None:
    done = linflab(
        "sweep",
        RECIPE,
        "demo",
        *QUICK,
        "compute.workers=2",
        "--trials",
        "2",
        "--name",
        "pairs",
        "--storage",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trials = read_trials(Storage(tmp_path).tracking_uri, "pairs")
    assert set(trials["status"]) == {"FINISHED"} and trials[schema.TEST_CERTIFIED].notna().all()


def test_interrupted_sweep_leaves_no_open_run(tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("linflab")),
        "sweep",
        RECIPE,
        "demo",
        "training.epochs=10000",
        "--trials",
        "4",
        "--name",
        "cut",
        "--storage",
        str(tmp_path),
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "started" in line:
                break
        time.sleep(15)  # the trial's run is open by now
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=120)
    client = MlflowClient(Storage(tmp_path).tracking_uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(runs) >= 2, rest
    assert "RUNNING" not in {run.info.status for run in runs}
    assert process.returncode != 0
