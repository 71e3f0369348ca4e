"""Checks of datasets, the storage directory and ports."""

import os
import shutil
from pathlib import Path

from linflab.platform.cluster.ports import DASHBOARD_PORT, RAY_PORT, is_listening
from linflab.platform.data.datasets import data_dir, dataset_problem, is_prepared
from linflab.platform.data.info import DATASETS
from linflab.platform.diagnosis.checks import Check, Status
from linflab.platform.errors import InputError
from linflab.platform.tracking.database import State, database_state
from linflab.platform.tracking.storage import Storage

UI_PORT = 5000  # default of `linflab ui`
PORTS = {UI_PORT: "linflab ui", RAY_PORT: "Ray", DASHBOARD_PORT: "Ray's dashboard"}
MIN_FREE_BYTES = 2**30
NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "fuse.sshfs", "9p", "afs")
MOUNTS = Path("/proc/mounts")


def check_datasets() -> Check:
    """Return which datasets are prepared and valid; their images are not read."""
    try:
        folder = data_dir()
    except InputError as error:
        return Check("datasets", Status.FAILED, str(error), "set LINFLAB_DATA to an absolute path")
    own = sorted(path.name for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []
    missing = [name for name in DATASETS if name != "digits" and not (folder / name).is_dir()]
    names = [name for name in DATASETS if name not in missing]
    names += [name for name in own if name not in DATASETS and is_prepared(name)]
    damaged = {name: problem for name in names if (problem := dataset_problem(name)) is not None}
    found = [name for name in names if name not in damaged]
    values = {"folder": str(folder), "found": found, "missing": missing, "damaged": damaged}
    text = f"{', '.join(found)} in {folder}"
    if damaged:
        name, problem = next(iter(damaged.items()))
        others = f"; also damaged: {', '.join(list(damaged)[1:])}" if len(damaged) > 1 else ""
        advice = (
            f"move {folder / name} away, then run `linflab data prepare {name}`" if name in DATASETS else "correct it"
        )
        return Check("datasets", Status.FAILED, f"{text}; {problem}{others}", advice, values)
    if not missing:
        return Check("datasets", Status.OK, text, values=values)
    advice = f"prepare others before use, as with `linflab data prepare {missing[0]}`, or set LINFLAB_DATA"
    return Check("datasets", Status.NOTE, f"{text}; not prepared: {', '.join(missing)}", advice, values)


def check_storage(root: Path) -> Check:
    """Return whether runs can be logged to a storage directory, without creating it.

    Args:
        root: Path of the storage directory.
    """
    try:
        storage = Storage.from_path(root)
        if storage.tracking_server is not None:
            Storage.open_existing(root)
            found = f"{storage.root}, MLflow server {storage.tracking_server} responds"
            return Check("storage", Status.OK, found, values={"path": str(storage.root)})
        state = database_state(storage.database)
    except InputError as error:
        return Check("storage", Status.FAILED, str(error), values={"path": str(root)})
    return _check_folder(storage, state)


def _check_folder(storage: Storage, state: State) -> Check:
    existing = next(folder for folder in (storage.root, *storage.root.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    values = {"path": str(storage.root), "database": state.value, "free_bytes": free}
    schema = "with MLflow's current schema" if state is State.READY else "without runs; a run creates the database"
    found = f"{storage.root}, {schema}, {free / 2**30:.1f} GiB free"
    is_writable = storage.is_writable if state is State.READY else os.access(existing, os.W_OK)
    if not existing.is_dir() or not is_writable:
        advice = "use another directory: set --storage or LINFLAB_STORAGE"
        return Check("storage", Status.FAILED, f"{found}, but {existing} is not writable", advice, values)
    if free < MIN_FREE_BYTES:
        return Check(
            "storage", Status.FAILED, found, "free at least 1 GiB, or set --storage or LINFLAB_STORAGE", values
        )
    kind = file_system(existing.resolve())
    if kind.startswith(NETWORK_FILE_SYSTEMS):
        advice = (
            "SQLite is slow on network file systems, and several nodes must not write to it; start `mlflow server` on "
            "one node and set LINFLAB_TRACKING_URI"
        )
        return Check("storage", Status.SLOW, f"{found}, on {kind}", advice, values)
    return Check("storage", Status.OK, found, values=values)


def file_system(path: Path, mounts: Path = MOUNTS) -> str:
    """Return the type of the file system that holds an absolute path; empty if the system does not list mounts."""
    try:
        entries = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    except OSError:
        return ""
    names = [(Path(point.replace("\\040", " ")), kind) for point, kind in entries]  # spaces are escaped
    holding = [(len(point.parts), kind) for point, kind in names if path.is_relative_to(point)]
    return max(holding, key=lambda pair: pair[0])[1] if holding else ""


def check_ports() -> Check:
    """Return which default ports of linflab's servers on this machine are in use."""
    used = [port for port in PORTS if is_listening(port)]
    if not used:
        return Check("ports", Status.OK, f"{', '.join(map(str, PORTS))} are free", values={"used": []})
    found = ", ".join(f"{port} ({PORTS[port]})" for port in used)
    advice = "use `linflab ui --port 5050`" if UI_PORT in used else "sweeps start their own Ray on other ports"
    return Check("ports", Status.NOTE, f"in use: {found}", advice, {"used": used})
