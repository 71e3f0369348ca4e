"""The code of linflab itself: which commit it is, and how what runs here is sent to a cluster and runs there.

A job gets a copy of the code that runs on the user's machine, with all edits, as a package that comes before the one
that is installed on the cluster. Every process of the job checks that it runs that copy, so an edit never silently does
not run.
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

import yaml

import linflab.models
import linflab.platform
import linflab.reports
import linflab.search_spaces
from linflab.platform.errors import SettingError

# variables of a job's environment
CODE = "LINFLAB_CODE"  # the digest of the code that was sent
COMMIT = "LINFLAB_COMMIT"  # `git_commit()` where it came from

PARTS = {
    "models": linflab.models, "platform": linflab.platform,
    "reports": linflab.reports, "search_spaces": linflab.search_spaces,
}  # fmt: skip
# a package without one would be mixed with the installed one of its name, file by file; and an editable install has a
# finder that is asked for what is not here
_INIT = """import sys

finders = [one for one in sys.meta_path if not getattr(one, "__module__", "").startswith("__editable___linflab")]
sys.meta_path[:] = finders
"""
KINDS = (".py", ".yaml", ".cpp", ".h")  # files that are code; what compilers make of it stays where it is


def sent_here() -> bool:
    """Whether this process belongs to a job that was sent to a cluster."""
    return CODE in os.environ


def _files() -> list[tuple[Path, Path]]:
    """The files of the code that runs, by place and path within the package."""
    found = []
    for name, part in PARTS.items():
        folder = Path(next(iter(part.__path__)))
        paths = (path for path in folder.rglob("*") if path.suffix in KINDS)
        found += [(path, Path(name) / path.relative_to(folder)) for path in paths]
    return sorted(found, key=lambda pair: pair[1].as_posix())


def code_digest() -> str:
    """A digest of the code that runs: names and contents of all files."""
    digest = hashlib.sha256()
    for path, name in _files():
        content = path.read_bytes()
        digest.update(f"{name.as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def copy_code(folder: Path) -> Path:
    """Copy the code that runs into a folder; returns the package."""
    package = folder / "linflab"
    for path, name in _files():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, package / name)
    (package / "__init__.py").write_text(_INIT)
    return package


def file_to_send(what: str, content: Callable[[], Any], taken: str = "") -> tuple[str, dict[str, str]]:
    """What a recipe or space is called where it is sent, and the file that goes with it if it is one's own.

    Args:
        taken: the name of another file that goes there.
    """
    if not what.endswith((".yaml", ".yml")):
        return what, {}
    name = Path(what).name
    name = f"space_{name}" if name == taken else name
    return name, {name: yaml.safe_dump(content(), sort_keys=False)}


@cache
def check_code() -> None:
    """Check that this process runs the code that was sent for its job; where none was, nothing.

    Raises:
        SettingError: it runs other code.
    """
    if sent_here() and code_digest() != os.environ[CODE]:
        raise SettingError(
            f"code: {Path(__file__).parent} is other code than was sent with this job; is a PYTHONPATH set on the "
            "cluster's machines? Without, what was sent comes first"
        )


@cache
def git_commit() -> str:
    """The commit of the code that runs, with `-dirty` where it was changed since; empty where it is no checkout."""
    if sent_here():
        return os.environ.get(COMMIT, "")
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return ""
    describe = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return ""
