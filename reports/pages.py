"""Reports as files: a table in all its forms with its figures, and an index of many.

HTML pages hold their figures, so that each is one file that needs no network.
"""

import base64
import html
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from linflab.reports import schema
from linflab.reports.comparison import run_of, table_of
from linflab.reports.figures import (
    front_figure,
    importance_figure,
    learning_curves,
    slice_figure,
    write_figure,
)
from linflab.reports.importance import importances
from linflab.reports.records import read_history
from linflab.reports.rendering import html_page, write_table, write_text
from linflab.reports.sweep_tables import ORDERS, front, in_order, objectives_of, sweep_table
from linflab.reports.tables import Table

RUN_FIGURES = {  # of a run's artifacts, and what they show
    "learning_curves": "the training, epoch by epoch",
    "certified_accuracy": "certified accuracy over eps",
    "radius_histogram": "certified radii of the test images",
    "training_margins": "margins of the training images",
}


@dataclass(frozen=True)
class Page:
    """A table with its figures, and the files of them all."""

    name: str
    table: Table
    files: tuple[Path, ...]


def page_name(kind: str, name: str) -> str:
    """The name of a page's files: of letters, digits, dots, dashes and underscores, whatever is in the record."""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9._-]', '_', name)}"


def write_page(table: Table, folder: Path, name: str, figures: Sequence[Path] = ()) -> Page:
    """Write a table as NAME.md, .tex, .html and .csv beside its figures, which are there already."""

    def embedded(file: str) -> str:
        return "data:image/png;base64," + base64.b64encode((folder / file).read_bytes()).decode()

    return Page(name, table, (*write_table(table, folder, name, embedded), *figures))


def write_sweep_page(sweep: str, trials: pd.DataFrame, folder: Path) -> Page:
    """The report of a sweep: its table, the front of clean and certified accuracy, and what the settings did.

    `trials` is what `read_trials` returns, with at least one row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, trials = page_name("sweep", sweep), in_order(trials)
    objective = objectives_of(trials)[0]
    metric, of = schema.OBJECTIVE_METRICS[objective][0], ORDERS[objective]
    shares = importances(trials, metric)
    table = sweep_table(sweep, trials, shares)
    figures, files = {}, []
    if not (best := front(trials, ("certified", "clean"))).empty:
        figures["certified over clean accuracy, and the front"] = f"{name}_front.png"
        files += write_figure(front_figure(trials, best), folder, f"{name}_front")
    if shares:
        figures["importance of the settings"] = f"{name}_importance.png"
        files += write_figure(importance_figure(shares, of), folder, f"{name}_importance")
    first = trials[[("." not in str(name)) and "-" not in str(name) for name in trials[schema.TRIAL]]]
    paths = [path for path in shares or str(trials[schema.SEARCHED].iloc[0]).split(",") if path in trials]
    if objective != "flops" and paths and first[metric].notna().any():
        figures["each setting"] = f"{name}_slices.png"
        files += write_figure(slice_figure(first, paths, metric, of), folder, f"{name}_slices")
    return write_page(replace(table, figures=figures), folder, name, files)


def write_run_page(client: MlflowClient, runs: pd.DataFrame, run_id: str, folder: Path) -> Page:
    """The report of one run: its row, and the figures that are in its artifacts; else at least its learning curves.

    Raises:
        LookupError: as `table_of`.
    """
    run_id = str(run_of(runs, run_id)["run_id"].iloc[0])
    table = table_of(runs, [run_id], quoted=False, title=f"Run {run_id[:8]}")
    folder.mkdir(parents=True, exist_ok=True)
    name, figures, files = page_name("run", run_id[:8]), {}, []
    with tempfile.TemporaryDirectory() as there:
        try:
            found = Path(client.download_artifacts(run_id, schema.FIGURES_FOLDER, there))
        except (MlflowException, OSError):  # it has none
            found = Path(there)
        for file, what in RUN_FIGURES.items():
            for suffix in ("png", "pdf"):
                source = found / f"{file}.{suffix}"
                if source.exists():
                    files.append(folder / f"{name}_{source.name}")
                    files[-1].write_bytes(source.read_bytes())
                    figures[what] = f"{name}_{file}.png"
    history = {} if figures else read_history(client, run_id)
    if any(epoch > 0 for curve in history.values() for epoch in curve):  # an imported run has its last values alone
        files += write_figure(
            learning_curves(history, str(table.rows[0].cell("Method").text)), folder, f"{name}_curves"
        )
        figures[RUN_FIGURES["learning_curves"]] = f"{name}_curves.png"
    return write_page(replace(table, figures=figures), folder, name, files)


def write_index(pages: Sequence[Page], folder: Path, notes: Sequence[str] = ()) -> Path:
    """Write index.html, which links all pages and their files; returns its path."""
    items = []
    for page in pages:
        others = [path for path in page.files if path.suffix != ".html"]
        links = " ".join(f'<a href="{html.escape(path.name)}">{html.escape(_label(path, page))}</a>' for path in others)
        address = html.escape(f"{page.name}.html")
        items.append(f'<li><a href="{address}">{html.escape(page.table.title)}</a> <small>{links}</small></li>')
    said = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return write_text(folder / "index.html", html_page("Reports", f"<ul>\n{chr(10).join(items)}\n</ul>\n{said}"))


def _label(path: Path, page: Page) -> str:
    stem = path.stem.removeprefix(page.name).strip("_").replace("_", " ")
    return f"{stem} {path.suffix[1:]}".strip()
