"""Source code of linflab: its commit, its hash, and its copy for cluster jobs.

A cluster job runs a copy of the user's source code, with all edits. The copy takes precedence over the package that is
installed on the cluster. Every process of the job verifies the hash of its source code, so that edits are never
silently ignored.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import linflab
import linflab.models
import linflab.platform
import linflab.reports
import linflab.search_spaces
from linflab.platform.errors import InputError

# Environment variables of a job.
SOURCE_HASH_VAR = "LINFLAB_SOURCE_HASH"  # hash of the submitted source code
COMMIT_VAR = "LINFLAB_COMMIT"  # `git_commit()` on the submitting machine
IMPORT_VAR = "LINFLAB_IMPORT"  # modules of the user that register networks, objectives and other parts

SUBPACKAGES = {
    "models": linflab.models, "platform": linflab.platform,
    "reports": linflab.reports, "search_spaces": linflab.search_spaces,
}  # fmt: skip
# Content of the copy's __init__.py. Without this file, Python would merge the copy with the installed package, file by
# file. The code removes the import finder of an editable install, which would supply modules that the copy lacks.
_INIT = """import sys

__version__ = {version!r}

finders = [one for one in sys.meta_path if not getattr(one, "__module__", "").startswith("__editable___linflab")]
sys.meta_path[:] = finders
"""
# Of package data and code; compiled files are not copied.
SOURCE_SUFFIXES = (".py", ".yaml", ".json", ".jsonl", ".safetensors", ".npy", ".cpp", ".h")


def linflab_version() -> str:
    """Return the version of the source code, which can differ from that of an earlier installation."""
    return str(vars(linflab)["__version__"])  # mypy sees linflab as a namespace package


def is_cluster_job() -> bool:
    """Return True if this process belongs to a cluster job."""
    return SOURCE_HASH_VAR in os.environ


def _files() -> list[tuple[Path, Path]]:
    """Return the source files as pairs of path and path within the package."""
    files = []
    for name, part in SUBPACKAGES.items():
        folder = Path(next(iter(part.__path__)))
        paths = (path for path in folder.rglob("*") if path.suffix in SOURCE_SUFFIXES)
        files += [(path, Path(name) / path.relative_to(folder)) for path in paths]
    return sorted(files, key=lambda pair: pair[1].as_posix())


def source_hash() -> str:
    """Return the SHA-256 hash of names and contents of all source files."""
    digest = hashlib.sha256()
    for path, name in _files():
        content = path.read_bytes()
        digest.update(f"{name.as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def copy_source(folder: Path) -> Path:
    """Copy the source code into a folder and return the path of the package."""
    package = folder / "linflab"
    for path, name in _files():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, package / name)
    (package / "__init__.py").write_text(_INIT.format(version=linflab_version()))
    return package


def package_input_file(
    recipe_or_space: str, content: Callable[[], Any], other_file: str = ""
) -> tuple[str, dict[str, str]]:
    """Return the name that a cluster job uses for a recipe or space, and its file unless linflab ships it.

    Args:
        recipe_or_space: Name of a shipped recipe or space, or path of a YAML file.
        content: Function that returns the content of the YAML file.
        other_file: Name of another submitted file, which must not be overwritten.

    Returns:
        Name within the job, and the contents of files by name; there are no files for shipped recipes and spaces.
    """
    if not recipe_or_space.endswith((".yaml", ".yml")):
        return recipe_or_space, {}
    import yaml

    name = Path(recipe_or_space).name
    name = f"space_{name}" if name == other_file else name
    return name, {name: yaml.safe_dump(content(), sort_keys=False)}


@cache
def verify_source_hash() -> None:
    """Check that a process of a cluster job runs the submitted source code.

    Raises:
        InputError: If the process runs other source code.
    """
    if is_cluster_job() and source_hash() != os.environ[SOURCE_HASH_VAR]:
        raise InputError(
            f"code: {Path(__file__).parent} is not the source code submitted with this job; unset PYTHONPATH on the "
            "nodes of the cluster, so that the submitted code takes precedence"
        )


@cache
def git_commit() -> str:
    """Return the git commit of the source, with `-dirty` if files were changed; empty outside a checkout."""
    if is_cluster_job():
        return os.environ.get(COMMIT_VAR, "")
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return ""
    describe = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return ""
