"""Cost and accuracy of successive halving, compared with full training of the same configurations.

    python benchmarks/successive_halving.py [--trials N] [--halving N] [--storage DIR] [RECIPE SPACE [KEY=VALUE ...]]

Both sweeps use random sampling with the same seed, so they try the same configurations. The output is, for each sweep,
the number of epochs, the elapsed seconds, and the best certified accuracy on validation images. It also includes the
accuracy that successive halving loses, and the rank of its best configuration in the full sweep. The default is a
network of 3 layers and width 128 on Fashion-MNIST, which takes about a quarter of an hour on 2 cores.
"""

import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd

from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.host import describe_hardware
from linflab.platform.sweeps.plan import parse_search_options, plan_sweep
from linflab.platform.sweeps.run import run_sweep
from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from linflab.reports.records import read_trials
from linflab.reports.sweep_tables import rank_trials

RECIPE, SPACE = "fashion_mnist_eps0.1_linf_dist_net_cpu", "training"
SMALL = ["model.depth=3", "model.width=128", "training.epochs=9", "compute.cpus_per_worker=1"]
SMALL += ["evaluation.attack.methods=[pgd]", "evaluation.attack.steps=1"]  # test attacks do not matter here


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=27)
    parser.add_argument("--halving", type=int, default=9)
    parser.add_argument("--storage", type=Path, default=None, help="Storage directory (default: a temporary one)")
    parser.add_argument("what", nargs="*", help="Recipe, space and settings")
    arguments = parser.parse_args()
    recipe, space, *overrides = arguments.what or [RECIPE, SPACE, *SMALL]
    print(f"{describe_hardware()}; {recipe} {space} {' '.join(overrides)}; {arguments.trials} configurations")
    trials_by_sweep = {}
    dataset = load_dataset(load_config(recipe, overrides).dataset)
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage.open(arguments.storage or Path(folder))
        for name, halving in (("full", 1), ("halving", arguments.halving)):
            config = parse_search_options(str(arguments.trials), sampler="random", halving=halving)
            start = time.perf_counter()
            run_sweep(plan_sweep(recipe, overrides, space, name, config, dataset), storage)
            seconds = time.perf_counter() - start
            trials = rank_trials(read_trials(storage.tracking_uri, name))
            trials_by_sweep[name] = trials
            epochs = int(trials[schema.EPOCHS].astype(int).sum())
            print(f"{name:8} {epochs:6} epochs {seconds:7.0f} s   best {_best(trials):.2f} % certified on validation")
    full_trials, halving_trials = trials_by_sweep["full"], trials_by_sweep["halving"]
    best_label = str(halving_trials[schema.TRIAL].iloc[0]).split(".")[0]
    rank = list(full_trials[schema.TRIAL]).index(best_label) + 1
    print(
        f"successive halving loses {_best(full_trials) - _best(halving_trials):.2f} points; its best trial, "
        f"#{best_label}, has rank {rank} in the full sweep"
    )


def _best(trials: pd.DataFrame) -> float:
    return 100 * float(trials[schema.BEST_VALIDATION_CERTIFIED].iloc[0])


if __name__ == "__main__":
    main()
