"""Data of a table for a paper: shown text and unrounded number of each cell."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

METHOD, MODEL, SETTING, EPOCHS, FLOPS = "Method", "Model", "Hyperparameters", "Epochs", "FLOPs"
VALIDATION_CLEAN, VALIDATION, VERIFIED = "Val. clean", "Val. certified", "Val. verified"
TEST, ROBUST, CERTIFIED, TEST_VERIFIED = "Clean", "Robust", "Certified", "Verified"
INTERVALS = {column: f"{column} CI" for column in (TEST, ROBUST, CERTIFIED)}  # columns of half-widths
EPOCH_SECONDS, HOURS, CPUS, RUNS = "Time/epoch (s)", "Hours", "CPUs", "Runs"
NUMBER = "#"
MISSING = "-"

Emphasis = Literal["", "best", "best of kind"]
Selection = Literal["", "test", "validation", "unknown"]
TEST_MARK = "†"
HIGHER_IS_BETTER = {TEST: True, ROBUST: True, CERTIFIED: True, EPOCH_SECONDS: False}


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: Shown text; a missing value is a dash, never a zero.
        value: Unrounded number, if any.
        std: Standard deviation over seeds, if the value is a mean.
        emphasis: `best` if it is the best of its group, `best of kind` if it is the best of the group's measured or
            quoted rows, else empty.
    """

    text: str = MISSING
    value: float | None = None
    std: float | None = None
    emphasis: Emphasis = ""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        cells: Cells by column; columns without a cell are shown as missing.
        group: Heading above the row; rows of a group are adjacent.
        origin: `measured` or `quoted` if a table has both, else empty.
        footnote_mark: Letter that marks the first cell of the row and its footnote.
        footnote: Conditions under which the row was measured.
        source: Source of a quoted row.
        selected_on: Images on which settings, runs or epochs were selected; empty if the row does not state it. Rows
            selected on test images have the mark `TEST_MARK`.
        reproduce_commands: Command and commit (empty if unknown) of each run of a measured row, and of members.
        runs: Ids of the runs of a measured row.
        basis: Measurement conditions by column, such as the attacks. Columns without an entry are comparable between
            all rows.
    """

    cells: Mapping[str, Cell]
    group: str = ""
    origin: Literal["", "measured", "quoted"] = ""
    footnote_mark: str = ""
    footnote: str = ""
    source: str = ""
    selected_on: Selection = ""
    reproduce_commands: tuple[tuple[str, str], ...] = ()
    runs: tuple[str, ...] = ()
    basis: Mapping[str, str] = field(default_factory=dict)

    @property
    def mark(self) -> str:
        """Mark of the first cell: the footnote's letter, or `TEST_MARK`; empty if there is none."""
        return self.footnote_mark or (TEST_MARK if self.selected_on == "test" else "")

    @property
    def command(self) -> str:
        """Commands to reproduce the row, one per line."""
        return "\n".join(command for command, _ in self.reproduce_commands)

    def cell(self, column: str) -> Cell:
        """Return the cell of a column, or a missing one."""
        return self.cells.get(column, Cell())


@dataclass(frozen=True)
class Table:
    """A table to be rendered.

    Attributes:
        title: Title.
        columns: Names of the columns, in order.
        rows: Rows, in order.
        notes: Facts about the numbers, one or a few sentences each.
        figures: File names of its figures by description.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    figures: Mapping[str, str] = field(default_factory=dict)

    @property
    def numeric(self) -> tuple[str, ...]:
        """Columns that hold only numbers."""
        cells = {column: [row.cell(column) for row in self.rows] for column in self.columns}
        return tuple(
            column
            for column in self.columns
            if any(cell.value is not None for cell in cells[column])
            and all(cell.value is not None or cell.text == MISSING for cell in cells[column])
        )

    def column(self, name: str) -> list[float | str | None]:
        """Return the values of a column: unrounded numbers, texts, or None if missing."""
        cells = [row.cell(name) for row in self.rows]
        return [cell.value if cell.value is not None else None if cell.text == MISSING else cell.text for cell in cells]


def percent_cell(share: float | None) -> Cell:
    """Return the cell of a fraction in [0, 1], shown in percent."""
    return Cell() if share is None else number_cell(100 * share)


def number_cell(value: float | None, std: float | None = None, digits: int = 2) -> Cell:
    """Return the cell of a number and its standard deviation, with this number of decimals."""
    if value is None or value != value:
        return Cell()
    if std is None or std != std:
        return Cell(f"{value:.{digits}f}", float(value))
    return Cell(f"{value:.{digits}f} ± {std:.{digits}f}", float(value), float(std))


def text_cell(value: object) -> Cell:
    """Return the cell of a text or an unformatted number; a dash if it is missing."""
    missing = value is None or value != value or value == ""
    return Cell() if missing else Cell(str(value), float(value) if isinstance(value, int | float) else None)


def flops_cell(count: float | None) -> Cell:
    """Return the cell of FLOPs, with three digits and a unit: 8.8K, 82.7M, 5.22G."""
    if count is None or count != count:
        return Cell()
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= 0.9995 * size:  # 1000K is shown as 1M
            return Cell(f"{count / size:.3g}{unit}", float(count))
    return Cell(f"{count:.0f}", float(count))


def format_eps(eps: object) -> str:
    """Format an l_inf radius for pixel values in [0, 1], such as 0.3 or 8/255; other text is unchanged."""
    try:
        eps = float(str(eps))
        levels = round(255 * eps)
    except (ValueError, OverflowError):
        return str(eps)
    return f"{levels}/255" if abs(255 * eps - levels) < 1e-6 and float(f"{eps:.3g}") != eps else f"{eps:g}"


def highlight_best(rows: Sequence[Row], columns: Sequence[str]) -> tuple[Row, ...]:
    """Return rows with the best value of each group, and of its measured and quoted rows, emphasized.

    Rounded values are compared, so ties share the emphasis. If the compared rows
    differ in `Row.basis` for a column, none of them is emphasized in that column.

    Args:
        rows: Rows of a table.
        columns: Columns to compare, keys of `HIGHER_IS_BETTER`.
    """
    best = _best_cells(rows, columns, lambda row: (row.group,))
    kinds = _best_cells(rows, columns, lambda row: (row.group, row.origin))
    highlighted = []
    for index, row in enumerate(rows):
        cells = dict(row.cells)
        for column in columns:
            emphasis: Emphasis = ""
            if (index, column) in best:
                emphasis = "best"
            elif (index, column) in kinds:
                emphasis = "best of kind"
            if emphasis:
                cells[column] = dataclasses.replace(cells[column], emphasis=emphasis)
        highlighted.append(dataclasses.replace(row, cells=cells))
    return tuple(highlighted)


def _best_cells(
    rows: Sequence[Row], columns: Sequence[str], key_of_row: Callable[[Row], tuple[str, ...]]
) -> set[tuple[int, str]]:
    """Return row index and column of the best values, for each key with at least two values."""
    best: set[tuple[int, str]] = set()
    for column in columns:
        values: dict[tuple[str, ...], list[tuple[float, int]]] = {}
        bases: dict[tuple[str, ...], set[str]] = {}
        for index, row in enumerate(rows):
            cell = row.cell(column)
            if cell.value is not None:
                rounded_value = float(cell.text.split(" ")[0])
                values.setdefault(key_of_row(row), []).append((rounded_value, index))
                bases.setdefault(key_of_row(row), set()).update({row.basis[column]} if column in row.basis else ())
        for key, pairs in values.items():
            if len(bases[key]) > 1:
                continue
            pick = (max if HIGHER_IS_BETTER[column] else min)(value for value, _ in pairs)
            best |= {(index, column) for value, index in pairs if value == pick and len(pairs) > 1}
    return best
