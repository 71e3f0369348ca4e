"""What a sweep costs beside the training itself.

    python benchmarks/sweep_overhead.py [--trials N] [--noop N] [--storage DIR]

First, a sweep of short trainings, one at a time, beside the bare loop: the same experiments trained and scored in a
plain process, without Ray, MLflow and checkpoints. Printed is, from the second trial on (the first one starts Ray's
process), the time from the end of one trial to the end of the next, less that of its bare training.

Then trials that do nothing, on nodes that Ray simulates: what the driver, Tune and MLflow take for each, how that grows
with the number of trials done, and the memory of the driver. MLflow's SQLite takes most of it: some ten transactions a
trial (its run with tags, its settings, its metrics, its end), each of them written to the disk.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from mlflow.tracking import MlflowClient
from ray.cluster_utils import Cluster
from rich.console import Console

from linflab.platform.config import Experiment
from linflab.platform.datasets import data_folder, load_dataset
from linflab.platform.evaluation import evaluate, scoring_of
from linflab.platform.search import Job
from linflab.platform.storage import Storage
from linflab.platform.sweep import SweepPlan, plan_sweep, run_sweep, search_config
from linflab.platform.tracking import Run, hardware
from linflab.platform.training import fit
from linflab.reports import schema
from linflab.reports.records import read_trials

RECIPE = "digits_eps0.1_linf_dist_net"
SHORT = ["training.epochs=10", "evaluation.attack.steps=10", "evaluation.attack.restarts=1"]
NODES, CPUS_A_NODE = 4, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--noop", type=int, default=1000, help="0, or at least 300")
    parser.add_argument("--storage", type=Path, default=None, help="folder to work in; by default a temporary one")
    arguments = parser.parse_args()
    print(hardware())
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage.open(arguments.storage or Path(folder))
        if arguments.trials > 1:
            _short_trials(storage, arguments.trials)
        if arguments.noop > 0:
            _no_op_trials(storage, arguments.noop)


def _short_trials(storage: Storage, trials: int) -> None:
    plan = _plan("short", SHORT, trials)
    ray.init(num_cpus=1, logging_level="ERROR", log_to_driver=False)
    run_sweep(plan, storage, Console(quiet=True))
    ray.shutdown()
    ends = _ends(storage, "short")
    records = read_trials(storage.tracking_uri, "short").set_index(schema.TRIAL)
    bare = []
    for number in range(1, trials + 1):
        job = Job(**json.loads(records.loc[str(number), schema.JOB]))
        bare.append(_bare(plan.experiment(job)))
    print(f"\n{'trial':>5} {'sweep':>7} {'bare':>7} {'more':>7}   seconds")
    more = []
    for number in range(2, trials + 1):
        took = ends[number - 1] - ends[number - 2]
        more.append(took - bare[number - 1])
        print(f"{number:5} {took:7.2f} {bare[number - 1]:7.2f} {more[-1]:7.2f}")
    print(f"more than the bare loop: median {statistics.median(more):.2f} s, at most {max(more):.2f} s a trial")


def _bare(experiment: Experiment) -> float:
    """Seconds to train and score an experiment in this process."""
    start = time.perf_counter()
    dataset = load_dataset(experiment.dataset, experiment.augmentation)
    trained = fit(experiment, dataset)
    evaluate(trained.network, dataset.test, scoring_of(experiment, trained.network, attacked=True), 1000)
    return time.perf_counter() - start


def _no_op_trials(storage: Storage, trials: int) -> None:
    os.environ["LINFLAB_DATA"] = str(data_folder())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS_A_NODE, "include_dashboard": False})
    for _ in range(NODES - 1):
        cluster.add_node(num_cpus=CPUS_A_NODE)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    start, memory = time.perf_counter(), _memory()
    run_sweep(_plan("noop", [], trials), storage, Console(quiet=True), train=_no_op)
    seconds = time.perf_counter() - start
    ray.shutdown()
    cluster.shutdown()
    statuses = read_trials(storage.tracking_uri, "noop")["status"].value_counts().to_dict()
    ends, up = _ends(storage, "noop"), 2 * NODES * CPUS_A_NODE  # by then, all processes are up
    first, last = ends[up + 100] - ends[up], ends[-1] - ends[-101]
    print(f"\n{trials} trials that do nothing, {NODES} simulated nodes of {CPUS_A_NODE} CPUs: {statuses}")
    print(f"{seconds:.0f} s in all, start of processes included; {trials / seconds:.1f} trials a second")
    print(f"first 100 trials {first:.1f} s, last 100 trials {last:.1f} s: ratio {last / first:.2f}")
    print(f"memory of the driver: {memory:.0f} MiB before, {_memory():.0f} MiB at most")


def _no_op(experiment: Experiment, storage: Storage, *_: Any, resume: str, **__: Any) -> dict[str, float]:
    """In place of `run_trial`: a record, and no training."""
    value = torch.rand((), generator=torch.Generator().manual_seed(hash(experiment.objective.theta) % 2**32)).item()
    metrics = {
        schema.BEST_VALIDATION_CERTIFIED: value,
        schema.BEST_VALIDATION_CLEAN: value,
        schema.TRAIN_SECONDS: 0.0,
    }
    with Run.resume(storage, resume) as run:
        run.log_metrics(metrics)
    return metrics


def _plan(name: str, overrides: list[str], trials: int) -> SweepPlan:
    config = search_config(str(trials), sampler="random")
    return plan_sweep(RECIPE, overrides, "demo", name, config, load_dataset("digits"))


def _ends(storage: Storage, name: str) -> list[float]:
    """When the trials of a sweep ended, in seconds, in order."""
    client = MlflowClient(storage.tracking_uri)
    runs = [client.get_run(run_id) for run_id in read_trials(storage.tracking_uri, name)["run_id"]]
    return sorted(run.info.end_time / 1000 for run in runs)


def _memory() -> float:
    """The most that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
