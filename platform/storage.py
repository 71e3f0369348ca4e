"""The folder that holds all that runs leave behind.

<storage>/mlflow.db     runs: tags, parameters, metrics (SQLite)
<storage>/artifacts/    experiment, weights and figures of every run
<storage>/sweeps/       what each sweep was asked for
<storage>/ray/          what Ray writes while it works
<storage>/checkpoints/  where trainings that have not ended are
<storage>/reports/      tables and figures
"""

import sqlite3
import tempfile
from dataclasses import dataclass
from pathlib import Path

from linflab.platform.errors import SettingError

ELSEWHERE = "give another folder with --storage, or in LINFLAB_STORAGE"


@dataclass(frozen=True)
class Storage:
    """A storage folder by its absolute path."""

    root: Path

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
        if storage.database.exists():
            storage._check_database()
        return storage

    @classmethod
    def with_records(cls, root: Path) -> "Storage":
        """The storage at this folder, to read from.

        Raises:
            SettingError: nothing has been recorded there, or what is there is no storage.
        """
        storage = cls.at(root)
        if not storage.database.exists():
            raise SettingError(f"storage={storage.root}: holds no records (no {storage.database.name}); {ELSEWHERE}")
        storage._check_database()
        return storage

    @classmethod
    def at(cls, root: Path) -> "Storage":
        """The storage at this folder, whatever is there.

        Raises:
            SettingError: a path that can't be one.
        """
        if set("?%#") & set(str(root)):
            raise SettingError(
                f"storage={root}: must be a path without ?, % and #, which mean more in a database's URI"
            )
        try:
            return cls(root.expanduser().absolute())
        except RuntimeError as error:  # ~nobody
            raise SettingError(f"storage={root}: {error}; {ELSEWHERE}") from None

    def _check_database(self) -> None:
        try:
            # not read-only: what a process that was killed left half-written is then rolled back
            with sqlite3.connect(f"file:{self.database}?mode=rw", uri=True) as connection:
                connection.execute("PRAGMA schema_version")
            connection.close()
        except sqlite3.Error as error:
            raise SettingError(
                f"storage={self.root}: {self.database.name} can't be read ({error}); {ELSEWHERE}"
            ) from None

    @property
    def database(self) -> Path:
        return self.root / "mlflow.db"

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.database}"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

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
