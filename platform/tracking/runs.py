"""MLflow runs, one per trial, nested under the parent run of their sweep."""

import platform as machine
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self

from mlflow.entities import Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.tracking import MlflowClient
from mlflow.utils.time import get_current_time_millis

from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.own_parts import used_modules
from linflab.platform.errors import RunInterrupted, WorkerLostError
from linflab.platform.host import describe_hardware, package_versions
from linflab.platform.source import git_commit
from linflab.platform.tracking.mlflow import STORE_ERRORS, client_of, get_or_create_config_experiment, retrying_client
from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from linflab.reports.added_settings import ADDED_TEXTS
from linflab.reports.records import read_run, search_runs
from linflab.reports.renames import CONFIG_HASH, current_tag

DESCRIPTION = "docs/how-to/report.md describes the metrics, figures and files of a run."


class Run:
    """An open MLflow run; as a context manager, it marks the run as finished, failed or killed at the end.

    Attributes:
        starts: For each process of this invocation that trained the run, the number of epochs done before it started.
            The last entry belongs to this process.
        is_finished: True if the run had finished successfully when it was opened.
        has_config: True if the config is logged.
        metrics: Latest metrics of the resumed run.
        certificate: Certifier of the certified accuracies, if any.
        last_logged_epoch: Last epoch with metrics.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client = client
        self.id = run_id
        self.starts: list[int] = [0]
        self.is_finished = False
        self.has_config = False
        self.metrics: dict[str, float] = {}
        self.certificate = ""
        self.last_logged_epoch = 0
        self.monitors: list[BaseMetricsMonitor] = []

    @classmethod
    def start(
        cls,
        storage: Storage,
        experiment: ExperimentConfig,
        name: str,
        tags: Mapping[str, str],
        settings: Mapping[str, object] | None = None,
    ) -> Self:
        """Start a new run; its parameters are `settings` if given, else the settings of the config."""
        client = retrying_client(storage)
        common_tags = {
            "mlflow.runName": name,
            "mlflow.source.name": "linflab",
            schema.DESCRIPTION: DESCRIPTION,
            schema.METHOD: experiment.method,
            schema.CONFIG_HASH: experiment.config_hash(),
            **_host_tags(),
            **({schema.MODULES: ",".join(modules)} if (modules := used_modules(experiment)) else {}),
            **({schema.COMMIT: commit} if (commit := git_commit()) else {}),
        }
        experiment_id = get_or_create_config_experiment(client, storage, experiment)
        run = client.create_run(experiment_id, tags={**common_tags, **tags})
        self = cls(client, run.info.run_id)
        try:
            self.log_config(experiment, settings)
        except BaseException:
            client.set_terminated(self.id, "KILLED")
            raise
        return self

    def log_config(self, experiment: ExperimentConfig, settings: Mapping[str, object] | None = None) -> None:
        """Log the config as a file, and `settings` as parameters (None for the settings of the config).

        The call can be repeated with the same arguments.
        """
        params = [Param(path, str(value)) for path, value in (settings or experiment.to_flat_dict()).items()]
        self.client.log_text(self.id, experiment.to_yaml(), schema.CONFIG_FILE)
        self.client.log_batch(self.id, params=params, synchronous=True)  # last: parameters mark a complete config
        self.has_config = True

    @classmethod
    def resume(cls, storage: Storage, run_id: str, reopen_finished: bool = False) -> Self:
        """Reopen a run. A finished run stays unchanged unless `reopen_finished` is set."""
        client = retrying_client(storage)
        self, stored_run = cls(client, run_id), read_run(client, run_id)
        self.metrics = dict(stored_run.data.metrics)
        self.certificate = stored_run.data.tags.get(schema.CERTIFIER, "")
        self.is_finished = stored_run.info.status == "FINISHED" and not reopen_finished
        self.has_config = bool(stored_run.data.params)
        if self.is_finished:
            return self
        losses = client.get_metric_history(run_id, schema.TRAIN_LOSS)
        self.last_logged_epoch = max((metric.step for metric in losses), default=0)
        *earlier, current = stored_run.data.tags.get(schema.START_EPOCHS, "").split("|")
        self.starts = [*map(int, filter(None, current.split(","))), self.last_logged_epoch]
        client.update_run(run_id, status="RUNNING")
        for name in client.get_run(run_id).data.tags:  # an earlier version may have stored another name
            if current_tag(name) == schema.FAILURE:
                client.delete_tag(run_id, name)
        self.log_tags({**_host_tags(), schema.START_EPOCHS: "|".join([*earlier, ",".join(map(str, self.starts))])})
        return self

    @staticmethod
    def metrics_if_finished(storage: Storage, run_id: str) -> dict[str, float] | None:
        """Return the metrics of a finished run; None for a run that has not finished."""
        run = read_run(retrying_client(storage), run_id)
        return dict(run.data.metrics) if run.info.status == "FINISHED" else None

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of an epoch, unless they were logged before an interruption.

        A resumed run repeats the epochs after its checkpoint with exactly the same metrics.
        """
        if epoch > self.last_logged_epoch:
            self.log_metrics({**metrics, **self._system_metrics()}, step=epoch)

    def _system_metrics(self) -> dict[str, float]:
        """Return MLflow's system metrics at the end of an epoch.

        MLflow's monitoring thread is not used, since it samples at fixed times and stops when the store is unavailable.
        """
        if not self.monitors:
            for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
                with suppress(Exception):  # various errors occur if there is no such device
                    self.monitors.append(kind())
        metrics: dict[str, float] = {}
        for monitor in self.monitors:
            monitor.clear_metrics()
            with suppress(Exception):  # a monitor's error must not stop the run
                monitor.collect_metrics()
                metrics |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
        return metrics

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at a step."""
        now = get_current_time_millis()
        self.client.log_batch(
            self.id,
            metrics=[Metric(name, float(value), now, step) for name, value in metrics.items()],
            synchronous=True,
        )

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self.client.log_batch(self.id, tags=[RunTag(name, value) for name, value in tags.items()], synchronous=True)

    def fail(self, reason: str) -> None:
        """Terminate the run as failed, with the reason in a tag."""
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
        # The run can be resumed after these errors.
        if issubclass(kind, (KeyboardInterrupt, SystemExit, RunInterrupted, WorkerLostError, *STORE_ERRORS)):
            self.client.set_terminated(self.id, "KILLED")
            return
        self.fail(f"{kind.__name__}: {error}")


def terminate_open_runs(storage: Storage, invocation: str, except_run: str = "") -> None:
    """Mark the open runs of an invocation as killed, except `except_run`.

    Call this function after the processes that train these runs have ended.
    """
    client = retrying_client(storage)
    experiment_ids = [group.experiment_id for group in client.search_experiments()]
    query = f"tags.`{schema.INVOCATION_ID}` = '{invocation}' AND attributes.status = 'RUNNING'"
    for run in client.search_runs(experiment_ids, query):
        if run.info.run_id != except_run:
            client.set_terminated(run.info.run_id, "KILLED")


def find_runs(storage: Storage, experiment: ExperimentConfig) -> list[MlflowRun]:
    """Return the runs of a config that `linflab train` started, latest first."""
    client, digest = client_of(storage), experiment.config_hash()
    runs = search_runs(client, f"tags.`{schema.CONFIG_HASH}` = '{digest}'")
    # Earlier versions hashed the config with old names of settings, so compare the parameters of their runs.
    earlier = search_runs(client, f"tags.`{CONFIG_HASH}` LIKE '%'")
    params = {path: str(value) for path, value in experiment.to_flat_dict().items()}
    added = {path: text for path, text in ADDED_TEXTS.items() if path in params}
    runs += [run for run in earlier if added | run.data.params == params]
    return [run for run in runs if schema.SWEEP not in run.data.tags and schema.ORIGINAL_RUN_ID not in run.data.tags]


def _host_tags() -> dict[str, str]:
    """Return tags that describe the machine and software of this process."""
    return {schema.HARDWARE: describe_hardware(), schema.HOST: machine.node(), schema.VERSIONS: package_versions()}
