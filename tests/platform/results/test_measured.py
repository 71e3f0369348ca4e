"""The table of measured results: made from the shipped runs, which its commands repeat."""

import io
import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import build_config, load_config
from linflab.platform.tracking.export import read_exported_runs, to_dataframe
from linflab.reports import schema
from linflab.reports.comparison import comparison_table, load_definition
from linflab.reports.records import param_columns
from linflab.reports.rendering import print_table, to_markdown
from linflab.reports.tables import Row, Table
from linflab.reports.terminal import PlainConsole
from linflab.search_spaces.strict_yaml import read_mapping


@pytest.fixture(scope="module")
def runs() -> pd.DataFrame:
    runs_file = load_definition("measured", read_mapping).runs_file
    assert runs_file is not None
    return to_dataframe(read_exported_runs(runs_file))


@pytest.fixture(scope="module")
def table(runs: pd.DataFrame) -> Table:
    return comparison_table(load_definition("measured", read_mapping), runs)


def list_measured_rows(table: Table) -> list[Row]:
    rows = [row for row in table.rows if row.origin == "measured"]
    assert rows
    return rows


def rebuild_config(recorded: pd.Series) -> ExperimentConfig:
    """Return the config of a run's parameters; settings added later get their defaults, which were in effect then."""
    tree: dict[str, Any] = {}
    for path, text in recorded.items():
        *sections, name = str(path).split(".")
        section = tree
        for key in sections:
            section = section.setdefault(key, {})
        section[name] = None if text == "None" else yaml.safe_load(text)
    return build_config(tree, {})


def test_terminal_shows_all_measured_rows(table: Table) -> None:
    console = PlainConsole(io.StringIO(), width=100)
    print_table(table, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "more rows: see the files." in text
    assert all(f"[{row.footnote_mark}]" in text for row in table.rows if row.origin == "measured")


def test_page_of_results_shows_the_table(table: Table) -> None:
    """`make readme` writes it."""
    _, shown = Path("docs/results/measured.md").read_text().split("<!-- measured -->\n")
    assert shown.split("<!-- end -->")[0] == to_markdown(table)


def test_commands_repeat_the_recorded_configs(table: Table, runs: pd.DataFrame) -> None:
    """A recipe with changed training settings no longer belongs to its row.

    Evaluation settings are excluded: the row states them, and defaults may have become stricter since the run.
    """
    by_id = runs.set_index("run_id")
    for row in list_measured_rows(table):
        commands = [shlex.split(command) for command in row.command.splitlines()]
        trained = []  # ids of runs, in the order of the commands that train them
        for run_id in row.runs:
            members = by_id.loc[run_id, schema.MEMBERS]
            trained += members.split(",") if isinstance(members, str) else [run_id]
        trained = list(dict.fromkeys(trained))  # a member of two ensembles is trained once
        for (program, action, recipe, *overrides), run_id in zip(
            [command for command in commands if command[1] != "ensemble"], trained, strict=True
        ):
            assert (program, action) == ("linflab", "train")
            if "--name" in overrides:  # of a member, by which the command of the ensemble finds it
                *overrides, _, name = overrides
                assert run_id.startswith(name)
            recorded = by_id.loc[run_id, param_columns(runs)].dropna()
            current, original = load_config(recipe, overrides), rebuild_config(recorded)
            exclude = {"evaluation": {"attack", "sound"}}
            assert current.model_dump(exclude=exclude) == original.model_dump(exclude=exclude), f"{recipe} {overrides}"
        ensembles = [run_id for run_id in row.runs if isinstance(by_id.loc[run_id, schema.MEMBERS], str)]
        for command, run_id in zip([one for one in commands if one[1] == "ensemble"], ensembles, strict=True):
            members = by_id.loc[run_id, schema.MEMBERS].split(",")
            names = command[2 : command.index("--name")]
            assert len(names) == len(members) and all(map(str.startswith, members, names))
            run = by_id.loc[run_id]
            assert ("--mirror" in command) == ("True" in str(run["model.mirror"]))
            assert ("--weights=auto" in command) == str(run[schema.SELECTION]).endswith(schema.CHOSEN_WEIGHTS)


def test_costs_are_reported_for_each_row(table: Table, runs: pd.DataFrame) -> None:
    """No run of a row took more than an hour on two CPUs, and none has a certificate violation."""
    by_id = runs.set_index("run_id")
    for row in list_measured_rows(table):
        for column in ("Epochs", "Hours", "CPUs", "FLOPs", "Clean", "Robust", "Certified"):
            assert row.cell(column).value is not None, column
        for run_id in row.runs:
            cpu_seconds = by_id.loc[run_id, schema.TRAIN_SECONDS] * row.cell("CPUs").value
            assert cpu_seconds < 2 * 3600 and by_id.loc[run_id, schema.TEST_VIOLATIONS] == 0
        assert row.cell("CPUs").value <= 2
