"""Ray Train around the training loop: several workers for one trial, on CPUs over gloo or on CUDA devices over nccl."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from threading import Thread
from typing import Any

import ray
import ray.train
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from linflab.platform.config import Experiment
from linflab.platform.datasets import data_folder
from linflab.platform.errors import SettingError, TrainingError
from linflab.platform.storage import Storage
from linflab.platform.training import EpochReport, StepReport
from linflab.platform.trial import run_trial
from linflab.reports import schema

SECONDS_BETWEEN_STEP_REPORTS = 0.5  # each one is a message between processes


def start_ray() -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start Ray on this machine for the life of this process."""
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ["LINFLAB_DATA"] = str(data_folder())  # absolute: Ray's workers run in folders of their own
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "local"),
            configure_logging=True,
            logging_level="ERROR",
            log_to_driver=False,
        )


def uses_gpus(experiment: Experiment) -> bool:
    """Whether workers get a CUDA device each, on the running cluster."""
    wanted = experiment.compute.device
    return wanted == "cuda" or (wanted == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)


def worker_resources(experiment: Experiment) -> dict[str, float]:
    """What one worker of the experiment takes of the running cluster.

    Raises:
        SettingError: the cluster has less in all than the workers need together; they would wait for ever.
    """
    workers, cpus = experiment.compute.workers, experiment.compute.cpus_per_worker
    there = ray.cluster_resources()
    if workers * cpus > there.get("CPU", 0):
        raise SettingError(
            f"compute.workers={workers} of compute.cpus_per_worker={cpus}: need {workers * cpus} CPUs; "
            f"there are {there.get('CPU', 0):g}"
        )
    if not uses_gpus(experiment):
        return {"CPU": cpus}
    if workers > there.get("GPU", 0):
        raise SettingError(
            f"compute.workers={workers}: need a GPU each; there are {there.get('GPU', 0):g}; "
            "compute.device=cpu trains without"
        )
    return {"CPU": cpus, "GPU": 1}


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
) -> dict[str, float]:
    """`run_trial` on the experiment's number of Ray Train workers; needs a running Ray.

    `on_epoch` and `on_step` are called in this process, in another thread. Ray's `callbacks` see every epoch as
    the metrics that `summary` makes of it.

    Raises:
        SettingError: the cluster is too small.
        TrainingError: a worker failed; carries its reason.
    """
    resources = worker_resources(experiment)
    follow = on_epoch is not None or on_step is not None
    reports = Queue(actor_options={"num_cpus": 0}) if follow else None
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
            },
            "reports": reports,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=experiment.compute.workers, use_gpu="GPU" in resources, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(storage_path=str(storage.ray), callbacks=list(callbacks)),
    )
    listener = Thread(target=_listen, args=(reports, on_epoch, on_step), daemon=True)
    if reports is not None:
        listener.start()
    try:
        result = trainer.fit()
    except ray.train.WorkerGroupError as error:
        first = next(iter(error.worker_failures.values()))
        raise TrainingError(str(first)) from error
    finally:
        if reports is not None:
            reports.put(None)
            listener.join()
            reports.shutdown()
    assert result.return_value is not None  # a worker that returns nothing has raised
    return result.return_value


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
