"""A table as Markdown, LaTeX, CSV, or on the terminal. A value that is missing is a dash, never a zero."""

import os
from pathlib import Path

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from linflab.reports.tables import METHOD, NUMBER, SETTING, Table

DASH = "-"


def to_markdown(table: Table) -> str:
    """Title, table, notes, and for every row the command that repeats it."""
    body = _texts(table.rows).map(lambda text: text.replace("|", "\\|"))
    numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in table.rows.dtypes]
    aligned = body.to_markdown(
        index=False, disable_numparse=True, colalign=["right" if right else "left" for right in numeric]
    )
    notes = "\n".join(f"- {note}" for note in table.notes)
    commands = "\n".join(f"- #{number}: `{command}`" for number, command in table.commands)
    return f"## {table.title}\n\n{aligned}\n\n{notes}\n\nEach row again, by its number:\n\n{commands}\n"


def to_latex(table: Table) -> str:
    """A `table` environment with booktabs rules; notes and commands are comments above it."""
    texts = _texts(table.rows)
    styler = texts.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in table.rows.dtypes]
    body = styler.to_latex(
        hrules=True,
        caption=_escape_latex(table.title),
        position="t",
        position_float="centering",
        column_format="".join("r" if right else "l" for right in numeric),
    )
    comments = ["needs \\usepackage{booktabs}", *table.notes]
    comments += [f"row {number}: {command}" for number, command in table.commands]
    return "".join(f"% {comment}\n" for comment in comments) + body


def to_csv(table: Table) -> str:
    """The rows with unrounded numbers, and the command that repeats each as last column; missing values are empty."""
    commands = dict(table.commands)
    return table.rows.assign(Command=table.rows[NUMBER].map(commands)).to_csv(index=False)


def print_table(table: Table, console: Console) -> None:
    """Show a table on the terminal."""
    rows = table.rows
    title = table.title
    if rows[METHOD].nunique() == 1:  # then it need not take width from every row
        title, rows = f"{title}, {rows[METHOD].iloc[0]}", rows.drop(columns=METHOD)
    shown = TerminalTable(title=Text(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    texts = _texts(rows)
    taken = sum(3 + max(map(len, [*str(name).split(), *texts[name]])) for name in texts if name != SETTING)
    for name, dtype in rows.dtypes.items():
        right = pd.api.types.is_numeric_dtype(dtype)
        shown.add_column(
            str(name).replace(" ", "\n"),
            justify="right" if right else "left",
            no_wrap=right or name == NUMBER,
            overflow="fold" if name == SETTING else "ellipsis",
            # a setting in a line, where the terminal is wide enough for all columns
            min_width=max(1, min(24, console.width - taken - 3)) if name == SETTING else None,
        )
    for _, row in texts.iterrows():
        shown.add_row(*map(Text, row))
    console.print(shown, soft_wrap=False)
    console.print()
    for note in table.notes:
        console.print(Text(note), style="dim", soft_wrap=False)


def write_table(table: Table, folder: Path, name: str) -> list[Path]:
    """Write NAME.md, NAME.tex and NAME.csv to a folder, each put in place whole; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, text in (("md", to_markdown(table)), ("tex", to_latex(table)), ("csv", to_csv(table))):
        path = folder / f"{name}.{suffix}"
        partial = folder / f".{name}.{suffix}.partial"
        partial.write_text(text)
        os.replace(partial, path)
        paths.append(path)
    return paths


def _texts(rows: pd.DataFrame) -> pd.DataFrame:
    """Every cell as it is to be read: reals with two decimals."""
    return rows.apply(lambda column: column.map(_text)).astype(object)


def _text(value: object) -> str:
    if value is None or value is pd.NA or value != value:
        return DASH
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _escape_latex(text: str) -> str:
    for symbol in "_#%&":
        text = text.replace(symbol, f"\\{symbol}")
    return text
