"""A sweep from Python: plan it, run it on Ray, and read its trials as a DataFrame.

Run: python examples/sweep_from_python.py
"""

from pathlib import Path

import linflab
from linflab.platform.data.datasets import load_dataset
from linflab.platform.sweeps.plan import parse_search_options, plan_sweep
from linflab.platform.sweeps.run import run_sweep
from linflab.platform.tracking.storage import Storage

SPACE = """
description: Width and target radius
parameters:
  model.width: {distribution: integer, low: 32, high: 96, step: 32}
  objective.theta: {distribution: uniform, low: 0.15, high: 0.3}
"""


def main() -> None:
    """Run three short trials, and print the configurations with their accuracies."""
    Path("space.yaml").write_text(SPACE)
    overrides = ["training.epochs=5", "evaluation.attack.steps=10", "evaluation.attack.restarts=1"]
    search = parse_search_options("3", sampler="random")
    plan = plan_sweep(
        "digits_eps0.1_linf_dist_net", overrides, "space.yaml", "from_python", search, load_dataset("digits")
    )
    failed = run_sweep(plan, Storage.open(Path("runs")))
    trials = linflab.records("runs")
    columns = ["model.width", "objective.theta", "best/val/certified_accuracy", "test/certified_accuracy"]
    print(trials[columns].sort_values("best/val/certified_accuracy", ascending=False).to_string(index=False))
    print(f"{len(trials)} trials, {failed} failed")


if __name__ == "__main__":
    main()
