"""What stands in records, in the words of tables."""

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from linflab.reports import schema

WAYS = {
    "lipschitz": "margin/2",
    "interval": "bounds through every layer",
    "crown": "linear bounds through ReLU, tanh and affine layers (CROWN), intervals before them",
}


def certifiers(runs: pd.DataFrame) -> str:
    """By what the certified accuracies of runs are, and what accounting for rounding costs."""
    scored = runs[runs[schema.TEST_CERTIFIED].notna()]
    names = sorted(set(scored[schema.CERTIFIER].fillna("lipschitz")))  # once the only one, and not in the record
    ways = [f"{name} ({WAYS.get(name.removesuffix('-sound'), 'not known here')})" for name in names]
    cost = (scored[schema.TEST_CERTIFIED_EXACT] - scored[schema.TEST_CERTIFIED]).mean()
    rounding = [] if pd.isna(cost) else [f"float32 rounding included, at a cost of {100 * cost:.2f} points on average"]
    return "; ".join([" or ".join(ways) or "none, for want of results", *rounding])


def attacks(runs: pd.DataFrame) -> str:
    """What the robust accuracies of runs are under."""
    return " or ".join(sorted(set(runs[schema.ATTACK].dropna()))) or "not in the record"


def machines(runs: pd.DataFrame) -> str:
    """On what hardware runs were."""
    return "; ".join(sorted(set(runs[schema.HARDWARE].dropna()))) or "not in the record"


def workers(run: pd.Series) -> str:
    """How many workers shared a training."""
    count, cpus = int(str(run["compute.workers"])), int(str(run["compute.cpus_per_worker"]))
    return f"{count} worker{'s' * (count > 1)} of {cpus} CPU{'s' * (cpus > 1)}"


def commit(run: pd.Series | Mapping[Hashable, Any]) -> str:
    """The commit of linflab that a run was of, shortened, with `-dirty` where that had been changed; empty: unknown."""
    found = run.get(schema.COMMIT)
    if not isinstance(found, str):
        return ""
    number, *changed = found.split("-")
    return "-".join([number[:9], *changed])


def duration(seconds: float) -> str:
    """A time for reading."""
    return f"{seconds / 3600:.2f} hours" if seconds >= 3600 else f"{seconds:.0f} seconds"


def describe_settings(values: Mapping[str, object]) -> str:
    """Settings by dotted path for reading, by short names where they say enough: `p_start=7.34, width=96`."""
    short = [short_name(path) for path in values]
    names = [name if short.count(name) == 1 else path for name, path in zip(short, values, strict=True)]
    return ", ".join(f"{name}={short_value(value)}" for name, value in zip(names, values.values(), strict=True))


def short_name(path: str) -> str:
    """`model.width` -> `width`; of a schedule's settings, with what it schedules: `p_schedule.start` -> `p_start`."""
    *sections, name = path.split(".")
    if sections and sections[-1].endswith("_schedule"):
        return f"{sections[-1].removesuffix('schedule')}{name}"
    return name


def short_value(value: object) -> str:
    """A setting for reading: reals to three significant digits. The exact value is in the command."""
    text = str(value)
    try:
        return text if text.lstrip("-").isdigit() else f"{float(f'{float(text):.3g}'):g}"
    except ValueError:
        return text
