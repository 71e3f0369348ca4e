"""Build l_inf-dist nets that approximate a 1-Lipschitz function, and compare their error with the tolerance.

    python examples/universal_approximation.py [--tolerance T ...] [--output-dir FOLDER]

The function of two inputs in [0, 1] is a mean of waves and distances. The sizes of the nets are printed before they are
built. Then a classifier of two regions is certified: its logits are the function minus 0.1, and the negative.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import linflab
from linflab.models.networks.linf_dist import LinfDistNet
from linflab.models.networks.universal import Form, approximate, plan_grid
from linflab.reports.figures import DARK, FIGURE_SIZE, LIGHT, style_axes

BOX = (0.0, 0.0), (1.0, 1.0)
FORMS: tuple[Form, Form] = ("shallow", "deep")


def function(points: Tensor) -> Tensor:
    """Return values (N,) at points (N, 2); the sum of the absolute partial derivatives is at most 1."""
    x, y = points[:, 0], points[:, 1]
    waves = torch.sin(12 * x) / 24 + torch.cos(9 * y + 1) / 18
    tent = torch.maximum((x - 0.65).abs(), (y - 0.35).abs())
    return (waves + 0.5 - tent) / 2


def classifier_outputs(points: Tensor) -> Tensor:
    """Return the function minus 0.1, and its negative, (N, 2)."""
    values = function(points) - 0.1
    return torch.stack([values, -values], dim=1)


def sup_error(network: LinfDistNet, per_axis: int = 301) -> float:
    """Return the largest error on a grid."""
    axis = torch.linspace(0, 1, per_axis, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        errors = [(network(part)[:, 0] - function(part)).abs().max() for part in points.split(10_000)]
    return torch.stack(errors).max().item()


def main() -> None:
    """Print sizes, errors and certificates, and draw the nets along a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tolerance", type=float, nargs="+", default=[0.1, 0.05, 0.025], help="Largest errors")
    parser.add_argument("--output-dir", type=Path, help="Folder for the figure, as SVG")
    arguments = parser.parse_args()
    figure = Figure(figsize=(2 * FIGURE_SIZE[0], FIGURE_SIZE[1]), layout="constrained")
    left, right = figure.subplots(1, 2)
    line = torch.stack([torch.linspace(0, 1, 500), torch.full((500,), 0.3)], dim=1).double()
    left.plot(line[:, 0], function(line), color="black", lw=1, label="function")
    errors: dict[Form, list[float]] = {form: [] for form in FORMS}
    print("tolerance  form     samples  depth  width  parameters  sup error")
    for tolerance in arguments.tolerance:
        plan = plan_grid(*BOX, tolerance)
        for form in FORMS:
            size = plan.size(form)
            print(
                f"{tolerance:9g}  {form:7} {size.samples:8} {size.depth:6} {size.width:6} {size.parameters:11}", end=""
            )
            network = approximate(function, *BOX, tolerance, form)
            errors[form].append(sup_error(network))
            print(f"  {errors[form][-1]:9.5f}", flush=True)
        with torch.no_grad():
            values = network(line)[:, 0]
        shade = LIGHT if tolerance == max(arguments.tolerance) else DARK
        style = ":" if len(errors["deep"]) == 2 else "-"
        left.plot(line[:, 0], values, style, color=shade, lw=1.2, label=f"net, tolerance {tolerance:g}")
    certify(max(arguments.tolerance))
    for form, style, color in zip(FORMS, ("o-", "s--"), (LIGHT, DARK), strict=True):
        right.plot(arguments.tolerance, errors[form], style, color=color, ms=4, lw=1.3, label=f"{form} net")
    right.plot(arguments.tolerance, arguments.tolerance, color="black", lw=0.8, label="tolerance")
    for axes in (left, right):
        style_axes(axes)
        axes.legend(frameon=False, fontsize=7)
    left.set(xlabel="first input (the second is 0.3)", ylabel="value")
    right.set(xlabel="tolerance", ylabel="largest error on a grid", xlim=(0, None), ylim=(0, None))
    if arguments.output_dir is not None:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        figure.savefig(arguments.output_dir / "universal_approximation.svg", metadata={"Date": None})


def certify(tolerance: float) -> None:
    """Certify the deep classifier at random points, by half its margin and by IBP."""
    network = approximate(classifier_outputs, *BOX, tolerance).float()
    points = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = network(points).argmax(dim=1)
    for certifier in ("lipschitz", "ibp"):
        radii = linflab.certify(network, points, labels, certifier=certifier).to_frame()["radius"]
        print(f"deep classifier, certified by {certifier}: mean radius {radii.mean():.4f} at {len(points)} points")


if __name__ == "__main__":
    main()
