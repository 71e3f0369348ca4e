"""Ray around one trial: several workers that train it, on CPUs over gloo or on CUDA devices over nccl, or score it."""

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
from ray.train.v2._internal.exceptions import RayTrainError  # what Ray says of a worker, as against what a worker says
from ray.util.actor_pool import ActorPool
from ray.util.queue import Queue
from torch import Tensor, nn

from linflab.platform.config import Experiment
from linflab.platform.datasets import data_folder, load_dataset
from linflab.platform.errors import Busy, SettingError, TrainingError, WorkerDied
from linflab.platform.evaluation import BatchScore, Scoring, score_batch
from linflab.platform.node import cluster_description
from linflab.platform.process import settle_process
from linflab.platform.shipping import check_code
from linflab.platform.storage import Storage
from linflab.platform.tracking import STORE_ERRORS
from linflab.platform.training import EpochReport, StepReport
from linflab.platform.trial import device_of, run_trial
from linflab.platform.weights import network_of
from linflab.reports import schema

SECONDS_TO_JOIN = 180.0  # that machines of one's own have, after `ray up` has returned
SECONDS_BETWEEN_STEP_REPORTS = 0.5  # each one is a message between processes


def start_ray() -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start Ray on this machine for the life of this process."""
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # a process that Ray itself kills for want of memory ends the whole of Ray Tune; the kernel's kill does not
        os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
        os.environ["LINFLAB_DATA"] = str(data_folder())  # absolute: Ray's workers run in folders of their own
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "local"),
            configure_logging=True,
            logging_level="ERROR",
            log_to_driver=False,
        )


def machines() -> list[dict[str, float]]:
    """What each machine of the running cluster has, by Ray's names (CPU, GPU), and those that it can start."""
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    description = _description()
    can_be: list[dict[str, float]] = []
    for name, kind in description.get("available_node_types", {}).items():
        if name != description["head_node_type"] and kind.get("resources"):  # of one's own machines they are not known
            can_be += [kind["resources"]] * int(kind.get("max_workers", 0))
    can_be = can_be[: description.get("max_workers", 0)]
    return can_be if _total(can_be, "CPU") > _total(there, "CPU") else there


def _description() -> dict[str, Any]:
    """Of the running cluster, if it is one of `ray up` and this its head; else empty."""
    return (cluster_description() or {}) if "RAY_ADDRESS" in os.environ else {}


def _total(of: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(machine.get(name, 0) for machine in of)


def wait_for_machines(experiment: Experiment, say: Callable[[str], None]) -> None:
    """Where `ray up` has just started a cluster, wait for machines that are to join, until the experiment fits."""
    kinds = _description().get("available_node_types", {}).values()
    expected = 1 + sum(kind.get("min_workers", 0) for kind in kinds)
    deadline, said = time.monotonic() + SECONDS_TO_JOIN, False
    while (there := sum(node["Alive"] for node in ray.nodes())) < expected and time.monotonic() < deadline:
        with suppress(SettingError):
            worker_resources(experiment)
            if experiment.compute.device != "auto" or uses_gpus(experiment):  # else GPUs may be still to come
                return
        if not said:
            say(f"Waiting for the cluster's machines: {there} of {expected} are there.")
        said = True
        time.sleep(2)


def uses_gpus(experiment: Experiment) -> bool:
    """Whether workers get a CUDA device each, on the running cluster."""
    wanted = experiment.compute.device
    return wanted == "cuda" or (wanted == "auto" and _total(machines(), "GPU") >= 1)


def worker_resources(experiment: Experiment) -> dict[str, float]:
    """What one worker of the experiment takes of the running cluster.

    Raises:
        SettingError: the cluster has less in all than the workers need together; they would wait for ever.
    """
    workers, cpus = experiment.compute.workers, experiment.compute.cpus_per_worker
    there = machines()
    if workers * cpus > _total(there, "CPU"):
        raise SettingError(
            f"compute.workers={workers} of compute.cpus_per_worker={cpus}: need {workers * cpus} CPUs; "
            f"there are {_total(there, 'CPU'):g}"
        )
    largest = max(machine.get("CPU", 0) for machine in there)
    if cpus > largest:
        raise SettingError(f"compute.cpus_per_worker={cpus}: the largest machine of the cluster has {largest:g} CPUs")
    if not uses_gpus(experiment):
        return _checked(workers, {"CPU": cpus})
    share = experiment.compute.gpus_per_worker
    if share < 1 and workers > 1:  # NCCL refuses two processes on one device
        raise SettingError(f"compute.gpus_per_worker={share:g}: a GPU is shared by trainings of one worker alone")
    if workers > _total(there, "GPU"):
        raise SettingError(
            f"compute.workers={workers}: need a GPU each; there are {_total(there, 'GPU'):g}; "
            "compute.device=cpu trains without"
        )
    return _checked(workers, {"CPU": cpus, "GPU": share})


def _checked(workers: int, resources: dict[str, float]) -> dict[str, float]:
    if _room(resources) < workers:
        what = " and ".join(f"{needed:g} {name}" for name, needed in resources.items())
        raise SettingError(
            f"compute.workers={workers} of {what}: the cluster's machines have room for {_room(resources)}"
        )
    return resources


def _room(resources: Mapping[str, float]) -> int:
    """For how many workers with these resources the machines have room; none is spread over several."""
    return sum(
        int(min(machine.get(name, 0) / needed for name, needed in resources.items()) + 1e-9) for machine in machines()
    )


def at_once(workers: int, resources: Mapping[str, float]) -> int:
    """How many trainings of so many workers, with these resources each, the machines have room for; one at least."""
    return max(1, _room(resources) // workers)


def train_on_workers(
    experiment: Experiment,
    storage: Storage,
    name: str,
    tags: Mapping[str, str],
    on_epoch: Callable[[EpochReport], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    callbacks: Sequence[UserCallback] = (),
    checkpointed: bool = False,
    resume: str | None = None,
    deaths: int | None = None,
    scored: bool = True,
    resources: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """`run_trial` on the experiment's number of Ray Train workers; needs a running Ray.

    `on_epoch` and `on_step` are called in this process, in another thread. Ray's `callbacks` see every epoch as
    the metrics that `summary` makes of it. Where `resources` of a worker are given, they are waited for.

    Raises:
        SettingError: the cluster is too small.
        WorkerDied: a worker's process or machine is gone.
        TrainingError: a worker failed; carries its reason.
    """
    resources = resources or worker_resources(experiment)
    follow = on_epoch is not None or on_step is not None
    reports = Queue(actor_options={"num_cpus": 0}) if follow else None
    own_name = f"train-{uuid.uuid4().hex}"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "trial": {
                "experiment": experiment,
                "storage": storage,
                "name": name,
                "tags": dict(tags),
                "checkpointed": checkpointed,
                "resume": resume,
                "deaths": deaths,
                "scored": scored,
            },
            "reports": reports,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=experiment.compute.workers, use_gpu="GPU" in resources, resources_per_worker=dict(resources)
        ),
        run_config=ray.train.RunConfig(name=own_name, storage_path=str(storage.ray), callbacks=list(callbacks)),
    )
    listener = Thread(target=_listen, args=(reports, on_epoch, on_step), daemon=True)
    if reports is not None:
        listener.start()
    try:
        result = trainer.fit()
    except ray.train.WorkerGroupError as error:
        failures = list(error.worker_failures.values())
        own = [failure for failure in failures if not _lost(failure)]
        raise (TrainingError(str(own[0])) if own else WorkerDied(str(failures[0]))) from error
    except ray.exceptions.RayActorError as error:  # Ray Train's own process is gone
        raise WorkerDied(str(error)) from error
    finally:
        if reports is not None:
            reports.put(None)
            listener.join()
            reports.shutdown()
        shutil.rmtree(storage.ray / own_name, ignore_errors=True)
    assert result.return_value is not None  # a worker that returns nothing has raised
    return result.return_value


def _lost(failure: Exception) -> bool:
    """Whether a worker's failure is that it, or one that it waited for, is gone; not an error of its own."""
    if isinstance(failure, (WorkerDied, Busy, *STORE_ERRORS)):
        return True
    ours = isinstance(failure, SettingError | TrainingError)
    return isinstance(failure, RayTrainError | dist.DistError) or (not ours and "gloo" in str(failure))


def summary(report: EpochReport) -> dict[str, float]:
    """An epoch as Ray Train and Ray Tune report it."""
    values = {"epoch": report.epoch, schema.P: report.at.p, schema.TRAIN_LOSS: report.train_loss}
    if report.validation is None or report.best_certified is None:
        return values
    return {
        **values,
        schema.VALIDATION_CERTIFIED: report.validation.certified,
        schema.BEST_VALIDATION_CERTIFIED: report.best_certified,
    }


def _worker(config: dict[str, Any]) -> dict[str, float]:
    """What each worker does; the first one's metrics are the result."""
    check_code()
    reports: Queue | None = config["reports"]
    first = ray.train.get_context().get_world_rank() == 0
    last_step = 0.0

    def on_epoch(report: EpochReport) -> None:
        ray.train.report(summary(report))
        if first and reports is not None:
            reports.put(report)

    def on_step(report: StepReport) -> None:
        nonlocal last_step
        if reports is not None and time.monotonic() - last_step > SECONDS_BETWEEN_STEP_REPORTS:
            last_step = time.monotonic()
            reports.put(replace(report, loss=report.loss.cpu()))

    return run_trial(**config["trial"], on_epoch=on_epoch, on_step=on_step)


def _listen(
    reports: Queue, on_epoch: Callable[[EpochReport], None] | None, on_step: Callable[[StepReport], None] | None
) -> None:
    while (report := reports.get()) is not None:
        if isinstance(report, EpochReport) and on_epoch is not None:
            on_epoch(report)
        elif isinstance(report, StepReport) and on_step is not None:
            on_step(report)


def scores_by_workers(
    experiment: Experiment, network: nn.Module, scoring: Scoring, batches: Sequence[Tensor], workers: int
) -> Iterator[BatchScore]:
    """The scores of batches of test images, as they come from so many Ray workers; starts Ray where it does not run.

    A worker takes the experiment's CPUs, fewer where there are not enough, and a CUDA device where there are any.

    Raises:
        SettingError: the cluster is too small.
        TrainingError: a worker failed; carries its reason.
    """
    start_ray()
    there = ray.cluster_resources()
    gpus = int(uses_gpus(experiment) and there.get("GPU", 0) >= 1)  # where there are none, CPUs do
    cpus = min(experiment.compute.cpus_per_worker, int(there.get("CPU", 0)) // workers)
    if not cpus or gpus * workers > there.get("GPU", 0):
        raise SettingError(
            f"workers={workers}: need a CPU each, and a GPU where there are any; there are {there.get('CPU', 0):g} "
            f"CPUs and {there.get('GPU', 0):g} GPUs"
        )
    state = ray.put({name: tensor.cpu() for name, tensor in network.state_dict().items()})
    scorer = ray.remote(num_cpus=cpus, num_gpus=gpus)(_Scorer)
    pool = ActorPool([scorer.remote(experiment, state, scoring, cpus) for _ in range(workers)])
    try:
        yield from pool.map_unordered(lambda scorer, batch: scorer.score.remote(batch), batches)
    except ray.exceptions.RayError as error:
        raise TrainingError(f"a worker failed while scoring: {' '.join(str(error).split())[-500:]}") from None


class _Scorer:
    """A worker with the network and the test images."""

    def __init__(self, experiment: Experiment, state: dict[str, Tensor], scoring: Scoring, threads: int) -> None:
        check_code()
        torch.set_num_threads(threads)
        settle_process()
        device = device_of(experiment) if torch.cuda.is_available() else torch.device("cpu")
        self.network = network_of(experiment)
        self.network.load_state_dict(state)
        self.network.to(device).eval()
        self.test = load_dataset(experiment.dataset, experiment.augmentation).to(device).test
        self.scoring = scoring

    def score(self, positions: Tensor) -> BatchScore:
        return score_batch(self.network, self.test, positions.to(self.test.indices.device), self.scoring)
