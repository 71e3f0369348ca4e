"""Atomic writes to paths that users name; only regular files are replaced."""

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object], flush: bool = True) -> None:
    """Write a temporary file and rename it atomically to the path.

    A symbolic link is kept; its target is replaced.

    Args:
        path: The file.
        write: Function that writes the content to a file opened in binary mode.
        flush: Sync the file to disk before the rename.

    Raises:
        OSError: If the file cannot be written, or the path exists and is not a regular file (a pipe or device).
    """
    target = _resolve(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text_atomic(path: Path, text: str) -> Path:
    """Write a UTF-8 text file with `write_whole`, without sync; create its folder; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(text.encode()), flush=False)
    return path


def write_columns(path: Path, columns: Mapping[str, Sequence[float]]) -> None:
    """Write per-image numbers as CSV: one row per image, with the index of the image first."""
    rows = ([number, *row] for number, row in enumerate(zip(*columns.values(), strict=True)))
    lines = (",".join(map(repr, row)) for row in rows)
    write_text_atomic(path, "\n".join([",".join(["image", *columns]), *lines, ""]))


def _resolve(path: Path) -> Path:
    """Return the real path of a file, with symbolic links resolved."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("must be a regular file; use another path")
    return Path(os.path.realpath(path))
