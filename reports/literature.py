"""Quoted results, from `literature.yaml`: what papers report, as it is printed there."""

from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

from linflab.reports.tables import (
    CERTIFIED,
    EPOCH_SECONDS,
    FLOPS,
    METHOD,
    MODEL,
    ROBUST,
    TEST,
    Cell,
    Row,
)

UNITS = {"K": 1e3, "M": 1e6, "G": 1e9}
COLUMNS = {TEST: "clean", ROBUST: "robust", CERTIFIED: "certified", EPOCH_SECONDS: "epoch_seconds"}


@dataclass(frozen=True)
class Quotation:
    """A row of a paper's table: its data set and eps, and the row."""

    dataset: str
    eps: float
    row: Row


@dataclass(frozen=True)
class Source:
    """Where quoted rows are from; `secondary` where that is not the paper itself."""

    title: str
    url: str = ""
    secondary: bool = False

    def describe(self) -> str:
        return self.title + (f", {self.url}" if self.url else "") + ("; second hand" if self.secondary else "")


@cache
def sources() -> dict[str, Source]:
    """All sources, by the names that tables call them."""
    return {name: Source(**fields) for name, fields in _content()["sources"].items()}


@cache
def quotations() -> tuple[Quotation, ...]:
    """All quoted rows, in the order of their tables."""
    found = []
    for entry in _content()["rows"]:
        method = entry["method"] + (f" ({entry['reference']})" if "reference" in entry else "")
        cells = {METHOD: Cell(method)} | ({MODEL: Cell(entry["model"])} if "model" in entry else {})
        if "flops" in entry:
            cells[FLOPS] = Cell(entry["flops"], float(entry["flops"][:-1]) * UNITS[entry["flops"][-1]])
        cells |= {column: Cell(entry[key], float(entry[key])) for column, key in COLUMNS.items() if key in entry}
        row = Row(cells, kind="quoted", source=entry["source"])
        found.append(Quotation(entry["dataset"], parse_eps(entry["eps"]), row))
    return tuple(found)


def dataset_title(name: str) -> str:
    """A data set as papers write it."""
    return str(_content()["datasets"].get(name, name))


def parse_eps(text: object) -> float:
    """A radius in pixels of [0, 1], from a number or a fraction such as 8/255.

    Raises:
        ValueError: it is none.
    """
    try:
        numerator, _, denominator = str(text).partition("/")
        eps = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        eps = -1.0
    if not 0 <= eps <= 1:
        raise ValueError(f"eps={text}: must be a radius in pixels of [0, 1], as in 0.1 or 8/255")
    return eps


@cache
def _content() -> dict:
    return yaml.safe_load((resources.files("linflab.reports") / "literature.yaml").read_text())
