"""Figures for papers: readable in grey, and without telling colours apart."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes
