"""Figures: drawn data, omitted parts and layout."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from linflab.reports import schema
from linflab.reports.figures import (
    certified_accuracy_curve,
    escape_missing_glyphs,
    importance_figure,
    learning_curves,
    log_ticks,
    margin_cdf,
    pareto_front_figure,
    radius_histogram,
    save_figure,
    slice_figure,
)


def test_learning_curves_omit_missing_metrics() -> None:
    """Networks without distance layers have no p; trainings on all images have no validation accuracy."""
    history = {
        schema.VALIDATION_CLEAN: {1: 0.5, 2: 0.7},
        schema.TRAIN_LOSS: {1: 1.0, 2: 0.5},
        schema.P: {1: 8.0},
        schema.LEARNING_RATE: {1: 0.1, 2: 0.05},
    }
    shown = {schema.P: "p (log)", schema.VALIDATION_CLEAN: "accuracy on validation (%)"}
    for missing, panel in [("", ""), *shown.items()]:
        figure = learning_curves({name: curve for name, curve in history.items() if name != missing}, "IBP")
        labels = [axes.get_ylabel() for axes in figure.axes]
        assert len(labels) == 4 - bool(missing) and panel not in labels


def test_learning_curves_show_each_metric_by_epoch() -> None:
    history = {
        schema.VALIDATION_CLEAN: {1: 0.5, 2: 0.7, 3: 0.75},
        schema.VALIDATION_CERTIFIED: {1: 0.25, 3: 0.5},
        schema.TRAIN_LOSS: {1: 1.0, 2: 0.5, 3: 0.25},
    }
    accuracies, loss = learning_curves(history, "net").axes
    clean, certified = accuracies.get_lines()
    np.testing.assert_allclose(clean.get_xydata(), [(1, 50), (2, 70), (3, 75)])
    np.testing.assert_allclose(certified.get_xydata(), [(1, 25), (2, np.nan), (3, 50)])
    assert [str(line.get_label()) for line in (clean, certified)] == ["clean", "certified"]
    np.testing.assert_allclose(loss.get_lines()[0].get_xydata(), [(1, 1), (2, 0.5), (3, 0.25)])
    assert {axes.get_xlabel() for axes in (accuracies, loss)} == {"epoch"}


def test_certified_accuracy_falls_at_each_radius() -> None:
    """One of four images has no radius; robust accuracies are points."""
    (axes,) = certified_accuracy_curve(np.array([0.2, -1.0, 0.1, 0.3]), "digits", "lipschitz", {0.1: 0.6}).axes
    curve, attacked = axes.get_lines()
    assert curve.get_drawstyle() == "steps-post"
    np.testing.assert_allclose(curve.get_xydata(), [(0, 75), (0.1, 50), (0.2, 25), (0.3, 0)])
    np.testing.assert_allclose(attacked.get_xydata(), [(0.1, 60)])
    assert "lipschitz" in str(curve.get_label()) and axes.get_ylim() == (0, 100)
    assert "eps" in axes.get_xlabel() and "digits" in axes.get_title() and "4" in axes.get_title()


def test_radius_histogram_counts_images_with_a_radius() -> None:
    radii = np.concatenate([np.linspace(0.01, 0.4, 70), np.zeros(13)])
    (axes,) = radius_histogram(radii, "digits", "ibp").axes
    counts = [bar.get_height() for bar in axes.patches]
    assert sum(counts) == 70 and len(counts) == 40 and axes.get_ylabel() == "images"
    assert "ibp" in axes.get_xlabel() and "83" in axes.get_title() and "13" in axes.get_title()


def test_margin_cdf_shows_percentages_and_eps() -> None:
    (axes,) = margin_cdf(np.array([-0.1, 0.05, 0.2, 0.3]), 0.1, "digits").axes
    curve, eps = axes.get_lines()
    xs, percentages = np.asarray(curve.get_xydata()).T
    assert [percentages[xs <= radius].max() for radius in (-0.1, 0.05, 0.2, 0.3)] == [25, 50, 75, 100]
    assert set(np.asarray(eps.get_xdata())) == {0.1} and "0.1" in str(eps.get_label()) and "50" in str(eps.get_label())


def test_pareto_front_joins_and_labels_its_trials() -> None:
    trials = pd.DataFrame(
        {
            schema.TRIAL: ["1", "2", "3"], "dataset": "digits", "eps": "0.1",
            schema.BEST_VALIDATION_CLEAN: [0.9, 0.8, 0.7], schema.BEST_VALIDATION_CERTIFIED: [0.5, 0.6, 0.4],
        }
    )  # fmt: skip
    (axes,) = pareto_front_figure(trials, trials.head(2)).axes
    points, joined = axes.get_lines()
    np.testing.assert_allclose(points.get_xydata(), [(90, 50), (80, 60), (70, 40)])
    np.testing.assert_allclose(joined.get_xydata(), [(80, 60), (90, 50)])
    assert {text.get_text() for text in axes.texts} == {"#1", "#2"}


def test_importances_are_bars_with_the_largest_on_top() -> None:
    (axes,) = importance_figure({"model.width": 0.75, "seed": 0.25}, "certified accuracy").axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [25, 75]  # from bottom to top
    assert [label.get_text() for label in axes.get_yticklabels()] == ["seed", "model.width"]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([0.01, 0.1, 1.0, 10.0, 100.0], "log"),  # spread by ratios
        ([2.86e-5, 0.05, 0.1, 0.15, 0.2, 0.25], "linear"),  # spread evenly, one value near 0
        ([64.0, 96.0, 128.0], "linear"),
        ([0.0, 1.0, 100.0], "linear"),
    ],
)
def test_axis_of_a_setting_follows_its_spread(values: list[float], scale: str) -> None:
    trials = pd.DataFrame({"optimizer.learning_rate": map(str, values), "val": 0.5})
    figure = slice_figure(trials, ["optimizer.learning_rate"], "val", "certified accuracy")
    assert [axes.get_xscale() for axes in figure.axes] == [scale]
    np.testing.assert_allclose(figure.axes[0].get_lines()[0].get_xydata(), [(value, 50) for value in values])


@pytest.mark.parametrize(("low", "high"), [(8, 1000), (8, 12), (8, 8), (8, 60), (2, 1e6), (1, 1.01), (3.3, 47)])
def test_ticks_of_p_are_few_and_inside(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 1 <= len(ticks) <= 7 and len(set(ticks)) == len(ticks)
    assert all(0.99 * low <= tick <= 1.01 * high for tick in ticks)


@pytest.mark.parametrize("end", [1000.0, 12.0, 8.0])
def test_labels_of_p_do_not_overlap(end: float) -> None:
    curve = {epoch: 8.0 * (end / 8) ** ((epoch - 1) / 9) for epoch in range(1, 11)}
    history = {schema.TRAIN_LOSS: dict.fromkeys(range(1, 13), 1.0), schema.P: curve}
    figure = learning_curves(history, "net")
    figure.draw_without_rendering()
    (axes,) = [axes for axes in figure.axes if axes.get_yscale() == "log"]
    assert not [label for label in axes.get_yticklabels(minor=True) if label.get_text()]
    shown = [label.get_window_extent() for label in axes.get_yticklabels() if label.get_text()]
    assert shown and not any(one.overlaps(other) for one, other in combinations(shown, 2))


@pytest.mark.parametrize("eps", [0.0005, 0.01, 0.1, 0.3, 0.5])
def test_label_of_eps_is_inside_and_off_the_curve(eps: float) -> None:
    radii = np.random.default_rng(0).normal(0.15, 0.08, 1000)
    figure = margin_cdf(radii, eps, "digits")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert legend is not None
    box, inside = legend.get_window_extent(), axes.get_window_extent()
    assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
    curve = axes.transData.transform(np.asarray(axes.get_lines()[0].get_xydata()))
    assert not ((box.x0 < curve[:, 0]) & (curve[:, 0] < box.x1) & (box.y0 < curve[:, 1]) & (curve[:, 1] < box.y1)).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["$x^", "a$b_c$", "\x1b[31m", "\u662f\u202e\x00", "[/red] \\frac{", "a\nb"])
def test_names_in_figures_are_text(name: str, tmp_path: Path) -> None:
    trials = pd.DataFrame({"model.size": pd.Series([name, "other"], dtype=object), "val": [0.1, 0.2]})
    history = {schema.TRAIN_LOSS: {1: 1.0}}
    for number, figure in enumerate(
        [learning_curves(history, name), slice_figure(trials, ["model.size"], "val", "x"),
         margin_cdf(np.array([0.1, 0.2]), 0.1, name), certified_accuracy_curve(np.array([0.1]), name, name, {}),
         radius_histogram(np.array([0.1]), name, name)]
    ):  # fmt: skip
        assert {path.suffix for path in save_figure(figure, tmp_path, str(number))} == {".png", ".pdf"}
        assert all(escape_missing_glyphs(text.get_text()) == text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_titles_of_slices_fit_into_the_figure(count: int) -> None:
    paths = [f"model.width{k}" for k in range(count)]
    trials = pd.DataFrame({**{path: ["1", "2"] for path in paths}, "val": [0.5, 0.6], schema.EPOCHS: "3"})
    figure = slice_figure(trials, paths, "val", "certified accuracy on validation")
    figure.canvas.draw()
    titles = [text for text in figure.findobj(Text) if "over each setting" in text.get_text()]
    assert len(titles) == 1
    extent, frame = titles[0].get_window_extent(), figure.bbox
    assert frame.x0 <= extent.x0 and extent.x1 <= frame.x1 and extent.y1 <= frame.y1


def test_texts_of_run_figures_fit_into_the_figure() -> None:
    radii = np.concatenate([np.linspace(-0.1, 0.4, 200), np.full(15, 0.1)])  # bars of two-digit counts
    for figure in (
        radius_histogram(radii, "fashion_mnist", "lipschitz-sound"),
        certified_accuracy_curve(radii, "fashion_mnist", "lipschitz-sound", {}),
        margin_cdf(radii, 0.1, "fashion_mnist"),
    ):
        figure.draw_without_rendering()
        (axes,) = figure.axes
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            extent, frame = text.get_window_extent(), figure.bbox.padded(1)  # extents are rounded to pixels
            assert frame.x0 <= extent.x0 and extent.x1 <= frame.x1, text.get_text()
            assert frame.y0 <= extent.y0 and extent.y1 <= frame.y1, text.get_text()
