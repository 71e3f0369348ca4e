"""Data-parallel training and evaluation on Ray workers, over gloo on CPUs or NCCL on CUDA devices."""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from threading import Thread
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import RayTrainError  # raised by Ray, not by the worker's own code
from ray.util.actor_pool import ActorPool
from ray.util.queue import Queue
from torch import Tensor, nn

from linflab.platform.cluster.node import cluster_description
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.own_parts import import_own_parts, own_modules
from linflab.platform.data.datasets import data_dir, load_dataset
from linflab.platform.distributed.address import check_address, configured_address
from linflab.platform.errors import InputError, RunLockedError, TrainingError, WorkerLostError
from linflab.platform.host import allocated_cpus, configure_process
from linflab.platform.signals import watch_again
from linflab.platform.source import IMPORT_VAR, is_cluster_job, verify_source_hash
from linflab.platform.tracking.mlflow import STORE_ERRORS
from linflab.platform.training.evaluation import BatchResult, EvaluationSpec, evaluate_batch
from linflab.platform.training.loop import EpochMetrics, StepMetrics
from linflab.platform.training.weights import build_network
from linflab.platform.trial import Report, TrialRequest, TrialResult, run_trial, select_evaluation_device
from linflab.reports import schema

NODE_JOIN_TIMEOUT_S = 180.0  # for on-premise nodes, after `ray up` has returned
LATE_REPORTS_TIMEOUT_S = 30.0  # for reports that workers sent before training ended
STEP_REPORT_INTERVAL_S = 0.5  # each report is a message between processes


def start_ray() -> None:
    """Connect to the cluster in RAY_ADDRESS, or start Ray on this machine until this process ends.

    Raises:
        InputError: If the cluster in RAY_ADDRESS cannot be used from this machine.
    """
    if ray.is_initialized():
        return
    address = configured_address()
    if address is not None:
        address = check_address(address)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Without this setting, Ray kills a process when memory is low, and such a kill stops Ray Tune. A kill by the kernel
    # does not stop Ray Tune.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    os.environ["LINFLAB_DATA"] = str(data_dir())  # absolute: Ray's workers have other working directories
    try:
        ray.init(
            address=address or "local",
            num_cpus=allocated_cpus() if address is None else None,
            include_dashboard=False if address is None else None,  # 10 processes that nothing here uses
            namespace=f"linflab-{os.getuid()}",  # keeps the actors of a cluster's users apart
            runtime_env=_worker_environment(address),
            configure_logging=True,
            logging_level="ERROR",
            log_to_driver=False,
        )
    except Exception as error:  # any exception, depending on cause and version of Ray
        if address is None:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(
            f"RAY_ADDRESS={address}: the cluster cannot be used from this machine ({reason}); run on one of its "
            "nodes, or unset it to start Ray on this machine"
        ) from None
    finally:
        watch_again()  # Ray replaces the signal handlers


def _worker_environment(address: str | None) -> dict[str, Any] | None:
    """Return the runtime environment of workers, which do not inherit this process's variables on a running cluster.

    A cluster job has the variables in its own runtime environment, and Ray rejects them in both.
    """
    if address is None or is_cluster_job() or not own_modules():
        return None
    return {"env_vars": {IMPORT_VAR: os.environ[IMPORT_VAR]}}


def node_resources() -> list[dict[str, float]]:
    """Return the Ray resources (CPU, GPU) of each node of the running cluster.

    If the worker nodes that the cluster can start have more CPUs, return the resources of these nodes instead.
    """
    current_nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    description = _description()
    possible_nodes: list[dict[str, float]] = []
    for name, kind in description.get("available_node_types", {}).items():
        if name != description["head_node_type"] and kind.get("resources"):  # unknown for on-premise nodes
            possible_nodes += [kind["resources"]] * int(kind.get("max_workers", 0))
    possible_nodes = possible_nodes[: description.get("max_workers", 0)]
    return possible_nodes if _total(possible_nodes, "CPU") > _total(current_nodes, "CPU") else current_nodes


def _description() -> dict[str, Any]:
    """Return the `ray up` settings if this machine is the head node of such a cluster; otherwise {}."""
    return (cluster_description() or {}) if configured_address() is not None else {}


def _total(nodes: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(machine.get(name, 0) for machine in nodes)


def wait_for_nodes(experiment: ExperimentConfig, show_message: Callable[[str], None]) -> None:
    """Wait until a cluster just started by `ray up` has all its nodes, or enough for the config's workers.

    Args:
        experiment: Config of the run or sweep.
        show_message: Called once with a message if nodes are missing.
    """
    kinds = _description().get("available_node_types", {}).values()
    expected = 1 + sum(kind.get("min_workers", 0) for kind in kinds)
    deadline, has_shown_message = time.monotonic() + NODE_JOIN_TIMEOUT_S, False
    while (num_nodes := sum(node["Alive"] for node in ray.nodes())) < expected and time.monotonic() < deadline:
        with suppress(InputError):
            worker_resources(experiment)
            if experiment.compute.device != "auto" or uses_gpus(experiment):  # otherwise nodes with GPUs may still join
                return
        if not has_shown_message:
            show_message(f"Waiting for the cluster's nodes: {num_nodes} of {expected} have joined.")
        has_shown_message = True
        time.sleep(2)


def uses_gpus(experiment: ExperimentConfig) -> bool:
    """Return whether each worker gets a CUDA device on the running cluster."""
    device = experiment.compute.device
    return device == "cuda" or (device == "auto" and _total(node_resources(), "GPU") >= 1)


def worker_resources(experiment: ExperimentConfig) -> dict[str, float]:
    """Return the Ray resources of one worker of a config.

    Raises:
        InputError: If the cluster is too small for all workers, which would then wait forever.
    """
    workers, cpus = experiment.compute.workers, experiment.compute.cpus_per_worker
    nodes = node_resources()
    if workers * cpus > _total(nodes, "CPU"):
        raise InputError(
            f"compute.workers={workers}, compute.cpus_per_worker={cpus}: requires {workers * cpus} CPUs, but the "
            f"cluster has {_total(nodes, 'CPU'):g}; use fewer workers or CPUs"
        )
    largest = max(machine.get("CPU", 0) for machine in nodes)
    if cpus > largest:
        raise InputError(
            f"compute.cpus_per_worker={cpus}: requires a node with {cpus} CPUs, but the largest one has {largest:g}; "
            "use fewer"
        )
    if not uses_gpus(experiment):
        return _check_capacity(workers, {"CPU": cpus})
    share = experiment.compute.gpus_per_worker
    if share < 1 and workers > 1:  # NCCL does not support two processes on one device
        raise InputError(
            f"compute.gpus_per_worker={share:g}: requires compute.workers=1, not {workers}; use one GPU per worker"
        )
    if workers > _total(nodes, "GPU"):
        raise InputError(
            f"compute.workers={workers}: requires a GPU per worker, but the cluster has {_total(nodes, 'GPU'):g}; use "
            "fewer workers or compute.device=cpu"
        )
    return _check_capacity(workers, {"CPU": cpus, "GPU": share})


def _check_capacity(workers: int, resources: dict[str, float]) -> dict[str, float]:
    if _max_workers(resources) < workers:
        requirements = " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
        raise InputError(
            f"compute.workers={workers}: requires {requirements} per worker on one node, but the cluster's nodes fit "
            f"{_max_workers(resources)} workers; use fewer"
        )
    return resources


def _max_workers(resources: Mapping[str, float]) -> int:
    """Return the number of workers with these resources that fit; no worker can span two nodes."""
    return sum(
        int(min(machine.get(name, 0) / amount for name, amount in resources.items()) + 1e-9)
        for machine in node_resources()
    )


def max_concurrent_trials(workers: int, resources: Mapping[str, float]) -> int:
    """Return the number of trials that fit on the nodes at once, at least 1.

    Args:
        workers: Number of workers per trial.
        resources: Ray resources of one worker, by name.
    """
    return max(1, _max_workers(resources) // workers)


def train_distributed(
    request: TrialRequest,
    on_report: Callable[[Report], None] | None = None,
    callbacks: Sequence[UserCallback] = (),
    resources: Mapping[str, float] | None = None,
) -> TrialResult:
    """Run `run_trial` on Ray Train workers; Ray must be running.

    Args:
        request: Trial to train.
        on_report: Called as by `run_trial`, but from another thread of this process, and only for some of the steps.
        callbacks: Ray Train callbacks, which receive the metrics of `to_ray_metrics` after each epoch.
        resources: Ray resources that each worker requests and waits for; None requests those of the config.

    Returns:
        Result of the first worker.

    Raises:
        InputError: If the cluster is too small.
        WorkerLostError: If a worker's process or node is gone.
        TrainingError: If a worker failed; the message has the reason.
    """
    resources = resources or worker_resources(request.experiment)
    reports = None if on_report is None else Queue(actor_options={"num_cpus": 0})
    own_name = f"train-{uuid.uuid4().hex}"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"request": request, "reports": reports},
        scaling_config=ray.train.ScalingConfig(
            num_workers=request.experiment.compute.workers,
            use_gpu="GPU" in resources,
            resources_per_worker=dict(resources),
        ),
        run_config=ray.train.RunConfig(name=own_name, storage_path=str(request.storage.ray), callbacks=list(callbacks)),
    )
    listener = Thread(target=_forward_reports, args=(reports, on_report), daemon=True)
    if reports is not None:
        listener.start()
    try:
        result = trainer.fit()
    except ray.train.WorkerGroupError as error:
        failures = list(error.worker_failures.values())
        own_failures = [failure for failure in failures if not _is_worker_loss(failure)]
        raise (TrainingError(str(own_failures[0])) if own_failures else WorkerLostError(str(failures[0]))) from error
    except ray.exceptions.RayError as error:  # Ray Train's controller or all of Ray is gone
        raise WorkerLostError(f"Ray stopped ({' '.join(str(error).split())[:200]})") from error
    finally:
        if reports is not None:
            with suppress(ray.exceptions.RayError):  # the queue is gone if Ray is gone
                reports.put(None)
                listener.join(LATE_REPORTS_TIMEOUT_S)
                reports.shutdown()
        shutil.rmtree(request.storage.ray / own_name, ignore_errors=True)
    assert isinstance(result.return_value, TrialResult)  # the first worker's
    return result.return_value


def _is_worker_loss(failure: Exception) -> bool:
    """Return True if this worker or one that it waited for is gone; False if this worker raised an error."""
    if isinstance(failure, (WorkerLostError, RunLockedError, *STORE_ERRORS)):
        return True
    is_own_error = isinstance(failure, InputError | TrainingError)
    return isinstance(failure, RayTrainError | dist.DistError) or (not is_own_error and "gloo" in str(failure))


def to_ray_metrics(report: EpochMetrics) -> dict[str, float]:
    """Return the metrics of an epoch by name, as reported to Ray Train and Ray Tune."""
    values = {"epoch": report.epoch, schema.P: report.at.p, schema.TRAIN_LOSS: report.train_loss}
    if report.validation is None or report.best_certified is None:
        return values
    return {
        **values,
        schema.VALIDATION_CERTIFIED: report.validation.certified,
        schema.BEST_VALIDATION_CERTIFIED: report.best_certified,
    }


def _worker(config: dict[str, Any]) -> TrialResult | None:
    """Train on one worker; only the first worker returns a result."""
    verify_source_hash()
    import_own_parts()
    reports: Queue | None = config["reports"]
    first = ray.train.get_context().get_world_rank() == 0
    last_step = 0.0

    def on_report(report: Report) -> None:
        nonlocal last_step
        if isinstance(report, EpochMetrics):
            ray.train.report(to_ray_metrics(report))
        elif isinstance(report, StepMetrics):
            if time.monotonic() - last_step <= STEP_REPORT_INTERVAL_S:
                return
            last_step = time.monotonic()
            report = replace(report, loss=report.loss.cpu())
        if reports is not None and first:
            reports.put(report)

    return run_trial(config["request"], on_report)


def _forward_reports(reports: Queue, on_report: Callable[[Report], None]) -> None:
    with suppress(ray.exceptions.RayError):  # if Ray is gone, `trainer.fit` raises in the caller
        while (report := reports.get()) is not None:
            on_report(report)


def evaluate_distributed(
    experiment: ExperimentConfig, network: nn.Module, spec: EvaluationSpec, batches: Sequence[Tensor], workers: int
) -> Iterator[BatchResult]:
    """Evaluate batches of test images on Ray workers, starting Ray if needed.

    Each worker uses the number of CPUs in the config, or fewer if the cluster has too few, and a CUDA device if the
    cluster has one.

    Args:
        experiment: Config of the run.
        network: Trained network.
        spec: Certifier, attacks and eps.
        batches: One tensor per batch, with the positions of the batch in the test set.
        workers: Number of Ray workers.

    Yields:
        Results of the batches, in order of completion.

    Raises:
        InputError: If the cluster is too small.
        TrainingError: If a worker failed; the message has the reason.
    """
    start_ray()
    cpus, gpus = evaluation_resources(experiment, workers)
    state = ray.put({name: tensor.cpu() for name, tensor in network.state_dict().items()})
    scorer = ray.remote(num_cpus=cpus, num_gpus=gpus)(_EvaluationActor)
    pool = ActorPool([scorer.remote(experiment, state, spec, cpus) for _ in range(workers)])
    try:
        yield from pool.map_unordered(lambda scorer, batch: scorer.score.remote(batch), batches)
    except ray.exceptions.RayError as error:
        raise TrainingError(f"a worker failed during evaluation: {' '.join(str(error).split())[-500:]}") from None


def evaluation_resources(experiment: ExperimentConfig, workers: int) -> tuple[int, int]:
    """Return the CPUs and GPUs of each worker of an evaluation on the running cluster.

    Args:
        experiment: Config of the run.
        workers: Number of workers.

    Raises:
        InputError: If the cluster is too small.
    """
    nodes = node_resources()
    gpus = int(uses_gpus(experiment) and _total(nodes, "GPU") >= 1)  # without GPUs, use CPUs
    for cpus in range(experiment.compute.cpus_per_worker, 0, -1):
        if max_evaluation_workers(cpus, gpus) >= workers:
            return cpus, gpus
    raise InputError(
        f"workers={workers}: requires a CPU per worker, and a GPU on the same node if the cluster has any; there are "
        f"{_total(nodes, 'CPU'):g} CPUs and {_total(nodes, 'GPU'):g} GPUs; use fewer workers"
    )


def max_evaluation_workers(cpus: int, gpus: int) -> int:
    """Return how many workers of an evaluation, each with these CPUs and GPUs, run at once on the nodes."""
    return _max_workers({"CPU": cpus, **({"GPU": gpus} if gpus else {})})


class _EvaluationActor:
    """A Ray worker with the network and the test images."""

    def __init__(
        self, experiment: ExperimentConfig, state: dict[str, Tensor], spec: EvaluationSpec, threads: int
    ) -> None:
        verify_source_hash()
        import_own_parts()
        torch.set_num_threads(threads)
        configure_process()
        device = select_evaluation_device(experiment)
        self.network = build_network(experiment)
        self.network.load_state_dict(state)
        self.network.to(device).eval()
        self.test = load_dataset(experiment.dataset, experiment.augmentation).to(device).test
        self.spec, self.certifiers = spec, spec.certifiers(self.network)

    def score(self, positions: Tensor) -> BatchResult:
        return evaluate_batch(
            self.network, self.test, positions.to(self.test.indices.device), self.spec, self.certifiers
        )
