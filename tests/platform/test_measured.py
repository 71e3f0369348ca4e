"""The table of what was measured: made of the records that are shipped, repeated by the commands that it prints."""

import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from linflab.platform.config import Experiment, build_experiment, load_experiment
from linflab.platform.exchange import frame_of, read_file
from linflab.reports import schema
from linflab.reports.comparison import comparison_table, load_definition
from linflab.reports.records import parameters
from linflab.reports.rendering import to_markdown
from linflab.reports.tables import Row, Table


@pytest.fixture(scope="module")
def runs() -> pd.DataFrame:
    records = load_definition("measured").records
    assert records is not None
    return frame_of(read_file(records))


@pytest.fixture(scope="module")
def table(runs: pd.DataFrame) -> Table:
    return comparison_table(load_definition("measured"), runs)


def measured(table: Table) -> list[Row]:
    rows = [row for row in table.rows if row.kind == "measured"]
    assert rows
    return rows


def experiment_of(recorded: pd.Series) -> Experiment:
    """The experiment of a run's parameters; what became a setting later has its default, as it had then."""
    tree: dict[str, Any] = {}
    for path, text in recorded.items():
        *sections, name = str(path).split(".")
        section = tree
        for key in sections:
            section = section.setdefault(key, {})
        section[name] = None if text == "None" else yaml.safe_load(text)
    return build_experiment(tree, {})


def test_the_readme_shows_it(table: Table) -> None:
    """`make readme` puts it there."""
    _, shown = Path("README.md").read_text().split("<!-- measured -->\n")
    assert shown.split("<!-- end -->")[0] == to_markdown(table)


def test_its_commands_train_what_is_on_record(table: Table, runs: pd.DataFrame) -> None:
    """A recipe that changes after it was run is no longer the row's."""
    by_id = runs.set_index("run_id")
    for row in measured(table):
        commands = row.command.splitlines()
        assert len(commands) == len(row.runs) > 0
        for command, run_id in zip(commands, row.runs, strict=True):
            program, action, recipe, *overrides = shlex.split(command)
            assert (program, action) == ("linflab", "train")
            recorded = by_id.loc[run_id, parameters(runs)].dropna()
            assert load_experiment(recipe, overrides) == experiment_of(recorded), command


def test_its_costs_are_told(table: Table, runs: pd.DataFrame) -> None:
    """No training of a row took more than an hour on two CPUs, and none of its certificates was broken."""
    by_id = runs.set_index("run_id")
    for row in measured(table):
        for column in ("Epochs", "Hours", "CPUs", "FLOPs", "Test", "Robust", "Certified"):
            assert row.cell(column).value is not None, column
        for run_id in row.runs:
            assert by_id.loc[run_id, schema.TRAIN_SECONDS] < 3600 and by_id.loc[run_id, schema.TEST_BROKEN] == 0
        assert row.cell("CPUs").value <= 2
