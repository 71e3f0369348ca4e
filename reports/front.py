"""Figure of clean against certified accuracy of measured and published results, with their Pareto fronts."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from linflab.reports.figures import DARK, LIGHT, make_axes
from linflab.reports.tables import CERTIFIED, INTERVALS, METHOD, TEST, Row

WIDTH, HEIGHT, LINE_HEIGHT = 5.2, 3.1, 0.15  # inches: axes, and a line of the legend
MIN_SPAN = 1.0  # of an axis, in percentage points
CLOSE = 0.035  # distance of points that share a label, as a fraction of the axes
MIN_RUNS = 3  # for error bars
MARKERS = "oDs^vP*<>Xph"  # one for each measured row
GRAY, MEDIUM = "0.45", "#6d87b0"


def pareto_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that no other row surpasses in clean and certified accuracy, by ascending clean accuracy.

    Rows that lack one of these accuracies are left out; of rows with equal accuracies, the first is kept.
    """
    front: list[Row] = []
    best = float("-inf")
    for row in sorted(filter(_has_accuracies, rows), key=lambda row: _accuracies(row), reverse=True):
        if _accuracies(row)[1] > best:
            front.append(row)
            best = _accuracies(row)[1]
    return front[::-1]


def front_figure(measured: Sequence[Row], quoted: Sequence[Row], title: str) -> Figure:
    """Plot certified over clean accuracy, with error bars for confidence intervals and a line for each Pareto front.

    Rows of two runs have no error bars: their intervals of 12.7 standard errors would dominate the figure.

    Published results that were selected on test images are hollow. Numbers and the legend name those on the published
    Pareto front. Results without clean or certified accuracy are left out. Published results far from all others are
    outside the axes; the legend counts them.

    Args:
        measured: Measured rows of a table, each with its own marker and legend entry.
        quoted: Quoted rows.
        title: Title of the figure.
    """
    quoted, measured = list(filter(_has_accuracies, quoted)), list(filter(_has_accuracies, measured))
    front = pareto_rows(quoted)
    figure, axes = make_axes(title, (WIDTH, HEIGHT + LINE_HEIGHT * -(-(len(measured) + len(front) + 4) // 2)))
    is_shown = _limit_axes(axes, measured, quoted, front)
    _plot_front(axes, measured, "-", DARK, "Pareto front of measured results")
    for is_hollow, label in ((False, "published"), (True, "published, selected on test images")):
        points = [_accuracies(row) for row in quoted if (row.selected_on == "test") == is_hollow and is_shown(row)]
        if points:
            color = "white" if is_hollow else LIGHT
            axes.plot(*zip(*points, strict=True), "o", color=color, mec=GRAY, mew=0.8, ms=4.5, label=label)
    _plot_front(axes, quoted, "--", GRAY, "Pareto front of published results")
    for number, row in enumerate(measured):
        errors = [_error(row, column) for column in (TEST, CERTIFIED)]
        axes.errorbar(
            *_accuracies(row),
            yerr=errors[1],
            xerr=errors[0],
            fmt=MARKERS[number % len(MARKERS)],
            color=DARK,
            ms=5.5,
            mec="white",
            mew=0.6,
            ecolor=MEDIUM,
            elinewidth=0.8,
            capsize=2,
            zorder=3,
            label=row.cell(METHOD).text + (f" ({row.footnote_mark})" if row.footnote_mark else ""),
        )
    _number_points(axes, front)
    if hidden := sum(not is_shown(row) for row in quoted):
        axes.plot([], [], " ", label=f"outside the axes: {hidden} published")
    axes.set_xlabel("clean accuracy (%)", fontsize=9)
    axes.set_ylabel("certified accuracy (%)", fontsize=9)
    axes.tick_params(labelsize=8)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: not isinstance(handles[index], ErrorbarContainer))
    figure.legend(
        [handles[index] for index in order],
        [labels[index] for index in order],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=7,
    )
    return figure


def _error(row: Row, column: str) -> float:
    return (row.cell(INTERVALS[column]).value or 0.0) if len(row.runs) >= MIN_RUNS else 0.0


def _limit_axes(
    axes: Axes, measured: Sequence[Row], quoted: Sequence[Row], front: Sequence[Row]
) -> Callable[[Row], bool]:
    """Set limits that contain measured rows, the front and what is near; return whether a row is within them."""
    limits = []
    for index, column in enumerate((TEST, CERTIFIED)):
        centers = [(_accuracies(row)[index], _error(row, column)) for row in [*measured, *front]]
        low, high = min(value - error for value, error in centers), max(value + error for value, error in centers)
        span = max(high - low, MIN_SPAN)
        near = [value for value in (_accuracies(row)[index] for row in quoted) if value >= low - span]
        low = min([low, *near])
        limits.append((low - 0.06 * (high - low) - 0.1, high + 0.06 * (high - low) + 0.1))
    axes.set(xlim=limits[0], ylim=limits[1])
    return lambda row: all(low <= value <= high for value, (low, high) in zip(_accuracies(row), limits, strict=True))


def _number_points(axes: Axes, front: Sequence[Row]) -> None:
    """Write numbers at the points of a front, one label for points that are close, and name them in the legend."""
    scale = [high - low for low, high in (axes.get_xlim(), axes.get_ylim())]
    groups: list[list[int]] = []
    for number, row in enumerate(front):
        near = groups and all(
            abs(one - other) < CLOSE * size
            for one, other, size in zip(_accuracies(row), _accuracies(front[groups[-1][-1]]), scale, strict=True)
        )
        groups[-1].append(number) if near else groups.append([number])
        axes.plot([], [], " ", label=f"{number + 1}: {row.cell(METHOD).text}")
    for group in groups:
        text = ",".join(str(number + 1) for number in group)
        point = _accuracies(front[group[-1]])
        axes.annotate(text, point, xytext=(3, 3), textcoords="offset points", fontsize=7, color=GRAY)


def _plot_front(axes: Axes, rows: Sequence[Row], style: str, color: str, label: str) -> None:
    front = [_accuracies(row) for row in pareto_rows(rows)]
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), style, color=color, lw=1.2, zorder=2, label=label)


def _has_accuracies(row: Row) -> bool:
    return row.cell(TEST).value is not None and row.cell(CERTIFIED).value is not None


def _accuracies(row: Row) -> tuple[float, float]:
    """Return clean and certified accuracy in percent."""
    clean, certified = row.cell(TEST).value, row.cell(CERTIFIED).value
    assert clean is not None and certified is not None
    return clean, certified
