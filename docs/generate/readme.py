"""Writes measured results into README.md and docs/, and draws the README's figure.

Run it with `make readme`, after a change of reports/papers/measured.jsonl or of shipped networks.
"""

import dataclasses
import json
from pathlib import Path

import yaml
from method_pages import measured_table, method_of
from reference import markdown_table

from linflab.platform.exchange.manifest import MANIFEST_FILE, WEIGHTS_FILE
from linflab.platform.exchange.pretrained import PREFIX, PRETRAINED_DIR, pretrained_names
from linflab.reports.comparison import Group, quoted_rows_of
from linflab.reports.figures import save_figure
from linflab.reports.front import front_figure
from linflab.reports.rendering import to_markdown
from linflab.reports.tables import Row

ROOT = Path(__file__).parents[2]
START, END = "<!-- measured -->\n", "<!-- end -->"
BEST_ROWS = 4  # of each dataset, by certified accuracy
FIGURE_GROUP = Group(dataset="fashion_mnist", eps=0.1)
FIGURE_TITLE, FIGURE_NAME, FIGURE_ROWS = "Fashion-MNIST (eps = 0.1)", "fashion_mnist_front", 8
COLUMNS = ("FLOPs", "Clean", "Robust", "Certified", "Hours")


def readme_rows() -> str:
    """Return the README's rows: for each dataset, those that certify most images, with the best published result."""
    measured = [row for row in measured_table().rows if row.origin == "measured"]
    lines = []
    for group in dict.fromkeys(row.group for row in measured):
        best = sorted((row for row in measured if row.group == group), key=_certified, reverse=True)[:BEST_ROWS]
        for row in best:
            name = row.cell("Method").text + ("" if len(row.runs) > 1 else "*")
            title = group.replace(" (", ", ").rstrip(")") if row is best[0] else ""
            lines.append((title, name, *(row.cell(column).text for column in COLUMNS), _best_published(row)))
    return markdown_table(("Dataset", "Method", *COLUMNS, "Published, larger nets"), lines)


def pretrained_rows() -> str:
    """Return the shipped networks: name, method, size and accuracies."""
    rows = []
    for name in pretrained_names():
        folder = PRETRAINED_DIR / name
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        accuracies = (f"{100 * manifest[key]:.2f}" for key in ("clean", "robust", "certified"))
        size = (folder / WEIGHTS_FILE).stat().st_size
        method = yaml.safe_load((folder / "config.yaml").read_text())["method"]
        rows.append((f"`{PREFIX}{name}`", method, f"{manifest['eps']:g}", *accuracies, manifest["certifier"],
                     f"{size / 1000:.0f} kB"))  # fmt: skip
    return markdown_table(("Name", "Method", "eps", "Clean", "Robust", "Certified", "Certifier", "Size"), rows)


def replace_marked(text: str, content: str) -> str:
    """Replace what is between the markers of a text."""
    before, _, rest = text.partition(START)
    assert rest, "the marker <!-- measured --> is missing"
    return before + START + content + END + rest.partition(END)[2]


def _best_published(row: Row) -> str:
    """Return the best published certified accuracy of the row's method, in any version, as text."""
    published = [
        other.cell("Certified")
        for other in measured_table().rows
        if other.origin == "quoted"
        and other.group == row.group
        and method_of(other).removesuffix(" v2") == method_of(row)
    ]
    return max(published, key=lambda cell: cell.value or 0.0).text if published else "-"


def _certified(row: Row) -> float:
    return row.cell("Certified").value or 0.0


def main() -> None:
    """Write all files and the figure."""
    for path, content in (
        (ROOT / "README.md", readme_rows()),
        (ROOT / "docs" / "results" / "measured.md", to_markdown(measured_table())),
        (ROOT / "docs" / "how-to" / "export.md", pretrained_rows()),
    ):
        path.write_text(replace_marked(path.read_text(), content))
    draw_front(ROOT / "docs" / "images")


def draw_front(folder: Path) -> None:
    """Draw clean against certified accuracy on Fashion-MNIST, for the measured rows that certify most."""
    rows = [row for row in measured_table().rows if row.origin == "measured" and row.group == FIGURE_TITLE]
    rows.sort(key=_certified, reverse=True)
    measured = [dataclasses.replace(row, footnote_mark="") for row in rows[:FIGURE_ROWS]]
    for path in save_figure(front_figure(measured, quoted_rows_of(FIGURE_GROUP), FIGURE_TITLE), folder, FIGURE_NAME):
        if path.suffix == ".pdf":
            path.unlink()


if __name__ == "__main__":
    main()
