"""Lookup of weights by run id or path."""

import stat
from pathlib import Path

from mlflow.exceptions import MlflowException

from linflab.platform.errors import InputError
from linflab.platform.exchange.manifest import MANIFEST_FILE, WEIGHTS_FILE
from linflab.platform.exchange.pretrained import PREFIX, pretrained_weights
from linflab.platform.files import exists
from linflab.platform.results.sharing import fetch_weights, is_remote
from linflab.platform.tracking.mlflow import client_of, wrap_errors
from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from linflab.reports.comparison import find_run
from linflab.reports.records import read_run, read_runs


def find_weights(run_or_weights: str, storage_dir: Path) -> tuple[Path, Storage | None, str]:
    """Find weights by path, URL, repository, name of a shipped network, run name, or prefix of a run id.

    Args:
        run_or_weights: Path of a weights file or exported folder, URL of such a folder, `hf://OWNER/NAME`,
            `pretrained:NAME` for a shipped network, run name or id.
        storage_dir: Storage directory.

    Returns:
        Path of the weights, storage, and full run id. Without a run, the storage is None and the id is empty.

    Raises:
        InputError: If there is no such file or run, the run has no weights, or a download fails.
    """
    if run_or_weights.startswith(PREFIX):
        return pretrained_weights(run_or_weights), None, ""
    if is_remote(run_or_weights):
        return fetch_weights(run_or_weights), None, ""
    path = Path(run_or_weights)
    if exists(path / MANIFEST_FILE, stat.S_IFREG):
        path = path / WEIGHTS_FILE
        run_or_weights = str(path)
    if path.suffix.lower() == ".onnx":
        raise InputError(
            f"{run_or_weights}: must be a run or weights of linflab; verify properties of ONNX models with "
            "`linflab certify MODEL --vnnlib PROPERTY`"
        )
    is_file = exists(path, stat.S_IFREG)
    if is_file:
        return path, None, ""
    looks_like_path = "/" in run_or_weights or run_or_weights.endswith(".pt")
    if looks_like_path and not _has_run_named(Storage.from_path(storage_dir), run_or_weights):
        raise InputError(f"{run_or_weights}: not found, or not a regular file; use the path of a weights file")
    storage = Storage.open_existing(storage_dir)
    run = find_run_id(storage, run_or_weights)
    return download_weights(storage, run), storage, run


def _has_run_named(storage: Storage, name: str) -> bool:
    if not storage.has_runs:
        return False
    with wrap_errors(storage):
        runs = read_runs(storage.tracking_uri, {schema.KIND: "trial"})
    return schema.NAME in runs and bool((runs[schema.NAME] == name).any())


def find_run_id(storage: Storage, run: str) -> str:
    """Return the id of the only run with this name or id prefix.

    Args:
        storage: Storage of the run.
        run: Run name, or prefix of its id.

    Raises:
        InputError: If no run or several runs match, or the runs are not accessible.
    """
    with wrap_errors(storage):
        runs = read_runs(storage.tracking_uri, {schema.KIND: "trial"})
        if runs.empty:
            raise InputError(f"{run}: not found; use the path of a weights file, since {storage.root} has no runs")
        return str(find_run(runs, run)["run_id"].iloc[0])


def download_weights(storage: Storage, run: str) -> Path:
    """Return the path of a run's weights; download them first if an MLflow server stores them.

    Args:
        storage: Storage of the run.
        run: Run id.

    Raises:
        InputError: If there is no such run, or the run has no weights.
    """
    client = client_of(storage)
    try:
        if schema.ORIGINAL_RUN_ID in read_run(client, run).data.tags:
            raise InputError(
                f"run={run}: has no weights, since it was imported from a JSONL file; use the original storage"
            )
        return Path(client.download_artifacts(run, schema.WEIGHTS_FILE))
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"run={run}: weights not found in {storage.root} ({reason}); use a run that has finished"
        ) from None
