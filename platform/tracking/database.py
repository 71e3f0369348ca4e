"""SQLite database of a storage: atomic creation, checks before use, and relocation.

Checks use only sqlite3, since MLflow takes seconds to import. MLflow creates its tables in about 60 migrations. These
run on a temporary file that is then renamed atomically, so a killed process leaves no half-migrated database.
"""

import logging
import os
import re
import shlex
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from enum import Enum
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from linflab.platform.errors import InputError, RunLockedError
from linflab.platform.locks import announce_wait, file_lock, sync_folder
from linflab.reports import schema

STORAGE_HINT = "use another directory: set --storage or LINFLAB_STORAGE"
LOCK_TIMEOUT_S = 5.0  # maximum wait for a transaction of another process
CREATION_TIMEOUT_S = 120.0  # maximum wait while another process creates the database
QUIET_S = 3.0  # time without writes after which creation is abandoned
PARTIAL = ".mlflow.db.partial-"  # prefix of temporary directories
REQUIRED_TABLES = {"experiments", "runs", "tags", "params", "metrics", "latest_metrics"}
# A database can be replaced if no table listed here has a row that meets the SQL condition of the table.
DATA_TABLES = {
    "runs": "1",
    "experiments": "experiment_id != 0",
    "registered_models": "1",
    "logged_models": "1",
    "trace_info": "1",
}


class _DamagedError(InputError):
    """Signals that SQLite cannot read the file: it is damaged, or another process is still copying it."""


class State(Enum):
    """State of a database: usable by MLflow, created incompletely and empty, or missing."""

    READY = "ready"
    UNFINISHED = "unfinished"
    MISSING = "missing"


def database_state(path: Path) -> State:
    """Check an MLflow database.

    Args:
        path: The database file.

    Returns:
        `READY` if MLflow can use the database; `UNFINISHED` or `MISSING` if the database must be created.

    Raises:
        RunLockedError: If another process has locked the database.
        InputError: If the file has runs in the schema of another MLflow version, is damaged, or is not an MLflow
            database.
    """
    try:
        if not path.exists():
            return State.MISSING
        if path.is_dir():
            raise _input_error(path, "must be an MLflow database, but is a directory; move it away")
        if path.stat().st_size == 0:
            return State.UNFINISHED
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise _input_error(path, f"cannot be read ({error.strerror}); {STORAGE_HINT}") from None
    if head != b"SQLite format 3\0":
        raise _input_error(path, "must be an SQLite database; restore it from a backup, or move it away")
    try:
        with closing(_connect(path)) as connection:
            return _schema_state(path, connection)
    except sqlite3.Error as error:
        if "locked" in str(error):
            raise RunLockedError(
                f"storage={path.parent}: {path.name} has been locked by another process for {LOCK_TIMEOUT_S:g} s; "
                "wait for it or stop it, then retry"
            ) from None
        raise _DamagedError(
            f"{_name(path)} cannot be read ({error}); restore it from a backup, or move it away"
        ) from None


def _name(path: Path) -> str:
    return f"storage={path.parent}: {path.name}"


def _input_error(path: Path, reason: str) -> InputError:
    return InputError(f"{_name(path)} {reason}")


def _connect(path: Path) -> sqlite3.Connection:
    # The connection is not read-only, so that SQLite can roll back unfinished writes of a killed process.
    return sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=LOCK_TIMEOUT_S)


def _schema_state(path: Path, connection: sqlite3.Connection) -> State:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    versions: list[str] = []
    if "alembic_version" in tables:
        versions = [str(version) for (version,) in connection.execute("SELECT version_num FROM alembic_version")]
    revisions, newest = mlflow_revisions()
    if versions == [newest] and tables >= REQUIRED_TABLES:
        return State.READY
    other_tables = {name for name in tables if not name.startswith("sqlite_")} - {"alembic_version"}
    if other_tables and "experiments" not in tables:
        raise _input_error(
            path,
            f"must be an MLflow database, but has other tables ({', '.join(sorted(other_tables)[:3])}); move it away",
        )
    if not set(versions) <= revisions:
        mlflow_version = _recorded_mlflow_version(connection) if {"tags", "runs"} <= tables else None
        command = f"pip install mlflow=={mlflow_version}" if mlflow_version else "pip install --upgrade mlflow"
        raise _input_error(
            path,
            f"was written by a newer MLflow than the installed {version('mlflow')} (schema {versions[0]}); run "
            f"`{command}`, or {STORAGE_HINT}",
        )
    if not any(_has_rows(connection, name, condition) for name, condition in DATA_TABLES.items() if name in tables):
        return State.UNFINISHED
    if not versions or versions == [newest]:
        raise _input_error(path, f"must have all tables of MLflow; restore it from a backup, or {STORAGE_HINT}")
    raise _input_error(
        path,
        f"was written by an older MLflow than the installed {version('mlflow')} (schema {versions[0]}); make a "
        f"backup, then run `{shlex.join(['mlflow', 'db', 'upgrade', f'sqlite:///{path}'])}`",
    )


def _has_rows(connection: sqlite3.Connection, table: str, condition: str) -> bool:
    return connection.execute(f"SELECT 1 FROM {table} WHERE {condition} LIMIT 1").fetchone() is not None


def _recorded_mlflow_version(connection: sqlite3.Connection) -> str | None:
    """Return the MLflow version of the latest run, from the tag `linflab.versions`."""
    query = (
        "SELECT tags.value FROM tags JOIN runs ON runs.run_uuid = tags.run_uuid WHERE tags.key = ? "
        "ORDER BY runs.start_time DESC LIMIT 1"
    )
    row = connection.execute(query, (schema.VERSIONS,)).fetchone()
    match = re.search(r"\bmlflow (\d[\w.]*)", str(row[0])) if row else None
    return match.group(1) if match and match.group(1) != version("mlflow") else None


@cache
def mlflow_revisions() -> tuple[frozenset[str], str]:
    """Return all schema revisions of the installed MLflow, and the newest, without importing MLflow."""
    spec = find_spec("mlflow")
    assert spec is not None and spec.origin is not None
    revisions, earlier = set(), set()
    for file in (Path(spec.origin).parent / "store" / "db_migrations" / "versions").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        revisions |= set(re.findall(r"^revision\s*(?::[^=]*)?=\s*[\"'](\w+)[\"']", text, re.MULTILINE))
        for line in re.findall(r"^down_revision\s*(?::[^=]*)?=\s*(.*)", text, re.MULTILINE):
            earlier |= set(re.findall(r"[\"'](\w+)[\"']", line))
    (newest,) = revisions - earlier
    return frozenset(revisions), newest


def ensure_database(path: Path, artifacts: Path) -> None:
    """Create the database if it is missing or unfinished; other processes wait for its creation.

    A locked database is in use, so it is left unchanged.

    Args:
        path: The database file.
        artifacts: Artifact directory of the default experiment.

    Raises:
        InputError: If the existing file cannot be used (see `database_state`), or the database cannot be created.
    """
    try:
        if database_state(path) is State.READY:
            return
    except RunLockedError:
        return
    except _DamagedError:
        if not _is_written(path):
            raise
    try:
        with ExitStack() as stack:
            with announce_wait(f"another process to create {path}"):
                lock = file_lock(path.with_name(f".{path.name}.lock"), CREATION_TIMEOUT_S)
                has_lock = stack.enter_context(lock)
            if not has_lock:
                raise _input_error(
                    path, f"is being created by another process for more than {CREATION_TIMEOUT_S:g} s; stop it"
                )
            if _must_create(path):
                with announce_wait(f"MLflow to create {path}"):
                    _create(path, artifacts)
    except OSError as error:
        raise _input_error(path, f"cannot be created ({error}); {STORAGE_HINT}") from None


def _must_create(path: Path) -> bool:
    """Wait until no other process writes to the database; return whether it must be created."""
    deadline = time.monotonic() + CREATION_TIMEOUT_S
    while True:
        with suppress(RunLockedError, FileNotFoundError):
            try:
                state = database_state(path)
                if state is not State.UNFINISHED or not _is_written(path):
                    return state is not State.READY
            except _DamagedError:
                if not _is_written(path):
                    raise
        if time.monotonic() > deadline:
            raise _input_error(
                path, f"is being written by another process for more than {CREATION_TIMEOUT_S:g} s; stop it"
            )
        time.sleep(0.5)


def _is_written(path: Path) -> bool:
    """Whether a process has written to the file in the last `QUIET_S` seconds."""
    return time.time() - path.stat().st_mtime <= QUIET_S


def _create(path: Path, artifacts: Path) -> None:
    """Create the database; the caller must hold the lock for its creation."""
    for partial_dir in path.parent.glob(f"{PARTIAL}*"):  # left by killed processes
        shutil.rmtree(partial_dir, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=path.parent) as folder:
        new_path = Path(folder) / path.name
        _migrate(new_path, artifacts)
        with new_path.open("rb") as file:
            os.fsync(file.fileno())
        # Delete the journals too, since SQLite would apply a journal of the old file to the new database.
        for name in (path.name, *(f"{path.name}-{suffix}" for suffix in ("journal", "wal", "shm"))):
            path.with_name(name).unlink(missing_ok=True)
        os.replace(new_path, path)
        sync_folder(path.parent)


def _migrate(path: Path, artifacts: Path) -> None:
    for name in ("mlflow.store.db.utils", "alembic"):  # these loggers log every migration
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def skip_syncs(connection: sqlite3.Connection, _: object) -> None:
        # `_create` syncs the finished file once; a sync per migration takes most of the time.
        ((_, _, file),) = connection.execute("PRAGMA database_list")
        if Path(file) == path.resolve():
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", skip_syncs)
    try:
        SqlAlchemyStore(f"sqlite:///{path}", artifacts.as_uri()).engine.dispose()
    finally:
        event.remove(Engine, "connect", skip_syncs)


def relocate(path: Path, artifacts: Path) -> None:
    """Update the artifact URIs of a moved or copied storage, for MLflow's UI and other tools.

    linflab itself does not need the update, since `Storage.locate` resolves artifact URIs on use. If the database is
    not writable, it stays unchanged, and a later command updates it.

    Args:
        path: The database file.
        artifacts: Current artifact directory of the storage.
    """
    with suppress(sqlite3.Error), closing(_connect(path)) as connection:
        outdated = [root for root in _artifact_roots(connection) if not _is_same_folder(root, artifacts)]
        if not outdated:
            return
        with connection:  # one transaction
            connection.execute("BEGIN IMMEDIATE")
            for root in outdated:
                _rewrite(connection, root, artifacts.as_uri())


def _artifact_roots(connection: sqlite3.Connection) -> list[str]:
    """Return the URIs of all artifact directories of this storage in the database."""
    query = (
        "SELECT DISTINCT artifact_location FROM experiments WHERE name LIKE '% eps %' OR experiment_id IN "
        "(SELECT experiment_id FROM runs JOIN tags USING (run_uuid) WHERE tags.key = ?)"
    )
    uris = [str(uri) for (uri,) in connection.execute(query, (schema.KIND,))]
    # A server, such as that of a Slurm job, gives each experiment a folder, named by its number.
    uris = [re.sub(r"/artifacts/\d+$", "/artifacts", uri) for uri in uris]
    return [uri for uri in dict.fromkeys(uris) if (path := local_path(uri)) is not None and path.name == "artifacts"]


def _is_same_folder(uri: str, artifacts: Path) -> bool:
    path = local_path(uri)
    if path is None or path == artifacts:
        return True
    try:  # one directory may be linked or mounted twice
        return path.samefile(artifacts)
    except OSError:
        return False


def local_path(uri: str) -> Path | None:
    """Return the path of a `file:` URI or an absolute path; None for other URIs."""
    if uri.startswith("/"):
        return Path(uri)
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" and parts.path.startswith("/") else None


URI_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def _rewrite(connection: sqlite3.Connection, old: str, new: str) -> None:
    for table, column in URI_COLUMNS:
        connection.execute(
            f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
            f"WHERE {column} = ? OR substr({column}, 1, ?) = ? || '/'",
            (new, len(old) + 1, old, len(old) + 1, old),
        )


@contextmanager
def relocated_copy(path: Path, artifacts: Path) -> Iterator[Path]:
    """Copy a read-only database and update the artifact URIs in the copy.

    Args:
        path: The database file.
        artifacts: Current artifact directory of the storage.

    Yields:
        Path of the copy, which is removed on exit.
    """
    with tempfile.TemporaryDirectory(prefix="linflab-") as folder:
        copy = Path(folder) / path.name
        with closing(_connect(path)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        relocate(copy, artifacts)
        yield copy
