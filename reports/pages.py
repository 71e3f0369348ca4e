"""Report files: a table in all formats with its figures, and an index of reports.

HTML pages embed their figures, so each page is a single file that works offline.
"""

import base64
import hashlib
import html
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import methodcaller
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from linflab.reports import schema
from linflab.reports.comparison import find_run, table_for_names
from linflab.reports.figures import (
    importance_figure,
    learning_curves,
    pareto_front_figure,
    save_figure,
    slice_figure,
)
from linflab.reports.front import front_figure
from linflab.reports.importance import param_importances
from linflab.reports.outputs import write_text_atomic, write_whole
from linflab.reports.records import read_metric_history
from linflab.reports.rendering import html_page, html_text, write_table
from linflab.reports.seeds import SeedComparison
from linflab.reports.sweep_tables import OBJECTIVE_LABELS, pareto_front, rank_trials, sweep_objectives, sweep_table
from linflab.reports.tables import Table

MAX_NAME_LENGTH = 80  # characters of a page's name
RUN_FIGURES = {  # artifact: description
    "learning_curves": "learning curves",
    "certified_accuracy": "certified accuracy over eps",
    "radius_histogram": "certified radii of the test images",
    "training_margins": "margins of the training images",
}


@dataclass(frozen=True)
class Page:
    """A table and all files of its report."""

    name: str
    table: Table
    files: tuple[Path, ...]


def page_stem(kind: str, name: str) -> str:
    """Return a file name of ASCII letters, digits, dots, dashes and underscores for a page.

    If the name had to be changed or shortened, a digest is appended, so that file names of different pages differ.
    """
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:MAX_NAME_LENGTH]
    if stem != name:
        stem += f"-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"
    return f"{kind}-{stem}"


def write_page(table: Table, folder: Path, name: str, figures: Sequence[Path] = ()) -> Page:
    """Write a table as NAME.md, .tex, .html and .csv next to its existing figures."""

    def embed_image(file: str) -> str:
        return "data:image/png;base64," + base64.b64encode((folder / file).read_bytes()).decode()

    return Page(name, table, (*write_table(table, folder, name, embed_image), *figures))


def write_sweep_page(sweep: str, trials: pd.DataFrame, folder: Path) -> Page:
    """Write the report of a sweep: table, Pareto front, importance and effect of the settings.

    Args:
        sweep: Name of the sweep.
        trials: At least one trial, as returned by `read_trials`.
        folder: Output folder, created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, trials = page_stem("sweep", sweep), rank_trials(trials)
    objective = sweep_objectives(trials)[0]
    metric, objective_label = schema.OBJECTIVE_METRICS[objective][0], OBJECTIVE_LABELS[objective]
    importances = param_importances(trials, metric)
    table = sweep_table(sweep, trials, importances)
    figures, files = {}, []
    if not (best := pareto_front(trials, ("certified", "clean"))).empty:
        figures["certified over clean accuracy, with the Pareto front"] = f"{name}_front.png"
        files += save_figure(pareto_front_figure(trials, best), folder, f"{name}_front")
    if importances:
        figures["importance of the settings"] = f"{name}_importance.png"
        files += save_figure(importance_figure(importances, objective_label), folder, f"{name}_importance")
    first = trials[[("." not in str(name)) and "-" not in str(name) for name in trials[schema.TRIAL]]]
    paths = [path for path in importances or str(trials[schema.SEARCHED_SETTINGS].iloc[0]).split(",") if path in trials]
    if objective != "flops" and paths and first[metric].notna().any():
        figures["effect of each setting"] = f"{name}_slices.png"
        files += save_figure(slice_figure(first, paths, metric, objective_label), folder, f"{name}_slices")
    return write_page(replace(table, figures=figures), folder, name, files)


def write_comparison_page(comparison: SeedComparison, folder: Path, name: str) -> Page:
    """Write the table of a comparison over seeds, with a figure of clean against certified accuracy.

    Args:
        comparison: Table, measured rows and published results.
        folder: Output folder, created if missing.
        name: Stem of the file names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figure = front_figure(comparison.measured, comparison.published, comparison.measured[0].group)
    files = save_figure(figure, folder, f"{name}_front")
    figures = {"clean against certified accuracy": f"{name}_front.png"}
    return write_page(replace(comparison.table, figures=figures), folder, name, files)


def write_run_page(client: MlflowClient, runs: pd.DataFrame, run_id: str, folder: Path) -> Page:
    """Write the report of a run: its row and logged figures, or learning curves if it has no figures.

    Args:
        client: A client of the tracking store.
        runs: Trials, as returned by `read_runs`.
        run_id: Id of the run, beginning of its id, or its name.
        folder: Output folder, created if missing.

    Raises:
        LookupError: If no run or several runs match, or if the run has no test results.
    """
    run_id = str(find_run(runs, run_id)["run_id"].iloc[0])
    table = table_for_names(runs, [run_id], quoted=False, title=f"Run {run_id[:8]}")
    folder.mkdir(parents=True, exist_ok=True)
    name, figures, files = page_stem("run", run_id[:8]), {}, []
    with tempfile.TemporaryDirectory() as temporary_dir:
        try:
            figures_dir = Path(client.download_artifacts(run_id, schema.FIGURES_DIR, temporary_dir))
        except (MlflowException, OSError):  # the run has no logged figures
            figures_dir = Path(temporary_dir)
        for file, description in RUN_FIGURES.items():
            for suffix in ("png", "pdf"):
                source = figures_dir / f"{file}.{suffix}"
                if source.exists():
                    files.append(folder / f"{name}_{source.name}")
                    write_whole(files[-1], methodcaller("write", source.read_bytes()), flush=False)
                    figures[description] = f"{name}_{file}.png"
    history = {} if figures else read_metric_history(client, run_id)
    if any(epoch > 0 for curve in history.values() for epoch in curve):  # imported runs have only the last values
        files += save_figure(learning_curves(history, str(table.rows[0].cell("Method").text)), folder, f"{name}_curves")
        figures[RUN_FIGURES["learning_curves"]] = f"{name}_curves.png"
    return write_page(replace(table, figures=figures), folder, name, files)


def write_index(pages: Sequence[Page], folder: Path, notes: Sequence[str] = ()) -> Path:
    """Write index.html with links to all pages and their files; return its path."""
    items = []
    for page in pages:
        other_files = [path for path in page.files if path.suffix != ".html"]
        links = " ".join(f'<a href="{_address(path.name)}">{html_text(_label(path, page))}</a>' for path in other_files)
        title = html_text(page.table.title, symbols=False)
        items.append(f'<li><a href="{_address(f"{page.name}.html")}">{title}</a> <small>{links}</small></li>')
    notes_html = "".join(f"<p>{html_text(note)}</p>" for note in notes)
    return write_text_atomic(
        folder / "index.html", html_page("Reports", f"<ul>\n{chr(10).join(items)}\n</ul>\n{notes_html}")
    )


def _address(file: str) -> str:
    return html.escape(quote(file))


def _label(path: Path, page: Page) -> str:
    stem = path.stem.removeprefix(page.name).strip("_").replace("_", " ")
    return f"{stem} {path.suffix[1:]}".strip()
