"""Storage directory for the output of all runs.

<storage>/mlflow.db     runs: tags, parameters, metrics (SQLite)
<storage>/artifacts/    config, weights and figures of every run
<storage>/sweeps/       plan of every sweep
<storage>/ray/          temporary files of Ray
<storage>/checkpoints/  state of unfinished runs
<storage>/reports/      tables and figures

The directory can be moved, copied and mounted elsewhere. MLflow stores absolute URIs of artifacts in the database;
`Storage.locate` maps them to the current location.

If LINFLAB_TRACKING_URI is set, as on a cluster, it is the URI of an MLflow server that replaces `mlflow.db` and
`artifacts/`.
"""

import logging
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from linflab.platform.errors import InputError
from linflab.platform.tracking.database import (
    STORAGE_HINT,
    State,
    database_state,
    ensure_database,
    local_path,
    relocate,
)

SERVER_TIMEOUT_S = 5.0
SWEEP_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}"  # also the name of a directory
# End of an artifact URI in a storage: artifacts/RUN/artifacts, or artifacts/models/MODEL/artifacts.
IN_STORAGE = re.compile(r"/artifacts/((?:\d+/)?(?:models/)?[\w-]+/artifacts)$")


@dataclass(frozen=True)
class Storage:
    """A storage directory, by absolute path, and the MLflow server that replaces its database, if any."""

    root: Path
    tracking_server: str | None = None

    @classmethod
    def open(cls, root: Path) -> "Storage":
        """Open the storage at this path to log runs; create the directory if it is missing.

        Raises:
            InputError: If the directory cannot be created or written, or the path is not a storage.
        """
        storage = cls.folder(root)
        if storage._check_tracking_store() and not storage.is_writable:
            raise InputError(f"storage={storage.root}: {storage.database.name} must be writable; {STORAGE_HINT}")
        return storage

    @classmethod
    def folder(cls, root: Path) -> "Storage":
        """Return the storage at this path; create missing directories, but no database.

        Raises:
            InputError: If the directories cannot be created or written.
        """
        storage = cls.from_path(root)
        try:
            for folder in (storage.root, storage.artifacts, storage.ray, storage.reports):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=storage.root):
                pass
        except OSError as error:
            raise InputError(f"storage={storage.root}: must be writable ({error}); {STORAGE_HINT}") from None
        return storage

    @classmethod
    def open_existing(cls, root: Path, server: str | None = None) -> "Storage":
        """Open an existing storage to read from it.

        Args:
            root: Path of the storage.
            server: URI of an MLflow server to use instead of LINFLAB_TRACKING_URI.

        Raises:
            InputError: If there is no tracking store, or the path is not a storage.
        """
        storage = cls.from_path(root, server)
        if not storage._check_tracking_store():
            raise InputError(
                f"storage={storage.root}: no tracking store found ({storage.database.name} is missing); {STORAGE_HINT}"
            )
        return storage

    @classmethod
    def from_path(cls, root: Path, server: str | None = None) -> "Storage":
        """Return the storage at this path without reading or writing any file.

        Args:
            root: Path of the storage.
            server: URI of an MLflow server to use instead of LINFLAB_TRACKING_URI.

        Raises:
            InputError: If the path or the server's URI is not valid.
        """
        quiet_mlflow()
        if earlier := os.environ.get("LINFLAB_MLFLOW"):
            raise InputError(f"LINFLAB_MLFLOW={earlier}: was renamed; use LINFLAB_TRACKING_URI={earlier}")
        server = server or os.environ.get("LINFLAB_TRACKING_URI") or None
        if server is not None and not server.startswith(("http://", "https://")):
            raise InputError(
                f"LINFLAB_TRACKING_URI={server}: must be the URI of an MLflow server; use a URI such as http://127.0.0.1:5500"
            )
        try:
            path = root.expanduser().absolute()
        except (RuntimeError, OSError) as error:  # unknown user in the path, or no working directory
            raise InputError(f"storage={root}: {error}; {STORAGE_HINT}") from None
        if set("?%\0") & set(str(path)):
            raise InputError(
                f"storage={root}: must be a path without ? and %, which are special in database URIs; {STORAGE_HINT}"
            )
        return cls(path, server)

    def _check_tracking_store(self) -> bool:
        """Check the tracking store, update its artifact URIs, and return whether it exists."""
        if self.tracking_server is not None:
            _check_server(self.tracking_server)
            return True
        if database_state(self.database) is not State.READY:
            return False
        relocate(self.database, self.artifacts)
        return True

    def ensure_store(self) -> None:
        """Create the database if it is missing or unfinished; do nothing if the storage uses a server.

        Raises:
            InputError: If the existing file cannot be used, or the database cannot be created.
        """
        if self.tracking_server is None:
            ensure_database(self.database, self.artifacts)

    def locate(self, uri: str) -> str:
        """Return the current URI of artifacts, given the absolute URI in the database.

        URIs from a server, and URIs of runs that other tools logged to the same database, are returned unchanged.
        """
        path = local_path(uri)
        match = IN_STORAGE.search(str(path)) if path is not None and self.tracking_server is None else None
        return uri if match is None else (self.artifacts / match.group(1)).as_uri()

    @property
    def location(self) -> str:
        """Location of the tracking store for messages: a server's address, or the storage directory."""
        return self.tracking_server or str(self.root)

    @property
    def database(self) -> Path:
        """Path of the SQLite database."""
        return self.root / "mlflow.db"

    @property
    def has_runs(self) -> bool:
        """Whether the storage may have runs.

        Raises:
            InputError: If the database cannot be used.
        """
        return self.tracking_server is not None or database_state(self.database) is State.READY

    @property
    def is_writable(self) -> bool:
        """Whether file permissions allow to add and change runs."""
        return self.tracking_server is not None or all(os.access(path, os.W_OK) for path in (self.root, self.database))

    @property
    def tracking_uri(self) -> str:
        """URI of the database or MLflow server."""
        return self.tracking_server or f"sqlite:///{self.database}"

    @property
    def artifacts(self) -> Path:
        """Directory of artifacts."""
        return self.root / "artifacts"

    @property
    def artifact_location(self) -> str | None:
        """URI for artifacts of new MLflow experiments; None if an MLflow server chooses it."""
        return self.artifacts.as_uri() if self.tracking_server is None else None

    @property
    def ray(self) -> Path:
        """Directory for temporary files of Ray."""
        return self.root / "ray"

    @property
    def sweeps(self) -> Path:
        """Directory of sweep plans."""
        return self.root / "sweeps"

    @property
    def checkpoints(self) -> Path:
        """Directory of checkpoints."""
        return self.root / "checkpoints"

    @property
    def reports(self) -> Path:
        """Directory of reports."""
        return self.root / "reports"


def quiet_mlflow() -> None:
    """Suppress output of MLflow and SQLAlchemy; environment variables can enable MLflow's."""
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # one URL for each run on a server
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one bar for each small file
    # MLflow logs a traceback for every locked database before it raises. SQLAlchemy logs one if a signal arrives while
    # it closes a connection.
    for name in ("mlflow.store.db.utils", "sqlalchemy.pool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _check_server(uri: str) -> None:
    import urllib.request  # slow import, rarely needed
    from http.client import HTTPException

    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SERVER_TIMEOUT_S) as answer:
            text = answer.read(100)
    except (OSError, ValueError, HTTPException) as error:
        raise InputError(
            f"LINFLAB_TRACKING_URI={uri}: MLflow server not reachable ({error}); start it, or unset the variable"
        ) from None
    if text.strip() != b"OK":
        raise InputError(
            f"LINFLAB_TRACKING_URI={uri}: must be an MLflow server, but another server answers; use another URI"
        )
