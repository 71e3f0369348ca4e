"""The folder that holds all that runs leave behind.

<storage>/mlflow.db     runs: tags, parameters, metrics (SQLite)
<storage>/artifacts/    experiment and weights of every run
<storage>/ray/          state of Ray's sweeps
<storage>/reports/      tables
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from linflab.platform.errors import SettingError


@dataclass(frozen=True)
class Storage:
    """A storage folder that can be written to."""

    root: Path

    @classmethod
    def open(cls, root: Path) -> "Storage":
        """The storage at this folder, made where it is missing.

        Raises:
            SettingError: it can't be made or written to.
        """
        root = root.expanduser().absolute()
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
        except OSError as error:
            raise SettingError(
                f"storage={root}: can't be written to ({error.strerror}); give a folder that can with --storage, "
                "or in LINFLAB_STORAGE"
            ) from None
        return cls(root)

    @classmethod
    def with_records(cls, root: Path) -> "Storage":
        """The storage at this folder, to read from.

        Raises:
            SettingError: nothing has been recorded there.
        """
        storage = cls(root.expanduser().absolute())
        if not storage.database.is_file():
            raise SettingError(
                f"storage={storage.root}: holds no records (there is no {storage.database.name}); give the folder of "
                "your runs with --storage, or in LINFLAB_STORAGE"
            )
        return storage

    @property
    def database(self) -> Path:
        return self.root / "mlflow.db"

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.database}"

    @property
    def ray(self) -> Path:
        return self.root / "ray"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"
