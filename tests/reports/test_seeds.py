"""Comparison over seeds: intervals, rows, quoted rows of interest, and the figure of clean and certified accuracy."""

import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer

from linflab.reports import schema
from linflab.reports.front import front_figure, pareto_rows
from linflab.reports.intervals import confidence_half_width
from linflab.reports.rendering import to_csv
from linflab.reports.seeds import MAX_QUOTED, compare_over_seeds
from linflab.reports.tables import CERTIFIED, METHOD, TEST, Cell, Row
from tests.conftest import has_words
from tests.reports.runs import make_run

# 0.975 quantiles of Student's t by degrees of freedom, from printed tables.
T_QUANTILES = {1: 12.7062047, 2: 4.3026527, 3: 3.1824463, 4: 2.7764451, 9: 2.2621572}


@given(st.sampled_from(list(T_QUANTILES)), st.data())
def test_interval_agrees_with_tabulated_quantiles(degrees: int, data: st.DataObject) -> None:
    accuracies = st.floats(0, 100)
    values = np.array(data.draw(st.lists(accuracies, min_size=degrees + 1, max_size=degrees + 1)))
    expected = T_QUANTILES[degrees] * np.std(values, ddof=1) / np.sqrt(len(values))
    half_width = confidence_half_width([*values.tolist(), math.nan])
    assert half_width == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_intervals_cover_the_true_mean_in_95_percent_of_draws() -> None:
    draws = np.random.default_rng(0).normal(70, 0.5, (2000, 3))
    covers = [abs(np.mean(values) - 70) <= (confidence_half_width(values.tolist()) or 0) for values in draws]
    assert np.mean(covers) == pytest.approx(0.95, abs=0.015)  # three standard errors


def test_one_value_has_no_interval() -> None:
    assert confidence_half_width([70.0]) is None and confidence_half_width([70.0, math.nan]) is None


def _runs(method: str, certified: list[float], number: int = 0, **other: object) -> pd.DataFrame:
    """Return runs with these certified accuracies, one for each seed, whose clean accuracy is 0.1 higher."""
    return pd.DataFrame(
        [
            make_run(
                100 * number + seed,
                value,
                value,
                method=method,
                seed=str(seed),
                **{schema.TEST_CLEAN: value + 0.1, "model.kind": method, **other},
            )
            for seed, value in enumerate(certified)
        ]
    )


def test_rows_have_mean_deviation_and_interval_of_each_recipe() -> None:
    first, second = [0.70, 0.72, 0.71], [0.75, 0.74, 0.79]
    comparison = compare_over_seeds([("one", _runs("A", first)), ("two", _runs("B", second, 1))], quoted=False)
    assert [row.cell(METHOD).text for row in comparison.table.rows] == ["A", "B"]
    for row, values in zip(comparison.table.rows, (first, second), strict=True):
        percent = 100 * np.array(values)
        half_width = T_QUANTILES[2] * percent.std(ddof=1) / np.sqrt(3)
        assert row.cell(CERTIFIED).text == f"{percent.mean():.2f} ± {percent.std(ddof=1):.2f}"
        assert row.cell("Certified CI").value == pytest.approx(half_width, rel=1e-6)
        assert row.cell("Certified CI").text == f"± {half_width:.2f}"
        assert row.cell("Clean CI").value == pytest.approx(half_width, rel=1e-6)
        assert row.cell("Runs").text == "3" and len(row.reproduce_commands) == 3
    assert "Certified CI" in comparison.table.columns
    notes = " ".join(comparison.table.notes)
    assert has_words(notes, "Student's t") and has_words(notes, "95%") and has_words(notes, "25 epochs")
    exact = pd.read_csv(pd.io.common.StringIO(to_csv(comparison.table)))
    assert exact["Certified"].tolist() == pytest.approx([100 * np.mean(first), 100 * np.mean(second)])


def test_single_seeds_have_no_interval_and_a_note() -> None:
    runs = [("one", _runs("A", [0.7])), ("two", _runs("B", [0.6, 0.7], 1))]
    table = compare_over_seeds(runs, quoted=False).table
    assert table.rows[0].cell("Certified CI").text == "-"
    assert any("one seed" in note.lower() for note in table.notes)
    table = compare_over_seeds(runs[:1], quoted=False).table
    assert "Certified CI" not in table.columns and any("one seed" in note.lower() for note in table.notes)


def test_different_budgets_are_stated() -> None:
    runs = [("one", _runs("A", [0.7])), ("two", _runs("B", [0.6], 1, **{schema.EPOCHS: "100"}))]
    table = compare_over_seeds(runs, quoted=False, more_notes=["a note"]).table
    assert "a note" in table.notes and any(has_words(note, "25 to 100 epochs") for note in table.notes)
    assert [row.cell("Epochs").text for row in table.rows] == ["25", "100"] and "Hours" in table.columns


def test_long_quoted_part_is_reduced_to_methods_and_front() -> None:
    settings = {"dataset": "cifar10", "eps": str(8 / 255)}
    comparison = compare_over_seeds([("r", _runs("CROWN-IBP", [0.3, 0.31], **settings))], quoted=True)
    shown = [row for row in comparison.table.rows if row.origin == "quoted"]
    assert len(comparison.published) > MAX_QUOTED > len(shown)
    front = pareto_rows(comparison.published)
    for row in comparison.published:
        is_relevant = row.cell(METHOD).text.startswith("CROWN-IBP") or any(row is one for one in front)
        is_best = row.cell(CERTIFIED).text == "41.78"  # without clean accuracy
        assert (row.cell(METHOD).text in {one.cell(METHOD).text for one in shown}) == (is_relevant or is_best)
    left_out = len(comparison.published) - len(shown)
    assert any(has_words(note, f"{left_out} of {len(comparison.published)}") for note in comparison.table.notes)
    few = compare_over_seeds([("r", _runs("CROWN-IBP", [0.7]))], quoted=True)  # Fashion-MNIST
    assert len(few.table.rows) == len(few.published) + 1
    none = compare_over_seeds([("r", _runs("CROWN-IBP", [0.7]))], quoted=False)
    assert len(none.table.rows) == 1 and not none.published


def _row(name: str, clean: float | None, certified: float | None, **other: object) -> Row:
    return Row(
        {METHOD: Cell(name), TEST: Cell("x", clean) if clean is not None else Cell(), CERTIFIED: Cell("x", certified)},
        **other,  # type: ignore[arg-type]
    )


points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8)


@given(points)
def test_pareto_rows_are_those_that_no_row_surpasses(pairs: list[tuple[int, int]]) -> None:
    rows = [_row(str(index), clean, certified) for index, (clean, certified) in enumerate(pairs)]
    front = pareto_rows([*rows, _row("without clean accuracy", None, 9)])
    found = [(row.cell(TEST).value, row.cell(CERTIFIED).value) for row in front]
    expected = {
        (a, b) for a, b in pairs if not any((c, d) != (a, b) and c >= a and d >= b for c, d in pairs)
    }  # without dominated pairs
    assert found == sorted(expected)


def test_figure_shows_all_results_near_the_front() -> None:
    quoted = [
        _row("IBP (X)", 60.0, 40.0),
        _row("SABR (X)", 65.0, 39.0, selected_on="test"),
        _row("worse", 58.0, 35.0),
        _row("far away", 57.0, 2.0),
        _row("no clean accuracy", None, 50.0),
    ]
    runs = [("a", _runs("A", [0.369, 0.37, 0.371])), ("b", _runs("B", [0.40, 0.42], 1))]
    comparison = compare_over_seeds(runs, quoted=False)
    figure = front_figure(comparison.measured, quoted, "title $1")
    (axes,) = figure.axes
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    np.testing.assert_allclose(lines["published"].get_xydata(), [(60, 40), (58, 35)])
    hollow = lines["published, selected on test images"]
    np.testing.assert_allclose(hollow.get_xydata(), [(65, 39)])
    assert to_rgb(hollow.get_markerfacecolor()) == (1, 1, 1) != to_rgb(lines["published"].get_markerfacecolor())
    np.testing.assert_allclose(lines["Pareto front of published results"].get_xydata(), [(60, 40), (65, 39)])
    bars = [one for one in axes.containers if isinstance(one, ErrorbarContainer)]
    np.testing.assert_allclose([bar.lines[0].get_xydata()[0] for bar in bars], [(47, 37), (51, 41)])
    half_width = T_QUANTILES[2] * np.std([36.9, 37, 37.1], ddof=1) / np.sqrt(3)
    horizontal, vertical = (bar.get_segments()[0] for bar in bars[0].lines[2])
    np.testing.assert_allclose(horizontal, [(47 - half_width, 37), (47 + half_width, 37)], rtol=1e-6)
    np.testing.assert_allclose(vertical, [(47, 37 - half_width), (47, 37 + half_width)], rtol=1e-6)
    for segments in bars[1].lines[2]:  # two runs: no interval
        np.testing.assert_allclose(segments.get_segments()[0], [(51, 41), (51, 41)])
    (legend,) = figure.legends
    entries = [text.get_text() for text in legend.get_texts()]
    assert entries[:2] == ["A (a)", "B (b)"] and {"1: IBP (X)", "2: SABR (X)"} <= set(entries)
    assert any(re.search(r"outside.*\b1\b", entry) for entry in entries)


@pytest.mark.parametrize("num_measured", [1, 12])
def test_legend_and_labels_fit_into_the_figure(num_measured: int) -> None:
    runs = [(str(k), _runs(f"method {k}", [0.5 + k / 100, 0.51 + k / 100], k)) for k in range(num_measured)]
    quoted = [_row(f"SABR with long name (Author et al., {k})", 60.0 + k, 50.0 - k) for k in range(8)]
    figure = front_figure(compare_over_seeds(runs, quoted=False).measured, quoted, "CIFAR-10 (eps = 2/255)")
    figure.draw_without_rendering()
    frame = figure.bbox.padded(1)
    (axes,), (legend,) = figure.axes, figure.legends
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *legend.get_texts()):
        extent = text.get_window_extent()
        assert frame.x0 <= extent.x0 and extent.x1 <= frame.x1, text.get_text()
        assert frame.y0 <= extent.y0 and extent.y1 <= frame.y1, text.get_text()
    assert axes.get_window_extent().height > 200  # the legend leaves room for the axes
