"""Shipped tables, one YAML file each; `linflab.reports.comparison` defines the format."""

from importlib import resources

import yaml


def list_tables() -> list[str]:
    """Return the names of the shipped tables."""
    files = (path.name for path in resources.files("linflab.reports.papers").iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def table_title(name: str) -> str:
    """Return the title of a shipped table."""
    return str(yaml.safe_load((resources.files("linflab.reports.papers") / f"{name}.yaml").read_text())["title"])
