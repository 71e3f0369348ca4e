"""Reports of a real sweep, and what is added to its record."""

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

from linflab.models.robustness.certification import lipschitz_radius
from linflab.platform.config import load_experiment
from linflab.platform.datasets import load_dataset
from linflab.platform.publishing import LONGEST_NOTE, publish_run, save_model, short_note
from linflab.platform.scoring import weights_of_run
from linflab.platform.storage import Storage
from linflab.platform.weights import load_network, network_of
from linflab.reports import schema
from linflab.reports.records import read_runs, read_trials
from linflab.reports.sweep_tables import in_order, sweep_table
from tests.conftest import RECIPE, FinishedSweep, Here


@pytest.fixture(scope="module")
def best(finished_sweep: FinishedSweep) -> str:
    """The id of its best trial."""
    trials = read_trials(Storage(finished_sweep.storage).tracking_uri, finished_sweep.name)
    return str(in_order(trials).iloc[0]["run_id"])


def artifact(finished_sweep: FinishedSweep, run_id: str, path: str) -> Path:
    client = MlflowClient(Storage(finished_sweep.storage).tracking_uri)
    return Path(client.download_artifacts(run_id, path))


def test_only_the_best_trial_has_a_model_and_it_is_the_network(finished_sweep: FinishedSweep, best: str) -> None:
    storage = Storage(finished_sweep.storage)
    client = MlflowClient(storage.tracking_uri)
    (model,) = client.search_logged_models([client.get_run(best).info.experiment_id])
    assert model.source_run_id == best and str(model.status) == "READY"
    (output,) = client.get_run(best).outputs.model_outputs
    assert output.model_id == model.model_id
    folder = Path(mlflow.artifacts.download_artifacts(model.artifact_location))
    assert not list(folder.rglob("*.pth")) and list(folder.rglob("*.pt2"))  # a graph, no pickled code
    _, network = load_network(weights_of_run(storage, best))
    images = load_dataset("digits").test.batch(torch.arange(7))[0]
    torch.testing.assert_close(mlflow.pytorch.load_model(str(folder))(images), network(images), rtol=0, atol=0)


def test_a_new_process_loads_the_model_by_its_run(finished_sweep: FinishedSweep, best: str) -> None:
    code = f"""
import mlflow, torch, linflab.models.distance
mlflow.set_tracking_uri("{Storage(finished_sweep.storage).tracking_uri}")
print(tuple(mlflow.pytorch.load_model("runs:/{best}/model")(torch.zeros(5, 1, 8, 8)).shape))
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.stdout.strip().endswith("(5, 10)"), done.stderr


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.kind=sort_net", "model.q=0.7"],
        ["model.kind=linf_dist_conv_net", "model.width=4", "model.dense_width=16"],
        [
            "model.kind=linf_dist_hybrid", "model.net.kind=linf_dist_mlp", "model.net.width=16", "model.hidden=8",
            "objective.kind=worst_case_cross_entropy", "objective.eps_train=0.11",
        ],
    ],
    ids=lambda overrides: overrides[0].split("=")[1],
)  # fmt: skip
def test_models_of_all_networks(overrides: list[str], tmp_path: Path) -> None:
    network = network_of(load_experiment(RECIPE, overrides)).eval()
    save_model(network, torch.rand(2, 1, 8, 8), tmp_path / "model")
    images = torch.rand(9, 1, 8, 8)
    torch.testing.assert_close(
        mlflow.pytorch.load_model(str(tmp_path / "model"))(images), network(images), rtol=0, atol=0
    )


def test_figures_and_the_numbers_behind_them(finished_sweep: FinishedSweep, best: str) -> None:
    folder = artifact(finished_sweep, best, schema.FIGURES_FOLDER)
    for name in ("learning_curves", "training_margins", "certified_accuracy", "radius_histogram"):
        assert (folder / f"{name}.png").stat().st_size > 5000 and (folder / f"{name}.pdf").exists()
    _, network = load_network(weights_of_run(Storage(finished_sweep.storage), best))
    dataset = load_dataset("digits")
    for file, split in ((schema.MARGINS_FILE, dataset.train), (schema.RADII_FILE, dataset.test)):
        numbers = pd.read_csv(folder / file)
        expected = lipschitz_radius(network, *split.batch(torch.arange(len(split))))
        np.testing.assert_allclose(numbers.iloc[:, 1], expected, rtol=1e-5, atol=1e-7)
    runs = read_runs(Storage(finished_sweep.storage).tracking_uri, {schema.KIND: "trial"}).set_index("run_id")
    radii = pd.read_csv(folder / schema.RADII_FILE)["certified_radius"]
    assert (radii > 0.1).mean() == pytest.approx(runs.loc[best, schema.TEST_CERTIFIED])


def test_the_run_of_a_sweep_carries_its_report(finished_sweep: FinishedSweep) -> None:
    uri = Storage(finished_sweep.storage).tracking_uri
    (parent,) = read_runs(uri, {schema.KIND: "sweep"}).to_dict("records")
    names = {path.name for path in artifact(finished_sweep, parent["run_id"], schema.REPORT_FOLDER).iterdir()}
    assert {f"sweep-three{end}" for end in (".md", ".tex", ".html", ".csv", "_front.png", "_slices.pdf")} <= names
    assert parent[schema.NOTE].startswith("## Sweep three") and "| Certified" in " ".join(parent[schema.NOTE].split())
    for run in read_runs(uri, {}).to_dict("records"):
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", run[schema.COMMIT])
        if run[schema.KIND] == "trial":
            assert run["system/cpu_utilization_percentage"] >= 0 and run["system/system_memory_usage_megabytes"] > 0


def test_a_note_has_room_for_what_mlflow_keeps(finished_sweep: FinishedSweep) -> None:
    trials = read_trials(Storage(finished_sweep.storage).tracking_uri, "three")
    many = pd.concat([trials.assign(**{schema.TRIAL: str(number)}) for number in range(100)])
    note = short_note(sweep_table("three", many))
    assert 4000 < len(note) <= LONGEST_NOTE and "more rows are in the artifacts" in note


def test_publishing_again_changes_nothing(finished_sweep: FinishedSweep, best: str) -> None:
    folder = artifact(finished_sweep, best, schema.FIGURES_FOLDER)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    publish_run(Storage(finished_sweep.storage), best)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_all_reports_are_linked(here: Here, finished_sweep: FinishedSweep, best: str, tmp_path: Path) -> None:
    done = here("report", "--all", "--storage", str(finished_sweep.storage), "--out", str(tmp_path))
    assert done.returncode == 0 and str(tmp_path / "index.html") in done.stdout
    links = re.findall(r'href="([^"#]+)"', (tmp_path / "index.html").read_text())
    files = {path.name for path in tmp_path.iterdir()}
    assert set(links) == files - {"index.html"}
    assert {"table1.html", "table2.tex", "table4.csv", "sweep-three.html", "sweep-three_front.pdf"} <= files
    page = (tmp_path / "sweep-three.html").read_text()
    assert "data:image/png;base64," in page and not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_a_run_and_a_comparison(here: Here, finished_sweep: FinishedSweep, best: str, tmp_path: Path) -> None:
    place = ("--storage", str(finished_sweep.storage), "--out", str(tmp_path))
    done = here("report", "run", best[:12], *place)
    assert done.returncode == 0 and "[a] measured: 1 run (seed 0)" in done.stdout
    assert (tmp_path / f"run-{best[:8]}_training_margins.png").exists()
    done = here("report", "compare", "three", best, *place)
    assert done.returncode == 0 and (tmp_path / "comparison.tex").exists()
    assert "the best of sweep three by certified accuracy on validation" in " ".join(done.stdout.split())
    for what in ("three", "0" * 40):
        failed = here("report", "run", what, *place)
        assert failed.returncode == 2 and f"{what}: there is no such run" in failed.stderr
    failed = here("report", "compare", "four", *place)
    assert failed.returncode == 2 and "four: there is no such run or sweep; `linflab runs`" in failed.stderr
    assert "sweeps: three" in failed.stderr


def test_a_table_of_ones_own(here: Here, finished_sweep: FinishedSweep, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("title: Mine\ngroups: [{dataset: digits, eps: 0.1}]\nmeasured: {by: [method, model.width]}\n")
    done = here("report", "table", str(file), "--storage", str(finished_sweep.storage), "--out", str(tmp_path / "out"))
    assert done.returncode == 0 and "(width=" in done.stdout and (tmp_path / "out" / "table-mine.html").exists()
    file.write_text("title: Mine\ngroups: [{dataset: digits, eps: 5}]")
    done = here("report", "table", str(file))
    assert done.returncode == 2 and "eps=5: must be a radius" in done.stderr and done.stderr.count("\n") == 1


def test_tables_without_a_record_and_with_a_broken_one(here: Here, tmp_path: Path) -> None:
    done = here("report", "table4", "--storage", str(tmp_path / "none"), "--out", str(tmp_path / "out"))
    assert done.returncode == 0 and "19.7" in done.stdout and "no run with test scores is on record" in done.stdout
    assert not (tmp_path / "none").exists()
    (tmp_path / "mlflow.db").write_bytes(b"SQLite format 3\0" + bytes(2000))
    for command in (["table1"], ["sweep", "s"], ["run", "1"], ["--all"]):
        done = here("report", *command, "--storage", str(tmp_path))
        assert done.returncode == 2 and done.stderr.startswith(f"linflab: storage={tmp_path}: "), done.stderr
        assert done.stderr.count("\n") == 1


def test_options_go_after_the_report(here: Here, tmp_path: Path) -> None:
    done = here("report", "--storage", str(tmp_path), "table4")
    assert done.returncode == 2 and "storage: goes after table4" in done.stderr


@pytest.mark.parametrize("tagged", ["../../escaped", "table1", "index", "a b"])
def test_a_sweep_that_has_only_just_been_made(here: Here, tmp_path: Path, tagged: str) -> None:
    """Its one trial has no settings yet, and its name could be anything, had it been made by somebody else."""
    client = MlflowClient(Storage.open(tmp_path / "runs").tracking_uri)
    tags = {schema.KIND: "trial", schema.SWEEP: tagged, schema.TRIAL: "1", schema.SEARCHED: "model.width"}
    client.create_run("0", tags={**tags, schema.OBJECTIVES: "certified"})
    place = ("--storage", str(tmp_path / "runs"), "--out", str(tmp_path / "out"))
    done = here("report", "sweep", tagged, *place)
    assert done.returncode == 0 and "Trial 1 has no result (running)" in done.stdout and "best trial" not in done.stdout
    assert here("report", "--all", *place).returncode == 0
    assert here("sweeps", *place[:2]).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "out"}
    assert "Group Sort" in (tmp_path / "out" / "table1.html").read_text()


def test_results_are_shown_whatever_becomes_of_the_figures(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("linflab.platform.publishing.save_model", full)
    settings = ["training.epochs=1", "model.width=8", "evaluation.attack.steps=1"]
    done = here("train", RECIPE, *settings, "--storage", str(tmp_path))
    assert done.returncode == 0 and "Test: clean" in done.stdout
    assert "model and figures could not be added" in done.stdout and "No space left" in done.stdout


def test_radii_are_by_what_the_record_is_by(here: Here, tmp_path: Path) -> None:
    settings = ["training.epochs=2", "model.width=32", "evaluation.attack.steps=1", "evaluation.sound=true"]
    assert here("train", RECIPE, *settings, "--storage", str(tmp_path)).returncode == 0
    uri = Storage(tmp_path).tracking_uri
    (run,) = read_runs(uri, {}).to_dict("records")
    radii = pd.read_csv(MlflowClient(uri).download_artifacts(run["run_id"], f"figures/{schema.RADII_FILE}"))
    assert run[schema.CERTIFIER] == "lipschitz-sound"
    assert (radii["certified_radius"] > 0.1).mean() == pytest.approx(run[schema.TEST_CERTIFIED])


def test_a_folder_that_cannot_be_written(here: Here, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = here("report", "table1", "--storage", str(tmp_path / "none"), "--out", str(tmp_path / "file" / "out"))
    assert done.returncode == 2 and f"out={tmp_path / 'file' / 'out'}" in done.stderr


def test_a_single_training_is_published(here: Here, tmp_path: Path) -> None:
    settings = ["training.epochs=2", "model.width=16", "evaluation.attack.steps=2"]
    assert here("train", RECIPE, *settings, "--storage", str(tmp_path)).returncode == 0
    client = MlflowClient(Storage(tmp_path).tracking_uri)
    (run,) = read_runs(Storage(tmp_path).tracking_uri, {})["run_id"]
    there = {path.path for path in client.list_artifacts(run)}
    assert {"experiment.yaml", "weights.pt", "figures"} <= there
    assert len(client.get_run(run).outputs.model_outputs) == 1
