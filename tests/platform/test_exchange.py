"""Records out of one storage and into another: the same tables there."""

import json
from pathlib import Path

import pandas as pd
from mlflow.tracking import MlflowClient

from linflab.platform.exchange import HEAD
from linflab.platform.storage import Storage
from linflab.reports import schema
from linflab.reports.records import read_runs
from tests.conftest import QUICK, RECIPE, FinishedSweep, Here


def exported(sweep: FinishedSweep, here: Here, tmp_path: Path, *names: str) -> Path:
    file = tmp_path / "some" / "measured.jsonl"
    done = here("records", "export", str(file), *names, "--storage", str(sweep.storage))
    assert done.returncode == 0, done.stderr
    return file


def test_imported_records_make_the_same_tables(finished_sweep: FinishedSweep, here: Here, tmp_path: Path) -> None:
    file, there = exported(finished_sweep, here, tmp_path), tmp_path / "there"
    assert len(file.read_text().splitlines()) == 5 and file.stat().st_size < 50_000  # a head, a sweep, three trials
    done = here("records", "import", str(file), "--storage", str(there))
    assert done.returncode == 0 and "4 runs were added" in done.stdout
    again = here("records", "import", str(file), "--storage", str(there))
    assert "0 runs were added" in again.stdout and "4 had been there before" in again.stdout
    # where they come from they are not doubled either
    back = here("records", "import", str(file), "--storage", str(finished_sweep.storage))
    assert "0 runs were added" in back.stdout
    tables = []
    for storage in (finished_sweep.storage, there):
        out = tmp_path / f"report-{storage.name}"
        assert here("report", "sweep", "three", "--storage", str(storage), "--out", str(out)).returncode == 0
        tables.append((out / "sweep-three.csv").read_bytes())
    assert tables[0] == tables[1]
    # and out again, they are the same but for where they were
    second = tmp_path / "second.jsonl"
    here("records", "export", str(second), "--storage", str(there))
    assert second.read_bytes() == file.read_bytes()
    back = here("records", "import", str(second), "--storage", str(finished_sweep.storage))
    assert "0 runs were added" in back.stdout
    mine, theirs = (runs_of(storage) for storage in (finished_sweep.storage, there))
    assert set(theirs.columns) - set(mine.columns) == {schema.IMPORTED}
    theirs = theirs.set_index(schema.IMPORTED).loc[mine["run_id"]]
    for name in mine.columns:
        if name not in ("run_id", "mlflow.user", "mlflow.parentRunId") and not name.startswith("system/"):
            assert mine[name].tolist() == theirs[name].tolist() or mine[name].isna().any(), name
    (parent,) = read_runs(Storage(there).tracking_uri, {schema.KIND: "sweep"})["run_id"]
    assert set(theirs["mlflow.parentRunId"]) == {parent}


def test_a_page_of_an_imported_run(finished_sweep: FinishedSweep, here: Here, tmp_path: Path) -> None:
    """It has the run's row, and no curves, of which only the last values were in the file; the id it had will do."""
    there = tmp_path / "there"
    here("records", "import", str(exported(finished_sweep, here, tmp_path)), "--storage", str(there))
    new = runs_of(there)["run_id"].iloc[0]
    old = runs_of(there)[schema.IMPORTED].iloc[0]
    for name in (new, old[:12]):
        out = tmp_path / name
        done = here("report", "run", name, "--storage", str(there), "--out", str(out))
        assert done.returncode == 0 and done.stderr == ""
        assert sorted(path.suffix for path in out.iterdir()) == [".csv", ".html", ".md", ".tex"]
    failed = here("evaluate", old, "--storage", str(there))
    assert failed.returncode == 2 and "was imported from a file of records, which has no weights" in failed.stderr
    failed = here("sweep", "--resume", "three", "--storage", str(there))
    assert failed.returncode == 2 and "imported ones can't be resumed" in failed.stderr


def runs_of(storage: Path) -> pd.DataFrame:
    return read_runs(Storage(storage).tracking_uri, {schema.KIND: "trial"})


def test_chosen_runs(finished_sweep: FinishedSweep, here: Here, tmp_path: Path) -> None:
    run = runs_of(finished_sweep.storage)["run_id"].iloc[0]
    assert len(exported(finished_sweep, here, tmp_path, run[:12]).read_text().splitlines()) == 2
    assert len(exported(finished_sweep, here, tmp_path, run, "three").read_text().splitlines()) == 5
    failed = here("records", "export", str(tmp_path / "no"), "four", "--storage", str(finished_sweep.storage))
    assert failed.returncode == 2 and "four: there is no such run or sweep; `linflab runs`" in failed.stderr
    assert "sweeps: three" in failed.stderr
    assert not (tmp_path / "no").exists()


def test_a_record_without_trainings(here: Here, tmp_path: Path) -> None:
    """As it is until the first has begun."""
    MlflowClient(Storage.open(tmp_path).tracking_uri).create_experiment("empty")
    file = str(tmp_path / "no")
    for command in (("report", "run", "x"), ("report", "compare", "x"), ("records", "export", file, "x")):
        failed = here(*command, "--storage", str(tmp_path))
        assert failed.returncode == 2 and "x: there is no such run" in failed.stderr, failed.stderr
        assert failed.stderr.count("\n") == 1
    assert json.loads(here("runs", "--json", "--storage", str(tmp_path)).stdout) == []


def test_runs_are_listed(finished_sweep: FinishedSweep, here: Here) -> None:
    done = here("runs", "--json", "--storage", str(finished_sweep.storage))
    listed, runs = json.loads(done.stdout), runs_of(finished_sweep.storage)
    assert [row["run"] for row in listed] == runs["run_id"].tolist()
    assert [row["test"] for row in listed] == [None if x != x else x for x in runs[schema.TEST_CERTIFIED]]
    assert {row["sweep"] for row in listed} == {"three"} and {row["state"] for row in listed} <= {"finished", "failed"}
    text = here("runs", "--storage", str(finished_sweep.storage)).stdout
    assert all(run_id[:8] in text for run_id in runs["run_id"])


def test_a_sweep_that_goes_on_is_not_exported(finished_sweep: FinishedSweep, here: Here, tmp_path: Path) -> None:
    """Its trials would be without a sweep elsewhere."""
    file, there = exported(finished_sweep, here, tmp_path), tmp_path / "there"
    here("records", "import", str(file), "--storage", str(there))
    here("train", RECIPE, *QUICK, "--storage", str(there))
    client = MlflowClient(Storage(there).tracking_uri)
    (parent,) = read_runs(Storage(there).tracking_uri, {schema.KIND: "sweep"})["run_id"]
    client.update_run(parent, status="RUNNING")
    failed = here("records", "export", str(tmp_path / "no"), "three", "--storage", str(there))
    assert failed.returncode == 2 and "three: this sweep has not ended" in failed.stderr
    alone = runs_of(there)
    alone = alone[alone.get(schema.SWEEP).isna()]["run_id"].iloc[0]
    client.update_run(alone, status="RUNNING")
    failed = here("records", "export", str(tmp_path / "no"), alone[:12], "--storage", str(there))
    assert failed.returncode == 2 and f"{alone}: this run has not ended" in failed.stderr
    assert not (tmp_path / "no").exists()
    client.update_run(alone, status="FINISHED")
    done = here("records", "export", str(tmp_path / "rest"), "--storage", str(there))
    assert done.returncode == 0 and "1 runs are in" in done.stdout and "4 were left out" in done.stdout
    trial = runs_of(there).query(f"`{schema.SWEEP}` == 'three'")["run_id"].iloc[0]
    failed = here("records", "export", str(tmp_path / "no"), trial, "--storage", str(there))
    assert failed.returncode == 2 and "three: this sweep has not ended" in failed.stderr


def test_an_import_that_was_cut_is_done_anew(finished_sweep: FinishedSweep, here: Here, tmp_path: Path) -> None:
    file, there = exported(finished_sweep, here, tmp_path), tmp_path / "there"
    here("records", "import", str(file), "--storage", str(there))
    client = MlflowClient(Storage(there).tracking_uri)
    run = runs_of(there).iloc[0]
    client.update_run(run["run_id"], status="RUNNING")
    done = here("records", "import", str(file), "--storage", str(there))
    assert "1 runs were added" in done.stdout and "3 had been there before" in done.stdout
    assert sorted(runs_of(there)[schema.IMPORTED]) == sorted(runs_of(finished_sweep.storage)["run_id"])


def test_a_table_of_a_file_of_records(finished_sweep: FinishedSweep, here: Here, tmp_path: Path) -> None:
    """A definition and its records make the same table wherever they are, whatever the storage holds."""
    file = exported(finished_sweep, here, tmp_path)
    columns, groups = "[Method, Epochs, Certified, Hours, CPUs]", "[{dataset: digits, eps: 0.1}]"
    table = f"title: Mine\ncolumns: {columns}\ngroups: {groups}\nmeasured: {{by: [method, model.width]}}\n"
    (tmp_path / "plain.yaml").write_text(table)
    (file.parent / "mine.yaml").write_text(f"{table}records: {file.name}\n")
    of_storage = ("report", "table", str(tmp_path / "plain.yaml"), "--storage", str(finished_sweep.storage))
    assert here(*of_storage, "--out", str(tmp_path / "a")).returncode == 0
    empty = ("--storage", str(tmp_path / "empty"))
    done = here("report", "table", str(file.parent / "mine.yaml"), "--out", str(tmp_path / "b"), *empty)
    assert done.returncode == 0 and "Measured rows are of the records in measured.jsonl." in done.stdout, done.stderr
    failed = here("report", "table", str(file.parent / "mine.yaml"), "--cluster")
    assert failed.returncode == 2 and "cluster: table=" in failed.stderr and failed.stderr.count("\n") == 1
    assert (tmp_path / "a" / "table-plain.csv").read_bytes() == (tmp_path / "b" / "table-mine.csv").read_bytes()
    assert "linflab train" in (tmp_path / "b" / "table-mine.md").read_text()
    file.unlink()
    failed = here("report", "table", str(file.parent / "mine.yaml"))
    assert failed.returncode == 2 and f"file={file}: can't be read" in failed.stderr and failed.stderr.count("\n") == 1


def test_what_is_no_file_of_records(here: Here, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    for name, text, says in (
        ("none", None, "can't be read"),
        ("other.jsonl", "{}\n", "first line"),
        ("damaged.jsonl", f'{HEAD}\n{{"run_id": "a"}}\n', "line 2: experiment"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        failed = here("records", "import", str(tmp_path / name), "--storage", str(storage))
        assert failed.returncode == 2 and says in failed.stderr and len(failed.stderr.splitlines()) == 1
    assert not Storage(storage).has_records or runs_of(storage).empty
