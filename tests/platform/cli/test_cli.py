"""The command `linflab`: its output, and one line with exit status 2 for invalid input."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from linflab.platform.cli.options import storage_options
from linflab.platform.cli.train import train
from linflab.platform.locks import file_lock
from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from tests.conftest import QUICK, RECIPE, FinishedSweep, FinishedTraining, RunCli, assert_rejected, has_words

# Proxies that block downloads, even on a machine with a network.
OFFLINE = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("command", "heavy"),
    [
        (["train", RECIPE, "--dry-run"], {"ray", "matplotlib"}),
        (["describe", RECIPE], {"ray", "mlflow", "matplotlib", "sklearn"}),
        (["--help"], {"ray", "mlflow", "matplotlib", "sklearn", "torch", "pandas", "numpy", "pydantic"}),
    ],
)
def test_commands_import_slow_modules_only_when_needed(tmp_path: Path, command: list[str], heavy: set[str]) -> None:
    arguments = [*command, "--storage", str(tmp_path)] if command[0] == "train" else command
    code = f"""
import sys
from linflab.platform.cli.main import app
try:
    app({arguments!r})
except SystemExit as end:
    assert not end.code
heavy = {heavy!r}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["train", RECIPE], ["sweep", RECIPE, "demo"]])
@pytest.mark.parametrize(
    ("override", "suggestions"), [("model.widht=3", ["width"]), ("model.width=wide", []), ("eps=-1", [])]
)
def test_invalid_settings_are_rejected(
    run_cli: RunCli, tmp_path: Path, command: list[str], override: str, suggestions: list[str]
) -> None:
    assert_rejected(run_cli(*command, override, "--storage", str(tmp_path / "runs")), override, *suggestions)
    assert not (tmp_path / "runs").exists()


def test_p_start_above_p_end_is_rejected(run_cli: RunCli, tmp_path: Path) -> None:
    assert_rejected(run_cli("train", RECIPE, "p_schedule.start=100", "p_schedule.end=10"), "start=100", "end=10")


def test_unknown_recipe_is_rejected(run_cli: RunCli) -> None:
    assert_rejected(run_cli("train", "digits_eps0.1_linf_net"), "recipe=digits_eps0.1_linf_net", RECIPE)


def test_missing_dataset_is_reported_without_a_network(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli(
        "train",
        RECIPE,
        "dataset=fashion_mnist",
        LINFLAB_DATA=str(tmp_path / "data"),
        LINFLAB_STORAGE=str(tmp_path / "runs"),
        **OFFLINE,
    )
    assert_rejected(done, "dataset=fashion_mnist", str(tmp_path / "data" / "fashion_mnist"), "LINFLAB_DATA")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", [["train", RECIPE], ["sweep", RECIPE, "demo"]])
def test_unwritable_storage_is_rejected(run_cli: RunCli, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").touch()  # a file instead of a folder: even root cannot write below it
    assert_rejected(
        run_cli(*command, "--storage", str(tmp_path / "file" / "runs")), str(tmp_path / "file"), "--storage"
    )


@pytest.mark.parametrize("storage", ["q?x", "p%41x", "garbage", "folder"])
def test_invalid_storage_is_rejected(run_cli: RunCli, tmp_path: Path, storage: str) -> None:
    if storage in ("garbage", "folder"):
        (tmp_path / storage).mkdir()
        database = tmp_path / storage / "mlflow.db"
        database.write_bytes(b"no database" * 100) if storage == "garbage" else database.mkdir()
    for command in (["train", RECIPE], ["report", "sweep", "any"]):
        assert_rejected(run_cli(*command, "--storage", str(tmp_path / storage)), storage)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demoo"], ["space=demoo"]),
        (["demo", "--budget", "0"], ["budget=0"]),
        (["demo", "--budget", "soon"], ["budget=soon"]),
        (["demo", "--halving", "5"], ["halving=5"]),
        (["demo", "--sampler", "grid"], ["sampler=grid", "p_schedule.start"]),
        (["demo", "--objectives", "certified,speed"], ["objectives=speed"]),
        (["demo", "--retry-failed"], ["retry-failed", "--resume"]),
        (["demo", "--resume", "old"], [f"recipe={RECIPE}", "old"]),
        (["demo", "--name", "it's"], ["name=it's"]),
    ],
)
def test_invalid_sweep_options_are_rejected(
    run_cli: RunCli, tmp_path: Path, arguments: list[str], expected: list[str]
) -> None:
    assert_rejected(run_cli("sweep", RECIPE, *arguments, "--storage", str(tmp_path / "runs")), *expected)


INTEGERS = "{distribution: integer, low: 1, high: 5000}"


@pytest.mark.parametrize(
    ("setting", "distribution", "expected"),
    [
        ("model.depht", INTEGERS, "model.depht"),
        ("training.batch_size", INTEGERS, "training.batch_size=5000"),
        ("eps_schedule.rampup_fraction", INTEGERS, "eps_schedule.rampup_fraction=5000"),  # has an upper bound
        # valid values of settings that may not be searched
        ("eps", "{distribution: uniform, low: 0.1, high: 0.2}", "eps"),
        ("compute.workers", "{distribution: integer, low: 1, high: 2}", "compute.workers"),
        ("training.include_validation", "{distribution: categorical, choices: [true, false]}",
         "training.include_validation"),
    ],
)  # fmt: skip
def test_invalid_spaces_are_rejected(
    run_cli: RunCli, tmp_path: Path, setting: str, distribution: str, expected: str
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(f"description: x\nparameters: {{{setting}: {distribution}}}\n")
    assert_rejected(run_cli("sweep", RECIPE, str(space), "--storage", str(tmp_path / "runs")), expected)


def test_resuming_an_unavailable_sweep_is_rejected(
    run_cli: RunCli, tmp_path: Path, finished_sweep: FinishedSweep
) -> None:
    assert_rejected(run_cli("sweep", "--storage", str(tmp_path)), "--resume NAME")
    assert_rejected(run_cli("sweep", "--resume", "no", "--storage", str(tmp_path)), "resume=no")
    storage = str(finished_sweep.storage)
    assert_rejected(run_cli("sweep", "--resume", "no", "--storage", storage), "resume=no", "three")
    assert_rejected(run_cli("sweep", "--resume", "three", "--budget", "x", "--storage", storage), "budget=x")
    with file_lock(finished_sweep.storage / "sweeps" / "three" / "lock"):
        assert_rejected(run_cli("sweep", "--resume", "three", "--storage", storage), "sweep=three")


def test_report_of_an_unknown_sweep_is_rejected(run_cli: RunCli, tmp_path: Path, finished_sweep: FinishedSweep) -> None:
    assert_rejected(
        run_cli("report", "sweep", "nothing", "--storage", str(tmp_path / "no")), f"storage={tmp_path / 'no'}"
    )
    assert_rejected(run_cli("ui", "--storage", str(tmp_path / "no")), f"storage={tmp_path / 'no'}")
    assert not (tmp_path / "no").exists()
    assert_rejected(
        run_cli("report", "sweep", "nothing", "--storage", str(finished_sweep.storage)), "sweep=nothing", "three"
    )


def test_json_listings_have_recipes_spaces_and_costs(run_cli: RunCli) -> None:
    recipes = json.loads(run_cli("recipes", "--json").stdout)
    assert RECIPE in [recipe["recipe"] for recipe in recipes]
    spaces = json.loads(run_cli("space", "list", "--json").stdout)
    assert "demo" in [space["space"] for space in spaces]
    assert "p_schedule.start" in run_cli("space", "show", "demo").stdout
    described = json.loads(run_cli("describe", RECIPE, "model.width=10", "--json").stdout)
    assert described["flops"] == 64 * 10 + 10 * 10 + 10 * 10
    assert described["settings"]["model.width"] == 10


@pytest.mark.parametrize("command", [["recipes"], ["space", "list"], ["data", "list"]])
def test_text_listings_have_the_rows_of_the_json(run_cli: RunCli, command: list[str]) -> None:
    rows = json.loads(run_cli(*command, "--json").stdout)
    done = run_cli(*command, COLUMNS="400")
    assert done.returncode == 0, done.stderr
    for row in rows:
        assert next(iter(row.values())) in done.stdout


def test_train_prints_progress_and_result(finished_training: FinishedTraining) -> None:
    storage, lines = finished_training.storage, finished_training.output.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["epoch=1/3", "epoch=2/3", "epoch=3/3"]
    rest = "\n".join(lines[3:])
    run = MlflowClient(f"sqlite:///{storage}/mlflow.db").get_run(finished_training.id)
    for name in (schema.TEST_CLEAN, schema.TEST_ROBUST, schema.TEST_CERTIFIED):
        assert f"{100 * run.data.metrics[name]:.2f}%" in rest
    assert f"linflab evaluate {run.info.run_id}" in rest and f"linflab ui --storage {storage}" in rest


def test_name_of_another_run_is_reported(run_cli: RunCli, tmp_path: Path) -> None:
    options = ["--storage", str(tmp_path)]
    for name, is_used in (("other", False), ("other", True)):
        done = run_cli("train", RECIPE, *QUICK, "--name", name, *options)
        assert done.returncode == 0, done.stderr
        assert ("name=other" in done.stderr and "--resume" in done.stderr) == is_used
    done = run_cli("train", RECIPE, *QUICK, "--name", "other", *options, "--resume")
    assert "name=other" not in done.stderr


def test_constant_networks_are_reported(run_cli: RunCli, tmp_path: Path) -> None:
    options = ["--storage", str(tmp_path)]
    too_large = ["optimizer.learning_rate=1", "objective.eps_train=1", "eps=0.01"]
    for settings, is_constant in ((too_large, True), (["objective.eps_train=0.01", "eps=0.01"], False)):
        done = run_cli("train", "digits_eps0.1_ibp", *settings, *QUICK, *options)
        assert done.returncode == 0, done.stderr
        assert ("may be constant" in done.stdout) == is_constant, done.stdout


def test_non_finite_loss_ends_with_exit_status_1(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("train", RECIPE, *QUICK, "optimizer.learning_rate=1e30", "--storage", str(tmp_path))
    assert done.returncode == 1
    assert_rejected(done, "optimizer.learning_rate", status=1)


def test_describe_shows_layers_and_cost(run_cli: RunCli) -> None:
    done = run_cli("describe", "mnist_eps0.3_linf_dist_hybrid")
    assert done.returncode == 0
    for text in ("features.distances.0", "ScaledLinear", "4,014,080", "85,283,840 FLOPs", "A step on 512 images"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("recipe", "columns"), [(RECIPE, "p seconds per step"), ("digits_eps0.1_ibp", "seconds per step")]
)
def test_dry_run_estimates_and_records_nothing(run_cli: RunCli, tmp_path: Path, recipe: str, columns: str) -> None:
    done = run_cli("train", recipe, "--dry-run", "--storage", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    _, header, *lines = done.stdout.splitlines()
    assert " ".join(header.split()) == columns
    rows = [line.split() for line in lines[: lines.index("")]]
    assert 1 <= len(rows) <= 8 and all(len(row) == len(columns.split()) - 2 for row in rows)
    assert all(float(row[-1]) > 0 for row in rows)
    (total,) = [line for line in lines if "GiB" in line]
    assert "extrapolated" not in done.stdout and float(total.split()[1]) > 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("load, is_reported", [(0.6, False), (7351.2, True)])
def test_dry_run_reports_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], load: float, is_reported: bool
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    train(RECIPE, dry_run=True)
    assert has_words(capsys.readouterr().out, "7351") == is_reported


def test_hybrids_name_their_certifier(run_cli: RunCli, tmp_path: Path) -> None:
    settings = [
        "model.kind=linf_dist_hybrid",
        "model.backbone.kind=linf_dist_mlp",
        "model.backbone.width=32",
        "model.hidden_size=16",
    ]
    settings += [
        "objective.kind=worst_case_cross_entropy",
        "objective.eps_train=0.1",
        "training.include_validation=true",
    ]
    done = run_cli("train", RECIPE, *QUICK, "training.epochs=1", *settings, "--storage", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    assert "ibp-sound" in done.stdout
    (run,) = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db").search_runs(["1"])
    assert run.data.tags["linflab.certifier"] == "ibp-sound"
    assert run.data.tags["linflab.model_selection"].startswith("the last epoch")
    assert run.data.params["training.include_validation"] == "True"
    assert "best/val/certified_accuracy" not in run.data.metrics
    assert run.data.metrics["test/certificate_violations"] == 0


def test_sweeps_require_validation_images(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("sweep", RECIPE, "demo", "training.include_validation=true", "--storage", str(tmp_path / "runs"))
    assert_rejected(done, "training.include_validation=true")


def test_used_port_is_rejected(run_cli: RunCli, finished_sweep: FinishedSweep) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        assert_rejected(run_cli("ui", "--port", port, "--storage", str(finished_sweep.storage)), f"port={port}")


@pytest.mark.parametrize(
    ("variable", "folder", "is_printed"),
    [(None, "runs", False), (None, "other", True), ("elsewhere", "runs", True), ("", "runs", False)],
)
def test_printed_commands_omit_the_storage_if_it_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, folder: str, is_printed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LINFLAB_STORAGE", raising=False)
    if variable is not None:
        monkeypatch.setenv("LINFLAB_STORAGE", variable)
    storage = Storage.from_path(Path(folder))
    assert storage_options(storage) == (["--storage", str(tmp_path / folder)] if is_printed else [])
