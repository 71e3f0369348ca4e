"""The folder that holds all that runs leave behind.

<storage>/mlflow.db     runs: tags, parameters, metrics (SQLite)
<storage>/artifacts/    experiment, weights and figures of every run
<storage>/sweeps/       what each sweep was asked for
<storage>/ray/          what Ray writes while it works
<storage>/checkpoints/  where trainings that have not ended are
<storage>/reports/      tables and figures

Where LINFLAB_MLFLOW names an MLflow server, as on a cluster, that keeps the record, the first two, instead.
"""

import os
import sqlite3
import tempfile
import urllib.request
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from linflab.platform.errors import SettingError

ELSEWHERE = "give another folder with --storage, or in LINFLAB_STORAGE"


@dataclass(frozen=True)
class Storage:
    """A storage folder by its absolute path, and the MLflow server that keeps its record, where one does."""

    root: Path
    server: str | None = None

    @classmethod
    def open(cls, root: Path) -> "Storage":
        """The storage at this folder, made where it is missing.

        Raises:
            SettingError: it can't be made or written to, or what is there is no storage.
        """
        storage = cls.at(root)
        try:
            for folder in (storage.root, storage.artifacts, storage.ray, storage.reports):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=storage.root):
                pass
        except OSError as error:
            raise SettingError(f"storage={storage.root}: can't be written to ({error}); {ELSEWHERE}") from None
        if storage.has_records:
            storage._check_record()
        return storage

    @classmethod
    def with_records(cls, root: Path, server: str | None = None) -> "Storage":
        """The storage at this folder, to read from; another server's record, where one is given.

        Raises:
            SettingError: nothing has been recorded there, or what is there is no storage.
        """
        storage = cls.at(root, server)
        if not storage.has_records:
            raise SettingError(f"storage={storage.root}: holds no records (no {storage.database.name}); {ELSEWHERE}")
        storage._check_record()
        return storage

    @classmethod
    def at(cls, root: Path, server: str | None = None) -> "Storage":
        """The storage at this folder, whatever is there.

        Raises:
            SettingError: a path that can't be one, or a server that is none.
        """
        if set("?%#") & set(str(root)):
            raise SettingError(
                f"storage={root}: must be a path without ?, % and #, which mean more in a database's URI"
            )
        server = server or os.environ.get("LINFLAB_MLFLOW") or None
        if server is not None and not server.startswith(("http://", "https://")):
            raise SettingError(f"LINFLAB_MLFLOW={server}: must be an MLflow server's URI, as in http://127.0.0.1:5500")
        try:
            return cls(root.expanduser().absolute(), server)
        except RuntimeError as error:  # ~nobody
            raise SettingError(f"storage={root}: {error}; {ELSEWHERE}") from None

    def _check_record(self) -> None:
        if self.server is not None:
            try:
                with urllib.request.urlopen(f"{self.server}/health", timeout=10):
                    return
            except (OSError, ValueError) as error:
                raise SettingError(f"LINFLAB_MLFLOW={self.server}: no MLflow server answers there ({error})") from None
        try:
            # not read-only: what a process that was killed left half-written is then rolled back
            with closing(sqlite3.connect(f"file:{self.database}?mode=rw", uri=True)) as connection:
                connection.execute("PRAGMA schema_version")
        except sqlite3.Error as error:
            raise SettingError(
                f"storage={self.root}: {self.database.name} can't be read ({error}); {ELSEWHERE}"
            ) from None

    @property
    def database(self) -> Path:
        return self.root / "mlflow.db"

    @property
    def has_records(self) -> bool:
        return self.server is not None or self.database.exists()

    @property
    def tracking_uri(self) -> str:
        return self.server or f"sqlite:///{self.database}"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def artifact_location(self) -> str | None:
        """Where new experiments of MLflow keep artifacts; None where its server says."""
        return self.artifacts.as_uri() if self.server is None else None

    @property
    def ray(self) -> Path:
        return self.root / "ray"

    @property
    def sweeps(self) -> Path:
        return self.root / "sweeps"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def reports(self) -> Path:
        return self.root / "reports"
