"""Table and figure of a bound on the robust test error, from margins on training images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from linflab.reports.figures import DARK, FIGURE_SIZE, LIGHT, log_ticks, style_axes
from linflab.reports.tables import Cell, Row, Table, format_eps

QUANTITY, VALUE, ORIGIN = "Quantity", "Value", "Origin"
MEASURED, PROVEN, ASSUMED = "measured", "proven", "constant assumed"


@dataclass(frozen=True)
class BoundReport:
    """A bound on the robust test error with all its parts; see `linflab.models.robustness.generalization`.

    Attributes:
        run: Name of the run.
        dataset: Name of the dataset.
        eps: l_inf radius, for pixel values in [0, 1].
        confidence: Probability with which the bound holds.
        radii: (N,) certified radii of training images.
        deltas: Tried additional radii.
        size_terms: Proven size term of each delta.
        published_terms: Size terms of the published theorem, with a constant of 1 instead of the unknown one.
        best: Index of the delta that the table shows.
        constants: Constants of the size term, by symbol.
        needed_images: Number of training images from which on the bound would be below 100% with these margins.
        robust_error: Test error under the attacks of the run; None if the run was not attacked.
        certified_error: Share of test images that are not certified; None if unknown.
        attacks: Description of the attacks.
    """

    run: str
    dataset: str
    eps: float
    confidence: float
    radii: np.ndarray
    deltas: Sequence[float]
    size_terms: Sequence[float]
    published_terms: Sequence[float]
    best: int
    constants: dict[str, float]
    needed_images: int | None
    robust_error: float | None
    certified_error: float | None
    attacks: str = ""

    @property
    def margin_shares(self) -> list[float]:
        """Share of training images with a radius of at most eps + delta, for each delta."""
        return [float((self.radii <= self.eps + delta).mean()) for delta in self.deltas]

    @property
    def bound(self) -> float:
        """Bound on the robust test error, at most 1."""
        return min(1.0, self.margin_shares[self.best] + self.size_terms[self.best])


def bound_table(report: BoundReport) -> Table:
    """Return a table of the terms of a bound, with the origin of each and the measured robust test error."""
    delta, share = report.deltas[report.best], report.margin_shares[report.best]
    threshold = f"eps + delta = {report.eps + delta:.4g}"
    rows = [
        _row(f"Training images with a radius of at most {threshold}", share, MEASURED),
        _row("Network size term", report.size_terms[report.best], PROVEN),
        _row("Bound on the robust test error", report.bound, PROVEN),
        _row("Robust test error, under attack", report.robust_error, MEASURED),
        _row("Test images that are not certified", report.certified_error, MEASURED),
        _row("Network size terms of the published theorem", report.published_terms[report.best], ASSUMED),
    ]
    constants = ", ".join(f"{name} = {value:,g}" for name, value in report.constants.items())
    notes = [
        f"eps = {format_eps(report.eps)}; radii are for pixel values in [0, 1]; confidence {report.confidence:g}.",
        f"Size term: sqrt((D log ceil(2 G B std / delta) + log(T / (1 - confidence))) / (2 n)) with {constants}.",
        "Proven for independent images of one distribution, with architecture, mean and std fixed beforehand.",
        "Published theorem: (L W^2 / delta + sqrt(log log_2(2 / delta)) + t) / sqrt(n), with 1 in place of the "
        "unstated constant and logarithms.",
    ]
    if report.bound >= 1 and report.needed_images is not None:
        notes.append(
            f"The bound is vacuous. With these margins, it would be below 100% from {report.needed_images:,} training "
            "images on."
        )
    elif report.bound >= 1:
        notes.append("The bound is vacuous, since no training image has a radius above eps.")
    if report.robust_error is not None and report.robust_error > report.bound:
        notes.append(
            "The measured error exceeds the bound, which has a probability below 1 - confidence: the training images "
            "are probably no independent sample."
        )
    if report.attacks:
        notes.append(f"Attacks: {report.attacks}.")
    title = f"Generalization bound of {report.run} on {report.dataset}"
    return Table(title, (QUANTITY, VALUE, ORIGIN), tuple(rows), tuple(notes))


def _row(quantity: str, share: float | None, origin: str) -> Row:
    if share is None:
        return Row({QUANTITY: Cell(quantity), ORIGIN: Cell(origin)})
    value = Cell(f"{share:.2%}" if share < 100 else f"{100 * share:.2e}%", 100 * share)
    return Row({QUANTITY: Cell(quantity), VALUE: value, ORIGIN: Cell(origin)})


def bound_figure(report: BoundReport) -> Figure:
    """Plot the margins of training images, and the terms of the bound over delta next to the measured errors."""
    figure = Figure(figsize=(2.2 * FIGURE_SIZE[0], FIGURE_SIZE[1]), layout="constrained")
    figure.suptitle(f"{report.dataset}, {len(report.radii):,} training images", fontsize=9, parse_math=False)
    left, right = figure.subplots(1, 2)
    _plot_margins(left, report)
    _plot_terms(right, report)
    return figure


def _plot_margins(axes: Axes, report: BoundReport) -> None:
    style_axes(axes)
    order = np.sort(report.radii)
    axes.step(order, 100 * np.arange(1, len(order) + 1) / len(order), where="post", color=DARK, lw=1.2)
    delta = report.deltas[report.best]
    axes.axvline(report.eps, color="black", lw=0.8, ls="--", label=f"eps = {format_eps(report.eps)}")
    axes.axvline(report.eps + delta, color="black", lw=0.8, ls=":", label=f"eps + delta = {report.eps + delta:.3g}")
    low, high = np.quantile(order, [0.001, 0.999])
    left, right = min(float(low), report.eps), max(float(high), 1.05 * (report.eps + delta))
    axes.set_xlim(left - 0.02 * (right - left), right + 0.02 * (right - left))
    axes.set(xlabel="certified radius", ylabel="training images at or below (%)", ylim=(0, 102))
    axes.legend(fontsize=7, framealpha=0.9, edgecolor="none", loc="upper left")


def _plot_terms(axes: Axes, report: BoundReport) -> None:
    style_axes(axes)
    deltas, shares, sizes = (np.array(part) for part in (report.deltas, report.margin_shares, report.size_terms))
    axes.plot(deltas, 100 * (shares + sizes), color=DARK, lw=1.4, label="sum of both terms")
    axes.plot(deltas, 100 * sizes, "--", color=DARK, lw=1, label="size term (proven)")
    axes.plot(deltas, np.where(shares > 0, 100 * shares, np.nan), color=LIGHT, lw=1.4, label="margin term")
    axes.plot(deltas[report.best], 100 * (shares + sizes)[report.best], "o", color=DARK, ms=4)
    axes.axhspan(100, 1e12, color="0.94", zorder=0)
    for error, style, label in (
        (report.robust_error, "-", "test error under attack"),
        (report.certified_error, ":", "test images not certified"),
    ):
        if error:
            axes.axhline(100 * error, color="black", lw=0.8, ls=style, label=label)
    visible = np.concatenate([shares + sizes, shares[shares > 0], [error for error in _errors(report) if error]])
    axes.set(xscale="log", yscale="log", xlabel="delta", ylabel="error (%)")
    low, high = 50 * visible.min(), max(200, 130 * visible.max())
    axes.set_ylim(low, high)
    for axis, ends in ((axes.xaxis, (deltas.min(), deltas.max())), (axes.yaxis, (low, high))):
        axis.set_major_locator(FixedLocator(log_ticks(*map(float, ends))))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1))


def _errors(report: BoundReport) -> list[float]:
    return [error for error in (report.robust_error, report.certified_error) if error is not None]
