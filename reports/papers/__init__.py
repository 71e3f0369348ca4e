"""The shipped tables: a YAML file each (`linflab.reports.comparison` says what it holds)."""

from importlib import resources

import yaml


def table_names() -> list[str]:
    """The tables that are shipped."""
    files = (path.name for path in resources.files("linflab.reports.papers").iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def table_title(name: str) -> str:
    """What a shipped table compares."""
    return str(yaml.safe_load((resources.files("linflab.reports.papers") / f"{name}.yaml").read_text())["title"])
