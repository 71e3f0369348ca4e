"""Runs as DataFrames: equal from a database and a server; empty and broken stores; values of filters."""

import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from linflab.reports import schema
from linflab.reports.literature import parse_eps, parse_number
from linflab.reports.records import list_runs, param_columns, read_metric_history, read_runs, read_sweeps, read_trials
from tests.conftest import time_limit


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    client = MlflowClient(f"sqlite:///{path}")
    parent = client.create_run("0", tags={schema.KIND: "sweep", schema.SWEEP: "it's", schema.BUDGET: "3 trials"})
    for number in range(3):
        tags = {schema.KIND: "trial", schema.SWEEP: "it's", schema.TRIAL: str(number)}
        run = client.create_run("0", tags=tags, start_time=1000 + number)
        client.log_param(run.info.run_id, "model.width", str(number))
        for step in (1, 2):
            client.log_metric(run.info.run_id, schema.TRAIN_LOSS, step / 2, step=step)
        client.log_metric(run.info.run_id, schema.BEST_VALIDATION_CERTIFIED, [0.5, 0.7, float("nan")][number])
        if number:
            client.set_terminated(run.info.run_id, ["", "FINISHED", "FAILED"][number])
    deleted = client.create_run("0", tags={schema.KIND: "trial", schema.SWEEP: "it's"})
    client.delete_run(deleted.info.run_id)
    client.set_terminated(parent.info.run_id, "KILLED")
    return path


def test_runs_are_selected_by_tags(store: Path) -> None:
    runs = read_runs(f"sqlite:///{store}", {schema.KIND: "trial"})
    assert runs[schema.TRIAL].tolist() == ["2", "1", "0"]  # newest first
    assert runs["status"].tolist() == ["FAILED", "FINISHED", "RUNNING"]
    assert runs["model.width"].tolist() == ["2", "1", "0"] and runs[schema.TRAIN_LOSS].tolist() == [1, 1, 1]
    assert runs[schema.BEST_VALIDATION_CERTIFIED].isna().tolist() == [True, False, False]
    assert param_columns(runs) == ["model.width"]
    assert read_runs(f"sqlite:///{store}", {schema.KIND: "trial", schema.TRIAL: "1"})["start_time"].tolist() == [1001]
    assert read_runs(f"sqlite:///{store}", {schema.KIND: "no"}).empty


def test_tags_of_earlier_versions_do_not_replace_current_ones(tmp_path: Path) -> None:
    """A run that this version resumed has both."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(uri)
    pairs = ({"linflab.host": "old", schema.HOST: "new"}, {schema.HOST: "new", "linflab.host": "old"})
    for tags in pairs:
        run = client.create_run("0", tags={schema.KIND: "trial"}).info.run_id
        for name, text in tags.items():
            client.set_tag(run, name, text)
    assert read_runs(uri, {schema.KIND: "trial"})[schema.HOST].tolist() == ["new", "new"]


def test_sweeps_are_summarized(store: Path) -> None:
    (sweep,) = read_sweeps(f"sqlite:///{store}").to_dict("records")
    assert sweep["sweep"] == "it's" and sweep["status"] == "interrupted" and sweep["budget"] == "3 trials"
    assert (sweep["finished"], sweep["failed"], sweep["best_val_certified"]) == (1, 1, 0.7)


def test_metric_history_is_read_by_step(store: Path) -> None:
    client = MlflowClient(f"sqlite:///{store}")
    run_id = read_runs(f"sqlite:///{store}", {schema.TRIAL: "1"})["run_id"][0]
    assert read_metric_history(client, run_id) == {schema.TRAIN_LOSS: {1: 0.5, 2: 1.0}}


@pytest.mark.slow
def test_server_and_database_return_equal_runs(store: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{store}", "--workers", "1"]
    server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        for tags in ({schema.KIND: "trial"}, {schema.KIND: "trial", schema.SWEEP: "it's"}):
            found = read_runs(f"http://127.0.0.1:{port}", tags)
            expected = read_runs(f"sqlite:///{store}", tags)
            pd.testing.assert_frame_equal(found[expected.columns], expected, check_dtype=False)
            assert set(found) == set(expected)
        assert len(read_trials(f"http://127.0.0.1:{port}", "it's")) == 3
    finally:
        server.terminate()
        server.wait()


def test_empty_stores_are_read_and_broken_ones_rejected(tmp_path: Path) -> None:
    empty = tmp_path / "empty.db"
    sqlite3.connect(empty).close()
    assert read_runs(f"sqlite:///{empty}", {}).empty and read_sweeps(f"sqlite:///{empty}").empty
    with pytest.raises(LookupError, match="sweep=s"):
        read_trials(f"sqlite:///{empty}", "s")
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"SQLite format 3\0" + bytes(2000))
    with pytest.raises(SQLAlchemyError):
        read_runs(f"sqlite:///{broken}", {})
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE runs (id INTEGER)")
    with pytest.raises(SQLAlchemyError):
        read_runs(f"sqlite:///{other}", {})


@pytest.mark.parametrize(
    ("text", "number"), [("0.25", 0.25), ("8/255", 8 / 255), (" 1 / 4 ", 0.25), ("-1e3", -1000.0), ("0/5", 0.0)]
)
def test_numbers_are_decimals_or_fractions(text: str, number: float) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "x", "1e400", "1e99999999", "-1e400", "1/1e400", "1e300/1e-300", "1/0", "1/", "/2", "1/2/3", "nan", "inf"],
)
def test_non_finite_numbers_are_rejected_at_once(text: str) -> None:
    with time_limit(5), pytest.raises(ValueError, match=r"^.*$"):
        parse_number(text)
    with time_limit(5), pytest.raises(ValueError, match="eps="):
        parse_eps(text)


def test_runs_are_found_by_values_as_written_in_yaml(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(uri)
    run = client.create_run("0", tags={schema.KIND: "trial"}).info.run_id
    logged = {"eps": 8 / 255, "flag": False, "other": True, "none": None, "word": "false", "large": "1e400"}
    for name, value in logged.items():
        client.log_param(run, name, value)
    for pair in ("eps=8/255", "flag=false", "flag=False", "other=true", "none=null", "word=false", "large=1e400"):
        name, _, value = pair.partition("=")
        assert list_runs(uri, {name: value})["run"].tolist() == [run], pair
    for pair in ("flag=true", "other=false", "none=false", "eps=1e400", "eps=1e99999999", "eps=nan"):
        name, _, value = pair.partition("=")
        with time_limit(20):
            assert list_runs(uri, {name: value}).empty, pair
