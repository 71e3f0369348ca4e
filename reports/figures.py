"""Figures for papers: readable in grey, and without telling colours apart."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from linflab.reports import schema

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
    figure, axes = _axes(f"{trials['dataset'].iloc[0]}, eps = {trials['eps'].iloc[0]}, {count} trainings")
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


def write_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.pdf to a folder; returns their paths."""
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, dpi=200)
    return paths


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes
