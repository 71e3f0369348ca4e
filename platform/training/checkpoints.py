"""Checkpoints of training runs: the latest and the previous one of each run, replaced atomically.

A checkpoint contains only tensors and plain data.

<storage>/checkpoints/<run>/latest.pt      latest checkpoint
<storage>/checkpoints/<run>/previous.pt    the checkpoint before, used if the latest is damaged
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from linflab.platform.errors import InputError, RunLockedError, TrainingError
from linflab.platform.locks import file_lock
from linflab.platform.training.tensors import load_tensors
from linflab.reports.outputs import write_whole


@dataclass(frozen=True)
class CheckpointStore:
    """Checkpoints of one run, in their own folder."""

    folder: Path

    @property
    def latest(self) -> Path:
        """Path of the latest checkpoint."""
        return self.folder / "latest.pt"

    @property
    def previous(self) -> Path:
        """Path of the checkpoint before the latest."""
        return self.folder / "previous.pt"

    def exist(self) -> bool:
        """Return True if there is a checkpoint."""
        return self.latest.exists() or self.previous.exists()

    @contextmanager
    def lock(self, timeout: float = 0) -> Iterator[None]:
        """Hold the lock of this run, so that no other process can train it.

        Args:
            timeout: Seconds to wait for a process that holds the lock and is about to end.

        Raises:
            RunLockedError: If another process holds the lock.
        """
        with file_lock(self.folder / "lock", timeout) as has_lock:
            if not has_lock:
                raise RunLockedError(
                    f"resume: another process is training run {self.folder.name}; wait for it to end, or stop it"
                )
            yield

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint, so that a complete one remains even if the process or machine fails.

        Raises:
            TrainingError: If the checkpoint cannot be written; the last complete checkpoint is unchanged.
        """
        new_file = self.folder / "next.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for partial_file in self.folder.glob(".*.partial"):  # only one process writes, so these are leftovers
                partial_file.unlink(missing_ok=True)
            write_whole(new_file, partial(torch.save, state))
        except (OSError, RuntimeError) as error:  # torch.save can raise RuntimeError
            free = shutil.disk_usage(self.folder.parent).free
            raise TrainingError(
                f"checkpoint: cannot be written to {self.folder} with {free / 2**20:,.0f} MiB free "
                f"({' '.join(str(error).split())[:200]}); free disk space, then resume with --resume from the last "
                "complete checkpoint"
            ) from error
        if self.latest.exists():
            os.replace(self.latest, self.previous)
        os.replace(new_file, self.latest)

    def load(self) -> dict[str, Any]:
        """Load the latest readable checkpoint to the CPU; warn if it is not the latest one.

        Raises:
            InputError: If no checkpoint can be read; the message names the files.
        """
        problems = []
        for path in (self.latest, self.previous):
            try:
                state = load_tensors(path)
                if not isinstance(state, dict) or "experiment" not in state:
                    raise ValueError("it is not a checkpoint")
            except Exception as error:  # a damaged file can raise almost any exception
                problems.append(f"{path} ({' '.join(str(error).split())[:200]})")
                continue
            if problems and self.latest.exists():
                warnings.warn(f"checkpoint cannot be read: {problems[0]}; resuming from {path}", stacklevel=2)
            return state
        raise InputError(f"checkpoint cannot be read: {' and '.join(problems)}; run without --resume to start over")

    def remove(self) -> None:
        """Delete all checkpoints of the run."""
        shutil.rmtree(self.folder, ignore_errors=True)
