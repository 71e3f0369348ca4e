"""MLflow: one run a trial, under the run of its sweep."""

import logging
import math
import os
import platform as machine
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.time import get_current_time_millis

from linflab.platform.checkpoints import Checkpoints
from linflab.platform.config import Experiment
from linflab.platform.errors import Interrupted
from linflab.platform.storage import Storage
from linflab.platform.training import EpochReport, Trained
from linflab.platform.weights import save_weights
from linflab.reports import schema

logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it tells of every database it makes


def mlflow_experiment(client: MlflowClient, storage: Storage, experiment: Experiment) -> str:
    """The id of MLflow's experiment for this setting (data set and eps), made where it is missing."""
    name = f"{experiment.dataset} eps {experiment.eps:g}"
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":  # in the UI, say; new runs bring it back
        client.restore_experiment(found.experiment_id)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=storage.artifacts.as_uri())
        except MlflowException:  # another process was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


class Run:
    """An open MLflow run; as a context manager it ends the run, as failed with its reason on an exception."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client = client
        self.id = run_id

    @classmethod
    def start(
        cls,
        storage: Storage,
        experiment: Experiment,
        name: str,
        tags: Mapping[str, str],
        settings: Mapping[str, object] | None = None,
    ) -> Self:
        """A new run of this name with the experiment's settings as parameters, or other ones if they are given."""
        client = MlflowClient(storage.tracking_uri)
        everywhere = {
            "mlflow.runName": name,
            "mlflow.source.name": "linflab",
            schema.METHOD: experiment.method,
            schema.EXPERIMENT: experiment.digest(),
            schema.HARDWARE: hardware(),
            schema.VERSIONS: versions(),
        }
        run = client.create_run(mlflow_experiment(client, storage, experiment), tags={**everywhere, **tags})
        self = cls(client, run.info.run_id)
        params = [Param(path, str(value)) for path, value in (settings or experiment.settings()).items()]
        try:
            client.log_batch(self.id, params=params, synchronous=True)
            client.log_text(self.id, experiment.to_yaml(), schema.EXPERIMENT_FILE)
        except BaseException:
            client.set_terminated(self.id, "FAILED")
            raise
        return self

    @classmethod
    def resume(cls, storage: Storage, run_id: str) -> Self:
        """A run that was cut, open again."""
        client = MlflowClient(storage.tracking_uri)
        client.update_run(run_id, status="RUNNING")
        return cls(client, run_id)

    def log_epoch(self, report: EpochReport) -> None:
        validation = {}
        if report.validation is not None:
            validation[schema.VALIDATION_CLEAN] = report.validation.clean
            validation[schema.VALIDATION_CERTIFIED] = report.validation.certified
        self.log_metrics(
            {
                # MLflow stores no infinity; past the end of the p-schedule the point is left out
                **({schema.P: report.at.p} if math.isfinite(report.at.p) else {}),
                schema.LEARNING_RATE: report.at.learning_rate,
                schema.CROSS_ENTROPY_WEIGHT: report.at.cross_entropy_weight,
                schema.TRAIN_EPS: report.at.eps,
                schema.TRAIN_LOSS: report.train_loss,
                **validation,
                schema.EPOCH_SECONDS: report.seconds,
            },
            step=report.epoch,
        )

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        now = get_current_time_millis()
        self.client.log_batch(
            self.id,
            metrics=[Metric(name, float(value), now, step) for name, value in metrics.items()],
            synchronous=True,
        )

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self.client.log_batch(self.id, tags=[RunTag(name, value) for name, value in tags.items()], synchronous=True)

    def log_weights(self, trained: Trained, experiment: Experiment) -> None:
        """The network's state with what is needed to build it again: tensors and plain data only."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / schema.WEIGHTS_FILE
            save_weights(path, trained.network, experiment, trained.epoch)
            self.client.log_artifact(self.id, str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.client.set_terminated(self.id, "FINISHED")
            return
        if issubclass(kind, KeyboardInterrupt | SystemExit | Interrupted):
            self.client.set_terminated(self.id, "KILLED")
            return
        self.log_tags({schema.FAILURE: f"{kind.__name__}: {' '.join(str(error).split())}"[:5000]})
        self.client.set_terminated(self.id, "FAILED")


def end_open_runs(storage: Storage, launch: str, but: str = "") -> None:
    """Mark what still runs by the record, of one launch, `but` one run, as killed: for when its processes are gone."""
    client = MlflowClient(storage.tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    query = f"tags.`{schema.LAUNCH}` = '{launch}' AND attributes.status = 'RUNNING'"
    for run in client.search_runs(experiments, query):
        if run.info.run_id != but:
            client.set_terminated(run.info.run_id, "KILLED")


def run_to_resume(storage: Storage, experiment: Experiment) -> str | None:
    """The latest run of this experiment that was cut and left a checkpoint; None where there is none."""
    client = MlflowClient(storage.tracking_uri)
    experiments = [found.experiment_id for found in client.search_experiments()]
    query = f"tags.`{schema.EXPERIMENT}` = '{experiment.digest()}' AND attributes.status != 'FINISHED'"
    for run in client.search_runs(experiments, query, order_by=["attributes.start_time DESC"]):
        if checkpoints_of(storage, run.info.run_id).exist():
            return str(run.info.run_id)
    return None


def checkpoints_of(storage: Storage, run_id: str) -> Checkpoints:
    """Where a run's checkpoints are."""
    return Checkpoints(storage.checkpoints / run_id)


def hardware() -> str:
    """This machine in words: devices as the training would use them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{cores} CPU cores ({machine.machine()}, {torch.backends.cpu.get_cpu_capability()})", *devices])


def versions() -> str:
    packages = ("linflab", "torch", "ray", "optuna", "mlflow")
    return ", ".join([f"python {machine.python_version()}", *(f"{name} {version(name)}" for name in packages)])
