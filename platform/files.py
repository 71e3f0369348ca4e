"""Safe reading of regular files; rejects named pipes, devices and folders, so no read can block."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
MAX_TEXT_BYTES = 64 * 2**20  # per text file


def exists(path: Path, kind: int | None = None) -> bool:
    """Return True if a path exists; return False also if the path cannot be accessed.

    Args:
        path: Path; symbolic links are followed.
        kind: Required kind of file: a key of `KINDS`, or `stat.S_IFREG`. None accepts any kind.
    """
    try:
        actual_kind = stat.S_IFMT(os.stat(path).st_mode)
    except (OSError, ValueError):  # name too long, no permission, or null byte
        return False
    return kind is None or actual_kind == kind


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading without blocking; symbolic links are followed.

    Returns:
        File in binary mode.

    Raises:
        OSError: If the file does not exist, cannot be opened, or is not a regular file.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)  # before opening, which has side effects on some devices
        if kind == stat.S_IFREG:
            # Open without blocking and check again, since the path may have become a pipe since the first check.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
            if kind == stat.S_IFREG:
                return os.fdopen(descriptor, "rb")
            os.close(descriptor)
    except ValueError as error:  # a null byte in the path
        raise OSError(f"invalid file name: {error}") from None
    raise OSError(f"must be a regular file, but is {KINDS.get(kind, 'of another kind')}")


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        OSError: If the file cannot be opened, is not a regular file, or is larger than `limit`.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(f"must have at most {limit / 2**20:g} MiB")
    return content


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a regular UTF-8 file of at most `limit` bytes.

    Raises:
        OSError: If the file cannot be opened, is not a regular file, or is larger than `limit`.
        UnicodeDecodeError: If the content is not UTF-8.
    """
    return read_bytes(path, limit).decode("utf-8")
