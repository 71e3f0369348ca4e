"""Quoted results from `literature.yaml`, as printed in the papers."""

import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import get_args

import yaml

from linflab.reports.plain import shorten
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
    Selection,
)

UNITS = {"K": 1e3, "M": 1e6, "G": 1e9}
COLUMNS = {TEST: "clean", ROBUST: "robust", CERTIFIED: "certified", EPOCH_SECONDS: "epoch_seconds"}


@dataclass(frozen=True)
class QuotedRow:
    """A row of a paper's table, with its dataset and eps."""

    dataset: str
    eps: float
    row: Row


@dataclass(frozen=True)
class Source:
    """Source of quoted rows; `secondary` if the source is not the paper itself."""

    title: str
    url: str = ""
    secondary: bool = False

    def citation(self) -> str:
        """Return title, address and kind of the source, for a note."""
        return self.title + (f", {self.url}" if self.url else "") + ("; secondary source" if self.secondary else "")


@cache
def sources() -> dict[str, Source]:
    """Return all sources by name."""
    return {name: Source(**fields) for name, fields in _content()["sources"].items()}


@cache
def quoted_rows() -> tuple[QuotedRow, ...]:
    """Return all quoted rows, in the order of their tables."""
    rows = []
    for entry in _content()["rows"]:
        method = entry["method"] + (f" ({entry['reference']})" if "reference" in entry else "")
        cells = {METHOD: Cell(method)} | ({MODEL: Cell(entry["model"])} if "model" in entry else {})
        if "flops" in entry:
            cells[FLOPS] = Cell(entry["flops"], float(entry["flops"][:-1]) * UNITS[entry["flops"][-1]])
        cells |= {column: Cell(entry[key], float(entry[key])) for column, key in COLUMNS.items() if key in entry}
        selected_on = entry.get("selected_on")
        if selected_on not in get_args(Selection)[1:]:
            raise ValueError(f"selected_on={selected_on}: must be {', '.join(get_args(Selection)[1:])}")
        row = Row(cells, origin="quoted", source=entry["source"], selected_on=selected_on)
        rows.append(QuotedRow(entry["dataset"], parse_eps(entry["eps"]), row))
    return tuple(rows)


def dataset_title(name: str) -> str:
    """Return the name of a dataset as papers write it."""
    return str(_content()["datasets"].get(name, name))


def parse_eps(text: object) -> float:
    """Return an l_inf radius for pixel values in [0, 1], given as a number or a fraction such as 8/255.

    Raises:
        ValueError: If the text is not a number in [0, 1].
    """
    try:
        eps = parse_number(str(text))
    except ValueError:
        eps = -1.0
    if not 0 <= eps <= 1:
        raise ValueError(f"eps={shorten(text)}: must be a radius in [0, 1]; use a number or a fraction such as 8/255")
    return eps


def parse_number(text: str) -> float:
    """Return a number that is given as a decimal or as a fraction such as 8/255.

    Exponents are never expanded to digits, so parsing 1e99999999 takes no longer than parsing 0.1.

    Raises:
        ValueError: If the text is not a finite number.
    """
    numerator_text, slash, denominator_text = text.partition("/")
    numerator, denominator = float(numerator_text), float(denominator_text) if slash else 1.0
    if not (math.isfinite(numerator) and math.isfinite(denominator)) or denominator == 0:
        raise ValueError(f"{shorten(text)}: must be a finite number; use a decimal or a fraction such as 8/255")
    number = numerator / denominator
    if not math.isfinite(number):
        raise ValueError(f"{shorten(text)}: must be a finite number; use a decimal or a fraction such as 8/255")
    return number


@cache
def _content() -> dict:
    return yaml.safe_load((resources.files("linflab.reports") / "literature.yaml").read_text())
