"""Sweep tables: order, missing values and output formats."""

import io
import json
import random
from pathlib import Path

import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from linflab.reports import schema
from linflab.reports.comparison import table_for_names
from linflab.reports.importance import param_importances
from linflab.reports.records import read_trials, sweep_names
from linflab.reports.rendering import print_table, to_csv, to_latex, to_markdown, write_table
from linflab.reports.sweep_tables import pareto_front, sweep_table
from linflab.reports.tables import CERTIFIED, METHOD, NUMBER, SETTING, Row, Table, text_cell
from linflab.reports.terminal import PlainConsole
from tests.conftest import has_words

SETTINGS = {
    "dataset": "digits",
    "eps": "0.1",
    "compute.workers": "1",
    "compute.cpus_per_worker": "1",
}


def log_trial(client: MlflowClient, number: int, validation: float | None, width: int = 64, clean: float = 0.9) -> None:
    tags = {
        schema.KIND: "trial",
        schema.SWEEP: "s",
        schema.TRIAL: str(number),
        schema.METHOD: "l_inf-dist Net",
        schema.COMMAND: f"linflab train r model.width={width}",
        schema.SEARCHED_SETTINGS: "model.width,p_schedule.start",
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
        schema.TEST_CERTIFIED: 1 - validation,  # reversed order, which must not affect the ranking
        schema.TEST_VIOLATIONS: 0,
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
    log_trial(client, 1, 0.5, width=32)
    log_trial(client, 2, None, width=48)
    log_trial(client, 3, 0.8, width=64, clean=0.85)
    log_trial(client, 4, 0.8, width=96, clean=0.95)
    return uri


@pytest.fixture(scope="module")
def table(tracking_uri: str) -> Table:
    return sweep_table("s", read_trials(tracking_uri, "s"))


def test_trials_are_ranked_by_validation_with_failed_last(table: Table) -> None:
    assert table.column("#") == ["4", "3", "1", "2"]
    assert table.column("Val. certified")[:3] == [80, 80, 50]
    assert table.column("Certified")[3] is None
    assert table.rows[0].cell("FLOPs").text == "82.7M"
    assert table.column("Hyperparameters")[0] == "width=96, p_start=8.12"


def test_verified_trials_come_first(tracking_uri: str) -> None:
    trials = read_trials(tracking_uri, "s")
    verified = trials[schema.TRIAL].map({"1": 0.7, "3": 0.6})
    description = verified.map(lambda accuracy: "100 validation images" if accuracy == accuracy else None)
    trials = trials.assign(**{schema.VERIFIED_VALIDATION: verified, schema.VERIFICATION: description})
    table = sweep_table("s", trials)
    assert table.column("#") == ["1", "3", "4", "2"]
    assert table.column("Val. verified") == [70, 60, None, None]
    assert any("100 validation images" in note for note in table.notes)
    (row,) = table_for_names(trials, ["s"], quoted=False).rows
    assert "Best of sweep s by validation verified accuracy, trial 1." in row.footnote


def test_sweeps_without_verification_have_no_such_column(table: Table) -> None:
    assert "Val. verified" not in table.columns and not any("verified" in note for note in table.notes)


HALVING_TRIALS = pd.DataFrame(
    [
        {
            schema.TRIAL: name, schema.METHOD: "m", schema.COMMAND: "c", schema.SEARCHED_SETTINGS: "a,b",
            schema.OBJECTIVES: "clean,certified", schema.HARDWARE: "h", "status": "FINISHED", "dataset": "digits",
            "eps": "0.1", "compute.workers": "1", "compute.cpus_per_worker": "1", schema.EPOCHS: epochs,
            schema.BEST_VALIDATION_CLEAN: clean, schema.BEST_VALIDATION_CERTIFIED: certified, schema.TEST_VIOLATIONS: 0,
            schema.TEST_CLEAN: clean, schema.TEST_ROBUST: 0.5, schema.TEST_CERTIFIED: certified, schema.FLOPS: 1e6,
            schema.TRAIN_SECONDS: 1, "a": str(number / 10), "b": "x",
            schema.TRIAL_SPEC: json.dumps({"number": number, "params": {"a": number / 10, "b": "x"}, "rung": rung,
                                    "seed_index": seed_index}),
        }
        for name, number, rung, seed_index, epochs, clean, certified in (
            *((str(number), number, 1, 0, "3", 0.5 + number / 100, 0.4) for number in range(1, 10)),
            ("9.2", 9, 2, 0, "9", 0.7, 0.60), ("8.2", 8, 2, 0, "9", 0.8, 0.50), ("7.2", 7, 2, 0, "9", 0.7, 0.55),
            ("8.2-seed1", 8, 2, 1, "9", 0.9, 0.48), ("8.2-seed2", 8, 2, 2, "9", 0.7, 0.46),
        )
    ]
)  # fmt: skip


def test_reproduce_commands_import_own_modules() -> None:
    table = sweep_table("s", HALVING_TRIALS.assign(**{schema.MODULES: "my_parts"}))
    assert {row.command for row in table.rows} == {"LINFLAB_IMPORT=my_parts c"}


def test_halving_table_ranks_rungs_and_seed_replicates() -> None:
    """Rank by clean accuracy, full trainings before shortened ones, replicates last; check what notes count."""
    table = sweep_table("s", HALVING_TRIALS)
    names = table.column("#")
    assert names[:3] == ["8.2", "9.2", "7.2"] and names[3:12] == [str(number) for number in range(9, 0, -1)]
    assert names[12:] == ["8.2-seed1", "8.2-seed2"] and table.column("Epochs")[2:4] == ["9", "3"]
    assert table.column("Val. clean")[0] == 80
    assert pareto_front(HALVING_TRIALS, ("clean", "certified"))[schema.TRIAL].tolist() == ["9.2", "8.2"]
    notes = "\n".join(table.notes)
    for part in ("#8", "3 seeds", "Val. certified 48.00 ± 2.00", "Clean 80.00 ± 10.00", "#8.2, #9.2"):
        assert has_words(notes, part), part


def test_importances_identify_the_relevant_setting() -> None:
    rng = random.Random(0)
    points = [{"a": rng.random(), "b": rng.choice(["x", "y"]), "c": rng.random()} for _ in range(40)]
    trials = pd.DataFrame(
        {
            schema.TRIAL_SPEC: [
                json.dumps({"number": k, "params": point, "rung": 1, "seed_index": 0}) for k, point in enumerate(points)
            ],
            "m": [point["a"] ** 2 + 0.2 * (point["b"] == "x") for point in points],
        }
    )
    importances = param_importances(trials, "m")
    assert list(importances)[:2] == ["a", "b"] and importances["a"] > 0.6 and importances["c"] < 0.1
    assert param_importances(trials.head(5), "m") == {} and param_importances(trials.assign(m=1.0), "m") == {}


def test_notes_describe_the_evaluation(table: Table) -> None:
    notes = "\n".join(table.notes)
    failure = "(failed): TrainingError: the loss became nan [/gloo/pair.cc:53]"
    for part in ("lipschitz", "20 steps", "2 CPU cores", "3 of 4 trials: 0.83 hours", "Trial 2", failure):
        assert has_words(notes, part), part


def test_empty_sweep_is_read_and_unknown_sweep_is_rejected(tracking_uri: str) -> None:
    assert read_trials(tracking_uri, "empty").empty
    assert set(sweep_names(MlflowClient(tracking_uri))) == {"s", "empty"}
    with pytest.raises(LookupError, match="sweep=it's"):
        read_trials(tracking_uri, "it's")


def test_markdown_has_cells_and_commands(table: Table) -> None:
    lines = to_markdown(table).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == ["#", "Method", "Hyperparameters", "FLOPs", "Val. certified", "Clean", "Robust", "Certified"]
    assert cells[2] == ["4", "l_inf-dist Net", "width=96, p_start=8.12", "82.7M", "80.00", "95.00", "90.00", "20.00"]
    assert cells[5][3:] == ["-"] * 5
    assert "- #4: `linflab train r model.width=96`" in lines


def test_latex_has_rules_and_escaped_cells(table: Table) -> None:
    text = to_latex(table)
    for words in (r"\toprule", r"\midrule", r"\bottomrule", r"$\ell_\infty$-dist Net", r"\# &", r"p\_start=8.12"):
        assert words in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 5 and all(line.count("&") == 7 for line in body)


def test_csv_has_commands_and_empty_cells(table: Table) -> None:
    rows = pd.read_csv(io.StringIO(to_csv(table)))
    assert rows["#"].tolist() == [4, 3, 1, 2]
    assert rows["Command"].tolist()[0] == "linflab train r model.width=96"
    assert rows["Certified"].isna().tolist() == [False, False, False, True]


def test_terminal_fits_in_80_columns(table: Table) -> None:
    console = PlainConsole(io.StringIO(), width=80)
    print_table(table, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    assert "width=96" in text and "80.00" in text and "pair.cc" in text


@pytest.mark.parametrize("width", [80, 120])
def test_narrow_terminal_shows_all_columns(width: int) -> None:
    console = PlainConsole(io.StringIO(), width=width)
    print_table(sweep_table("s", HALVING_TRIALS), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "8.2-seed1" in text and text.count("48.00") >= 1 and max(map(len, text.splitlines())) <= width
    assert "Robust" in text and "Certified" in text.split("─")[0]


@pytest.mark.parametrize("width", [50, 80])
def test_settings_are_not_broken_within_numbers(width: int) -> None:
    setting = "learning_rate=0.01234, cross_entropy_weight=0.0345"
    row = Row({NUMBER: text_cell(1), SETTING: text_cell(setting), CERTIFIED: text_cell(12.5)})
    console = PlainConsole(io.StringIO(), width=width)
    print_table(Table("t", (NUMBER, METHOD, SETTING, CERTIFIED), (row,), ()), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "learning_rate=0.01234," in text and "cross_entropy_weight=0.0345" in text


def test_table_is_written_in_four_formats(table: Table, tmp_path: Path) -> None:
    paths = write_table(table, tmp_path / "reports", "s")
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == ["s.csv", "s.html", "s.md", "s.tex"]
    assert [path.suffix for path in paths] == [".md", ".tex", ".html", ".csv"]
