"""A folder with the layout of the installed package, for tools that follow imports without running them.

The folders `models/`, `platform/`, `reports/` and `search_spaces/` are parts of the package `linflab`, but are not
inside `linflab/`. Such tools cannot follow the mapping in `pyproject.toml`, some skip `platform/`, which has no
`__init__.py`, and some do not enter linked folders. They get folders with links to all files.
"""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("models", "platform", "reports", "search_spaces")


def link_package(folder: Path) -> None:
    """Make a folder that contains `linflab` with links to all Python files of its parts."""
    package = folder / "linflab"
    shutil.rmtree(package, ignore_errors=True)
    sources = {package / "__init__.py": ROOT / "linflab" / "__init__.py"}
    sources |= {package / file.relative_to(ROOT): file for part in PARTS for file in (ROOT / part).rglob("*.py")}
    for link, source in sources.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source)
    (package / "platform" / "__init__.py").touch()
