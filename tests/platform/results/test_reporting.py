"""Reports of a sweep, and the artifacts added to its runs."""

import re
import subprocess
import sys
from pathlib import Path

import mlflow
import mlflow.pytorch
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image

from linflab.models.robustness.certification import lipschitz_radius
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.results.load import download_weights
from linflab.platform.results.publish import (
    MAX_DESCRIPTION_CHARS,
    export_model,
    log_model_and_figures,
    truncated_description,
)
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.weights import build_network, load_network
from linflab.reports import schema
from linflab.reports.records import read_runs, read_trials
from linflab.reports.sweep_tables import rank_trials, sweep_table
from tests.conftest import RECIPE, FinishedSweep, FinishedTraining, RunCli, assert_rejected, has_words

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def best_run_id(finished_sweep: FinishedSweep) -> str:
    """The run ID of the sweep's best trial."""
    trials = read_trials(Storage(finished_sweep.storage).tracking_uri, finished_sweep.name)
    return str(rank_trials(trials).iloc[0]["run_id"])


def download_artifact(finished_sweep: FinishedSweep, run_id: str, path: str) -> Path:
    client = MlflowClient(Storage(finished_sweep.storage).tracking_uri)
    return Path(client.download_artifacts(run_id, path))


def test_only_the_best_trial_has_a_model_equal_to_its_network(finished_sweep: FinishedSweep, best_run_id: str) -> None:
    storage = Storage(finished_sweep.storage)
    client = MlflowClient(storage.tracking_uri)
    (model,) = client.search_logged_models([client.get_run(best_run_id).info.experiment_id])
    assert model.source_run_id == best_run_id and str(model.status) == "READY"
    (output,) = client.get_run(best_run_id).outputs.model_outputs
    assert output.model_id == model.model_id
    folder = Path(mlflow.artifacts.download_artifacts(model.artifact_location))
    assert not list(folder.rglob("*.pth")) and list(folder.rglob("*.pt2"))  # a graph without pickled code
    _, network = load_network(download_weights(storage, best_run_id))
    images = load_dataset("digits").test.batch(torch.arange(7))[0]
    torch.testing.assert_close(mlflow.pytorch.load_model(str(folder))(images), network(images), rtol=0, atol=0)


@pytest.mark.slow
def test_new_process_loads_the_model_by_its_run(finished_sweep: FinishedSweep, best_run_id: str) -> None:
    code = f"""
import mlflow, torch, linflab.models.distance
mlflow.set_tracking_uri("{Storage(finished_sweep.storage).tracking_uri}")
print(tuple(mlflow.pytorch.load_model("runs:/{best_run_id}/model")(torch.zeros(5, 1, 8, 8)).shape))
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.stdout.strip().endswith("(5, 10)"), done.stderr


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.kind=sort_net", "model.q=0.7"],
        ["model.kind=linf_dist_conv_net", "model.width=4", "model.hidden_size=16"],
        [
            "model.kind=linf_dist_hybrid", "model.backbone.kind=linf_dist_mlp", "model.backbone.width=16",
            "model.hidden_size=8",
            "objective.kind=worst_case_cross_entropy", "objective.eps_train=0.11",
        ],
    ],
    ids=lambda overrides: overrides[0].split("=")[1],
)  # fmt: skip
def test_exported_models_equal_their_networks(overrides: list[str], tmp_path: Path) -> None:
    network = build_network(load_config(RECIPE, overrides)).eval()
    export_model(network, torch.rand(2, 1, 8, 8), tmp_path / "model")
    images = torch.rand(9, 1, 8, 8)
    torch.testing.assert_close(
        mlflow.pytorch.load_model(str(tmp_path / "model"))(images), network(images), rtol=0, atol=0
    )


def test_figures_and_their_numbers_are_recorded(finished_sweep: FinishedSweep, best_run_id: str) -> None:
    folder = download_artifact(finished_sweep, best_run_id, schema.FIGURES_DIR)
    for name in ("learning_curves", "training_margins", "certified_accuracy", "radius_histogram"):
        with Image.open(folder / f"{name}.png") as image:  # tests/reports/test_figures.py checks the content
            image.verify()
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    _, network = load_network(download_weights(Storage(finished_sweep.storage), best_run_id))
    dataset = load_dataset("digits")
    for file, split in ((schema.MARGINS_FILE, dataset.train), (schema.RADII_FILE, dataset.test)):
        numbers = pd.read_csv(folder / file)
        expected = lipschitz_radius(network, *split.batch(torch.arange(len(split))), file == schema.RADII_FILE)
        np.testing.assert_allclose(numbers.iloc[:, 1], expected, rtol=1e-5, atol=1e-7)
    runs = read_runs(Storage(finished_sweep.storage).tracking_uri, {schema.KIND: "trial"}).set_index("run_id")
    radii = pd.read_csv(folder / schema.RADII_FILE)["certified_radius"]
    assert (radii > 0.1).mean() == pytest.approx(runs.loc[best_run_id, schema.TEST_CERTIFIED])


def test_sweep_run_has_its_report(finished_sweep: FinishedSweep) -> None:
    uri = Storage(finished_sweep.storage).tracking_uri
    (parent,) = read_runs(uri, {schema.KIND: "sweep"}).to_dict("records")
    names = {path.name for path in download_artifact(finished_sweep, parent["run_id"], schema.REPORT_DIR).iterdir()}
    assert {f"sweep-three{end}" for end in (".md", ".tex", ".html", ".csv", "_front.png", "_slices.pdf")} <= names
    assert parent[schema.DESCRIPTION].startswith("## Sweep three") and "| Certified" in " ".join(
        parent[schema.DESCRIPTION].split()
    )
    for run in read_runs(uri, {}).to_dict("records"):
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", run[schema.COMMIT])
        if run[schema.KIND] == "trial":
            assert run["system/cpu_utilization_percentage"] >= 0 and run["system/system_memory_usage_megabytes"] > 0


def test_long_description_fits_the_limit_of_mlflow(finished_sweep: FinishedSweep) -> None:
    trials = read_trials(Storage(finished_sweep.storage).tracking_uri, "three")
    many = pd.concat([trials.assign(**{schema.TRIAL: str(number)}) for number in range(40)])
    description = truncated_description(sweep_table("three", many))
    rows = [line for line in description.splitlines() if line.startswith("| ") and "width=" in line]
    assert 4000 < len(description) <= MAX_DESCRIPTION_CHARS and has_words(description, str(len(many) - len(rows)))


def test_repeated_publishing_changes_nothing(finished_sweep: FinishedSweep, best_run_id: str) -> None:
    folder = download_artifact(finished_sweep, best_run_id, schema.FIGURES_DIR)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    log_model_and_figures(Storage(finished_sweep.storage), best_run_id)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_index_links_all_reports(
    run_cli: RunCli, finished_sweep: FinishedSweep, best_run_id: str, tmp_path: Path
) -> None:
    done = run_cli("report", "--all", "--storage", str(finished_sweep.storage), "--output-dir", str(tmp_path))
    assert done.returncode == 0 and str(tmp_path / "index.html") in done.stdout
    links = re.findall(r'href="([^"#]+)"', (tmp_path / "index.html").read_text())
    files = {path.name for path in tmp_path.iterdir()}
    assert set(links) == files - {"index.html"}
    assert {"table1.html", "table2.tex", "table4.csv", "sweep-three.html", "sweep-three_front.pdf"} <= files
    page = (tmp_path / "sweep-three.html").read_text()
    assert "data:image/png;base64," in page and not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_run_and_comparison_are_reported(
    run_cli: RunCli, finished_sweep: FinishedSweep, best_run_id: str, tmp_path: Path
) -> None:
    options = ("--storage", str(finished_sweep.storage), "--output-dir", str(tmp_path))
    done = run_cli("report", "run", best_run_id[:12], *options)
    assert done.returncode == 0 and "[a]" in done.stdout
    assert (tmp_path / f"run-{best_run_id[:8]}_training_margins.png").exists()
    done = run_cli("report", "compare", "three", best_run_id, *options)
    assert done.returncode == 0 and (tmp_path / f"comparison-three_vs_{best_run_id[:8]}.tex").exists()
    assert "sweep three" in " ".join(done.stdout.split())
    for name in ("three", "0" * 40):
        assert_rejected(run_cli("report", "run", name, *options), name, "`linflab runs`")
    assert_rejected(run_cli("report", "compare", "four", *options), "four", "three")


def test_own_table_is_reported(run_cli: RunCli, finished_sweep: FinishedSweep, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("title: Mine\ngroups: [{dataset: digits, eps: 0.1}]\nmeasured: {group_by: [method, model.width]}\n")
    done = run_cli(
        "report", "table", str(file), "--storage", str(finished_sweep.storage), "--output-dir", str(tmp_path / "out")
    )
    assert done.returncode == 0 and "(width=" in done.stdout and (tmp_path / "out" / "table-mine.html").exists()
    file.write_text("title: Mine\ngroups: [{dataset: digits, eps: 5}]")
    assert_rejected(run_cli("report", "table", str(file)), f"table={file}", "eps=5")


def test_quoted_tables_need_no_storage_but_reject_damaged_ones(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("report", "table4", "--storage", str(tmp_path / "none"), "--output-dir", str(tmp_path / "out"))
    assert done.returncode == 0 and "19.7" in done.stdout
    assert not (tmp_path / "none").exists()
    (tmp_path / "mlflow.db").write_bytes(b"SQLite format 3\0" + bytes(2000))
    for command in (["table1"], ["sweep", "s"], ["run", "1"], ["--all"]):
        assert_rejected(run_cli("report", *command, "--storage", str(tmp_path)), f"storage={tmp_path}")


@pytest.mark.parametrize("long", ["9" * 4000, "a" * 9000])
def test_long_values_are_truncated_in_errors(run_cli: RunCli, tmp_path: Path, long: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"title: mine\ngroups: []\ncolumns: {long}\n")
    done = run_cli("report", "table", str(tmp_path / "mine.yaml"))
    assert_rejected(done, "columns")
    assert len(done.stderr) < 1000, done.stderr


def test_options_before_the_report_are_rejected(run_cli: RunCli, tmp_path: Path) -> None:
    assert_rejected(run_cli("report", "--storage", str(tmp_path), "table4"), "storage", "table4")


def test_new_sweeps_with_any_name_are_reported(run_cli: RunCli, tmp_path: Path) -> None:
    """Their only trial has no settings yet, and another program may have chosen any name."""
    client = MlflowClient(Storage.open(tmp_path / "runs").tracking_uri)
    options = ("--storage", str(tmp_path / "runs"), "--output-dir", str(tmp_path / "out"))
    for name in ("../../escaped", "table1", "index", "a b"):
        tags = {schema.KIND: "trial", schema.SWEEP: name, schema.TRIAL: "1", schema.SEARCHED_SETTINGS: "model.width"}
        client.create_run("0", tags={**tags, schema.OBJECTIVES: "certified"})
        done = run_cli("report", "sweep", name, *options)
        assert done.returncode == 0 and "Trial 1" in done.stdout and "running" in done.stdout
    assert run_cli("report", "--all", *options).returncode == 0
    assert run_cli("sweeps", *options[:2]).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "out"}
    assert "Group Sort" in (tmp_path / "out" / "table1.html").read_text()


def test_results_are_shown_when_the_model_export_fails(
    run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_disk_full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("linflab.platform.results.publish.export_model", raise_disk_full)
    settings = ["training.epochs=1", "model.width=8", "evaluation.attack.steps=1"]
    done = run_cli("train", RECIPE, *settings, "--storage", str(tmp_path))
    assert done.returncode == 0 and "No space left" in done.stdout
    (run,) = read_runs(Storage(tmp_path).tracking_uri, {}).to_dict("records")
    assert run["status"] == "FINISHED" and f"{100 * run[schema.TEST_CERTIFIED]:.2f}%" in done.stdout


def test_radii_and_metrics_use_the_same_certifier(finished_training: FinishedTraining) -> None:
    uri = Storage(finished_training.storage).tracking_uri
    (run,) = (run for run in read_runs(uri, {}).to_dict("records") if run["run_id"] == finished_training.id)
    radii = pd.read_csv(MlflowClient(uri).download_artifacts(run["run_id"], f"figures/{schema.RADII_FILE}"))
    assert run[schema.CERTIFIER] == "lipschitz-sound"
    assert (radii["certified_radius"] > 0.1).mean() == pytest.approx(run[schema.TEST_CERTIFIED])


def test_unwritable_output_folder_is_rejected(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_cli(
        "report", "table1", "--storage", str(tmp_path / "none"), "--output-dir", str(tmp_path / "file" / "out")
    )
    assert_rejected(done, f"output-dir={tmp_path / 'file' / 'out'}")


def test_single_training_is_published(finished_training: FinishedTraining) -> None:
    client, run = MlflowClient(Storage(finished_training.storage).tracking_uri), finished_training.id
    artifacts = {path.path for path in client.list_artifacts(run)}
    assert {"config.yaml", "weights.pt", "figures"} <= artifacts
    assert len(client.get_run(run).outputs.model_outputs) == 1
