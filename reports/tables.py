"""A table for a paper: what a reader sees of each cell, and the unrounded numbers behind it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

METHOD, MODEL, SETTING, EPOCHS, FLOPS = "Method", "Model", "Setting", "Epochs", "FLOPs"
VALIDATION_CLEAN, VALIDATION = "Val. clean", "Val. certified"
TEST, ROBUST, CERTIFIED = "Test", "Robust", "Certified"
EPOCH_SECONDS, HOURS, CPUS, RUNS = "Per-epoch Time (seconds)", "Hours", "CPUs", "Runs"
NUMBER = "#"
DASH = "-"

Emphasis = Literal["", "best", "best of kind"]
MORE_IS_BETTER = {TEST: True, ROBUST: True, CERTIFIED: True, EPOCH_SECONDS: False}


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: as it is read; a value that is missing is a dash, never a zero.
        value: the unrounded number, where it is one.
        spread: its standard deviation over seeds, where it is a mean.
        emphasis: whether it is the best of its group, or of the rows of its kind there.
    """

    text: str = DASH
    value: float | None = None
    spread: float | None = None
    emphasis: Emphasis = ""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        cells: by column; a column without one is missing.
        group: the heading that the row stands under; rows of a group follow one another.
        kind: `measured` or `quoted` where a table has both, else empty.
        mark: a letter that stands beside the row's first cell and its note.
        note: what a reader must know to trust the row's numbers.
        source: where a quoted row is from.
        again: of each run of a measured row, the command that repeats it and the commit that it was of, if known.
        runs: the ids of the runs that a measured row is made of.
    """

    cells: Mapping[str, Cell]
    group: str = ""
    kind: Literal["", "measured", "quoted"] = ""
    mark: str = ""
    note: str = ""
    source: str = ""
    again: tuple[tuple[str, str], ...] = ()
    runs: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What repeats it; of several runs, a line each."""
        return "\n".join(command for command, _ in self.again)

    def cell(self, column: str) -> Cell:
        return self.cells.get(column, Cell())


@dataclass(frozen=True)
class Table:
    """A table to be rendered.

    Attributes:
        title: what it compares.
        columns: their names, in order.
        rows: in order.
        notes: what a reader must know to trust the numbers, one sentence or a few each.
        figures: file names of the figures that belong to it, by what they show.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    figures: Mapping[str, str] = field(default_factory=dict)

    @property
    def numeric(self) -> tuple[str, ...]:
        """The columns that hold numbers and nothing else."""
        cells = {column: [row.cell(column) for row in self.rows] for column in self.columns}
        return tuple(
            column
            for column in self.columns
            if any(cell.value is not None for cell in cells[column])
            and all(cell.value is not None or cell.text == DASH for cell in cells[column])
        )

    def column(self, name: str) -> list[float | str | None]:
        """The values of a column: numbers unrounded, texts, None where there is nothing."""
        cells = [row.cell(name) for row in self.rows]
        return [cell.value if cell.value is not None else None if cell.text == DASH else cell.text for cell in cells]


def percent(share: float | None) -> Cell:
    """A share in [0, 1] as percent."""
    return Cell() if share is None else number(100 * share)


def number(value: float | None, spread: float | None = None, digits: int = 2) -> Cell:
    """A number with so many decimals, and its deviation."""
    if value is None or value != value:
        return Cell()
    if spread is None or spread != spread:
        return Cell(f"{value:.{digits}f}", float(value))
    return Cell(f"{value:.{digits}f} ± {spread:.{digits}f}", float(value), float(spread))


def text(value: object) -> Cell:
    """A text, or a number as it stands; a dash for what is missing."""
    missing = value is None or value != value or value == ""
    return Cell() if missing else Cell(str(value), float(value) if isinstance(value, int | float) else None)


def flops(count: float | None) -> Cell:
    """FLOPs as the paper writes them: 8.8K, 82.7M, 5.22G."""
    if count is None or count != count:
        return Cell()
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= 0.9995 * size:  # what rounds to 1000K is 1M
            return Cell(f"{count / size:.3g}{unit}", float(count))
    return Cell(f"{count:.0f}", float(count))


def eps_text(eps: float) -> str:
    """A radius in pixels as papers write it: 0.3, 8/255."""
    levels = round(255 * eps)
    return f"{levels}/255" if abs(255 * eps - levels) < 1e-6 and float(f"{eps:.3g}") != eps else f"{eps:g}"


def emphasized(rows: Sequence[Row], columns: Sequence[str]) -> tuple[Row, ...]:
    """The rows with the best of each group marked in each column, and the best of each kind where that is another.

    What is compared is what a reader sees: equals to the last digit shown are best together.
    """
    best = _best(rows, columns, lambda row: (row.group,))
    kinds = _best(rows, columns, lambda row: (row.group, row.kind))
    marked = []
    for place, row in enumerate(rows):
        cells = dict(row.cells)
        for column in columns:
            emphasis: Emphasis = ""
            if (place, column) in best:
                emphasis = "best"
            elif (place, column) in kinds:
                emphasis = "best of kind"
            if emphasis:
                cells[column] = dataclasses.replace(cells[column], emphasis=emphasis)
        marked.append(dataclasses.replace(row, cells=cells))
    return tuple(marked)


def _best(rows: Sequence[Row], columns: Sequence[str], of: Callable[[Row], tuple[str, ...]]) -> set[tuple[int, str]]:
    """The places and columns of the best values, one set for each that `of` tells apart; none among fewer than two."""
    found: set[tuple[int, str]] = set()
    for column in columns:
        values: dict[tuple[str, ...], list[tuple[float, int]]] = {}
        for place, row in enumerate(rows):
            cell = row.cell(column)
            if cell.value is not None:
                shown = float(cell.text.split(" ")[0])
                values.setdefault(of(row), []).append((shown, place))
        for pairs in values.values():
            pick = (max if MORE_IS_BETTER[column] else min)(value for value, _ in pairs)
            found |= {(place, column) for value, place in pairs if value == pick and len(pairs) > 1}
    return found
