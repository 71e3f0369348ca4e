"""Comparison of methods over seeds: means with confidence intervals, next to published results."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from linflab.reports.comparison import Group, make_table, measured_rows, quoted_rows_of
from linflab.reports.front import pareto_rows
from linflab.reports.tables import (
    CERTIFIED,
    EPOCHS,
    FLOPS,
    HOURS,
    INTERVALS,
    METHOD,
    ROBUST,
    RUNS,
    TEST,
    Row,
    Table,
)

MAX_QUOTED = 12  # more quoted rows are reduced to those of interest


@dataclass(frozen=True)
class SeedComparison:
    """Comparison of methods over seeds.

    Attributes:
        table: Table of the measured rows and of the quoted rows that a reader compares with them.
        measured: Measured rows.
        published: All quoted rows of the same dataset and eps.
    """

    table: Table
    measured: Sequence[Row]
    published: Sequence[Row]


def compare_over_seeds(
    selected: Sequence[tuple[str, pd.DataFrame]], quoted: bool, more_notes: Sequence[str] = ()
) -> SeedComparison:
    """Return a table with one row per recipe: mean, standard deviation and confidence interval over its seeds.

    Args:
        selected: Recipe and runs of each row. The runs have one dataset and eps, and the columns of `read_runs`.
        quoted: Add quoted rows of the same dataset and eps.
        more_notes: Further notes of the table.
    """
    first = selected[0][1].iloc[0]
    group = Group(dataset=first["dataset"], eps=first["eps"])
    measured = measured_rows([(runs, f"Recipe {recipe}") for recipe, runs in selected], group)
    published = quoted_rows_of(group) if quoted else []
    shown = select_relevant(published, measured)
    has_intervals = any(len(row.runs) > 1 for row in measured)
    columns = [METHOD, FLOPS, EPOCHS]
    for column in (TEST, ROBUST, CERTIFIED):
        columns += [column, INTERVALS[column]] if has_intervals else [column]
    columns += [HOURS, RUNS]
    notes = [] if has_intervals else ["One seed: no confidence intervals."]
    notes += [
        _describe_epochs(measured),
        "Settings are those of the recipes. Epochs are selected by certified accuracy on validation images, never on "
        "test images; runs that train on validation images use the last epoch.",
    ]
    if len(shown) < len(published):
        notes.append(
            f"{len(published) - len(shown)} of {len(published)} published results are left out: other methods, not on "
            "the Pareto front. The figure shows all that have both accuracies."
        )
    counts = {len(row.runs) for row in measured}
    title = f"Comparison over {max(counts)} seed{'s' * (max(counts) > 1)}"
    table = make_table(title, columns, [*shown, *measured], [*notes, *more_notes])
    return SeedComparison(table, measured, published)


def select_relevant(quoted: Sequence[Row], measured: Sequence[Row]) -> list[Row]:
    """Return the quoted rows that a reader compares with measured rows: all if they are few.

    Otherwise, these are the rows of the measured methods, those on the Pareto front of clean and certified accuracy,
    and the one with the best certified accuracy.

    Args:
        quoted: Quoted rows of one dataset and eps, with certified accuracies.
        measured: Measured rows of the same dataset and eps.
    """
    if len(quoted) <= MAX_QUOTED:
        return list(quoted)
    methods = {_base_name(row) for row in measured}
    best = max(quoted, key=lambda row: row.cell(CERTIFIED).value or 0.0)
    front = [*pareto_rows(quoted), best]
    return [row for row in quoted if _base_name(row) in methods or any(row is one for one in front)]


def _base_name(row: Row) -> str:
    """Return the method's name without reference and settings: `SABR (CTBench)` -> `SABR`."""
    return row.cell(METHOD).text.partition(" (")[0]


def _describe_epochs(measured: Sequence[Row]) -> str:
    epochs = sorted({row.cell(EPOCHS).text for row in measured}, key=int)
    if len(epochs) == 1:
        return f"Each run trains for {epochs[0]} epoch{'s' * (epochs[0] != '1')}."
    return f"Runs differ in epochs: {epochs[0]} to {epochs[-1]} epochs each."
