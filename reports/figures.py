"""Figures for papers: readable in grey, and without telling colours apart."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from linflab.reports import schema
from linflab.reports.tables import eps_text
from linflab.reports.wording import short_name

SIZE = (4.2, 2.9)  # inches: a column of a paper
INK, PALE = "#20406a", "#9db7d5"


def certified_accuracy_figure(
    radii: np.ndarray, dataset: str, certificate: str, robust: Mapping[float, float]
) -> Figure:
    """Certified accuracy over eps: the share of images whose certified radius is above it.

    Args:
        radii: (N), the certified radius of each image in pixels; not positive where it is misclassified.
        dataset: its name.
        certificate: by what the radii are.
        robust: accuracies under attack by eps, drawn as points above the curve.
    """
    figure, axes = _axes(f"{dataset}, {len(radii)} images")
    above = np.sort(radii[radii > 0])
    right = len(above) / len(radii)
    # at a radius the curve falls: certified means strictly above
    eps = np.concatenate([[0.0], above])
    share = np.concatenate([[right], right - np.arange(1, len(above) + 1) / len(radii)])
    axes.step(eps, 100 * share, where="post", color=INK, label=f"certified ({certificate})")
    if robust:
        axes.plot(
            list(robust), [100 * value for value in robust.values()], "D", color="black", ms=4, label="under attack"
        )
    axes.set(xlabel="eps (pixels of [0, 1])", ylabel="accuracy (%)", ylim=(0, 100))
    axes.set_xlim(left=0, right=max([*robust, float(eps[-1]) * 1.05, 1e-3]))
    axes.legend(frameon=False, fontsize=8)
    return figure


def radius_histogram(radii: np.ndarray, dataset: str, certificate: str) -> Figure:
    """How many images have which certified radius; those misclassified are counted in the title."""
    above = radii[radii > 0]
    figure, axes = _axes(f"{dataset}, {len(radii)} images, {len(radii) - len(above)} of them without a radius")
    axes.hist(above, bins=40, color=PALE, edgecolor=INK, linewidth=0.6)
    axes.set(xlabel=f"certified radius by {certificate} (pixels of [0, 1])", ylabel="images")
    axes.set_xlim(left=0)
    return figure


def front_figure(trials: pd.DataFrame, on_front: pd.DataFrame) -> Figure:
    """Certified over clean accuracy on validation, a point a trial; those `on_front` stand out, and are joined.

    Both are rows of `read_trials`.
    """
    clean, certified = schema.BEST_VALIDATION_CLEAN, schema.BEST_VALIDATION_CERTIFIED
    count = trials[certified].notna().sum()
    dataset, eps = (trials[name].dropna().iloc[0] for name in ("dataset", "eps"))
    figure, axes = _axes(f"{dataset}, eps = {eps_text(float(eps))}, {count} trainings")
    axes.plot(100 * trials[clean], 100 * trials[certified], "o", color=PALE, mec=INK, mew=0.6, ms=4)
    best = on_front.sort_values(clean)
    axes.plot(100 * best[clean], 100 * best[certified], "D-", color=INK, ms=5, lw=1, label="front")
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


def importance_figure(shares: Mapping[str, float], of: str) -> Figure:
    """How much each setting mattered for a metric, as bars; see `importances`."""
    figure, axes = _axes("")
    figure.suptitle(f"What matters for {of}", fontsize=9)  # over names and bars; a title would be over the bars alone
    names = list(shares)[::-1]
    bars = axes.barh(names, [100 * shares[name] for name in names], color=PALE, edgecolor=INK, linewidth=0.6)
    axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    axes.set(xlabel="relative importance (%, fANOVA)", xlim=(0, 100))
    axes.grid(visible=False)
    axes.tick_params(axis="y", labelsize=8)
    return figure


def slice_figure(trials: pd.DataFrame, paths: Sequence[str], metric: str, of: str) -> Figure:
    """A metric over each setting that was searched, a point a trial; of those that all trials of one length share.

    Args:
        trials: rows of `read_trials`.
        paths: the settings, at most twelve are shown.
        metric: a column of `trials`, a share.
        of: what it is, in words.
    """
    paths = paths[:12]
    columns = min(3, len(paths))
    rows = -(-len(paths) // columns)
    figure = Figure(figsize=(1 + 1.9 * columns, 0.4 + 1.7 * rows), layout="constrained")
    figure.suptitle(f"{of[0].upper()}{of[1:]} (%) over each setting", fontsize=9)
    for place, path in enumerate(paths):
        axes = figure.add_subplot(rows, columns, place + 1)
        there = trials[trials[path].notna() & trials[metric].notna()]
        values = pd.to_numeric(there[path], errors="coerce")
        _plain(axes)
        if values.notna().all() and len(values):
            if _is_spread_by_ratios(values):
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=4))
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
            else:
                axes.xaxis.set_major_locator(MaxNLocator(4, integer=bool((values % 1 == 0).all())))
        else:
            values = there[path].astype(str)
        dots = len(there) > 1000  # drawn as pixels in a PDF, too
        axes.plot(values, 100 * there[metric], "o", color=PALE, mec=INK, mew=0.6, ms=3.5, rasterized=dots)
        axes.set_xlabel(short_name(path), fontsize=8, parse_math=False)
        axes.tick_params(labelsize=7, which="both")
    return figure


def _is_spread_by_ratios(values: pd.Series) -> bool:
    """Whether values lie more evenly on a logarithmic axis: their median is nearer to its middle."""
    low, middle, high = values.min(), values.median(), values.max()
    if low <= 0 or high / low <= 10:
        return False
    linear, logarithmic = (middle - low) / (high - low), math.log(middle / low) / math.log(high / low)
    return abs(logarithmic - 0.5) < abs(linear - 0.5)


def learning_curves(history: Mapping[str, Mapping[int, float]], title: str) -> Figure:
    """A training over its epochs: the accuracies on validation images, the loss, and the schedules of p and rate.

    Args:
        history: metrics of an epoch (`linflab.reports.schema`), each by epoch; what is missing is left out.
        title: what was trained.
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
    figure = Figure(figsize=(2 * SIZE[0] * 0.8, 2 * SIZE[1] * 0.8), layout="constrained")
    figure.suptitle(title, fontsize=9, parse_math=False)  # names may hold dollars
    last = max((epoch for curve in history.values() for epoch in curve), default=1)
    there = [panel for panel in panels if any(history.get(name) for name in panel[2])]
    for place, (what, unit, names) in enumerate(there):  # no p of networks without distances
        axes = figure.add_subplot(2, 2, place + 1)
        _plain(axes)
        for (name, label), style in zip(names.items(), ("-", "--"), strict=False):
            curve = history.get(name, {})
            values = [unit * curve.get(epoch, np.nan) for epoch in range(1, last + 1)]
            marker = "o" if last <= 30 else ""
            axes.plot(range(1, last + 1), values, style, marker=marker, ms=2.5, color=INK, lw=1.2, label=label)
        if schema.P in names:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            finite = max(history.get(schema.P, {}), default=last)
            if finite < last:
                axes.axvspan(finite + 0.5, last + 0.5, color="0.92")
                axes.text(last + 0.4, axes.get_ylim()[0], "p = inf ", fontsize=7, ha="right", va="bottom", rotation=90)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch", fontsize=8)
        axes.set_ylabel(what, fontsize=8)
        axes.set_xlim(0.5, last + 0.5)
        axes.tick_params(labelsize=7)
    return figure


def margin_figure(radii: np.ndarray, eps: float, dataset: str) -> Figure:
    """The distribution of the margin on training data, in pixels, as the share of images at or below each value.

    At delta + r it is the first term of the generalisation bound of l_inf-dist nets: the share of training samples
    whose margin is not large (Zhang et al., ICML 2021, the theorem on the robust generalization error).

    Args:
        radii: (N), std times half the margin of each training image, negative where it is misclassified.
        eps: the radius at which the experiment certifies.
        dataset: its name.
    """
    figure, axes = _axes(f"{dataset}, {len(radii)} training images")
    radii = radii[np.isfinite(radii)]
    order = np.sort(radii)
    axes.step(order, 100 * np.arange(1, len(order) + 1) / len(order), where="post", color=INK)
    at = 100 * float((radii <= eps).mean())
    axes.axvline(eps, color="black", lw=0.8, ls="--")
    axes.annotate(f"eps = {eps:.4g}: {at:.1f} %", (eps, at), xytext=(6, -3), textcoords="offset points", fontsize=8,
                  va="top")  # fmt: skip
    axes.set(xlabel="half the margin (pixels of [0, 1])", ylabel="training images at or below (%)", ylim=(0, 100))
    low, high = np.quantile(order, [0.001, 0.999])
    axes.set_xlim(low, max(high, 1.05 * eps))
    return figure


def write_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.pdf to a folder; returns their paths."""
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "pdf")]
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # it has been laid out, once for both
    for path in paths:
        figure.savefig(path, dpi=200)
    return paths


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=9, parse_math=False)
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
