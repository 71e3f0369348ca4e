"""MLflow: one run a trial, under the run of its sweep.

While its store is out of reach, calls are made again until they come through: a training waits, and loses nothing.
"""

import logging
import math
import os
import platform as machine
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.tracking import MlflowClient
from mlflow.utils.time import get_current_time_millis
from sqlalchemy.exc import OperationalError

from linflab.platform.checkpoints import Checkpoints
from linflab.platform.config import Experiment
from linflab.platform.errors import Interrupted, WorkerDied
from linflab.platform.shipping import git_commit
from linflab.platform.storage import Storage
from linflab.platform.training import EpochReport, Trained
from linflab.platform.weights import save_weights
from linflab.reports import schema

PATIENCE = 600  # seconds
OUT_OF_REACH = (
    "TEMPORARILY_UNAVAILABLE",
    "INTERNAL_ERROR",
)  # a database that is locked or gone; no server, or an ill one
STORE_ERRORS = (MlflowException, OperationalError)  # the latter where a store is opened
T = TypeVar("T")

os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # a server's, of every run that ends

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a bar for each small file

logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it tells of every database it makes


def experiment_named(client: MlflowClient, storage: Storage, name: str) -> str:
    """The id of MLflow's experiment of this name, made where it is missing."""
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":  # in the UI, say; new runs bring it back
        client.restore_experiment(found.experiment_id)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=storage.artifact_location)
        except MlflowException:  # another process was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def patient_client(storage: Storage) -> MlflowClient:
    """A client whose calls wait for a store that is out of reach, for `PATIENCE` seconds, and then raise.

    Calls are repeated: those that add something under a new name, such as `create_run`, may have come through unheard.
    """
    return cast(MlflowClient, _Patient(patiently(lambda: MlflowClient(storage.tracking_uri))))


class _Patient:
    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *args, **named: patiently(lambda: method(*args, **named))


def patiently(call: Callable[[], T]) -> T:
    """What the call returns, once MLflow's store is in reach.

    Raises:
        STORE_ERRORS: it is not within `PATIENCE` seconds; or at once, what else the call raises.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except STORE_ERRORS as error:
            code = error.error_code if isinstance(error, MlflowException) else OUT_OF_REACH[0]
            if code not in OUT_OF_REACH or time.monotonic() > deadline:
                raise
            time.sleep(1)


class Run:
    """An open MLflow run; as a context manager it ends the run, as failed with its reason on an exception.

    Attributes:
        starts: after which epochs processes of this launch began to train it, this one included.
        finished: it had ended well before.
        metrics: the latest ones, of before.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client = client
        self.id = run_id
        self.starts: list[int] = [0]
        self.finished = False
        self.metrics: dict[str, float] = {}
        self.logged_epoch = 0
        self.monitors: list[BaseMetricsMonitor] = []

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
        client = patient_client(storage)
        everywhere = {
            "mlflow.runName": name,
            "mlflow.source.name": "linflab",
            schema.METHOD: experiment.method,
            schema.EXPERIMENT: experiment.digest(),
            **_here(),
            **({schema.COMMIT: commit} if (commit := git_commit()) else {}),
        }
        group = experiment_named(client, storage, f"{experiment.dataset} eps {experiment.eps:g}")
        run = client.create_run(group, tags={**everywhere, **tags})
        self = cls(client, run.info.run_id)
        try:
            self.describe(experiment, settings)
        except BaseException:
            client.set_terminated(self.id, "KILLED")
            raise
        return self

    def describe(self, experiment: Experiment, settings: Mapping[str, object] | None = None) -> None:
        """Record the experiment, and its settings (or other ones) as parameters; again changes nothing."""
        params = [Param(path, str(value)) for path, value in (settings or experiment.settings()).items()]
        self.client.log_batch(self.id, params=params, synchronous=True)
        self.client.log_text(self.id, experiment.to_yaml(), schema.EXPERIMENT_FILE)

    @classmethod
    def resume(cls, storage: Storage, run_id: str, again: bool = False) -> Self:
        """A run that was created or cut, open again; one that has finished is left as it is, unless `again`."""
        client = patient_client(storage)
        self, before = cls(client, run_id), client.get_run(run_id)
        self.metrics = dict(before.data.metrics)
        self.finished = before.info.status == "FINISHED" and not again
        if self.finished:
            return self
        losses = client.get_metric_history(run_id, schema.TRAIN_LOSS)
        self.logged_epoch = max((metric.step for metric in losses), default=0)
        *earlier, launch = before.data.tags.get(schema.STARTS, "").split("|")
        self.starts = [*map(int, filter(None, launch.split(","))), self.logged_epoch]
        client.update_run(run_id, status="RUNNING")
        if schema.FAILURE in before.data.tags:
            client.delete_tag(run_id, schema.FAILURE)
        self.log_tags({**_here(), schema.STARTS: "|".join([*earlier, ",".join(map(str, self.starts))])})
        return self

    @staticmethod
    def metrics_if_finished(storage: Storage, run_id: str) -> dict[str, float] | None:
        """The metrics of a run that has finished; None for others."""
        run = patient_client(storage).get_run(run_id)
        return dict(run.data.metrics) if run.info.status == "FINISHED" else None

    def log_epoch(self, report: EpochReport) -> None:
        """Log an epoch, but for one that was logged before the run was cut: from a checkpoint it comes to the same."""
        if report.epoch <= self.logged_epoch:
            return
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
                **self._system_metrics(),
            },
            step=report.epoch,
        )

    def _system_metrics(self) -> dict[str, float]:
        """What MLflow's UI shows as system metrics: an epoch's use of CPUs, or what there is of it at its end.

        MLflow's own thread, which would measure by the clock, gives up where the store is out of reach.
        """
        if not self.monitors:
            for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
                with suppress(Exception):  # nearly anything, where a machine has no such thing, as a GPU
                    self.monitors.append(kind())
        found: dict[str, float] = {}
        for monitor in self.monitors:
            monitor.clear_metrics()
            with suppress(Exception):  # no reason to end a training
                monitor.collect_metrics()
                found |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
        return found

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

    def fail(self, reason: str) -> None:
        """End the run as failed."""
        self.log_tags({schema.FAILURE: " ".join(reason.split())[:5000]})
        self.client.set_terminated(self.id, "FAILED")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.client.set_terminated(self.id, "FINISHED")
            return
        # not what training says of itself: it can go on
        if issubclass(kind, (KeyboardInterrupt, SystemExit, Interrupted, WorkerDied, *STORE_ERRORS)):
            self.client.set_terminated(self.id, "KILLED")
            return
        self.fail(f"{kind.__name__}: {error}")


def end_open_runs(storage: Storage, launch: str, but: str = "") -> None:
    """Mark what still runs by the record, of one launch, `but` one run, as killed: for when its processes are gone."""
    client = patient_client(storage)
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


def _here() -> dict[str, str]:
    """The tags that say where a process runs."""
    return {schema.HARDWARE: hardware(), schema.HOST: machine.node(), schema.VERSIONS: versions()}


def hardware() -> str:
    """This machine in words: devices as the training would use them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{cores} CPU cores ({machine.machine()}, {torch.backends.cpu.get_cpu_capability()})", *devices])


def versions() -> str:
    packages = ("linflab", "torch", "ray", "optuna", "mlflow")
    return ", ".join([f"python {machine.python_version()}", *(f"{name} {version(name)}" for name in packages)])
