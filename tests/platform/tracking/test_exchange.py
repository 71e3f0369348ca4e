"""Export and import of runs: both storages yield the same tables."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from linflab.platform.tracking.export import HEADER
from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from linflab.reports.records import read_runs
from tests.conftest import QUICK, RECIPE, CompletedCommand, FinishedSweep, RunCli, assert_rejected, time_limit

RESUME = "linflab sweep --resume three"  # for an existing sweep that has not ended
STORAGE_SPECIFIC = ("run_id", "mlflow.user", "mlflow.parentRunId")


def parse_counts(done: CompletedCommand) -> list[int]:
    """Return the numbers of runs that an export or import printed, ignoring file names."""
    words = done.stdout.replace("(", " ").split()
    return [int(word) for word in words if word.isdigit()]


def export_runs(sweep: FinishedSweep, run_cli: RunCli, tmp_path: Path, *names: str) -> Path:
    file = tmp_path / "some" / "measured.jsonl"
    done = run_cli("runs", "export", str(file), *names, "--storage", str(sweep.storage))
    assert done.returncode == 0, done.stderr
    return file


@pytest.mark.slow
def test_imported_runs_make_the_same_tables(finished_sweep: FinishedSweep, run_cli: RunCli, tmp_path: Path) -> None:
    file, target = export_runs(finished_sweep, run_cli, tmp_path), tmp_path / "there"
    assert len(file.read_text().splitlines()) == 5 and file.stat().st_size < 50_000  # a header, a sweep, three trials
    done = run_cli("runs", "import", str(file), "--storage", str(target))
    assert done.returncode == 0 and parse_counts(done) == [4, 0]
    ids = set(read_trial_runs(target)["run_id"])
    repeated = run_cli("runs", "import", str(file), "--storage", str(target))
    assert parse_counts(repeated) == [0, 4] and set(read_trial_runs(target)["run_id"]) == ids
    # Importing into the original storage adds no duplicates.
    back = run_cli("runs", "import", str(file), "--storage", str(finished_sweep.storage))
    assert parse_counts(back) == [0, 4] and len(read_trial_runs(finished_sweep.storage)) == 3
    tables = []
    for storage in (finished_sweep.storage, target):
        out = tmp_path / f"report-{storage.name}"
        assert run_cli("report", "sweep", "three", "--storage", str(storage), "--output-dir", str(out)).returncode == 0
        tables.append((out / "sweep-three.csv").read_bytes())
    assert tables[0] == tables[1]
    # A second export has the same runs, except for their location.
    second = tmp_path / "second.jsonl"
    run_cli("runs", "export", str(second), "--storage", str(target))
    assert second.read_bytes() == file.read_bytes()
    back = run_cli("runs", "import", str(second), "--storage", str(finished_sweep.storage))
    assert parse_counts(back) == [0, 4] and len(read_trial_runs(finished_sweep.storage)) == 3
    mine, theirs = (read_trial_runs(storage) for storage in (finished_sweep.storage, target))
    assert set(theirs.columns) - set(mine.columns) == {schema.ORIGINAL_RUN_ID}
    # Ids, users and system metrics depend on the storage; everything else is equal, missing values included.
    columns = [name for name in mine.columns if name not in STORAGE_SPECIFIC and not name.startswith("system/")]
    assert {schema.TRAIN_LOSS, schema.TEST_CERTIFIED, "model.width", schema.COMMAND, "start_time"} <= set(columns)
    theirs = theirs.set_index(schema.ORIGINAL_RUN_ID).loc[mine["run_id"]].reset_index()
    pd.testing.assert_frame_equal(mine[columns], theirs[columns])
    (parent,) = read_runs(Storage(target).tracking_uri, {schema.KIND: "sweep"})["run_id"]
    assert set(theirs["mlflow.parentRunId"]) == {parent}


def test_metrics_of_users_are_not_exported(run_cli: RunCli, tmp_path: Path) -> None:
    """They may have other units, and would be rejected by the import."""
    storage = Storage.open(tmp_path / "runs")
    storage.ensure_store()
    client = MlflowClient(storage.tracking_uri)
    run = client.create_run("0", tags={schema.KIND: "trial"}).info.run_id
    for name in (schema.TRAIN_LOSS, "mine", "eval/accuracy_percent"):
        client.log_metric(run, name, 97.0)
    client.set_terminated(run, "FAILED")
    file = tmp_path / "runs.jsonl"
    done = run_cli("runs", "export", str(file), "--storage", str(storage.root))
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text().splitlines()[1])["metrics"] == {schema.TRAIN_LOSS: 97.0}
    assert run_cli("runs", "import", str(file), "--storage", str(tmp_path / "there")).returncode == 0


def test_import_reports_runs_with_other_results(run_cli: RunCli, tmp_path: Path) -> None:
    storage = Storage.open(tmp_path / "runs")
    storage.ensure_store()
    client = MlflowClient(storage.tracking_uri)
    runs = [client.create_run("0", tags={schema.KIND: "trial"}).info.run_id for _ in range(2)]
    for run in runs:
        client.set_terminated(run, "FAILED")
    file, there = tmp_path / "runs.jsonl", ["--storage", str(tmp_path / "there")]
    for outdated in (0, 1):
        assert run_cli("runs", "export", str(file), "--storage", str(storage.root)).returncode == 0
        run_cli("runs", "import", str(file), *there)
        done = run_cli("runs", "import", str(file), *there)
        assert parse_counts(done) == [0, 2] + [outdated] * outdated, done.stdout
        client.log_metric(runs[0], schema.TEST_CERTIFIED, 0.5)  # evaluated again


def test_imported_run_has_a_report_page(finished_sweep: FinishedSweep, run_cli: RunCli, tmp_path: Path) -> None:
    """The page has the run's row but no curves, because the file has only last values; its old id is accepted."""
    target = tmp_path / "there"
    run_cli("runs", "import", str(export_runs(finished_sweep, run_cli, tmp_path)), "--storage", str(target))
    new = read_trial_runs(target)["run_id"].iloc[0]
    old = read_trial_runs(target)[schema.ORIGINAL_RUN_ID].iloc[0]
    for name in (new, old[:12]):
        out = tmp_path / name
        done = run_cli("report", "run", name, "--storage", str(target), "--output-dir", str(out))
        assert done.returncode == 0 and done.stderr == ""
        assert "--radii-dir" not in done.stdout  # figures of radii would need the weights
        assert sorted(path.suffix for path in out.iterdir()) == [".csv", ".html", ".md", ".tex"]
    assert_rejected(run_cli("evaluate", old, "--storage", str(target)), new)
    assert_rejected(run_cli("sweep", "--resume", "three", "--storage", str(target)), "resume=three")


def read_trial_runs(storage: Path) -> pd.DataFrame:
    return read_runs(Storage(storage).tracking_uri, {schema.KIND: "trial"})


def test_export_selects_named_runs(finished_sweep: FinishedSweep, run_cli: RunCli, tmp_path: Path) -> None:
    run = read_trial_runs(finished_sweep.storage)["run_id"].iloc[0]
    assert len(export_runs(finished_sweep, run_cli, tmp_path, run[:12]).read_text().splitlines()) == 2
    assert len(export_runs(finished_sweep, run_cli, tmp_path, run, "three").read_text().splitlines()) == 5
    failed = run_cli("runs", "export", str(tmp_path / "no"), "four", "--storage", str(finished_sweep.storage))
    assert_rejected(failed, "four", "`linflab runs`", "three")
    assert not (tmp_path / "no").exists()


def test_commands_report_no_runs_in_an_empty_store(run_cli: RunCli, tmp_path: Path) -> None:
    """The store is in this state until the first training starts."""
    MlflowClient(Storage.open(tmp_path).tracking_uri).create_experiment("empty")
    file = str(tmp_path / "no")
    for command in (("report", "run", "x"), ("report", "compare", "x"), ("runs", "export", file, "x")):
        failed = run_cli(*command, "--storage", str(tmp_path))
        assert_rejected(failed, "x", "`linflab runs`")
    assert json.loads(run_cli("runs", "--json", "--storage", str(tmp_path)).stdout) == []


def test_runs_are_listed(finished_sweep: FinishedSweep, run_cli: RunCli) -> None:
    done = run_cli("runs", "--json", "--storage", str(finished_sweep.storage))
    listed, runs = json.loads(done.stdout), read_trial_runs(finished_sweep.storage)
    assert [row["run"] for row in listed] == runs["run_id"].tolist()
    assert [row["test_certified"] for row in listed] == [None if x != x else x for x in runs[schema.TEST_CERTIFIED]]
    assert {row["sweep"] for row in listed} == {"three"} and {row["status"] for row in listed} <= {"finished", "failed"}
    text = run_cli("runs", "--storage", str(finished_sweep.storage)).stdout
    assert all(run_id[:8] in text for run_id in runs["run_id"])


def test_running_sweep_is_not_exported(finished_sweep: FinishedSweep, run_cli: RunCli, tmp_path: Path) -> None:
    """Its trials would have no sweep in another storage."""
    file, target = export_runs(finished_sweep, run_cli, tmp_path), tmp_path / "there"
    run_cli("runs", "import", str(file), "--storage", str(target))
    run_cli("train", RECIPE, *QUICK, "--storage", str(target))
    client = MlflowClient(Storage(target).tracking_uri)
    (parent,) = read_runs(Storage(target).tracking_uri, {schema.KIND: "sweep"})["run_id"]
    client.update_run(parent, status="RUNNING")
    assert_rejected(run_cli("runs", "export", str(tmp_path / "no"), "three", "--storage", str(target)), RESUME)
    single = read_trial_runs(target)
    single = single[single.get(schema.SWEEP).isna()]["run_id"].iloc[0]
    client.update_run(single, status="RUNNING")
    failed = run_cli("runs", "export", str(tmp_path / "no"), single[:12], "--storage", str(target))
    assert_rejected(failed, single, "--resume")
    assert not (tmp_path / "no").exists()
    client.update_run(single, status="FINISHED")
    done = run_cli("runs", "export", str(tmp_path / "rest"), "--storage", str(target))
    assert done.returncode == 0 and parse_counts(done) == [1, 4]
    trial = read_trial_runs(target).query(f"`{schema.SWEEP}` == 'three'")["run_id"].iloc[0]
    assert_rejected(run_cli("runs", "export", str(tmp_path / "no"), trial, "--storage", str(target)), RESUME)


def test_interrupted_import_is_repeated(finished_sweep: FinishedSweep, run_cli: RunCli, tmp_path: Path) -> None:
    file, target = export_runs(finished_sweep, run_cli, tmp_path), tmp_path / "there"
    run_cli("runs", "import", str(file), "--storage", str(target))
    client = MlflowClient(Storage(target).tracking_uri)
    run = read_trial_runs(target).iloc[0]
    client.update_run(run["run_id"], status="RUNNING")
    done = run_cli("runs", "import", str(file), "--storage", str(target))
    assert parse_counts(done) == [1, 3]
    assert sorted(read_trial_runs(target)[schema.ORIGINAL_RUN_ID]) == sorted(
        read_trial_runs(finished_sweep.storage)["run_id"]
    )


def test_table_reads_its_runs_file(finished_sweep: FinishedSweep, run_cli: RunCli, tmp_path: Path) -> None:
    """A definition and its runs file make the same table at any path and for any storage."""
    file = export_runs(finished_sweep, run_cli, tmp_path)
    columns, groups = "[Method, Epochs, Certified, Hours, CPUs]", "[{dataset: digits, eps: 0.1}]"
    table = f"title: Mine\ncolumns: {columns}\ngroups: {groups}\nmeasured: {{group_by: [method, model.width]}}\n"
    (tmp_path / "plain.yaml").write_text(table)
    (file.parent / "mine.yaml").write_text(f"{table}runs_file: {file.name}\n")
    arguments = ("report", "table", str(tmp_path / "plain.yaml"), "--storage", str(finished_sweep.storage))
    assert run_cli(*arguments, "--output-dir", str(tmp_path / "a")).returncode == 0
    empty = ("--storage", str(tmp_path / "empty"))
    done = run_cli("report", "table", str(file.parent / "mine.yaml"), "--output-dir", str(tmp_path / "b"), *empty)
    assert done.returncode == 0 and "measured.jsonl" in done.stdout, done.stderr
    failed = run_cli("report", "table", str(file.parent / "mine.yaml"), "--cluster")
    assert_rejected(failed, "cluster", f"table={file.parent / 'mine.yaml'}")
    assert (tmp_path / "a" / "table-plain.csv").read_bytes() == (tmp_path / "b" / "table-mine.csv").read_bytes()
    assert "linflab train" in (tmp_path / "b" / "table-mine.md").read_text()
    file.unlink()
    failed = run_cli("report", "table", str(file.parent / "mine.yaml"))
    assert_rejected(failed, f"file={file}")


def test_invalid_runs_files_are_rejected(run_cli: RunCli, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    os.mkfifo(tmp_path / "pipe")
    for name, text, *parts in (
        ("none", None),
        ("pipe", None),
        ("other.jsonl", "{}\n"),
        ("damaged.jsonl", f'{HEADER}\n{{"run_id": "a"}}\n', "line 2", "experiment"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        failed = run_cli("runs", "import", str(tmp_path / name), "--storage", str(storage))
        assert_rejected(failed, f"file={tmp_path / name}", *parts)
    assert not Storage(storage).has_runs or read_trial_runs(storage).empty


@pytest.mark.parametrize(
    "change",
    [
        {"params": {"a*b": "1"}},
        {"params": {"": "1"}},
        {"params": {"../up": "1"}},
        {"params": {"a": "x" * 7000}},
        {"tags": {"/absolute": "1"}},
        {"tags": {"a//b": "1"}},
        {"tags": {"a" * 300: "1"}},
        {"tags": {"linflab.note": "x" * 9000}},
        {"metrics": {"a?": 1.0}},
        {"metrics": {"a/../b": 1.0}},
        {"experiment": ""},
        {"experiment": "x" * 600},
        *({"params": {"eps": eps}, "tags": {"linflab.kind": "trial"}} for eps in ("1e400", "1e99999999", "x", "2")),
    ],
)
def test_runs_that_mlflow_refuses_are_rejected_before_writing(
    run_cli: RunCli, tmp_path: Path, change: dict[str, object]
) -> None:
    run = {"run_id": "a", "experiment": "one", "status": "FAILED", "start_time": 1, "end_time": 2}
    run |= {"tags": {"linflab.kind": "trial"}, "params": {"eps": "8/255"}, "metrics": {"test/clean_accuracy": 0.5}}
    file, target = tmp_path / "records.jsonl", tmp_path / "there"
    file.write_text("\n".join([HEADER, json.dumps(run), json.dumps({**run, "run_id": "b", **change}), ""]))
    with time_limit(60):
        done = run_cli("runs", "import", str(file), "--storage", str(target))
    assert_rejected(done, f"file={file}", "line 3")
    assert len(done.stderr) < 600
    assert not (target / "mlflow.db").exists() or read_trial_runs(target).empty


def test_sweep_names_cannot_reach_other_files(run_cli: RunCli, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "lock").write_text("kept")
    storage = Storage.open(tmp_path / "runs")
    (storage.sweeps / "good").mkdir(parents=True)
    (storage.sweeps / "good" / "lock").write_text("kept too")
    client = MlflowClient(storage.tracking_uri)
    for name in (str(outside), "../../outside", "good", "..", "a" * 300, "\0"):
        client.create_run("0", tags={schema.KIND: "sweep", schema.SWEEP: name})
    done = run_cli("sweeps", "--json", "--storage", str(storage.root))
    assert done.returncode == 0, done.stderr
    states = {row["sweep"]: row["status"] for row in json.loads(done.stdout)}
    assert states.pop("good") == "interrupted" and set(states.values()) == {"running"}
    assert (outside / "lock").read_text() == "kept"
    assert (storage.sweeps / "good" / "lock").read_text() == "kept too"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "runs"]


def test_export_follows_links_and_writes_only_to_files(
    finished_sweep: FinishedSweep, run_cli: RunCli, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link, dangling = tmp_path / "elsewhere" / "kept.jsonl", tmp_path / "link", tmp_path / "dangling"
    target.write_text("old")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "elsewhere" / "new.jsonl")
    storage = ["--storage", str(finished_sweep.storage)]
    for path in (link, dangling):
        assert run_cli("runs", "export", str(path), *storage).returncode == 0
        assert path.is_symlink() and path.read_text().startswith(HEADER)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for path in (tmp_path / "pipe", tmp_path / "null", tmp_path / "elsewhere"):
        kind = path.lstat().st_mode
        with time_limit(60):
            done = run_cli("runs", "export", str(path), *storage)
        assert_rejected(done, f"file={path}")
        assert path.lstat().st_mode == kind
    assert not list(tmp_path.rglob(".*"))


def test_runs_of_other_tools_are_not_exported(run_cli: RunCli, tmp_path: Path) -> None:
    storage = Storage.open(tmp_path / "runs")
    client = MlflowClient(storage.tracking_uri)
    run = client.create_run("0", tags={schema.KIND: "trial"}).info.run_id
    client.log_param(run, "eps", "small")
    client.set_terminated(run, "FAILED")
    done = run_cli("runs", "export", str(tmp_path / "no"), "--storage", str(storage.root))
    assert_rejected(done, run, "eps=small")
    assert not (tmp_path / "no").exists()
