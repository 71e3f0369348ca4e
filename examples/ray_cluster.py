"""Data-parallel training on a Ray cluster.

Run on a node of the cluster, with a storage directory that all nodes share:

    RAY_ADDRESS=HOST:PORT python examples/ray_cluster.py /shared/runs

Without RAY_ADDRESS, Ray starts on this machine.
"""

import sys

import linflab


def main(storage: str) -> None:
    """Train on two workers, and print the accuracies of the selected network."""
    overrides = ["compute.workers=2", "training.epochs=5", "evaluation.attack.steps=10"]
    result = linflab.train("digits_eps0.1_linf_dist_net", overrides, storage=storage, name="two_workers")
    for metric in ("test/clean_accuracy", "test/robust_accuracy", "test/certified_accuracy"):
        print(f"{metric}: {result.metrics[metric]:.2%}")
    print(f"certificate: {result.certificate}, run: {result.run_id}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs")
