"""A storage directory of linflab 0.1: two runs, a finished sweep of several rungs, and an interrupted one."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from linflab.platform.config.overrides import load_config
from linflab.platform.tracking.mlflow import client_of
from linflab.platform.tracking.runs import Run, find_runs
from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from linflab.reports.records import read_runs
from tests.conftest import QUICK, RECIPE, RunCli

ARCHIVE = Path(__file__).parents[2] / "data" / "storage_0.1.tar.xz"
TEST_CERTIFIED = {
    "first": 159 / 360,
    "digits_eps0.1_ibp epochs=2, steps=1, restarts=1": 39 / 360,
    "done-1.2": 156 / 360,
}


@pytest.fixture(scope="module")
def old_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "runs"


def find_run_id(storage: Storage, name: str) -> str:
    runs = read_runs(storage.tracking_uri, {})
    (found,) = runs.loc[runs[schema.NAME] == name, "run_id"]
    return str(found)


def test_runs_and_sweeps_of_an_old_storage_are_listed(old_storage: Path, run_cli: RunCli) -> None:
    done = run_cli("runs", "--json", "--storage", str(old_storage))
    assert done.returncode == 0, done.stderr
    accuracies = {
        run["name"]: run["test_certified"] for run in json.loads(done.stdout) if run["test_certified"] is not None
    }
    assert accuracies == pytest.approx(TEST_CERTIFIED)
    done = run_cli("sweeps", "--json", "--storage", str(old_storage))
    assert {row["sweep"]: row["finished"] for row in json.loads(done.stdout)} == {"done": 4, "cut": 0}


def test_run_of_an_old_storage_is_found_by_its_config(old_storage: Path) -> None:
    experiment = load_config(RECIPE, [*QUICK, "model.width=16", "evaluation.attack.steps=1"])
    (run,) = find_runs(Storage.open_existing(old_storage), experiment)
    assert run.info.run_name == "first"


def test_evaluation_of_an_old_run_matches_its_metrics(old_storage: Path, run_cli: RunCli) -> None:
    for name in ("first", "done-1.2"):
        done = run_cli("evaluate", name, "--attacks", "none", "--json", "--storage", str(old_storage))
        assert done.returncode == 0, done.stderr
        (row,) = json.loads(done.stdout)["results"]
        assert row["certified"] == pytest.approx(TEST_CERTIFIED[name])


def test_old_storage_can_be_reported_and_exported(old_storage: Path, run_cli: RunCli, tmp_path: Path) -> None:
    for command in (["sweep", "done"], ["compare", "first", "done"], ["--all"]):
        done = run_cli("report", *command, "--storage", str(old_storage), "--output-dir", str(tmp_path / "reports"))
        assert done.returncode == 0, done.stderr
    (comparison,) = (tmp_path / "reports").glob("comparison*.csv")
    assert "44.16" in comparison.read_text()
    file = tmp_path / "runs.jsonl"
    assert run_cli("runs", "export", str(file), "--storage", str(old_storage)).returncode == 0
    assert run_cli("runs", "import", str(file), "--storage", str(tmp_path / "new")).returncode == 0
    listed = json.loads(run_cli("runs", "--json", "--storage", str(tmp_path / "new")).stdout)
    assert {run["name"]: run["test_certified"] for run in listed if run["test_certified"] is not None} == pytest.approx(
        TEST_CERTIFIED
    )


@pytest.mark.slow
def test_failed_run_of_an_old_storage_is_resumed(old_storage: Path, tmp_path: Path) -> None:
    shutil.copytree(old_storage, tmp_path / "runs")
    storage = Storage.open_existing(tmp_path / "runs")
    client = client_of(storage)
    run_id = find_run_id(storage, "first")
    client.set_tag(run_id, "linflab.failure", "it failed")
    client.set_terminated(run_id, "FAILED")
    Run.resume(storage, run_id)
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert not {"linflab.failure", schema.FAILURE} & set(run.data.tags)


def test_new_evaluation_continues_the_old_numbering(old_storage: Path, run_cli: RunCli, tmp_path: Path) -> None:
    shutil.copytree(old_storage, tmp_path / "runs")
    storage = Storage.open_existing(tmp_path / "runs")
    client = client_of(storage)
    run_id = find_run_id(storage, "first")
    (tmp_path / "evaluation.json").write_text("{}")
    before = len(client.list_artifacts(run_id, schema.EVALUATIONS_DIR))
    for number in (1, 2):
        client.log_artifact(run_id, str(tmp_path / "evaluation.json"), f"scores/{number}")
    assert run_cli("evaluate", run_id, "--attacks", "none", "--storage", str(tmp_path / "runs")).returncode == 0
    files = {file.path for file in client.list_artifacts(run_id, schema.EVALUATIONS_DIR)}
    assert len(files) == before + 1 and f"evaluations/{before + 3}" in files


def test_interrupted_sweep_of_an_old_storage_is_resumed(old_storage: Path, run_cli: RunCli, tmp_path: Path) -> None:
    storage = shutil.copytree(old_storage, tmp_path / "runs")
    done = run_cli("sweep", "--resume", "cut", "--budget", "2", "--storage", str(storage))
    assert done.returncode == 0, done.stderr
    done = run_cli("sweeps", "--json", "--storage", str(storage))
    assert {row["sweep"]: row["finished"] for row in json.loads(done.stdout)} == {"done": 4, "cut": 2}
