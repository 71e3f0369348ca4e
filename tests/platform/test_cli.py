"""The command as a user types it: what it prints, and one clear line with exit status 2 for wrong input."""

import io
import json
import math
import os
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from linflab.platform.checkpoints import exclusive_lock
from linflab.platform.cli import train
from linflab.platform.config import load_experiment
from linflab.platform.evaluation import Accuracy
from linflab.platform.progress import TrainingBar
from linflab.platform.training import EpochReport, Scheduled
from tests.conftest import QUICK, RECIPE, Done, FinishedSweep, Here

Command = Callable[..., subprocess.CompletedProcess[str]]
# no way out to a network, also where there is one
OFFLINE = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}


def refused(done: subprocess.CompletedProcess[str] | Done, *says: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("linflab: ")
    for words in says:
        assert words in done.stderr


@pytest.mark.parametrize("command", [["train", RECIPE], ["sweep", RECIPE, "demo"]])
@pytest.mark.parametrize(
    ("override", "says"),
    [("model.widht=3", "did you mean width?"), ("model.width=wide", "integer"), ("eps=-1", "eps=-1")],
)
def test_wrong_settings(here: Here, tmp_path: Path, command: list[str], override: str, says: str) -> None:
    refused(here(*command, override, "--storage", str(tmp_path / "runs")), override, says)
    assert not (tmp_path / "runs").exists()


def test_p_start_above_p_end(here: Here, tmp_path: Path) -> None:
    refused(here("train", RECIPE, "p_schedule.start=100", "p_schedule.end=10"), "start=100", "end=10")


def test_unknown_recipe(linflab: Command) -> None:
    refused(linflab("train", "digits_eps0.1_linf_net"), "recipe=digits_eps0.1_linf_net", RECIPE)


def test_missing_data_without_network(here: Here, tmp_path: Path) -> None:
    done = here(
        "train",
        RECIPE,
        "dataset=fashion_mnist",
        LINFLAB_DATA=str(tmp_path / "data"),
        LINFLAB_STORAGE=str(tmp_path / "runs"),
        **OFFLINE,
    )
    refused(done, "dataset=fashion_mnist", str(tmp_path / "data" / "fashion_mnist"), "LINFLAB_DATA")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", [["train", RECIPE], ["sweep", RECIPE, "demo"]])
def test_unwritable_storage(here: Here, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").touch()  # a file where a folder is needed: not even root can write below it
    refused(here(*command, "--storage", str(tmp_path / "file" / "runs")), str(tmp_path / "file"), "--storage")


@pytest.mark.parametrize("storage", ["q?x", "p%41x", "garbage", "folder"])
def test_storage_that_is_none(here: Here, tmp_path: Path, storage: str) -> None:
    if storage in ("garbage", "folder"):
        (tmp_path / storage).mkdir()
        database = tmp_path / storage / "mlflow.db"
        database.write_bytes(b"no database" * 100) if storage == "garbage" else database.mkdir()
    for command in (["train", RECIPE], ["report", "sweep", "any"]):
        refused(here(*command, "--storage", str(tmp_path / storage)), storage)


def test_too_many_workers_for_this_machine(linflab: Command, tmp_path: Path) -> None:
    many = 64 * (os.cpu_count() or 1)
    done = linflab(
        "train", RECIPE, f"compute.workers={many}", f"training.batch_size={many}", "--storage", str(tmp_path)
    )
    refused(done, f"compute.workers={many}", "CPUs")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demoo"], "space=demoo"),
        (["demo", "--budget", "0"], "budget=0: input should be greater than or equal to 1"),
        (["demo", "--budget", "soon"], "budget=soon: must be a number of trials, as in 20, or of hours"),
        (["demo", "--race", "5"], "race=5: must be a power of 3"),
        (["demo", "--sampler", "grid"], "sampler=grid: p_schedule.start"),
        (["demo", "--objectives", "certified,speed"], "objectives"),
        (["demo", "--retry-failed"], "retry-failed: goes with --resume"),
        (["demo", "--resume", "old"], f"recipe={RECIPE}: is part of the sweep old already"),
        (["demo", "--name", "it's"], "name=it's"),
        (["SPACE", "model.depht"], "model.depht"),
        (["SPACE", "training.batch_size"], "training.batch_size=5000"),
        (["SPACE", "eps"], "eps can't be searched"),
        (["SPACE", "compute.workers"], "compute.workers can't be searched"),
        (["SPACE", "training.include_validation"], "training.include_validation can't be searched"),
        (["SPACE", "eps_ramp.share"], "eps_ramp.share=5000"),  # may be searched, and has an end
    ],
)
def test_wrong_sweeps(here: Here, tmp_path: Path, arguments: list[str], says: str) -> None:
    typed = arguments
    if arguments[0] == "SPACE":
        space = tmp_path / "space.yaml"
        space.write_text(
            f"description: x\nparameters:\n  {arguments[1]}: {{distribution: integer, low: 1, high: 5000}}\n"
        )
        typed = [str(space)]
    refused(here("sweep", RECIPE, *typed, "--storage", str(tmp_path / "runs")), says)


def test_resuming_what_is_not_there(here: Here, tmp_path: Path, finished_sweep: FinishedSweep) -> None:
    refused(here("sweep", "--storage", str(tmp_path)), "sweep: needs a recipe and a search space, or --resume NAME")
    refused(
        here("sweep", "--resume", "no", "--storage", str(tmp_path)), "resume=no: there is no such sweep", "none yet"
    )
    storage = str(finished_sweep.storage)
    refused(here("sweep", "--resume", "no", "--storage", storage), "resume=no", "there are: three")
    refused(here("sweep", "--resume", "three", "--budget", "x", "--storage", storage), "budget=x")
    with exclusive_lock(finished_sweep.storage / "sweeps" / "three" / "lock"):
        refused(here("sweep", "--resume", "three", "--storage", storage), "sweep=three: another process runs it")


def test_report_of_an_unknown_sweep(here: Here, tmp_path: Path, finished_sweep: FinishedSweep) -> None:
    refused(here("report", "sweep", "nothing", "--storage", str(tmp_path / "no")), str(tmp_path / "no"), "no records")
    refused(here("ui", "--storage", str(tmp_path / "no")), "no records")
    assert not (tmp_path / "no").exists()
    refused(here("report", "sweep", "nothing", "--storage", str(finished_sweep.storage)), "sweep=nothing", "three")


def test_listings(here: Here) -> None:
    recipes = json.loads(here("recipes", "--json").stdout)
    assert RECIPE in [recipe["recipe"] for recipe in recipes]
    spaces = json.loads(here("space", "list", "--json").stdout)
    assert "demo" in [space["space"] for space in spaces]
    assert "p_schedule.start" in here("space", "show", "demo").stdout
    described = json.loads(here("describe", RECIPE, "model.width=10", "--json").stdout)
    assert described["flops"] == 64 * 10 + 10 * 10 + 10 * 10
    assert described["settings"]["model.width"] == 10


def test_train_prints_progress_and_result(linflab: Command, tmp_path: Path) -> None:
    done = linflab("train", RECIPE, *QUICK, "--storage", str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["1/3", "2/3", "3/3"]
    assert "p inf" in lines[2] and "certified" in lines[2]
    assert lines[3].startswith("scoring") and lines[4].startswith("Test: clean ")
    assert re.search(r"as run [0-9a-f]{32}; `linflab evaluate", lines[5])
    assert f"linflab ui --storage {tmp_path}" in lines[6]


@pytest.mark.parametrize(("recipe", "shown"), [("digits_eps0.1_ibp", False), ("digits_eps0.1_linf_dist_net", True)])
def test_p_is_shown_of_distances_alone(recipe: str, shown: bool) -> None:
    text = io.StringIO()
    bar = TrainingBar(Console(file=text), load_experiment(recipe))
    bar.on_epoch(EpochReport(1, Scheduled(math.inf, 0.1, 0.0, 0.1), 0.5, Accuracy(clean=0.9, certified=0.8), 0.8, 1.0))
    assert ("  p inf  " in text.getvalue()) == shown and "loss 0.5000  val 90.0% certified 80.0%" in text.getvalue()


def test_loss_that_is_not_finite(linflab: Command, tmp_path: Path) -> None:
    done = linflab("train", RECIPE, *QUICK, "optimizer.learning_rate=1e30", "--storage", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("linflab: the loss became")


def test_describe_shows_layers_and_cost(here: Here) -> None:
    done = here("describe", "mnist_eps0.3_linf_dist_hybrid")
    assert done.returncode == 0
    for words in ("features.distances.0", "ScaledLinear", "4,014,080", "85,283,840 FLOPs", "A step on 512 images"):
        assert words in done.stdout


@pytest.mark.parametrize(("recipe", "columns"), [(RECIPE, "p seconds a step"), ("digits_eps0.1_ibp", "seconds a step")])
def test_dry_run_estimates_and_records_nothing(here: Here, tmp_path: Path, recipe: str, columns: str) -> None:
    done = here("train", recipe, "--dry-run", "--storage", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert " ".join(header.split()) == columns and len(lines) >= 8
    (whole,) = [line for line in lines if "GiB" in line]
    assert "seconds (" in whole
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("load, said", [(0.6, False), (3.2, True)])
def test_dry_run_says_when_the_machine_is_busy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], load: float, said: bool
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    train(RECIPE, dry_run=True)
    assert ("3 other processes wanted a core" in " ".join(capsys.readouterr().out.split())) == said


def test_hybrids_name_their_certifier(here: Here, tmp_path: Path) -> None:
    settings = ["model.kind=linf_dist_hybrid", "model.net.kind=linf_dist_mlp", "model.net.width=32", "model.hidden=16"]
    settings += [
        "objective.kind=worst_case_cross_entropy",
        "objective.eps_train=0.1",
        "training.include_validation=true",
    ]
    done = here("train", RECIPE, *QUICK, *settings, "--storage", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    assert "certified (interval)" in done.stdout and "trained on training and validation images" in done.stdout
    (run,) = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db").search_runs(["1"])
    assert run.data.tags["linflab.certifier"] == "interval"
    assert run.data.tags["linflab.selection"].startswith("the last epoch")
    assert run.data.params["training.include_validation"] == "True"
    assert "best/val/certified_accuracy" not in run.data.metrics
    assert run.data.metrics["test/certified_but_broken"] == 0


def test_sweeps_need_validation_images(here: Here, tmp_path: Path) -> None:
    done = here("sweep", RECIPE, "demo", "training.include_validation=true", "--storage", str(tmp_path / "runs"))
    refused(done, "training.include_validation=true")


def test_a_port_that_is_taken(here: Here, finished_sweep: FinishedSweep) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused(here("ui", "--port", port, "--storage", str(finished_sweep.storage)), f"port={port}", "choose another")
