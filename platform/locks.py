"""File locks, and notices on stderr about long waits."""

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

NOTICE_AFTER_S = 5.0  # shorter waits are not reported


@contextmanager
def file_lock(path: Path, timeout: float = 0) -> Iterator[bool]:
    """Hold an exclusive lock on a file until the block or the process ends.

    Args:
        path: Lock file; created if missing.
        timeout: Seconds to wait for the lock.

    Yields:
        True if the lock was acquired; False if the timeout has passed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    with path.open("a") as file:  # keeps existing content
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


@contextmanager
def announce_wait(event: str, after: float = NOTICE_AFTER_S) -> Iterator[None]:
    """Write a line to stderr if a block waits longer than `after` seconds, and another when the wait ends.

    Args:
        event: Noun that follows "waiting for" in the first line.
        after: Seconds until the first line.
    """
    start, is_announced = time.monotonic(), False

    def notice() -> None:
        nonlocal is_announced
        is_announced = True
        _write_line(f"linflab: waiting for {event}")

    timer = Timer(after, notice)
    timer.daemon = True
    timer.start()
    try:
        yield
        timer.cancel()
        if is_announced:
            _write_line(f"linflab: continuing after {time.monotonic() - start:.0f} s")
    finally:
        timer.cancel()


def _write_line(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, so that a rename in it survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
