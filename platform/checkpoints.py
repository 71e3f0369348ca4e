"""Checkpoints of a training: tensors and plain data, put in place by an atomic rename, the one before kept.

<storage>/checkpoints/<run>/latest.pt      where the training is
<storage>/checkpoints/<run>/previous.pt    where it was one checkpoint earlier, should the latest be damaged
"""

import fcntl
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from linflab.platform.errors import SettingError


def write_partial(path: Path, state: dict[str, Any]) -> Path:
    """Write tensors and plain data beside `path`, safe on the disk; an atomic rename then puts the file in place."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return partial


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, in a folder of their own."""

    folder: Path

    @property
    def latest(self) -> Path:
        return self.folder / "latest.pt"

    @property
    def previous(self) -> Path:
        return self.folder / "previous.pt"

    def exist(self) -> bool:
        return self.latest.exists() or self.previous.exists()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """While it lasts, no other process can train this run; the lock goes with the process that holds it.

        Raises:
            SettingError: another process holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise SettingError(
                    f"resume: run {self.folder.name} is being trained by another process; wait for it, or stop it first"
                ) from None
            yield

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint; whenever the process or the machine dies, one that is whole is left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = write_partial(self.latest, state)
        if self.latest.exists():
            os.replace(self.latest, self.previous)
        os.replace(partial, self.latest)

    def load(self) -> dict[str, Any]:
        """The latest checkpoint that can be read, on the CPU; warns where that is not the latest.

        Raises:
            SettingError: there is none; names the files.
        """
        problems = []
        for path in (self.latest, self.previous):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                if not isinstance(state, dict) or "experiment" not in state:
                    raise ValueError("it holds something else")
            except Exception as error:  # a damaged file can raise nearly anything
                problems.append(f"{path} ({' '.join(str(error).split())[:200]})")
                continue
            if problems and self.latest.exists():
                warnings.warn(f"checkpoint can't be read: {problems[0]}; going on from {path}", stacklevel=2)
            return state
        raise SettingError(
            f"checkpoint can't be read: {', and '.join(problems)}; without --resume, training starts anew"
        )

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
