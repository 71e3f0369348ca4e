"""Overhead of a sweep, compared with only training and evaluating its configurations.

    python benchmarks/sweep_overhead.py [--trials N] [--noop N] [--storage DIR]

The first part runs a sweep of short trials, one after another. The baseline trains and evaluates the same configs in a
plain process, without Ray, MLflow and checkpoints. The output is the time from the end of one trial to the end of the
next, minus the time of the baseline. The first trial is excluded, since it also starts Ray's process.

The second part runs trials that do nothing, on nodes that Ray simulates. It measures the time that the driver, Tune and
MLflow take per trial, how this time grows with the number of trials, and the memory of the driver. MLflow's SQLite
takes most of the time: about ten transactions per trial (run with tags, settings, metrics, end), each written to disk.
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

from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.data.datasets import data_dir, load_dataset
from linflab.platform.host import describe_hardware
from linflab.platform.sweeps.plan import SweepPlan, parse_search_options, plan_sweep
from linflab.platform.sweeps.run import run_sweep
from linflab.platform.sweeps.search import TrialSpec
from linflab.platform.tracking.runs import Run
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.evaluation import evaluate, evaluation_spec
from linflab.platform.training.fit import fit
from linflab.platform.trial import TrialRequest, TrialResult
from linflab.reports import schema
from linflab.reports.records import read_trials

RECIPE = "digits_eps0.1_linf_dist_net"
SHORT = ["training.epochs=10", "evaluation.attack.steps=10", "evaluation.attack.restarts=1"]
NODES, CPUS_PER_NODE = 4, 2


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--noop", type=int, default=1000, help="Number of trials that do nothing: 0, or at least 300")
    parser.add_argument("--storage", type=Path, default=None, help="Storage directory (default: a temporary one)")
    arguments = parser.parse_args()
    print(describe_hardware())
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage.open(arguments.storage or Path(folder))
        if arguments.trials > 1:
            _short_trials(storage, arguments.trials)
        if arguments.noop > 0:
            _no_op_trials(storage, arguments.noop)


def _short_trials(storage: Storage, trials: int) -> None:
    plan = _plan("short", SHORT, trials)
    ray.init(num_cpus=1, logging_level="ERROR", log_to_driver=False)
    run_sweep(plan, storage)
    ray.shutdown()
    ends = _ends(storage, "short")
    records = read_trials(storage.tracking_uri, "short").set_index(schema.TRIAL)
    plain_seconds = []
    for number in range(1, trials + 1):
        job = TrialSpec(**json.loads(records.loc[str(number), schema.TRIAL_SPEC]))
        plain_seconds.append(_time_plain_run(plan.experiment(job)))
    print(f"\n{'trial':>5} {'sweep':>7} {'plain':>7} {'extra':>7}   seconds")
    extra_seconds = []
    for number in range(2, trials + 1):
        sweep_seconds = ends[number - 1] - ends[number - 2]
        extra_seconds.append(sweep_seconds - plain_seconds[number - 1])
        print(f"{number:5} {sweep_seconds:7.2f} {plain_seconds[number - 1]:7.2f} {extra_seconds[-1]:7.2f}")
    print(f"overhead per trial: median {statistics.median(extra_seconds):.2f} s, at most {max(extra_seconds):.2f} s")


def _time_plain_run(experiment: ExperimentConfig) -> float:
    """Return the seconds to train and evaluate a config in this process."""
    start = time.perf_counter()
    dataset = load_dataset(experiment.dataset, experiment.augmentation)
    result = fit(experiment, dataset)
    evaluate(result.network, dataset.test, evaluation_spec(experiment, result.network, with_attacks=True), 1000)
    return time.perf_counter() - start


def _no_op_trials(storage: Storage, trials: int) -> None:
    os.environ["LINFLAB_DATA"] = str(data_dir())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS_PER_NODE, "include_dashboard": False})
    for _ in range(NODES - 1):
        cluster.add_node(num_cpus=CPUS_PER_NODE)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    start, memory = time.perf_counter(), _memory()
    run_sweep(_plan("noop", [], trials), storage, train=_no_op)
    seconds = time.perf_counter() - start
    ray.shutdown()
    cluster.shutdown()
    statuses = read_trials(storage.tracking_uri, "noop")["status"].value_counts().to_dict()
    ends, num_startup_trials = _ends(storage, "noop"), 2 * NODES * CPUS_PER_NODE  # by then all processes have started
    first, last = ends[num_startup_trials + 100] - ends[num_startup_trials], ends[-1] - ends[-101]
    print(f"\n{trials} trials that do nothing, {NODES} simulated nodes of {CPUS_PER_NODE} CPUs: {statuses}")
    print(f"{seconds:.0f} s in total, including the start of processes; {trials / seconds:.1f} trials per second")
    print(f"first 100 trials {first:.1f} s, last 100 trials {last:.1f} s: ratio {last / first:.2f}")
    print(f"memory of the driver: {memory:.0f} MiB before, {_memory():.0f} MiB at most")


def _no_op(request: TrialRequest, **_: Any) -> TrialResult:
    """Log metrics without training, as a replacement of `run_trial`."""
    assert request.resume_run_id is not None
    seed = hash(request.experiment.objective.theta) % 2**32
    value = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    metrics = {
        schema.BEST_VALIDATION_CERTIFIED: value,
        schema.BEST_VALIDATION_CLEAN: value,
        schema.TRAIN_SECONDS: 0.0,
    }
    with Run.resume(request.storage, request.resume_run_id) as run:
        run.log_metrics(metrics)
    return TrialResult(request.resume_run_id, metrics, "")


def _plan(name: str, overrides: list[str], trials: int) -> SweepPlan:
    config = parse_search_options(str(trials), sampler="random")
    return plan_sweep(RECIPE, overrides, "demo", name, config, load_dataset("digits"))


def _ends(storage: Storage, name: str) -> list[float]:
    """Return the sorted end times of the trials of a sweep, in seconds."""
    client = MlflowClient(storage.tracking_uri)
    runs = [client.get_run(run_id) for run_id in read_trials(storage.tracking_uri, name)["run_id"]]
    return sorted(run.info.end_time / 1000 for run in runs)


def _memory() -> float:
    """Return the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
