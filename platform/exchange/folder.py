"""Folders of exported files, which are written completely or not at all."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from linflab.platform.errors import InputError


def check_folder(folder: Path) -> None:
    """Check that a folder does not exist or can be compared with new files.

    Raises:
        InputError: If the path exists and is not a folder.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"output-dir={folder}: must be a folder; use another path")


def write_folder(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write files to a new or empty folder, the last file last; keep a folder that has exactly these files.

    Args:
        folder: Folder to write.
        files: Contents by file name.

    Returns:
        Paths of the files.

    Raises:
        InputError: If the folder has other content, or cannot be written.
    """
    check_folder(folder)
    target = folder.resolve()
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        names = sorted(os.listdir(target)) if target.exists() else []
        if names:
            _check_same(folder, target, names, files)
            return [folder / name for name in files]
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        for name, content in files.items():
            with (partial / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if target.exists():  # keep the folder, which may be the current one
            for name in files:
                os.replace(partial / name, target / name)
        else:
            os.rename(partial, target)
    except OSError as error:
        raise InputError(
            f"output-dir={folder}: cannot be written ({error.strerror or error}); use another folder"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / name for name in files]


def _check_same(folder: Path, target: Path, names: list[str], files: Mapping[str, bytes]) -> None:
    """Check that existing files are the ones to write.

    Raises:
        InputError: If the folder has another file, or a file with other content.
    """
    others = [name for name in names if name not in files]
    changed = [name for name in files if name not in names or (target / name).read_bytes() != files[name]]
    if others or changed:
        raise InputError(
            f"output-dir={folder}: has other content ({(others or changed)[0]}); use a new or empty folder"
        )
