"""What a race saves, and what it loses: the same points of a space, all trained in full, and raced.

    python benchmarks/race.py [--trials N] [--race N] [--storage DIR] [RECIPE SPACE [SETTING=VALUE ...]]

Both sweeps draw at random with one seed, so they try the same points. Printed are, for each, the epochs trained, the
seconds from start to end, and certified accuracy of the best on validation; how much of the best is lost by the race;
and where the race's choice stands among all points in full. By default on Fashion-MNIST, with a network of 3 layers and
width 128, in about a quarter of an hour on 2 cores.
"""

import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd
from rich.console import Console

from linflab.platform.config import load_experiment
from linflab.platform.datasets import load_dataset
from linflab.platform.storage import Storage
from linflab.platform.sweep import plan_sweep, run_sweep, search_config
from linflab.platform.tracking import hardware
from linflab.reports import schema
from linflab.reports.records import read_trials
from linflab.reports.sweep_tables import in_order

RECIPE, SPACE = "fashion_mnist_eps0.1_linf_dist_net_cpu", "training"
SMALL = ["model.depth=3", "model.width=128", "training.epochs=9", "compute.cpus_per_worker=1"]
SMALL += ["evaluation.attack.kinds=[pgd]", "evaluation.attack.steps=1"]  # attacks on test images decide nothing here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=27)
    parser.add_argument("--race", type=int, default=9)
    parser.add_argument("--storage", type=Path, default=None, help="folder to work in; by default a temporary one")
    parser.add_argument("what", nargs="*", help="recipe, space, settings")
    arguments = parser.parse_args()
    recipe, space, *overrides = arguments.what or [RECIPE, SPACE, *SMALL]
    print(f"{hardware()}; {recipe} {space} {' '.join(overrides)}; {arguments.trials} points")
    found = {}
    dataset = load_dataset(load_experiment(recipe, overrides).dataset)
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage.open(arguments.storage or Path(folder))
        for name, race in (("in_full", 1), ("raced", arguments.race)):
            config = search_config(str(arguments.trials), sampler="random", race=race)
            start = time.perf_counter()
            run_sweep(plan_sweep(recipe, overrides, space, name, config, dataset), storage, Console(quiet=True))
            seconds = time.perf_counter() - start
            trials = in_order(read_trials(storage.tracking_uri, name))
            found[name] = trials
            epochs = int(trials[schema.EPOCHS].astype(int).sum())
            print(f"{name:8} {epochs:6} epochs {seconds:7.0f} s   best {_best(trials):.2f} % certified on validation")
    in_full, raced = found["in_full"], found["raced"]
    chosen = str(raced[schema.TRIAL].iloc[0]).split(".")[0]
    place = list(in_full[schema.TRIAL]).index(chosen) + 1
    print(
        f"the race loses {_best(in_full) - _best(raced):.2f} points; its choice, #{chosen}, is number {place} in full"
    )


def _best(trials: pd.DataFrame) -> float:
    return 100 * float(trials[schema.BEST_VALIDATION_CERTIFIED].iloc[0])


if __name__ == "__main__":
    main()
