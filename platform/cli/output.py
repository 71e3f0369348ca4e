"""Output of commands: tables, reports, and hints at the next command."""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from linflab.platform.cli.options import storage_options
from linflab.platform.tracking.storage import Storage
from linflab.reports.plain import one_line
from linflab.reports.terminal import PlainConsole

if TYPE_CHECKING:
    import pandas as pd

    from linflab.reports.pages import Page

console = PlainConsole(soft_wrap=True)
MIN_TEXT_WIDTH = 6  # of a text column in a table


def print_warning(note: str | None) -> None:
    """Print a warning to standard error, if there is one."""
    if note is not None:
        sys.stderr.write(f"linflab: warning: {one_line(note)}\n")


def show_output(text: str) -> None:
    """Print output of a cluster job."""
    console.print(text, end="")


def log_optional(log: Callable[[], None], resume_command: str) -> None:
    """Log the model and figures of a run whose metrics are logged; print any error instead of raising it.

    Args:
        log: Function that logs the model and figures.
        resume_command: Command that logs them again after an error.
    """
    try:
        log()
    except Exception as error:  # from MLflow, the disk, the model export or Matplotlib
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        console.print(
            f"Metrics are logged, but the model and figures could not be logged ({reason}). "
            f"Retry with `{resume_command}`."
        )


def print_page(page: "Page") -> None:
    """Print the table of a report, and the paths of its files."""
    from linflab.reports.rendering import print_table

    print_table(page.table, console)
    print_files(page.files, "Files:")


def print_sweep_page(page: "Page") -> None:
    """Print the table of a sweep, the command that reproduces its best trial, and the paths of its files."""
    from linflab.reports.rendering import format_commit, print_table
    from linflab.reports.tables import VALIDATION

    print_table(page.table, console)
    best = page.table.rows[0]
    if best.cell(VALIDATION).value is not None:
        (command, commit), *_ = best.reproduce_commands
        console.print(
            f"\nCommand to reproduce trial {best.cell('#').text}, the best one{format_commit(commit)}:\n  {command}"
        )
    print_files(page.files, "Files:")


def print_files(files: Iterable[Path], heading: str) -> None:
    """Print a heading and the paths of files."""
    console.print(heading)
    for path in files:
        console.print(f"  {path}")


def ui_command(storage: Storage) -> str:
    """Return the command that opens the MLflow UI on a storage."""
    return shlex.join(["linflab", "ui", *storage_options(storage)])


def print_run_table(runs: "pd.DataFrame", fractions: Sequence[str], as_json: bool) -> None:
    """Print runs or sweeps as a table, or as JSON.

    Args:
        runs: One row per run or sweep.
        fractions: Columns with fractions in [0, 1] or NaN, which the table shows in percent.
        as_json: Whether to print JSON.
    """
    rows = [{str(name): value for name, value in row.items()} for row in runs.to_dict("records")]
    for row in rows:
        for name in fractions:
            missing = row[name] != row[name]
            row[name] = (None if missing else row[name]) if as_json else "-" if missing else f"{100 * row[name]:.2f}%"
    print_rows(rows, list(runs.columns), as_json)


def print_rows(rows: list[dict[str, Any]], columns: list[str], as_json: bool) -> None:
    """Print rows as a table of the given columns, or as JSON with all columns."""
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table(box=None, pad_edge=False)
    lines = [[_format_cell(row[column]) for column in columns] for row in rows]
    least = 0  # width at which no number is broken across lines
    for index, column in enumerate(columns):
        cells = [line[index] for line in lines]
        has_numbers = bool(cells) and all(re.fullmatch(r"-|[-+\d.,/e%]*\d%?|inf|nan", cell) for cell in cells)
        width = max(map(len, [column, *cells]))
        table.add_column(column, overflow="fold", no_wrap=has_numbers, min_width=width if has_numbers else None)
        least += 1 + (width if has_numbers else min(width, MIN_TEXT_WIDTH))
    for line in lines:
        table.add_row(*line)
    # Keep each row on one line in files and pipes.
    (console.with_width(max(least, console.width) if console.is_terminal else 10_000)).print(table)


def _format_cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
