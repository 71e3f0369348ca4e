"""Measure the l_inf nearest-neighbor classifier on whole test sets, and compare it with scikit-learn.

    python examples/nearest_neighbor.py [DATASET=EPS ...] [--checked N] [--output-dir FOLDER]

The distance operator computes the distances of all test images to all training images. Half the difference between the
distances to the nearest image of another class and of the own class is the certified radius. Distances are multiples of
1/255, or 1/16 for the digits, and are rounded to them, so ties are exact. A tie counts as an error.
"""

import argparse
import time
from pathlib import Path

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from linflab.models.distance import lp_distance
from linflab.platform.data.datasets import load_dataset
from linflab.reports.figures import DARK, make_axes

BATCH = 200
LINES = ("-", "--", ":")


def nearest_distances(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances (N,) of test images to the nearest training image of the own and of another class."""
    own, other = [], []
    for images, classes in zip(test.split(BATCH), test_labels.split(BATCH), strict=True):
        distances, is_own = lp_distance(images, train), classes[:, None] == labels
        own.append(distances.masked_fill(~is_own, torch.inf).amin(dim=1))
        other.append(distances.masked_fill(is_own, torch.inf).amin(dim=1))
    return torch.cat(own), torch.cat(other)


def check(train: Tensor, test: Tensor, nearest: Tensor) -> float:
    """Return the largest deviation from the distances that scikit-learn computes, in float64."""
    search = NearestNeighbors(n_neighbors=1, metric="chebyshev", algorithm="brute").fit(train.double().numpy())
    expected = torch.from_numpy(search.kneighbors(test.double().numpy())[0][:, 0])
    return float((expected - nearest).abs().max())


def main() -> None:
    """Print the row of each dataset, and draw certified accuracy over eps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*", default=["mnist=0.3", "fashion_mnist=0.1"], metavar="DATASET=EPS")
    parser.add_argument("--checked", type=int, default=100, help="Test images that scikit-learn checks")
    parser.add_argument("--output-dir", type=Path, help="Folder for the figure, as PNG")
    arguments = parser.parse_args()
    figure, axes = make_axes("l_inf nearest neighbor")
    print("dataset          eps   clean  ties  certified  CPU s  largest deviation from scikit-learn")
    for number, pair in enumerate(arguments.datasets):
        name, _, eps = pair.partition("=")
        dataset = load_dataset(name)
        split = dataset.training_split(include_validation=True)
        train, labels = split.batch(torch.arange(len(split)))
        test, test_labels = dataset.test.batch(torch.arange(len(dataset.test)))
        train, test, start = train.flatten(1), test.flatten(1), time.process_time()
        own, other = nearest_distances(train, labels, test, test_labels)
        seconds, levels = time.process_time() - start, dataset.info.max_value
        radii = ((other - own).double() * levels).round() / (2 * levels)
        clean, ties, certified = (part.double().mean() for part in (radii > 0, radii == 0, radii > float(eps)))
        deviation = check(train, test[: arguments.checked], torch.minimum(own, other)[: arguments.checked])
        print(
            f"{name:15} {float(eps):4g} {clean:6.2%} {ties:6.2%} {certified:9.2%} {seconds:6.0f}  {deviation:.1e}",
            flush=True,
        )
        values = torch.linspace(0, 0.4, 401, dtype=torch.float64)
        shares = (radii[:, None] > values).double().mean(dim=0)
        axes.plot(values, 100 * shares, LINES[number % len(LINES)], color=DARK, lw=1.3, label=name)
    axes.set(xlabel="eps (pixel values in [0, 1])", ylabel="certified accuracy (%)", xlim=(0, 0.4), ylim=(0, 100))
    axes.legend(frameon=False, fontsize=8)
    if arguments.output_dir is not None:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        figure.savefig(arguments.output_dir / "nearest_neighbor.png", dpi=150)


if __name__ == "__main__":
    main()
