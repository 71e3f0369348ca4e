"""Generated parts of the method pages: recipes, commands and measured rows.

A page in docs/methods/ has `methods` in its front matter, a list of method names as in recipes and runs.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from mkdocs.utils.meta import get_data

from linflab.platform.config.recipes import recipe_files
from linflab.platform.tracking.export import read_exported_runs, to_dataframe
from linflab.reports.comparison import comparison_table, load_definition
from linflab.reports.papers import list_tables
from linflab.reports.rendering import to_markdown
from linflab.reports.tables import Row, Table
from linflab.search_spaces.strict_yaml import read_mapping

FOLDER = Path(__file__).parents[1] / "methods"
NOT_MEASURED = (
    "[The table of measured results](../results/measured.md) has no row of this method. Its quoted rows are published "
    "results.\n"
)


@cache
def measured_runs() -> pd.DataFrame:
    """Return the shipped runs."""
    runs_file = load_definition("measured", read_mapping).runs_file
    assert runs_file is not None
    return to_dataframe(read_exported_runs(runs_file))


@cache
def measured_table() -> Table:
    """Return the shipped table of measured results."""
    return comparison_table(load_definition("measured", read_mapping), measured_runs())


def tables_page() -> dict[str, str]:
    """Return the page of all other shipped tables, with the shipped runs as measured rows."""
    text = (
        "---\nhide: [toc]\n---\n\n# Tables\n\n`linflab report NAME` writes each of these tables, with the runs of "
        "your storage directory as measured rows. Here, these are the runs that linflab ships.\n"
    )
    for name in list_tables():
        if name != "measured":
            table = comparison_table(load_definition(name, read_mapping), measured_runs())
            rows = tuple(dataclasses.replace(row, reproduce_commands=()) for row in table.rows)
            shown = to_markdown(dataclasses.replace(table, rows=rows)).replace("## ", "## " + f"`{name}`: ", 1)
            text += "\n" + shown
    return {"results/tables.md": text}


def generated_sections(meta: Mapping[str, Any]) -> str:
    """Return the sections on recipes and measured rows for the front matter of a page."""
    names = list(meta["methods"])
    return "\n" + _recipes(names) + "\n" + _measured(names)


def method_of(row: Row) -> str:
    """Return the method of a measured row, without the settings that tell rows of a method apart."""
    return row.cell("Method").text.partition(" (")[0]


def index_page() -> dict[str, str]:
    """Return the list of all method pages with their best measured certified accuracy per dataset."""
    from reference import markdown_table

    rows = []
    for path in sorted(FOLDER.glob("*.md")):
        body, meta = get_data(path.read_text())
        measured = [row for row in _measured_rows(list(meta["methods"]))]
        results = "; ".join(f"{row.group}: {row.cell('Certified').text}" for row in measured) or "not measured"
        title = body.strip().splitlines()[0].removeprefix("# ")
        rows.append((f"[{title}]({path.name})", meta["kind"], meta["paper"], results))
    text = (
        "# Methods\n\nEach page has the equation, the recipes with their commands, the measured rows, and the "
        "deviations from the paper. The last column is the certified test accuracy in percent, measured with linflab; "
        "budgets differ, see [the full table](../results/measured.md).\n\n"
    )
    return {"methods/index.md": text + markdown_table(("Method", "Trains", "Paper", "Measured"), rows)}


def _recipes(names: list[str]) -> str:
    lines = []
    for name, path in recipe_files().items():
        tree = yaml.safe_load(path.read_text())
        if tree.get("method") in names:
            anchor = name.replace(".", "-")
            lines.append(f"- [{name}](../reference/recipes/{tree['dataset']}.md#{anchor})")
    first = lines[0].split("[")[1].split("]")[0]
    small = [line for line in lines if "[digits_" in line] or [line for line in lines if "_cpu]" in line]
    command = small[0].split("[")[1].split("]")[0] if small else first
    return (
        f"## Recipes and command\n\n```bash\nlinflab train {command}\n```\n\n" + "\n".join(lines) + "\n\nRecipes that "
        "end in `_cpu`, and those for `digits`, are small enough for a few CPU cores. The others are made for a GPU.\n"
    )


def _measured_rows(names: list[str]) -> list[Row]:
    return [row for row in measured_table().rows if row.origin == "measured" and method_of(row) in names]


def _measured(names: list[str]) -> str:
    rows = _measured_rows(names)
    if not rows:
        return "## Measured\n\n" + NOT_MEASURED
    text = to_markdown(dataclasses.replace(measured_table(), title="Measured", rows=tuple(rows), notes=()))
    return text + "\nAccuracies are in percent. [All rows](../results/measured.md) have the published results too.\n"
