"""Reports of a storage's runs: read the runs, and write tables and figures to a directory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import yaml

from linflab.platform.errors import InputError
from linflab.platform.tracking.export import read_exported_runs, to_dataframe
from linflab.platform.tracking.mlflow import client_of, wrap_errors
from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from linflab.reports.comparison import (
    MeasuredRows,
    TableDefinition,
    comparison_table,
    find_run,
    groups_with_results,
    load_definition,
    table_for_names,
)
from linflab.reports.outputs import write_text_atomic
from linflab.reports.pages import (
    Page,
    page_stem,
    write_comparison_page,
    write_index,
    write_page,
    write_run_page,
    write_sweep_page,
)
from linflab.reports.papers import list_tables
from linflab.reports.records import drop_incomplete_runs, read_run, read_runs, read_trials
from linflab.reports.seeds import compare_over_seeds
from linflab.search_spaces.strict_yaml import read_mapping

OWN_TABLE = "table"  # prefix of the file names of user tables


def report_sweep(storage: Storage, name: str, out: Path | None) -> Page:
    """Write the report of a sweep.

    Args:
        storage: Storage of the sweep.
        name: Name of the sweep.
        out: Output directory; None for reports/ in the storage.

    Raises:
        InputError: If the sweep is not found or has no trials, or the runs or files are not accessible.
    """
    with wrap_errors(storage, out):
        return write_sweep_page(name, _trials(storage, name), out or storage.reports)


def report_run(storage: Storage, run: str, out: Path | None) -> Page:
    """Write the report of a run.

    Args:
        storage: Storage of the run.
        run: Run name, or prefix of its id.
        out: Output directory; None for reports/ in the storage.

    Raises:
        InputError: If the run is not found, or the runs or files are not accessible.
    """
    with wrap_errors(storage, out):
        client = client_of(storage)
        return write_run_page(client, _runs(storage), run, out or storage.reports)


def has_weights(storage: Storage, page: Page) -> bool:
    """Return whether the storage has the weights of the run of a page; it has none of imported runs.

    Args:
        storage: Storage of the run.
        page: Page written by `report_run`.
    """
    (row,) = page.table.rows
    with wrap_errors(storage):
        return schema.ORIGINAL_RUN_ID not in read_run(client_of(storage), row.runs[0]).data.tags


def report_comparison(storage: Storage, names: Sequence[str], quoted: bool, out: Path | None) -> Page:
    """Write a comparison of runs and sweeps, to files named after them.

    Args:
        storage: Storage of the runs.
        names: Run names, prefixes of run ids, or sweep names.
        quoted: Whether to include quoted results for the same dataset and eps.
        out: Output directory; None for reports/ in the storage.

    Raises:
        InputError: If a run or sweep is not found or has no test results, or the runs or files are not accessible.
    """
    with wrap_errors(storage, out):
        runs = _runs(storage)
        if waiting := [name for name in names if name in _sweeps_without_trials(storage, runs)]:
            raise InputError(
                f"{waiting[0]}: requires a sweep with test results, but no trial of this one has any yet; wait, "
                "or leave it out"
            )
        table = table_for_names(runs, names, quoted)
        sweeps = set(runs.get(schema.SWEEP, pd.Series(dtype=object)).dropna())
        stems = [name if name in sweeps else str(find_run(runs, name)["run_id"].iloc[0])[:8] for name in names]
        kind = "comparison" if quoted else "comparison-measured"
        return write_page(table, out or storage.reports, page_stem(kind, "_vs_".join(stems)))


def report_recipes(
    storage: Storage,
    name: str,
    run_ids: Mapping[str, Sequence[str]],
    notes: Sequence[str],
    quoted: bool,
    out: Path | None,
) -> Page:
    """Write a comparison of recipes over seeds: table, and clean against certified accuracy as figure.

    Args:
        storage: Storage of the runs.
        name: Name of the comparison, for the file names.
        run_ids: Ids of the finished runs of each recipe.
        notes: Further notes of the table.
        quoted: Whether to include quoted results for the same dataset and eps.
        out: Output directory; None for reports/ in the storage.

    Raises:
        InputError: If the runs or files are not accessible.
    """
    with wrap_errors(storage, out):
        runs = _runs(storage).set_index("run_id", drop=False)
        selected = [(recipe, runs.loc[list(ids)]) for recipe, ids in run_ids.items()]
        comparison = compare_over_seeds(selected, quoted, notes)
        return write_comparison_page(comparison, out or storage.reports, page_stem("compare", name))


def _sweeps_without_trials(storage: Storage, runs: pd.DataFrame) -> set[str]:
    parents = read_runs(storage.tracking_uri, {schema.KIND: "sweep"})
    no_names = pd.Series(dtype=object)
    return set(parents.get(schema.SWEEP, no_names).dropna()) - set(runs.get(schema.SWEEP, no_names).dropna())


def report_table(storage: Storage, name: str, definition: TableDefinition, out: Path | None) -> Page:
    """Write a table of the exported runs that its definition names, or else of the storage's runs.

    If there are no runs, the table has only quoted results.

    Args:
        storage: Storage of the runs.
        name: Name of a shipped table, or path of a YAML file.
        definition: Definition of the table.
        out: Output directory; None for reports/ in the storage.

    Raises:
        InputError: If the runs, exported runs or files are not accessible.
    """
    folder = out or storage.reports
    stem = name if name in list_tables() else page_stem(OWN_TABLE, Path(name).stem)
    with wrap_errors(storage, out):
        table = comparison_table(definition, _runs_for(definition, lambda: _runs(storage)))
        page = write_page(table, folder, stem)
        if name in list_tables():
            return page
        # `report_all` reads this copy of the definition to write the table again.
        runs_file = definition.runs_file and definition.runs_file.absolute()
        content = definition.model_copy(update={"runs_file": runs_file}).model_dump(mode="json")
        file = write_text_atomic(folder / f"{stem}.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        return replace(page, files=(*page.files, file))


def load_table_definition(name: str) -> TableDefinition:
    """Return a table definition by the name of a shipped table or the path of a YAML file.

    Raises:
        InputError: If the definition is not found or not valid.
    """
    try:
        return load_definition(name, read_mapping)
    except ValueError as error:
        raise InputError(str(error)) from None


def report_all(storage: Storage, out: Path | None) -> list[Path]:
    """Write all reports of a storage with an index page, and return the path of the index.

    There is a report of each shipped table, of all datasets with runs, of each sweep, and of each run that a table
    contains. User tables are included if `report_table` wrote them to the same directory or to reports/ in the storage.

    Args:
        storage: Storage of the runs.
        out: Output directory; None for reports/ in the storage.

    Raises:
        InputError: If the runs or files are not accessible.
    """
    folder = out or storage.reports
    with wrap_errors(storage, out):
        runs = _runs(storage)
        definitions = {name: load_definition(name, read_mapping) for name in list_tables()}
        notes = [] if len(runs) else [f"There are no runs in {storage.location} yet."]
        for folder_with_tables in dict.fromkeys((storage.reports, folder)):
            for file in sorted(folder_with_tables.glob(f"{OWN_TABLE}-*.yaml")):
                try:
                    definitions[file.stem] = load_table_definition(str(file))
                except InputError as error:
                    notes.append(f"Excluded: {error}.")
        if groups := groups_with_results(runs):
            columns = ("Method", "Model", "Epochs", "FLOPs", "Val. certified", "Clean", "Robust", "Certified", "Runs")
            definitions["recorded"] = TableDefinition(
                title="All datasets with runs",
                columns=columns,
                groups=tuple(groups),
                measured=MeasuredRows(min_seeds=1),
            )
        tables = {}
        for name, definition in definitions.items():
            try:
                tables[name] = comparison_table(definition, _runs_for(definition, lambda: runs))
            except InputError as error:  # the table's exported runs are missing
                notes.append(f"Excluded: {name}: {error}.")
        pages = [write_page(table, folder, name) for name, table in tables.items()]
        if len(runs) and schema.SWEEP in runs:
            for sweep, trials in runs.groupby(schema.SWEEP, sort=False):
                pages.append(write_sweep_page(str(sweep), trials, folder))
        shown_ids = [run_id for table in tables.values() for row in table.rows for run_id in row.runs]
        stored_ids = set(runs["run_id"]) if len(runs) else set()
        for run_id in dict.fromkeys(run_id for run_id in shown_ids if run_id in stored_ids):
            pages.append(write_run_page(client_of(storage), runs, run_id, folder))
        return [write_index(pages, folder, notes)]


def _runs(storage: Storage) -> pd.DataFrame:
    return (
        drop_incomplete_runs(read_runs(storage.tracking_uri, {schema.KIND: "trial"}))
        if storage.has_runs
        else pd.DataFrame()
    )


def _runs_for(definition: TableDefinition, read_stored: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Return the table's own exported runs if it has any, else the storage's runs."""
    return read_stored() if definition.runs_file is None else to_dataframe(read_exported_runs(definition.runs_file))


def _trials(storage: Storage, name: str) -> pd.DataFrame:
    trials = drop_incomplete_runs(read_trials(storage.tracking_uri, name))
    if trials.empty:
        raise InputError(f"sweep={name}: requires at least one trial, but none has started; wait for the first one")
    return trials
