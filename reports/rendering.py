"""A table as Markdown, LaTeX, HTML, CSV, or on the terminal."""

import csv
import html
import io
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as TerminalTable
from rich.text import Text
from tabulate import tabulate

from linflab.reports.tables import (
    CPUS,
    EPOCHS,
    FLOPS,
    HOURS,
    METHOD,
    MODEL,
    NUMBER,
    RUNS,
    SETTING,
    VALIDATION,
    Cell,
    Row,
    Table,
)

MOST_SHOWN = 40  # rows on a terminal
NARROWEST_TEXT = 20  # a column of words, on a terminal
DROPPED_FIRST = (CPUS, RUNS, HOURS, EPOCHS, MODEL, FLOPS, VALIDATION)  # where a terminal is too narrow for all
LINES_OF_A_PAGE = 48  # of LaTeX
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "[": "{[}", "*": "{*}",
}  # fmt: skip
LATEX_HEAD = r"""% To be pasted or \input where there is \usepackage{booktabs,graphicx}; alone, it is a document.
\expandafter\ifx\csname @nodocument\endcsname\relax\else
  \documentclass{article}\usepackage{booktabs,graphicx}\expandafter\def\csname linflab@end\endcsname{\end{document}}
  \begin{document}
\fi"""
UNICODE = {
    "±": r"$\pm$", "\N{SCRIPT SMALL L}": r"$\ell$", "∞": r"$\infty$", "→": r"$\to$", "≤": r"$\le$", "≥": r"$\ge$",
    "\N{MULTIPLICATION SIGN}": r"$\times$", "\N{EN DASH}": "--", "\N{EM DASH}": "---", "…": r"\ldots{}", "ß": r"\ss{}",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'", "\N{LEFT DOUBLE QUOTATION MARK}": "``", "ø": r"\o{}",
    "\N{RIGHT DOUBLE QUOTATION MARK}": "''",
}  # fmt: skip
SYMBOLS = {"l_inf": r"$\ell_\infty$", "eps": r"$\epsilon$"}


def to_markdown(table: Table) -> str:
    """Title, table, notes, and for every row the command that repeats it."""
    right = [column in table.numeric for column in table.columns]
    lines = []
    for group, rows in groupby(table.rows, key=lambda row: row.group):
        if group:
            lines.append([f"**{_markdown(group)}**"] + [""] * (len(table.columns) - 1))
        lines += [[_markdown_cell(row, column, table) for column in table.columns] for row in rows]
    aligned = tabulate(
        lines,
        headers=list(table.columns),
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["right" if flag else "left" for flag in right] if lines else None,
    )
    notes = [*table.notes, *(f"({row.mark}) {row.note}" for row in table.rows if row.mark)]
    blocks = [f"## {_markdown(table.title)}", aligned, "\n".join(f"- {_markdown(note)}" for note in notes)]
    blocks += [f"![{_markdown(what)}]({file})" for what, file in table.figures.items()]
    if commands := [(_name(row), *once) for row in table.rows for once in row.again]:
        again = "\n".join(f"- {name}: `{command}`{of_commit(commit)}" for name, command, commit in commands)
        blocks.append(f"Each row again:\n\n{again}")
    return "\n\n".join(block for block in blocks if block) + "\n"


def of_commit(commit: str) -> str:
    """Beside a command, outside of what is copied."""
    return f" (linflab {commit})" if commit else ""


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line; underscores within words mean nothing there."""
    text = re.sub(r"([\\|*<`])", r"\\\1", " ".join(text.split()))
    text = re.sub(r"&(?=#?\w+;)", r"\&", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\_", text).replace("](", r"]\(")


def _markdown_cell(row: Row, column: str, table: Table) -> str:
    cell = row.cell(column)
    shown = _markdown(cell.text) + (f" <sup>{row.mark}</sup>" if _marked(row, column, table) else "")
    return {"best": f"**{shown}**", "best of kind": f"<u>{shown}</u>"}.get(cell.emphasis, shown)


def _name(row: Row) -> str:
    return f"({row.mark})" if row.mark else f"#{row.cell(NUMBER).text}"


def _marked(row: Row, column: str, table: Table) -> bool:
    return bool(row.mark) and column == table.columns[0]


def to_latex(table: Table) -> str:
    """A `table` environment with booktabs rules, to be pasted or \\input into a paper; by itself it compiles, too.

    What repeats a row is a comment.
    """
    width, shown = len(table.columns), _rows_of_a_page(table)
    lines = [LATEX_HEAD]
    lines += [f"% {_name(row)}: {command}{of_commit(commit)}" for row in shown for command, commit in row.again]
    kinds = {SETTING: r"p{0.5\linewidth}"} | {column: "r" for column in table.numeric}
    alignment = "".join(kinds.get(column, "l") for column in table.columns)
    lines += [
        r"\begin{table}[t]",
        r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{_latex(table.title)}}}",
    ]
    lines += [rf"\sbox0{{\begin{{tabular}}{{{alignment}}}", r"\toprule"]
    lines.append(" & ".join(_latex(column) for column in table.columns) + r" \\")
    for group, rows in groupby(shown, key=lambda row: row.group):
        lines.append(r"\midrule")
        if group:
            lines += [rf"\multicolumn{{{width}}}{{l}}{{{_latex(group)}}} \\", r"\midrule"]
        lines += [" & ".join(_latex_cell(row, column, table) for column in table.columns) + r" \\" for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}}"]
    lines.append(r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi")
    notes = [_latex(note) for note in table.notes]
    notes += [f"$^{{{row.mark}}}$ {_latex(row.note)}" for row in shown if row.mark]
    if len(shown) < len(table.rows):
        notes.append(f"{len(table.rows) - len(shown)} more rows are in the CSV file.")
    if notes:
        body = r"\par ".join(notes)
        lines.append(rf"\par\smallskip\begin{{minipage}}{{\linewidth}}\footnotesize {body}\end{{minipage}}")
    return "\n".join([*lines, r"\end{table}", r"\csname linflab@end\endcsname", ""])


def _rows_of_a_page(table: Table) -> tuple[Row, ...]:
    """The rows that a page has room for, with the notes: settings are broken into lines as well."""
    lines, rows = sum(map(_lines_of_note, table.notes)), 0
    for row in table.rows:
        lines += 1 + len(row.cell(SETTING).text) // 50 + _lines_of_note(row.note)
        if lines > LINES_OF_A_PAGE:
            break
        rows += 1
    return table.rows[:rows]


def _lines_of_note(note: str) -> int:
    return -(-len(note) // 90)


def _latex(text: str) -> str:
    parts = re.split(r"(\bl_inf\b|\beps\b)", " ".join(text.split()))
    return "".join(SYMBOLS.get(part) or "".join(map(_latex_letter, part)) for part in parts)


def _latex_letter(letter: str) -> str:
    if letter.isascii():
        return LATEX.get(letter, letter)
    base = unicodedata.normalize("NFD", letter)
    if base[0].isascii() and base[0].isalpha() and ord(letter) < 0x180:  # accents, which pdflatex knows
        return letter
    return UNICODE.get(letter, rf"\texttt{{U+{ord(letter):04X}}}")


def _latex_cell(row: Row, column: str, table: Table) -> str:
    cell = row.cell(column)
    shown = (
        r"\raggedright " * (column == SETTING)
        + _latex(cell.text)
        + (f"$^{{{row.mark}}}$" if _marked(row, column, table) else "")
    )
    command = {"best": r"\textbf", "best of kind": r"\underline"}.get(cell.emphasis)
    return f"{command}{{{shown}}}" if command else shown


def to_csv(table: Table) -> str:
    """The rows with unrounded numbers; quoted ones as they are printed. Missing values are empty.

    After the columns of the table: deviations over seeds where there are any, group, kind and source where the table
    has them, and the command that repeats each row (of several, one a line).
    """
    spreads = [column for column in table.columns if any(row.cell(column).spread is not None for row in table.rows)]
    more: dict[str, Callable[[Row], str]] = {
        "Group": lambda row: row.group,
        "Kind": lambda row: row.kind,
        "Source": lambda row: row.source,
    }
    more = {name: of for name, of in more.items() if any(of(row) for row in table.rows)}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*table.columns, *(f"{column} sd" for column in spreads), *more, "Command"])
    for row in table.rows:
        cells = [_plain(row.cell(column), exact=row.kind != "quoted") for column in table.columns]
        deviations = [row.cell(column).spread for column in spreads]
        writer.writerow([*cells, *deviations, *(of(row) for of in more.values()), row.command])
    return out.getvalue()


def _plain(cell: Cell, exact: bool) -> object:
    if cell.value is None:
        return None if cell == Cell() else " ".join(cell.text.split())
    return cell.value if exact else cell.text


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; border-top: 2px solid; border-bottom: 2px solid; margin: 1rem 0; }
th, td { padding: .25rem .8rem; text-align: left; vertical-align: top; }
thead th { border-bottom: 1px solid; }
th.group { border-top: 1px solid; border-bottom: 1px solid; font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.notes, .again { font-size: .85rem; } code { font-size: .85em; overflow-wrap: anywhere; }
sub, sup { line-height: 0; } sup a { text-decoration: none; } img { max-width: 32rem; width: 100%; background: white; }
"""


def to_html(table: Table, images: Callable[[str], str] = lambda file: file) -> str:
    """A page of its own, without scripts, that needs no network.

    Args:
        images: the address of a figure by the name of its file, such as a `data:` address that holds it.
    """
    return html_page(table.title, html_body(table, images))


def html_page(title: str, body: str) -> str:
    """A page of this body."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_html(title, symbols=False)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>\n<h1>{_html(title)}</h1>\n{body}\n</body></html>\n"
    )


def html_body(table: Table, images: Callable[[str], str]) -> str:
    """Table, notes, figures and commands as HTML."""
    numeric = [' class="number"' if column in table.numeric else "" for column in table.columns]
    head = "".join(f"<th{kind}>{_html(column)}</th>" for column, kind in zip(table.columns, numeric, strict=True))
    lines = []
    for group, rows in groupby(table.rows, key=lambda row: row.group):
        if group:
            lines.append(f'<tr><th class="group" colspan="{len(table.columns)}">{_html(group)}</th></tr>')
        for row in rows:
            cells = (
                f"<td{kind}>{_html_cell(row, column, table)}</td>"
                for column, kind in zip(table.columns, numeric, strict=True)
            )
            lines.append(f"<tr>{''.join(cells)}</tr>")
    notes = [f"<li>{_html(note)}</li>" for note in table.notes]
    notes += [f'<li id="note-{row.mark}">({row.mark}) {_html(row.note)}</li>' for row in table.rows if row.mark]
    commands = [
        f"<li>{_html(_name(row))}: <code>{html.escape(command)}</code>{of_commit(commit)}</li>"
        for row in table.rows
        for command, commit in row.again
    ]
    parts = [f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>', *lines, "</tbody></table></div>"]
    parts.append(f'<ul class="notes">{"".join(notes)}</ul>' if notes else "")
    parts += [
        f'<figure><img src="{html.escape(images(file))}" alt="{_html(what, symbols=False)}"></figure>'
        for what, file in table.figures.items()
    ]
    if commands:
        parts.append(f'<h2>Each row again</h2>\n<ul class="again">{"".join(commands)}</ul>')
    return "\n".join(part for part in parts if part)


def _html(text: str, symbols: bool = True) -> str:
    escaped = html.escape(text)
    return (
        re.sub(r"\bl_inf\b", "\N{SCRIPT SMALL L}<sub>∞</sub>", re.sub(r"\beps\b", "ε", escaped)) if symbols else escaped
    )


def _html_cell(row: Row, column: str, table: Table) -> str:
    cell = row.cell(column)
    shown = _html(cell.text)
    shown = {"best": f"<b>{shown}</b>", "best of kind": f"<u>{shown}</u>"}.get(cell.emphasis, shown)
    if _marked(row, column, table):
        shown += f'<sup><a href="#note-{row.mark}">{row.mark}</a></sup>'
    return shown


def print_table(table: Table, console: Console) -> None:
    """Show a table on the terminal: its first rows, where it is long."""
    rows, title, columns = table.rows[:MOST_SHOWN], table.title, list(table.columns)
    methods = {row.cell(METHOD).text for row in table.rows}
    if len(methods) == 1 and NUMBER in columns:  # then it need not take width from every row
        title = f"{title}, {methods.pop()}"
        columns.remove(METHOD)
    shown = TerminalTable(title=Text(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    least = {column: _least_width(column, rows, table) for column in columns}
    dropped = []
    for column in DROPPED_FIRST:
        if column in columns[1:] and _width(least, columns) > console.width:
            dropped.append(column)
            columns.remove(column)
    for column in columns:
        right = column in table.numeric
        shown.add_column(
            escape(column.replace(" ", "\n")),
            justify="right" if right else "left",
            no_wrap=right or column == NUMBER,
            overflow="ellipsis" if right else "fold",
            min_width=least[column],
        )
    for group, of_group in groupby(rows, key=lambda row: row.group):
        if group:
            shown.add_row(Text(group, style="bold"))
        for row in of_group:
            shown.add_row(*(_terminal_cell(row, column, table) for column in columns))
    if (width := _width(least, columns)) > console.width:  # the terminal will break lines
        Console(file=console.file, width=width, force_terminal=console.is_terminal).print(shown)
    else:
        console.print(shown)
    if dropped:
        names = ", ".join(column for column in table.columns if column in dropped)
        console.print(f"This terminal is too narrow for {names}; the files have all columns.")
    if len(table.rows) > len(rows):
        console.print(f"{len(table.rows) - len(rows)} more rows are in the files.")
    console.print()
    for note in [*table.notes, *(f"[{row.mark}] {row.note}" for row in rows if row.mark)]:
        console.print(Text(note), style="dim", soft_wrap=False)


def _width(widths: Mapping[str, int], columns: Sequence[str]) -> int:
    return sum(widths[column] + 3 for column in columns) - 1


def _least_width(column: str, rows: Sequence[Row], table: Table) -> int:
    """Text may be wrapped to this width; numbers are never cut."""
    cells = [_terminal_cell(row, column, table).plain for row in rows]
    words = [word for text in (column, *cells) for word in text.split()]
    if column in table.numeric or column == NUMBER:
        return max(map(len, [*column.split(), *cells]))
    return min(NARROWEST_TEXT, max(map(len, words), default=1))


def _terminal_cell(row: Row, column: str, table: Table) -> Text:
    cell = row.cell(column)
    mark = f" [{row.mark}]" if _marked(row, column, table) else ""
    return Text(cell.text + mark, style={"best": "bold", "best of kind": "underline"}.get(cell.emphasis, ""))


def write_table(table: Table, folder: Path, name: str, images: Callable[[str], str] = lambda file: file) -> list[Path]:
    """Write NAME.md, NAME.tex, NAME.html and NAME.csv to a folder; returns their paths. For `images` see `to_html`."""
    texts = {"md": to_markdown(table), "tex": to_latex(table), "html": to_html(table, images), "csv": to_csv(table)}
    return [write_text(folder / f"{name}.{suffix}", text) for suffix, text in texts.items()]


def write_text(path: Path, text: str) -> Path:
    """Write a file and put it in place whole, with its folder; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path
