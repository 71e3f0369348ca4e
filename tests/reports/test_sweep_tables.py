"""Tables from records: order, missing values, and the formats they are written in."""

import io
import json
import random
from pathlib import Path

import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from linflab.reports import schema
from linflab.reports.importance import importances
from linflab.reports.records import read_trials, sweep_names
from linflab.reports.rendering import print_table, to_csv, to_latex, to_markdown, write_table
from linflab.reports.sweep_tables import front, sweep_table
from linflab.reports.tables import Table

SETTINGS = {
    "dataset": "digits",
    "eps": "0.1",
    "compute.workers": "1",
    "compute.cpus_per_worker": "1",
}


def record(client: MlflowClient, number: int, validation: float | None, width: int = 64, clean: float = 0.9) -> None:
    tags = {
        schema.KIND: "trial",
        schema.SWEEP: "s",
        schema.TRIAL: str(number),
        schema.METHOD: "l_inf-dist Net",
        schema.COMMAND: f"linflab train r model.width={width}",
        schema.SEARCHED: "model.width,p_schedule.start",
        schema.HARDWARE: "2 CPU cores",
        schema.CERTIFIER: "lipschitz",
        schema.ATTACK: "PGD (20 steps of 0.25 eps, 1 restart)",
    }
    run = client.create_run("0", tags=tags)
    for name, value in {**SETTINGS, "model.width": str(width), "p_schedule.start": "8.123456"}.items():
        client.log_param(run.info.run_id, name, value)
    if validation is None:
        client.set_tag(run.info.run_id, schema.FAILURE, "TrainingError: the loss became nan [/gloo/pair.cc:53]")
        client.set_terminated(run.info.run_id, "FAILED")
        return
    metrics = {
        schema.BEST_VALIDATION_CERTIFIED: validation,
        schema.BEST_VALIDATION_CLEAN: clean,
        schema.TEST_CLEAN: 0.95,
        schema.TEST_ROBUST: 0.9,
        schema.TEST_CERTIFIED: 1 - validation,  # the wrong way round: the order must not look at it
        schema.TEST_BROKEN: 0,
        schema.FLOPS: 82_700_000,
        schema.TRAIN_SECONDS: 1000,
    }
    for name, value in metrics.items():
        client.log_metric(run.info.run_id, name, value)
    client.set_terminated(run.info.run_id)


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    client = MlflowClient(uri)
    client.create_run("0", tags={schema.KIND: "sweep", schema.SWEEP: "s"})
    client.create_run("0", tags={schema.KIND: "sweep", schema.SWEEP: "empty"})
    client.create_run("0", tags={schema.KIND: "trial", schema.SWEEP: "other", schema.TRIAL: "1"})
    record(client, 1, 0.5, width=32)
    record(client, 2, None, width=48)
    record(client, 3, 0.8, width=64, clean=0.85)
    record(client, 4, 0.8, width=96, clean=0.95)
    return uri


@pytest.fixture(scope="module")
def table(tracking_uri: str) -> Table:
    return sweep_table("s", read_trials(tracking_uri, "s"))


def test_best_by_validation_first_and_failed_last(table: Table) -> None:
    assert table.column("#") == ["4", "3", "1", "2"]
    assert table.column("Val. certified")[:3] == [80, 80, 50]
    assert table.column("Certified")[3] is None
    assert table.rows[0].cell("FLOPs").text == "82.7M"
    assert table.column("Setting")[0] == "width=96, p_start=8.12"


RACE = pd.DataFrame(
    [
        {
            schema.TRIAL: name, schema.METHOD: "m", schema.COMMAND: "c", schema.SEARCHED: "a,b",
            schema.OBJECTIVES: "clean,certified", schema.HARDWARE: "h", "status": "FINISHED", "dataset": "digits",
            "eps": "0.1", "compute.workers": "1", "compute.cpus_per_worker": "1", schema.EPOCHS: epochs,
            schema.BEST_VALIDATION_CLEAN: clean, schema.BEST_VALIDATION_CERTIFIED: certified, schema.TEST_BROKEN: 0,
            schema.TEST_CLEAN: clean, schema.TEST_ROBUST: 0.5, schema.TEST_CERTIFIED: certified, schema.FLOPS: 1e6,
            schema.TRAIN_SECONDS: 1, "a": str(number / 10), "b": "x",
            schema.JOB: json.dumps({"number": number, "point": {"a": number / 10, "b": "x"}, "round": round_,
                                    "repeat": repeat}),
        }
        for name, number, round_, repeat, epochs, clean, certified in (
            *((str(number), number, 1, 0, "3", 0.5 + number / 100, 0.4) for number in range(1, 10)),
            ("9.2", 9, 2, 0, "9", 0.7, 0.60), ("8.2", 8, 2, 0, "9", 0.8, 0.50), ("7.2", 7, 2, 0, "9", 0.7, 0.55),
            ("8.2-seed1", 8, 2, 1, "9", 0.9, 0.48), ("8.2-seed2", 8, 2, 2, "9", 0.7, 0.46),
        )
    ]
)  # fmt: skip


def test_a_race_with_two_objectives_and_repetitions() -> None:
    """By clean accuracy, in full before shortened, repetitions last; and what the notes count."""
    table = sweep_table("s", RACE)
    names = table.column("#")
    assert names[:3] == ["8.2", "9.2", "7.2"] and names[3:12] == [str(number) for number in range(9, 0, -1)]
    assert names[12:] == ["8.2-seed1", "8.2-seed2"] and table.column("Epochs")[2:4] == ["9", "3"]
    assert table.column("Val. clean")[0] == 80
    assert front(RACE, ("clean", "certified"))[schema.TRIAL].tolist() == ["9.2", "8.2"]
    notes = "\n".join(table.notes)
    assert "#8 with 3 seeds" in notes and "Val. certified 48.00 ± 2.00, Test 80.00 ± 10.00" in notes
    assert "none of them worse than another in all: #8.2, #9.2." in notes


def test_importances_find_the_setting_that_matters() -> None:
    chance = random.Random(0)
    points = [{"a": chance.random(), "b": chance.choice(["x", "y"]), "c": chance.random()} for _ in range(40)]
    trials = pd.DataFrame(
        {
            schema.JOB: [
                json.dumps({"number": k, "point": point, "round": 1, "repeat": 0}) for k, point in enumerate(points)
            ],
            "m": [point["a"] ** 2 + 0.2 * (point["b"] == "x") for point in points],
        }
    )
    shares = importances(trials, "m")
    assert list(shares)[:2] == ["a", "b"] and shares["a"] > 0.6 and shares["c"] < 0.1
    assert importances(trials.head(5), "m") == {} and importances(trials.assign(m=1.0), "m") == {}


def test_notes_say_what_the_numbers_are(table: Table) -> None:
    notes = "\n".join(table.notes)
    for words in (
        "validation",
        "certifier lipschitz",
        "20 steps",
        "2 CPU cores",
        "3000 seconds",
        "Trial 2 has no result (failed): TrainingError: the loss became nan [/gloo/pair.cc:53]",
    ):
        assert words in notes


def test_sweep_without_trials_and_unknown_sweep(tracking_uri: str) -> None:
    assert read_trials(tracking_uri, "empty").empty
    assert set(sweep_names(MlflowClient(tracking_uri))) == {"s", "empty"}
    with pytest.raises(LookupError, match="sweep=it's"):
        read_trials(tracking_uri, "it's")


def test_markdown(table: Table) -> None:
    lines = to_markdown(table).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == ["#", "Method", "Setting", "FLOPs", "Val. certified", "Test", "Robust", "Certified"]
    assert cells[2] == ["4", "l_inf-dist Net", "width=96, p_start=8.12", "82.7M", "80.00", "95.00", "90.00", "20.00"]
    assert cells[5][3:] == ["-"] * 5
    assert "- #4: `linflab train r model.width=96`" in lines


def test_latex(table: Table) -> None:
    text = to_latex(table)
    for words in (r"\toprule", r"\midrule", r"\bottomrule", r"$\ell_\infty$-dist Net", r"\# &", r"p\_start=8.12"):
        assert words in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 5 and all(line.count("&") == 7 for line in body)


def test_csv(table: Table) -> None:
    rows = pd.read_csv(io.StringIO(to_csv(table)))
    assert rows["#"].tolist() == [4, 3, 1, 2]
    assert rows["Command"].tolist()[0] == "linflab train r model.width=96"
    assert rows["Certified"].isna().tolist() == [False, False, False, True]


def test_terminal_fits_in_80_columns(table: Table) -> None:
    console = Console(file=io.StringIO(), width=80)
    print_table(table, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    assert "width=96" in text and "80.00" in text and "pair.cc" in text


@pytest.mark.parametrize("width", [80, 120])
def test_no_column_is_cut_off_on_a_narrow_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    print_table(sweep_table("s", RACE), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "8.2-seed1" in text and text.count("48.00") >= 1 and max(map(len, text.splitlines())) <= width
    assert "Robust" in text and "Certified" in text.split("─")[0]


def test_files(table: Table, tmp_path: Path) -> None:
    paths = write_table(table, tmp_path / "reports", "s")
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == ["s.csv", "s.html", "s.md", "s.tex"]
    assert [path.suffix for path in paths] == [".md", ".tex", ".html", ".csv"]
