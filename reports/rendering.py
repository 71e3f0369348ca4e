"""Tables as Markdown, LaTeX, HTML and CSV, and on the terminal."""

import csv
import html
import io
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable
from tabulate import tabulate

from linflab.reports.outputs import write_text_atomic
from linflab.reports.plain import escape_invisible, one_line
from linflab.reports.tables import (
    CERTIFIED,
    CPUS,
    EPOCHS,
    FLOPS,
    HOURS,
    INTERVALS,
    METHOD,
    MODEL,
    NUMBER,
    ROBUST,
    RUNS,
    SETTING,
    TEST,
    TEST_MARK,
    VALIDATION,
    Cell,
    Row,
    Table,
)
from linflab.reports.terminal import PlainConsole, Styled

MAX_TERMINAL_ROWS = 40
MIN_TEXT_WIDTH = 20  # of a text column on a terminal
MAX_WORD_WIDTH = 32  # longer words are broken across lines of a narrow terminal
COLUMN_DROP_ORDER = (  # on narrow terminals
    CPUS, RUNS, INTERVALS[ROBUST], INTERVALS[TEST], MODEL, HOURS, EPOCHS, FLOPS, VALIDATION, INTERVALS[CERTIFIED],
)  # fmt: skip
FORMULAS = tuple(
    "=+-@\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}\N{FULLWIDTH COMMERCIAL AT}"
)
LATEX_PAGE_LINES = 48
LATEX_ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "[": "{[}", "*": "{*}",
}  # fmt: skip
LATEX_HEAD = r"""% Requires booktabs and graphicx where it is pasted or \input; also compiles as a document by itself.
\expandafter\ifx\csname @nodocument\endcsname\relax\else
  \documentclass{article}\usepackage{booktabs,graphicx}\expandafter\def\csname linflab@end\endcsname{\end{document}}
  \begin{document}
\fi"""
LATEX_UNICODE = {
    "±": r"$\pm$", "\N{SCRIPT SMALL L}": r"$\ell$", "∞": r"$\infty$", "→": r"$\to$", "≤": r"$\le$", "≥": r"$\ge$",
    "\N{MULTIPLICATION SIGN}": r"$\times$", "\N{EN DASH}": "--", "\N{EM DASH}": "---", "…": r"\ldots{}", "ß": r"\ss{}",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'", "\N{LEFT DOUBLE QUOTATION MARK}": "``", "ø": r"\o{}",
    "\N{RIGHT DOUBLE QUOTATION MARK}": "''", "†": r"$\dagger$",
}  # fmt: skip
ACCENTS = {  # accents that LaTeX can put on any letter without packages
    "\N{COMBINING GRAVE ACCENT}": r"\`", "\N{COMBINING ACUTE ACCENT}": r"\'",
    "\N{COMBINING CIRCUMFLEX ACCENT}": r"\^", "\N{COMBINING TILDE}": r"\~", "\N{COMBINING DIAERESIS}": r'\"',
    "\N{COMBINING MACRON}": r"\=", "\N{COMBINING BREVE}": r"\u", "\N{COMBINING DOT ABOVE}": r"\.",
    "\N{COMBINING RING ABOVE}": r"\r", "\N{COMBINING DOUBLE ACUTE ACCENT}": r"\H", "\N{COMBINING CARON}": r"\v",
    "\N{COMBINING CEDILLA}": r"\c", "\N{COMBINING DOT BELOW}": r"\d",
}  # fmt: skip
ACCENTS_BELOW = (r"\c", r"\d")
SYMBOLS = {"l_inf": r"$\ell_\infty$", "eps": r"$\epsilon$"}


def to_markdown(table: Table) -> str:
    """Return a table as Markdown, with notes and the commands that reproduce its rows."""
    right = [column in table.numeric for column in table.columns]
    lines = []
    for group, rows in groupby(table.rows, key=lambda row: row.group):
        if group:
            lines.append([f"**{markdown_text(group)}**"] + [""] * (len(table.columns) - 1))
        lines += [[_markdown_cell(row, column, table) for column in table.columns] for row in rows]
    aligned = tabulate(
        lines,
        headers=list(table.columns),
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["right" if flag else "left" for flag in right] if lines else None,
    )
    notes = [*table.notes, *(f"({row.footnote_mark}) {row.footnote}" for row in table.rows if row.footnote_mark)]
    blocks = [f"## {markdown_text(table.title)}", aligned, "\n".join(f"- {_markdown_item(note)}" for note in notes)]
    blocks += [f"![{markdown_text(description)}]({file})" for description, file in table.figures.items()]
    if commands := [(_name(row), *run) for row in table.rows for run in row.reproduce_commands]:
        command_list = "\n".join(
            f"- {markdown_text(name)}: {_markdown_code(command)}{markdown_text(format_commit(commit), ' ')}"
            for name, command, commit in commands
        )
        blocks.append(f"Commands to reproduce each row:\n\n{command_list}")
    return "\n\n".join(block for block in blocks if block) + "\n"


def format_commit(commit: str) -> str:
    """Format the commit of a run as a suffix of its command; it is not part of the code to copy."""
    return f" (linflab {commit})" if commit else ""


def markdown_text(text: str, prefix: str = "") -> str:
    """Escape text for Markdown, on one line.

    Underscores and single tildes within words need no escape.

    Args:
        text: Any text.
        prefix: Prefix of the result, omitted if the text is empty.
    """
    text = re.sub(r"([\\|*<`$\[\]])", r"\\\1", one_line(text))
    text = re.sub(r"&(?=#?\w+;)", r"\&", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", text).replace("~~", r"\~\~")
    return prefix + text if text else ""


def _markdown_item(text: str) -> str:
    """Escape text for a list item, so that it starts no quotation, heading or nested list."""
    text = re.sub(r"^(?=[>#+=~-])", r"\\", markdown_text(text))
    return re.sub(r"^(\d+)(?=[.)])", r"\1\\", text)


def _markdown_code(text: str) -> str:
    """Return text as inline code, between fences of more backticks than the text has in a row."""
    text = one_line(text) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def _markdown_cell(row: Row, column: str, table: Table) -> str:
    cell = row.cell(column)
    text = markdown_text(cell.text) + (f" <sup>{row.mark}</sup>" if _has_mark(row, column, table) else "")
    return {"best": f"**{text}**", "best of kind": f"<u>{text}</u>"}.get(cell.emphasis, text)


def _name(row: Row) -> str:
    return f"({row.footnote_mark})" if row.footnote_mark else f"#{row.cell(NUMBER).text}"


def _has_mark(row: Row, column: str, table: Table) -> bool:
    return bool(row.mark) and column == table.columns[0]


def to_latex(table: Table) -> str:
    """Return a LaTeX `table` environment with booktabs rules, to paste or input into a paper.

    The result also compiles as a document by itself. Comments in it have the commands that reproduce the rows. A table
    that is too long for a page shows measured rows before quoted ones, and rows before notes, which are comments then.
    """
    width, shown_rows = len(table.columns), _rows_per_page(table)
    notes, hidden_notes = _notes_per_page(table, shown_rows)
    lines = [LATEX_HEAD]
    lines += [
        one_line(f"% {_name(row)}: {command}{format_commit(commit)}")
        for row in shown_rows
        for command, commit in row.reproduce_commands
    ]
    lines += [one_line(f"% {note}") for note in hidden_notes]
    kinds = {SETTING: r"p{0.5\linewidth}"} | {column: "r" for column in table.numeric}
    alignment = "".join(kinds.get(column, "l") for column in table.columns)
    lines += [
        r"\begin{table}[t]",
        r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{_latex(table.title)}}}",
    ]
    lines += [rf"\sbox0{{\begin{{tabular}}{{{alignment}}}", r"\toprule"]
    lines.append(" & ".join(_latex(column) for column in table.columns) + r" \\")
    for group, rows in groupby(shown_rows, key=lambda row: row.group):
        lines.append(r"\midrule")
        if group:
            lines += [rf"\multicolumn{{{width}}}{{l}}{{{_latex(group)}}} \\", r"\midrule"]
        lines += [" & ".join(_latex_cell(row, column, table) for column in table.columns) + r" \\" for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}}"]
    lines.append(r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi")
    if notes:
        body = r"\par ".join(notes)
        lines.append(rf"\par\smallskip\begin{{minipage}}{{\linewidth}}\footnotesize {body}\end{{minipage}}")
    return "\n".join([*lines, r"\end{table}", r"\csname linflab@end\endcsname", ""])


def _rows_per_page(table: Table) -> tuple[Row, ...]:
    """Return the rows that fit on a page, with at least a third of it for notes."""
    notes = sum(map(_note_lines, [*table.notes, *(row.footnote for row in table.rows)]))
    return _select_rows(table, LATEX_PAGE_LINES - min(notes, LATEX_PAGE_LINES // 3), _row_lines)


def _select_rows(table: Table, room: int, count_lines: Callable[[Row], int]) -> tuple[Row, ...]:
    """Return the rows that fit into `room` lines, in their order; measured rows have priority over quoted ones."""
    shown: set[int] = set()
    for position in sorted(range(len(table.rows)), key=lambda position: table.rows[position].origin == "quoted"):
        room -= count_lines(table.rows[position])
        if room < 0:
            break
        shown.add(position)
    return tuple(row for position, row in enumerate(table.rows) if position in shown)


def _notes_per_page(table: Table, shown_rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Return the notes in LaTeX that fit on a page below the rows, and the text of the other ones.

    Notes on rows are either all shown or all hidden.
    """
    footnotes = [row for row in shown_rows if row.footnote_mark]
    room = LATEX_PAGE_LINES - sum(map(_row_lines, shown_rows))
    shown: list[str] = []
    hidden: list[str] = []
    for note in table.notes:
        room -= _note_lines(note)
        (shown if room >= 0 else hidden).append(note)
    notes = [_latex(note) for note in shown]
    if sum(_note_lines(row.footnote) for row in footnotes) <= room:
        notes += [f"$^{{{row.footnote_mark}}}$ {_latex(row.footnote)}" for row in footnotes]
    else:
        hidden += [f"({row.footnote_mark}) {row.footnote}" for row in footnotes]
    if hidden:
        notes.append(f"{len(hidden)} more notes: see the comments in the LaTeX file.")
    if len(shown_rows) < len(table.rows):
        notes.append(f"{len(table.rows) - len(shown_rows)} more rows: see the CSV file.")
    return notes, hidden


def _row_lines(row: Row) -> int:
    return 1 + len(row.cell(SETTING).text) // 50  # long settings take several lines


def _note_lines(note: str) -> int:
    return -(-len(note) // 90)


def _latex(text: str) -> str:
    parts = re.split(r"(\bl_inf\b|\beps\b)", one_line(text))
    return "".join(SYMBOLS.get(part) or "".join(map(_latex_letter, part)) for part in parts)


def _latex_letter(letter: str) -> str:
    if letter.isascii():
        return LATEX_ESCAPES.get(letter, letter)
    base, *accents = list(unicodedata.normalize("NFD", letter))
    if len(accents) == 1 and base.isascii() and base.isalpha() and accents[0] in ACCENTS:
        command = ACCENTS[accents[0]]
        dotless = base in "ij" and command not in ACCENTS_BELOW
        return rf"{command}{{{chr(92) + base if dotless else base}}}"
    return LATEX_UNICODE.get(letter, rf"\texttt{{U+{ord(letter):04X}}}")


def _latex_mark(row: Row) -> str:
    return row.mark.replace(TEST_MARK, r"\dagger")


def _latex_cell(row: Row, column: str, table: Table) -> str:
    cell = row.cell(column)
    text = (
        r"\raggedright " * (column == SETTING)
        + _latex(cell.text)
        + (f"$^{{{_latex_mark(row)}}}$" if _has_mark(row, column, table) else "")
    )
    command = {"best": r"\textbf", "best of kind": r"\underline"}.get(cell.emphasis)
    return f"{command}{{{text}}}" if command else text


def to_csv(table: Table) -> str:
    """Return a table as CSV; measured numbers are not rounded, quoted numbers are as in the paper.

    Missing values are empty. Further columns hold standard deviations over seeds, group, origin, source, and the images
    on which settings were selected, if the table has them. The last column holds the commands to reproduce each row,
    one per line.
    """
    std_columns = [column for column in table.columns if any(row.cell(column).std is not None for row in table.rows)]
    optional_columns: dict[str, Callable[[Row], str]] = {
        "Group": lambda row: row.group,
        "Origin": lambda row: row.origin,
        "Source": lambda row: row.source,
        "Selected on": lambda row: row.selected_on,
    }
    optional_columns = {
        name: get_text for name, get_text in optional_columns.items() if any(get_text(row) for row in table.rows)
    }
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        map(csv_cell, [*table.columns, *(f"{column} sd" for column in std_columns), *optional_columns, "Command"])
    )
    for row in table.rows:
        cells = [_csv_value(row.cell(column), exact=row.origin != "quoted") for column in table.columns]
        deviations = [row.cell(column).std for column in std_columns]
        writer.writerow(
            map(
                csv_cell, [*cells, *deviations, *(get_text(row) for get_text in optional_columns.values()), row.command]
            )
        )
    return out.getvalue()


def csv_cell(value: object) -> object:
    """Return a value for CSV: numbers unchanged, text escaped so that spreadsheets evaluate no formula."""
    if not isinstance(value, str):
        return value
    text = escape_invisible(value, keep="\n")
    return f"'{text}" if text.lstrip().startswith(FORMULAS) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii()


def _csv_value(cell: Cell, exact: bool) -> object:
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
    """Return a table as a complete HTML page that has no scripts and works offline.

    Args:
        table: The table.
        images: Function that returns the address of a figure, such as a `data:` address, for its file name.
    """
    return html_page(table.title, html_body(table, images))


def html_page(title: str, body: str) -> str:
    """Return a complete HTML page with this body."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html_text(title, symbols=False)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>\n<h1>{html_text(title)}</h1>\n{body}\n</body></html>\n"
    )


def html_body(table: Table, images: Callable[[str], str]) -> str:
    """Return table, notes, figures and commands as HTML."""
    numeric = [' class="number"' if column in table.numeric else "" for column in table.columns]
    head = "".join(f"<th{kind}>{html_text(column)}</th>" for column, kind in zip(table.columns, numeric, strict=True))
    lines = []
    for group, rows in groupby(table.rows, key=lambda row: row.group):
        if group:
            lines.append(f'<tr><th class="group" colspan="{len(table.columns)}">{html_text(group)}</th></tr>')
        for row in rows:
            cells = (
                f"<td{kind}>{_html_cell(row, column, table)}</td>"
                for column, kind in zip(table.columns, numeric, strict=True)
            )
            lines.append(f"<tr>{''.join(cells)}</tr>")
    notes = [f"<li>{html_text(note)}</li>" for note in table.notes]
    notes += [
        f'<li id="note-{row.footnote_mark}">({row.footnote_mark}) {html_text(row.footnote)}</li>'
        for row in table.rows
        if row.footnote_mark
    ]
    commands = [
        f"<li>{html_text(_name(row))}: <code>{html.escape(one_line(command))}</code>"
        f"{html_text(format_commit(commit), symbols=False)}</li>"
        for row in table.rows
        for command, commit in row.reproduce_commands
    ]
    parts = [f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>', *lines, "</tbody></table></div>"]
    parts.append(f'<ul class="notes">{"".join(notes)}</ul>' if notes else "")
    parts += [
        f'<figure><img src="{html.escape(images(file))}" alt="{html_text(description, symbols=False)}"></figure>'
        for description, file in table.figures.items()
    ]
    if commands:
        parts.append(f'<h2>Commands to reproduce each row</h2>\n<ul class="again">{"".join(commands)}</ul>')
    return "\n".join(part for part in parts if part)


def html_text(text: str, symbols: bool = True) -> str:
    """Escape text for HTML and quoted attributes; with `symbols`, typeset l_inf and eps."""
    escaped = html.escape(escape_invisible(text, keep="\n"))
    return (
        re.sub(r"\bl_inf\b", "\N{SCRIPT SMALL L}<sub>∞</sub>", re.sub(r"\beps\b", "ε", escaped)) if symbols else escaped
    )


def _html_cell(row: Row, column: str, table: Table) -> str:
    cell = row.cell(column)
    text = html_text(cell.text)
    text = {"best": f"<b>{text}</b>", "best of kind": f"<u>{text}</u>"}.get(cell.emphasis, text)
    if _has_mark(row, column, table):
        mark = f'<a href="#note-{row.mark}">{row.mark}</a>' if row.footnote_mark else row.mark
        text += f"<sup>{mark}</sup>"
    return text


def print_table(table: Table, console: PlainConsole) -> None:
    """Print a table on the terminal, with at most `MAX_TERMINAL_ROWS` rows; measured ones have priority."""
    rows, title, columns = _select_rows(table, MAX_TERMINAL_ROWS, lambda row: 1), table.title, list(table.columns)
    methods = {row.cell(METHOD).text for row in table.rows}
    if len(methods) == 1 and NUMBER in columns:  # the only method moves to the title
        title = f"{title}, {methods.pop()}"
        columns.remove(METHOD)
    terminal_table = TerminalTable(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    min_widths = {column: _min_width(column, rows, table, console) for column in columns}
    dropped_columns = []
    for column in COLUMN_DROP_ORDER:
        if column in columns[1:] and _width(min_widths, columns) > console.width:
            dropped_columns.append(column)
            columns.remove(column)
    if _width(min_widths, columns) > console.width:
        min_widths = {column: _min_width(column, rows, table, console, is_narrow=True) for column in columns}
    for column in columns:
        right = column in table.numeric
        terminal_table.add_column(
            column.replace(" ", "\n"),
            justify="right" if right else "left",
            no_wrap=right or column == NUMBER,
            overflow="ellipsis" if right else "fold",
            min_width=min_widths[column],
        )
    for group, group_rows in groupby(rows, key=lambda row: row.group):
        if group:
            terminal_table.add_row(Styled(group, "bold"))
        for row in group_rows:
            terminal_table.add_row(*(_terminal_cell(row, column, table) for column in columns))
    if (width := _width(min_widths, columns)) > console.width:  # the terminal wraps lines
        console.with_width(width).print(terminal_table)
    else:
        console.print(terminal_table)
    if dropped_columns:
        names = ", ".join(column for column in table.columns if column in dropped_columns)
        console.print(f"This terminal is too narrow for {names}; the files have all columns.")
    if len(table.rows) > len(rows):
        console.print(f"{len(table.rows) - len(rows)} more rows: see the files.")
    console.print()
    for note in [*table.notes, *(f"[{row.footnote_mark}] {row.footnote}" for row in rows if row.footnote_mark)]:
        console.print(Styled(note, "dim"), soft_wrap=False)


def _width(widths: Mapping[str, int], columns: Sequence[str]) -> int:
    return sum(widths[column] + 3 for column in columns) - 1


def _min_width(column: str, rows: Sequence[Row], table: Table, console: PlainConsole, is_narrow: bool = False) -> int:
    """Return the least width of a column: numbers do not wrap, and text wraps after each word only if `is_narrow`."""
    cells = [console.render_str(_terminal_cell(row, column, table).text).plain for row in rows]
    width = max(map(len, [*column.split(), *cells]))
    if column in table.numeric or column == NUMBER:
        return width
    words = [word for text in (column, *cells) for word in text.split()]
    word = min(MAX_WORD_WIDTH, max(map(len, words), default=1))  # such as learning_rate=0.0123
    return word if is_narrow else max(word, min(MIN_TEXT_WIDTH, width))


def _terminal_cell(row: Row, column: str, table: Table) -> Styled:
    cell = row.cell(column)
    mark = f" [{row.mark}]" if _has_mark(row, column, table) else ""
    return Styled(cell.text + mark, {"best": "bold", "best of kind": "underline"}.get(cell.emphasis, ""))


def write_table(table: Table, folder: Path, name: str, images: Callable[[str], str] = lambda file: file) -> list[Path]:
    """Write a table as NAME.md, .tex, .html and .csv; return the paths. For `images` see `to_html`."""
    texts = {"md": to_markdown(table), "tex": to_latex(table), "html": to_html(table, images), "csv": to_csv(table)}
    return [write_text_atomic(folder / f"{name}.{suffix}", text) for suffix, text in texts.items()]
