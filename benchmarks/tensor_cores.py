"""Certified accuracy of training with fp16 matrix products, compared with the exact operator.

    python benchmarks/tensor_cores.py [--dataset digits | fashion_mnist] [--seeds 0 1 2 3 4] [--threads N] [--csv FILE]

For each seed, the benchmark trains a recipe with compute.tensor_cores=false and true: digits_eps0.1_linf_dist_net, or
fashion_mnist_eps0.1_linf_dist_net_cpu with width 256 and 8 epochs. p follows the schedule of the recipe; the
matrix products are used at p = 8 and 12. On a CPU the products are emulated with the rounding of tensor cores, so
accuracies are comparable, but times are not.

The output has the validation certified accuracy of the selected network and of the last epoch. For each p it has the
share of flagged distances, which were computed by their definition instead. If the exact operator computed all
distances of a layer, all of them count as flagged. The last lines have the mean difference in certified accuracy
between both operators, its standard deviation over seeds, and the 95% interval and p-value of a paired t-test. Each run
is appended as a row to tensor_cores.csv, or to FILE.
"""

import argparse
import csv
import math
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from linflab.models.distance import tensor_cores
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.host import describe_hardware
from linflab.platform.training.fit import fit
from linflab.platform.training.loop import EpochMetrics
from linflab.platform.trial import select_device

RECIPES = {
    "digits": ("digits_eps0.1_linf_dist_net",),
    "fashion_mnist": ("fashion_mnist_eps0.1_linf_dist_net_cpu", "model.width=256", "training.epochs=8"),
}
COLUMNS = ("selected", "last_epoch", "clean", "loss", "flagged_8", "flagged_12", "seconds")


class Outcome(NamedTuple):
    """Results of a run, in the order of `COLUMNS`; accuracies and shares are fractions in [0, 1]."""

    selected: float
    last: float
    clean: float
    loss: float
    flagged: tuple[float, float]
    seconds: float

    def row(self) -> list[float]:
        """Return the values of the columns, with accuracies and shares in percent."""
        return [
            *(round(100 * value, 3) for value in (self.selected, self.last, self.clean)),
            round(self.loss, 5),
            *(float(f"{100 * value:.3g}") for value in self.flagged),
            round(self.seconds, 1),
        ]


class FlaggedShares:
    """Replacement of `tensor_cores.forward` that counts flagged distances."""

    def __init__(self) -> None:
        self.forward = tensor_cores.forward
        self.counts: dict[int, list[int]] = defaultdict(lambda: [0, 0])  # by p: flagged, all

    def __call__(self, x: Tensor, weight: Tensor, p: int) -> tuple[Tensor, tensor_cores.Flagged | None]:
        """Compute distances like `tensor_cores.forward`."""
        y, flagged = self.forward(x, weight, p)
        self.counts[p][0] += y.numel() if flagged is None else len(flagged[0])
        self.counts[p][1] += y.numel()
        return y, flagged

    def share(self, p: int) -> float:
        """Return the share of flagged distances at p; NaN if no distance was computed at p."""
        flagged, total = self.counts[p]
        return flagged / total if total else math.nan


def train(dataset: str, seed: int, on_tensor_cores: bool, threads: int) -> Outcome:
    """Train a recipe once."""
    recipe, *overrides = RECIPES[dataset]
    settings = [f"seed={seed}", f"compute.tensor_cores={str(on_tensor_cores).lower()}"]
    experiment = load_config(recipe, [*overrides, *settings, f"compute.cpus_per_worker={threads}"])
    data = load_dataset(experiment.dataset, experiment.augmentation).to(select_device(experiment))
    epochs: list[EpochMetrics] = []
    shares = FlaggedShares()
    tensor_cores.forward = shares  # type: ignore[assignment]
    try:
        trained = fit(experiment, data, epochs.append)
    finally:
        tensor_cores.forward = shares.forward
    assert trained.validation is not None and epochs[-1].validation is not None
    return Outcome(
        trained.validation.certified,
        epochs[-1].validation.certified,
        trained.validation.clean,
        epochs[-1].train_loss,
        (shares.share(8), shares.share(12)),
        trained.seconds,
    )


def compare(name: str, exact: list[float], approximate: list[float]) -> None:
    """Print the mean of paired differences with a t-test."""
    differences = [100 * (other - one) for one, other in zip(exact, approximate, strict=True)]
    print(f"{name}: {100 * mean(exact):.2f} direct, {100 * mean(approximate):.2f} tensor cores", end="")
    print(f", difference {mean(differences):+.2f}", end="")
    if len(differences) > 1:
        test = stats.ttest_rel(approximate, exact)
        low, high = (100 * end for end in test.confidence_interval(0.95))
        print(f" (sd {stdev(differences):.2f}, 95% [{low:+.2f}, {high:+.2f}], p-value {test.pvalue:.2f})", end="")
    print()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"), help="file to append rows to")
    arguments = parser.parse_args()
    print(f"{arguments.dataset}, {describe_hardware()}, {arguments.threads} threads; in %, except loss and seconds")
    print("seed  operator    " + "".join(f"{name:>12}" for name in COLUMNS))
    results: dict[bool, list[Outcome]] = {False: [], True: []}
    for seed in arguments.seeds:
        for on_tensor_cores, outcomes in results.items():
            outcomes.append(train(arguments.dataset, seed, on_tensor_cores, arguments.threads))
            operator, row = "tensor cores" if on_tensor_cores else "direct", outcomes[-1].row()
            print(f"{seed:4}  {operator:12}" + "".join(f"{value:12g}" for value in row), flush=True)
            new = not arguments.csv.exists()
            with arguments.csv.open("a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                if new:
                    writer.writerow(["date", "machine", "torch", "dataset", "seed", "operator", *COLUMNS])
                run = [time.strftime("%Y-%m-%d"), describe_hardware(), torch.__version__, arguments.dataset, seed]
                writer.writerow([*run, operator, *row])
    direct, approximate = results[False], results[True]
    compare("selected", [one.selected for one in direct], [one.selected for one in approximate])
    compare("last epoch", [one.last for one in direct], [one.last for one in approximate])


if __name__ == "__main__":
    main()
