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

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def ray(self) -> Path:
        return self.root / "ray"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"
