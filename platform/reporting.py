"""Reports on a storage's records: read, made into pages, and written to a folder."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from linflab.platform.errors import SettingError
from linflab.platform.exchange import frame_of, read_file
from linflab.platform.storage import ELSEWHERE, Storage
from linflab.reports import schema
from linflab.reports.comparison import TableDefinition, comparison_table, load_definition, table_of
from linflab.reports.pages import Page, page_name, write_index, write_page, write_run_page, write_sweep_page
from linflab.reports.papers import table_names
from linflab.reports.records import read_runs, read_trials

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a bar for each small file
TRIALS = {schema.KIND: "trial"}


def report_sweep(storage: Storage, name: str, out: Path | None) -> Page:
    """The report of a sweep, written to a folder.

    Raises:
        SettingError: there is no such sweep, no trial of it, or no reading the record or writing the files.
    """
    with one_error(storage, out):
        return write_sweep_page(name, _trials(storage, name), out or storage.reports)


def report_run(storage: Storage, run: str, out: Path | None) -> Page:
    """The report of a run. Raises: as `report_sweep`."""
    with one_error(storage, out):
        client = MlflowClient(storage.tracking_uri)
        return write_run_page(client, read_runs(storage.tracking_uri, TRIALS), run, out or storage.reports)


def report_comparison(storage: Storage, names: Sequence[str], quoted: bool, out: Path | None) -> Page:
    """Runs and sweeps side by side. Raises: as `report_sweep`."""
    with one_error(storage, out):
        table = table_of(read_runs(storage.tracking_uri, TRIALS), names, quoted)
        return write_page(table, out or storage.reports, "comparison")


def report_table(storage: Storage, name: str, definition: TableDefinition, out: Path | None) -> Page:
    """A table by its definition, of its own records or the storage's; without any, the quoted rows alone.

    Raises:
        SettingError: as `report_sweep`, or the table's own file of records can't be read.
    """
    stem = name if name in table_names() else page_name("table", Path(name).stem)
    with one_error(storage, out):
        table = comparison_table(definition, _runs_for(definition, lambda: _runs(storage)))
        return write_page(table, out or storage.reports, stem)


def table_definition(name: str) -> TableDefinition:
    """As `load_definition`. Raises SettingError: as that ValueError."""
    try:
        return load_definition(name)
    except ValueError as error:
        raise SettingError(str(error)) from None


def report_all(storage: Storage, out: Path | None) -> list[Path]:
    """All shipped tables, all sweeps, and every run that a table has a row of, with an index; returns its path.

    Raises:
        SettingError: the record can't be read, or the files can't be written.
    """
    folder = out or storage.reports
    with one_error(storage, out):
        runs = _runs(storage)
        definitions = [load_definition(name) for name in table_names()]
        tables = [comparison_table(definition, _runs_for(definition, lambda: runs)) for definition in definitions]
        pages = [write_page(table, folder, name) for name, table in zip(table_names(), tables, strict=True)]
        notes = [] if len(runs) else [f"Nothing has been recorded in {storage.root} yet."]
        if len(runs) and schema.SWEEP in runs:
            for name, trials in runs.groupby(schema.SWEEP, sort=False):
                pages.append(write_sweep_page(str(name), trials, folder))
        shown = [run_id for table in tables for row in table.rows for run_id in row.runs]
        here = set(runs["run_id"]) if len(runs) else set()
        for run_id in dict.fromkeys(run_id for run_id in shown if run_id in here):
            pages.append(write_run_page(MlflowClient(storage.tracking_uri), runs, run_id, folder))
        return [write_index(pages, folder, notes)]


def _runs(storage: Storage) -> pd.DataFrame:
    return read_runs(storage.tracking_uri, TRIALS) if storage.has_records else pd.DataFrame()


def _runs_for(definition: TableDefinition, recorded: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table's own records, where it has any, else what is recorded in the storage."""
    return recorded() if definition.records is None else frame_of(read_file(definition.records))


def _trials(storage: Storage, name: str) -> pd.DataFrame:
    trials = read_trials(storage.tracking_uri, name)
    if trials.empty:
        raise SettingError(f"sweep={name}: no trial of it has started yet")
    return trials


@contextmanager
def one_error(storage: Storage, out: Path | None = None) -> Iterator[None]:
    """What goes wrong with records or files within, as one clear error.

    Raises:
        SettingError: for all that is not a mistake of ours.
    """
    try:
        yield
    except LookupError as error:
        if type(error) is not LookupError:  # ours
            raise
        raise SettingError(str(error.args[0])) from None
    except (SQLAlchemyError, MlflowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingError(f"storage={storage.root}: its records can't be read ({reason}); {ELSEWHERE}") from None
    except OSError as error:
        raise SettingError(f"out={out or storage.reports}: can't be used ({error})") from None
