"""MLflow clients for a storage, with retries while the tracking store is unavailable.

Only the clients of this module may open the runs and artifacts of a storage. The client of `retrying_client` repeats a
failed call for up to `RETRY_TIMEOUT_S` seconds, so a run waits for the store and loses no data.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException, RestException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.errors import InputError
from linflab.platform.locks import announce_wait
from linflab.platform.tracking.database import STORAGE_HINT
from linflab.platform.tracking.storage import Storage, quiet_mlflow

RETRY_TIMEOUT_S = 600
# MLflow's codes for a locked or missing database, and for a missing or failing server.
TRANSIENT_ERROR_CODES = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR")
# Messages of SQLite, MLflow and Alembic for errors that retries do not fix.
PERMANENT_ERRORS = (
    "no such table",
    "no such column",
    "has no column",
    "malformed",
    "not a database",
    "readonly database",
    "out-of-date database schema",
    "can't locate revision",
)
STORE_ERRORS = (MlflowException, OperationalError)  # OperationalError can occur while a store is opened
T = TypeVar("T")


def get_or_create_experiment(client: MlflowClient, storage: Storage, name: str) -> str:
    """Return the id of the MLflow experiment with a name; create a missing and restore a deleted one."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None and experiment.lifecycle_stage == "deleted":  # for example, in MLflow's UI
        client.restore_experiment(experiment.experiment_id)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=storage.artifact_location)
        except MlflowException:  # another process was faster
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return experiment.experiment_id


def get_or_create_config_experiment(client: MlflowClient, storage: Storage, config: ExperimentConfig) -> str:
    """Return the id of the MLflow experiment of a config; create a missing and restore a deleted one."""
    return get_or_create_experiment(client, storage, f"{config.dataset} eps {config.eps:g}")


class StorageClient(MlflowClient):
    """MLflow client that finds artifacts at the current location of the storage."""

    def __init__(self, storage: Storage) -> None:
        quiet_mlflow()
        super().__init__(storage.tracking_uri)
        self._storage = storage

    def _artifacts(self, run_id: str) -> ArtifactRepository:
        return self._repository(self.get_run(run_id).info.artifact_uri)

    def _repository(self, uri: str) -> ArtifactRepository:
        return get_artifact_repository(self._storage.locate(uri), tracking_uri=self._storage.tracking_uri)

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        """Copy a file to the artifacts of a run."""
        self._artifacts(run_id).log_artifact(str(local_path), artifact_path)

    def log_artifacts(self, run_id: str, local_dir: str, artifact_path: str | None = None) -> None:
        """Copy the content of a directory to the artifacts of a run."""
        self._artifacts(run_id).log_artifacts(str(local_dir), artifact_path)

    def list_artifacts(self, run_id: str, path: str | None = None) -> list[FileInfo]:
        """Return the artifacts of a run in a directory."""
        return self._artifacts(run_id).list_artifacts(path)

    def download_artifacts(self, run_id: str, path: str, dst_path: str | None = None) -> str:
        """Download artifacts of a run; return their local path."""
        return str(self._artifacts(run_id).download_artifacts(path, dst_path))

    def log_model_artifacts(self, model_id: str, local_dir: str, artifact_path: str | None = None) -> None:
        """Copy the content of a directory to the artifacts of a logged model."""
        self._repository(self.get_logged_model(model_id).artifact_location).log_artifacts(local_dir, artifact_path)


def client_of(storage: Storage) -> MlflowClient:
    """Return a client for the runs and artifacts of a storage; create the database if it is missing.

    Raises:
        InputError: If the database cannot be used or created.
    """
    storage.ensure_store()
    return StorageClient(storage)


def retrying_client(storage: Storage) -> MlflowClient:
    """Return a client that retries calls for `RETRY_TIMEOUT_S` seconds while the store is unavailable.

    If a call succeeds but its answer is lost, the retry repeats its effect. For example, `create_run` can then create
    two runs.

    Raises:
        InputError: If the database cannot be used or created.
    """
    storage.ensure_store()
    return cast(MlflowClient, _RetryingClient(call_with_retry(lambda: StorageClient(storage))))


class _RetryingClient:
    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *args, **keywords: call_with_retry(lambda: method(*args, **keywords))


def call_with_retry(call: Callable[[], T]) -> T:
    """Return the result of a call; while the store is unavailable, print a notice on stderr and retry.

    Raises:
        mlflow.exceptions.MlflowException: If the store is unavailable for `RETRY_TIMEOUT_S` seconds, or the error is
            permanent.
        sqlalchemy.exc.OperationalError: In the same cases, if raised by the database.
    """
    deadline = time.monotonic() + RETRY_TIMEOUT_S
    with announce_wait(f"the tracking store, which is locked or unavailable (timeout {RETRY_TIMEOUT_S} s)"):
        while True:
            try:
                return call()
            except STORE_ERRORS as error:
                if not is_transient(error) or time.monotonic() > deadline:
                    raise
                time.sleep(1)


def is_transient(error: BaseException) -> bool:
    """Return whether retries may fix an error of MLflow's store, such as a locked database."""
    text = str(error).lower()
    if any(phrase in text for phrase in PERMANENT_ERRORS):
        return False
    if isinstance(error, MlflowException):
        if error.error_code == "INTERNAL_ERROR":  # from a server: unavailable; from a database: a bug
            return isinstance(error, RestException) or "api request" in text
        return error.error_code in TRANSIENT_ERROR_CODES
    return isinstance(error, OperationalError)


@contextmanager
def wrap_errors(storage: Storage, out: Path | None = None) -> Iterator[None]:
    """Convert errors of the tracking store and of files to `InputError`.

    Args:
        storage: The storage in use.
        out: Output path to name in the message of a file error; None for reports/ in the storage.

    Raises:
        InputError: If the block raises an error of the store or of a file, or a plain `LookupError`, of no subclass.
    """
    try:
        yield
    except LookupError as error:
        if type(error) is not LookupError:  # KeyError and IndexError are bugs
            raise
        raise InputError(str(error.args[0])) from None
    except (SQLAlchemyError, MlflowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"storage={storage.root}: tracking store cannot be read ({reason}); {STORAGE_HINT}") from None
    except OSError as error:
        raise InputError(f"output-dir={out or storage.reports}: cannot be used ({error}); use another path") from None
