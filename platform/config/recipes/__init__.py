"""Shipped recipes: one YAML file each, in one folder per dataset."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def recipe_files() -> dict[str, Path]:
    """Return the files of all shipped recipes by name, sorted by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*/*.yaml"), key=lambda path: path.stem)}
