"""Options and arguments shared by commands, and the parsing of their values."""

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linflab.platform.config.recipes import recipe_files
from linflab.platform.errors import InputError
from linflab.platform.source import is_cluster_job
from linflab.platform.tracking.storage import Storage
from linflab.reports.plain import shorten

if TYPE_CHECKING:
    from linflab.search_spaces.space import SearchSpace


def complete_recipe(incomplete: str) -> list[str]:
    """Return the shipped recipes with this prefix for shell completion, without importing PyTorch."""
    return [name for name in recipe_files() if name.startswith(incomplete)]


def complete_space(incomplete: str) -> list[str]:
    """Return the shipped search spaces with this prefix for shell completion."""
    from linflab.search_spaces.space import space_names

    return [name for name in space_names() if name.startswith(incomplete)]


Recipe = Annotated[str, typer.Argument(help="Recipe name, or path of a YAML file", autocompletion=complete_recipe)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to override, such as model.width=128")]
StorageFolder = Annotated[
    Path,
    typer.Option(
        "--storage",
        envvar="LINFLAB_STORAGE",
        help="Storage directory (tracking store, checkpoints, weights, reports)",
    ),
]
OutFolder = Annotated[
    Path | None, typer.Option("--output-dir", help="Output directory; default: reports/ in the storage directory")
]
OnCluster = Annotated[
    bool, typer.Option("--cluster", help="Use the cluster of ./cluster.yaml, or of the file in LINFLAB_CLUSTER")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]
Tags = Annotated[
    list[str] | None, typer.Option("--tag", metavar="KEY=VALUE", help="User tag of the run; may be repeated")
]
DEFAULT_STORAGE = Path("runs")
SOUND = "Account for float32 rounding in certificates, or certify in real arithmetic"
MAX_TAG = 5000  # characters of a tag value that MLflow stores


def parse_tags(pairs: Sequence[str] | None) -> dict[str, str]:
    """Return user tags by key.

    Raises:
        InputError: If a pair is not KEY=VALUE, or MLflow does not accept its key or the length of its value.
    """
    tags = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not 0 < len(value) <= MAX_TAG or not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", key):
            raise InputError(
                f"tag={shorten(pair)}: must be KEY=VALUE with a key of letters, digits, dots, dashes and underscores "
                f"and a value of 1 to {MAX_TAG} characters; use --tag campaign=widths, for example"
            )
        tags[key] = value
    return tags


def parse_filters(pairs: Sequence[str] | None) -> dict[str, str]:
    """Return the values of `--where` by name.

    Raises:
        InputError: If a pair is not NAME=VALUE.
    """
    filters = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"where={pair}: must be NAME=VALUE; use --where status=finished or --where model.width=64")
        filters[name] = value
    return filters


def job_name(what: str) -> str:
    """Return a valid name for a Ray job, derived from the name or path of a recipe or space."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", Path(what).stem if "/" in what else what).strip("._-")


def storage_options(storage: Storage) -> list[str]:
    """Return the options with which another command uses the same storage."""
    if is_cluster_job():
        return ["--cluster"]
    is_default = storage.root == DEFAULT_STORAGE.absolute() and not os.environ.get("LINFLAB_STORAGE")
    return [] if is_default else ["--storage", str(storage.root)]


@contextmanager
def open_storage(storage_dir: Path, cluster: bool) -> Iterator[Storage]:
    """Open a storage for reading.

    Args:
        storage_dir: Storage directory.
        cluster: If True, read the cluster's tracking store, and use the storage directory only for reports.

    Raises:
        InputError: If there is no tracking store, or the cluster is unreachable.
    """
    if not cluster:
        yield Storage.open_existing(storage_dir)
        return
    from linflab.platform.cluster.head import tracking_server_tunnel

    with tracking_server_tunnel() as server:
        yield Storage.open_existing(storage_dir, server)


@contextmanager
def open_storage_if_exists(storage_dir: Path, cluster: bool) -> Iterator[Storage]:
    """Open a storage for reading, even if it has no runs yet; tables of quoted results need no runs.

    Args:
        storage_dir: Storage directory.
        cluster: If True, read the cluster's tracking store, and use the storage directory only for reports.

    Raises:
        InputError: If the tracking store or the cluster is unusable.
    """
    if not cluster and not Storage.from_path(storage_dir).has_runs:
        yield Storage.from_path(storage_dir)
        return
    with open_storage(storage_dir, cluster) as storage:
        yield storage


def parse_eps_list(text: str) -> list[float]:
    """Return the values of a comma-separated list of eps, for pixel values in [0, 1].

    Raises:
        InputError: If a part is not a number or fraction from 0 to 1.
    """
    from linflab.reports.literature import parse_eps

    try:
        radii = [parse_eps(part) for part in text.split(",") if part.strip()]
        if radii or not text:
            return radii
    except ValueError:
        pass
    raise InputError(f"eps={shorten(text)}: must be comma-separated numbers from 0 to 1; use 0.05,8/255, for example")


def read_space(name: str) -> "SearchSpace":
    """Return a search space by its name or the path of its YAML file.

    Raises:
        InputError: If the search space does not exist or is not valid.
    """
    from linflab.search_spaces.space import load_space

    try:
        return load_space(name)
    except ValueError as error:
        raise InputError(str(error)) from None


def check_writable(option: str, directory: Path) -> None:
    """Create the directory for the files of a command that may take hours, before it starts.

    Args:
        option: Name of the option, for messages.
        directory: The directory.

    Raises:
        InputError: If it cannot be created or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(
            f"{option}={directory}: cannot be created or written to ({error.strerror}); use another directory"
        ) from None
