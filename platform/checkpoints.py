"""Checkpoints of a training: tensors and plain data, put in place by an atomic rename, the one before kept.

<storage>/checkpoints/<run>/latest.pt      where the training is
<storage>/checkpoints/<run>/previous.pt    where it was one checkpoint earlier, should the latest be damaged
"""

import fcntl
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from linflab.platform.errors import Busy, SettingError, TrainingError


def write_partial(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Write a file beside `path`, safe on the disk; an atomic rename then puts it in place."""
    place = partial_path(path)
    with place.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    return place


def partial_path(path: Path) -> Path:
    """Where a file is written before it is put in place."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def exclusive_lock(path: Path, patience: float = 0) -> Iterator[bool]:
    """A lock on a file, made where it is missing, that goes with the process that holds it: whether it was to be had.

    Args:
        patience: seconds to wait for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                yield False
                return
            yield True
            return


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
    def lock(self, patience: float = 0) -> Iterator[None]:
        """While it lasts, no other process can train this run.

        Args:
            patience: seconds to wait for a process that holds it, and is about to end.

        Raises:
            Busy: another process holds it.
        """
        with exclusive_lock(self.folder / "lock", patience) as held:
            if not held:
                raise Busy(
                    f"resume: run {self.folder.name} is being trained by another process; wait for it, or stop it first"
                )
            yield

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint; whenever the process or the machine dies, one that is whole is left.

        Raises:
            TrainingError: it can't be written; the last good one is left as it was.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            written = write_partial(self.latest, partial(torch.save, state))
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter
            with suppress(OSError):
                partial_path(self.latest).unlink(missing_ok=True)
            free = shutil.disk_usage(self.folder.parent).free
            raise TrainingError(
                f"checkpoint: can't be written to {self.folder}, where {free / 2**20:,.0f} MiB are free "
                f"({' '.join(str(error).split())[:200]}); the one before it is intact. Make room, then --resume"
            ) from error
        if self.latest.exists():
            os.replace(self.latest, self.previous)
        os.replace(written, self.latest)

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
