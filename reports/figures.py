"""Figures for papers, readable in grayscale and without color vision."""

import math
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator

from linflab.reports import schema
from linflab.reports.formatting import short_name
from linflab.reports.outputs import write_whole
from linflab.reports.plain import escape_invisible, shorten
from linflab.reports.tables import format_eps

MAX_TICKS = 7
MAX_TICK_LENGTH = 16  # characters
FIGURE_SIZE = (4.2, 2.9)  # inches, one column of a paper
DARK, LIGHT = "#20406a", "#9db7d5"


def certified_accuracy_curve(
    radii: np.ndarray, dataset: str, certificate: str, robust: Mapping[float, float]
) -> Figure:
    """Plot certified accuracy over eps, the fraction of images with a certified radius strictly above eps.

    Args:
        radii: (N,) certified radii, for pixel values in [0, 1]; not positive for misclassified images.
        dataset: Name of the dataset.
        certificate: Name of the certifier.
        robust: Robust accuracies in [0, 1] by eps, drawn as points above the curve.
    """
    figure, axes = make_axes(f"{dataset}, {len(radii)} images")
    positive_radii = np.sort(radii[radii > 0])
    correct_share = len(positive_radii) / len(radii)
    # The curve falls where eps equals a radius, since only radii strictly above eps count as certified.
    eps = np.concatenate([[0.0], positive_radii])
    share = np.concatenate([[correct_share], correct_share - np.arange(1, len(positive_radii) + 1) / len(radii)])
    axes.step(eps, 100 * share, where="post", color=DARK, label=f"certified ({certificate})")
    if robust:
        axes.plot(
            list(robust), [100 * value for value in robust.values()], "D", color="black", ms=4, label="under attack"
        )
    axes.set(xlabel="eps (pixel values in [0, 1])", ylabel="accuracy (%)", ylim=(0, 100))
    axes.set_xlim(left=0, right=max([*robust, float(eps[-1]) * 1.05, 1e-3]))
    axes.legend(frameon=False, fontsize=8)
    return figure


def radius_histogram(radii: np.ndarray, dataset: str, certificate: str) -> Figure:
    """Plot a histogram of certified radii (N,); the title counts images without a positive radius."""
    positive_radii = radii[radii > 0]
    figure, axes = make_axes(f"{dataset}, {len(radii)} images, {len(radii) - len(positive_radii)} without a radius")
    axes.hist(positive_radii, bins=40, color=LIGHT, edgecolor=DARK, linewidth=0.6)
    axes.set(xlabel=f"certified radius ({certificate})", ylabel="images")
    axes.yaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.set_xlim(left=0)
    return figure


def pareto_front_figure(trials: pd.DataFrame, pareto_trials: pd.DataFrame) -> Figure:
    """Plot certified over clean accuracy on validation, one point per trial; a line is the Pareto front.

    Args:
        trials: Trials, as returned by `read_trials`.
        pareto_trials: Trials on the Pareto front.
    """
    clean, certified = schema.BEST_VALIDATION_CLEAN, schema.BEST_VALIDATION_CERTIFIED
    count = trials[certified].notna().sum()
    dataset, eps = (trials[name].dropna().iloc[0] for name in ("dataset", "eps"))
    figure, axes = make_axes(f"{dataset}, eps = {format_eps(eps)}, {count} trials")
    axes.plot(100 * trials[clean], 100 * trials[certified], "o", color=LIGHT, mec=DARK, mew=0.6, ms=4)
    best = pareto_trials.sort_values(clean)
    axes.plot(100 * best[clean], 100 * best[certified], "D-", color=DARK, ms=5, lw=1, label="Pareto front")
    for _, trial in best.iterrows():
        axes.annotate(
            f"#{trial[schema.TRIAL]}",
            (100 * trial[clean], 100 * trial[certified]),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set(xlabel="clean accuracy on validation (%)", ylabel="certified accuracy on validation (%)")
    axes.margins(0.12)
    axes.legend(frameon=False, fontsize=8, loc="best")
    return figure


def importance_figure(importances: Mapping[str, float], objective: str) -> Figure:
    """Plot the importance of settings for a metric as bars; see `param_importances`."""
    figure, axes = make_axes("")
    figure.suptitle(f"Importance for {objective}", fontsize=9)  # a suptitle also spans the names of settings
    names = list(importances)[::-1]
    bars = axes.barh(names, [100 * importances[name] for name in names], color=LIGHT, edgecolor=DARK, linewidth=0.6)
    axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    axes.set(xlabel="relative importance (%, fANOVA)", xlim=(0, 100))
    axes.grid(visible=False)
    axes.tick_params(axis="y", labelsize=8)
    return figure


def slice_figure(trials: pd.DataFrame, paths: Sequence[str], metric: str, objective: str) -> Figure:
    """Plot a metric over each searched setting, one point per trial.

    Args:
        trials: Trials of equal budget, as returned by `read_trials`.
        paths: Settings by dotted path; the first twelve are shown.
        metric: A column of `trials` with fractions in [0, 1].
        objective: Description of the metric.
    """
    paths = paths[:12]
    columns = min(3, len(paths))
    rows = -(-len(paths) // columns)
    figure = Figure(figsize=(1 + 1.9 * columns, 0.4 + 1.7 * rows), layout="constrained")
    space = " " if columns > 1 else "\n"  # a single column is narrower than the title
    figure.suptitle(f"{objective[0].upper()}{objective[1:]} (%){space}over each setting", fontsize=9)
    for index, path in enumerate(paths):
        axes = figure.add_subplot(rows, columns, index + 1)
        plotted_trials = trials[trials[path].notna() & trials[metric].notna()]
        values = pd.to_numeric(plotted_trials[path], errors="coerce")
        style_axes(axes)
        if values.notna().all() and len(values):
            if _prefers_log_axis(values):
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=4))
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
            else:
                axes.xaxis.set_major_locator(MaxNLocator(4, integer=bool((values % 1 == 0).all())))
        else:
            values = plotted_trials[path].astype(str).map(_tick)
        is_rasterized = len(plotted_trials) > 1000  # many points are a bitmap, also in the PDF
        axes.plot(
            values, 100 * plotted_trials[metric], "o", color=LIGHT, mec=DARK, mew=0.6, ms=3.5, rasterized=is_rasterized
        )
        axes.set_xlabel(short_name(path), fontsize=8, parse_math=False)
        axes.tick_params(labelsize=7, which="both")
    return figure


def _tick(text: str) -> str:
    """Return a short label of a tick."""
    return shorten(escape_missing_glyphs(text), MAX_TICK_LENGTH)


def _prefers_log_axis(values: pd.Series) -> bool:
    """Return whether the median is nearer to the middle of a logarithmic axis than of a linear one."""
    low, middle, high = values.min(), values.median(), values.max()
    if low <= 0 or high / low <= 10:
        return False
    linear, logarithmic = (middle - low) / (high - low), math.log(middle / low) / math.log(high / low)
    return abs(logarithmic - 0.5) < abs(linear - 0.5)


def learning_curves(history: Mapping[str, Mapping[int, float]], title: str) -> Figure:
    """Plot validation accuracies, training loss, p and learning rate over the epochs of a run.

    Args:
        history: For each per-epoch metric (`linflab.reports.schema`), its values by epoch. Panels without data are
            omitted.
        title: Title of the figure.
    """
    panels = (
        (
            "accuracy on validation (%)",
            100,
            {schema.VALIDATION_CLEAN: "clean", schema.VALIDATION_CERTIFIED: "certified"},
        ),
        ("training loss", 1, {schema.TRAIN_LOSS: ""}),
        ("p (log)", 1, {schema.P: ""}),
        ("learning rate", 1, {schema.LEARNING_RATE: ""}),
    )  # fmt: skip
    figure = Figure(figsize=(2 * FIGURE_SIZE[0] * 0.8, 2 * FIGURE_SIZE[1] * 0.8), layout="constrained")
    figure.suptitle(title, fontsize=9, parse_math=False)  # names may contain dollar signs
    last = max((epoch for curve in history.values() for epoch in curve), default=1)
    shown_panels = [panel for panel in panels if any(history.get(name) for name in panel[2])]
    for index, (y_label, unit, names) in enumerate(shown_panels):  # without distance layers, there is no p
        axes = figure.add_subplot(2, 2, index + 1)
        style_axes(axes)
        for (name, label), style in zip(names.items(), ("-", "--"), strict=False):
            curve = history.get(name, {})
            values = [unit * curve.get(epoch, np.nan) for epoch in range(1, last + 1)]
            marker = "o" if last <= 30 else ""
            axes.plot(range(1, last + 1), values, style, marker=marker, ms=2.5, color=DARK, lw=1.2, label=label)
        if schema.P in names:
            axes.set_yscale("log")
            finite_p = [value for value in history.get(schema.P, {}).values() if math.isfinite(value) and value > 0]
            axes.yaxis.set_major_locator(FixedLocator(log_ticks(min(finite_p, default=1), max(finite_p, default=1))))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            last_finite_epoch = max(history.get(schema.P, {}), default=last)
            if last_finite_epoch < last:
                axes.axvspan(last_finite_epoch + 0.5, last + 0.5, color="0.92")
                transform = axes.get_xaxis_transform()
                axes.text(
                    (last_finite_epoch + last + 1) / 2,
                    0.5,
                    "p = inf",
                    fontsize=7,
                    ha="center",
                    va="center",
                    rotation=90,
                    transform=transform,
                )
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=7)
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        axes.set_xlabel("epoch", fontsize=8)
        axes.set_ylabel(y_label, fontsize=8)
        axes.set_xlim(0.5, last + 0.5)
        axes.tick_params(labelsize=7)
    return figure


def log_ticks(low: float, high: float) -> list[float]:
    """Return at most seven round ticks of a logarithmic axis, spaced so that labels do not overlap.

    Args:
        low: Lowest value, positive.
        high: Highest value, at least `low`.
    """
    if high < 3 * low:
        candidates = [float(f"{tick:.6g}") for tick in MaxNLocator(4).tick_values(low, high)]
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        candidates = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    ticks = [tick for tick in candidates if 0.999 * low <= tick <= 1.001 * high]
    if len(ticks) > MAX_TICKS:  # keeps powers of ten, or every n-th of them
        ticks = [tick for tick in ticks if math.isclose(math.log10(tick) % 1, 0, abs_tol=1e-9)]
        ticks = ticks[:: -(-len(ticks) // MAX_TICKS)]
    return list(dict.fromkeys(ticks)) or [low]


def margin_cdf(radii: np.ndarray, eps: float, dataset: str) -> Figure:
    """Plot the cumulative distribution of half the margin on training images.

    In the theorem on the robust generalization error of l_inf-dist nets (Zhang et al., ICML 2021), r is the radius of
    the perturbations and delta an additional margin. The value of this distribution at delta + r is the first term of
    the bound: the fraction of training images without a large margin.

    Args:
        radii: (N,) std times half the margin, for pixel values in [0, 1]; negative for misclassified images.
        eps: Radius at which the config certifies, for pixel values in [0, 1].
        dataset: Name of the dataset.
    """
    figure, axes = make_axes(f"{dataset}, {len(radii)} training images")
    radii = radii[np.isfinite(radii)]
    order = np.sort(radii)
    axes.step(order, 100 * np.arange(1, len(order) + 1) / len(order), where="post", color=DARK)
    percent_below = 100 * float((radii <= eps).mean())
    axes.axvline(eps, color="black", lw=0.8, ls="--", label=f"eps = {format_eps(eps)}: {percent_below:.1f}%")
    axes.set(xlabel="half the margin (pixel values in [0, 1])", ylabel="training images at or below (%)", ylim=(0, 100))
    low, high = np.quantile(order, [0.001, 0.999]) if len(order) else (0.0, eps)
    left, right = min(low, eps), max(high, 1.05 * eps)
    axes.set_xlim(left - 0.02 * (right - left), right + 0.02 * (right - left) + 1e-9)
    # The curve rises from the lower left to the upper right; the legend goes to a free corner.
    share_below_middle = float((radii <= (left + right) / 2).mean()) if len(radii) else 1.0
    handle = [line for line in axes.get_lines() if str(line.get_label()).startswith("eps")]
    axes.legend(
        handles=handle,
        loc="lower right" if share_below_middle > 0.5 else "upper left",
        fontsize=8,
        framealpha=0.9,
        edgecolor="none",
    )
    return figure


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.pdf to a folder; return their paths.

    Texts may contain names that users chose. So no text is parsed as math, and letters that the font lacks become
    escapes.
    """
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "pdf")]
    with rc_context({"text.parse_math": False}):  # applies to ticks that are added while drawing
        for text in figure.findobj(Text):
            assert isinstance(text, Text)
            text.set_parse_math(False)
            text.set_text(escape_missing_glyphs(text.get_text()))
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # both files use the same layout
        for path in paths:
            save = partial(figure.savefig, format=path.suffix[1:], dpi=200)
            write_whole(path, save, flush=False)
    return paths


def escape_missing_glyphs(text: str) -> str:
    """Return text with escapes for control characters and for letters that the font lacks."""
    font = _letters_of_font()
    return "".join(
        letter if letter == "\n" or ord(letter) in font else letter.encode("ascii", "backslashreplace").decode()
        for letter in escape_invisible(text, keep="\n")
    )


@cache
def _letters_of_font() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def make_axes(title: str, size: tuple[float, float] = FIGURE_SIZE) -> tuple[Figure, Axes]:
    """Return an empty figure of this size in inches, and its axes."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=9, parse_math=False)
    style_axes(axes)
    return figure, axes


def style_axes(axes: Axes) -> None:
    """Remove the frame's upper and right side, and add light horizontal lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
