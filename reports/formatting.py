"""Formatting of stored values for tables and notes."""

import shlex
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from linflab.reports import schema

MAX_DIGITS = 17  # tell any two float64 numbers apart
CERTIFIER_DESCRIPTIONS = {
    "lipschitz": "margin/2",
    "ibp": "interval bound propagation",
    "crown": "CROWN through ReLU, tanh and affine layers, IBP before them",
    "alpha_crown": "CROWN with optimized slopes",
    "complete": "branch and bound with a time limit per image",
}


def describe_status(status: object) -> str:
    """Return the status of a run as text: finished, failed, running, or interrupted for MLflow's KILLED."""
    return {"KILLED": "interrupted"}.get(str(status), str(status).lower())


def describe_certifiers(runs: pd.DataFrame, details: bool = True) -> str:
    """Return the certifiers of runs, their arithmetic, and the cost of sound rounding.

    Args:
        runs: Runs, as returned by `linflab.reports.records.read_runs`.
        details: Describe each certifier in parentheses.
    """
    scored_runs = runs[runs[schema.TEST_CERTIFIED].notna()]
    names = sorted(set(scored_runs[schema.CERTIFIER].fillna("lipschitz")))  # old runs have no tag
    cost = (scored_runs[schema.TEST_CERTIFIED_REAL] - scored_runs[schema.TEST_CERTIFIED]).mean()
    rounding_note = "float32 rounding included"
    if not pd.isna(cost):
        rounding_note += f" (costs {100 * cost:.2f} points on average)"
    descriptions = []
    for name in names:
        certifier = name.removesuffix(schema.SOUND)
        arithmetic = rounding_note if name.endswith(schema.SOUND) else "real arithmetic"
        description = f" ({CERTIFIER_DESCRIPTIONS.get(certifier, 'unknown certifier')})" if details else ""
        descriptions.append(f"{certifier}{description}, {arithmetic}")
    return " or ".join(descriptions) or "none (no results)"


def describe_attacks(runs: pd.DataFrame) -> str:
    """Return the attacks behind the robust accuracies of runs."""
    return " or ".join(sorted(set(runs[schema.ATTACK].dropna()))) or "not recorded"


def is_sound(runs: pd.DataFrame) -> bool:
    """Return whether the certificates of all runs account for float32 rounding."""
    return bool(runs[schema.CERTIFIER].astype(str).str.endswith(schema.SOUND).all())


def describe_hardware(runs: pd.DataFrame) -> str:
    """Return the hardware of runs."""
    machines = {machine for text in runs[schema.HARDWARE].dropna() for machine in text.split("; ")}
    return "; ".join(sorted(machines)) or "not recorded"


def describe_workers(run: pd.Series) -> str:
    """Describe the data-parallel workers and their CPUs; values that are no numbers stay as recorded."""
    counts = run.get("compute.workers"), run.get("compute.cpus_per_worker")
    try:
        count, cpus = (int(str(number)) for number in counts)
    except ValueError:
        return f"{counts[0]} workers of {counts[1]} CPUs"
    workers = f"{count} workers of " if count > 1 else ""
    return f"{workers}{cpus} CPU{'s' * (cpus > 1)}"


def short_commit(run: pd.Series | Mapping[Hashable, Any]) -> str:
    """Return the short commit of a run, with `-dirty` for a modified tree; empty if unknown."""
    commit = run.get(schema.COMMIT)
    if not isinstance(commit, str):
        return ""
    number, *suffixes = commit.split("-")
    return "-".join([number[:9], *suffixes])


def reproduce_command(run: pd.Series | Mapping[Hashable, Any]) -> str:
    """Return the command of a run, which imports the user's modules that the run depends on."""
    modules = run.get(schema.MODULES)
    prefix = f"LINFLAB_IMPORT={shlex.quote(modules)} " if isinstance(modules, str) and modules else ""
    return f"{prefix}{run[schema.COMMAND]}"


def format_duration(seconds: float) -> str:
    """Format a duration in hours, minutes or seconds."""
    if seconds >= 360:
        return f"{seconds / 3600:.2f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds >= 120 else f"{seconds:.3g} seconds"


def describe_settings(values: Mapping[str, object], rows: Sequence[Mapping[str, object]] = ()) -> str:
    """Format settings, under their short names if these are unique: `p_start=7.34, width=96`.

    Args:
        values: Settings by dotted path.
        rows: Settings of the rows from which these must be told apart; numbers get the digits that this takes.
    """
    short = [short_name(path) for path in values]
    names = [name if short.count(name) == 1 else path for name, path in zip(short, values, strict=True)]
    texts = [format_value(value, [row[path] for row in rows if path in row]) for path, value in values.items()]
    return ", ".join(f"{name}={text}" for name, text in zip(names, texts, strict=True))


def short_name(path: str) -> str:
    """Return the short name of a setting.

    Examples: `model.width` -> `width`, `p_schedule.start` -> `p_start`, `objective.kind` -> `objective`.
    """
    *sections, name = path.split(".")
    if sections and name == "kind":
        return sections[-1]
    if sections and sections[-1].endswith("_schedule"):
        return f"{sections[-1].removesuffix('schedule')}{name}"
    return name


def format_value(value: object, others: Iterable[object] = ()) -> str:
    """Format the value of a setting; only real numbers are rounded, to three significant digits.

    The command of the run has the exact value.

    Args:
        value: Value.
        others: Values from which the text must differ unless they are equal; it gets the digits that this takes.
    """
    exact = _round_value(value, MAX_DIGITS)
    different = [other for other in others if _round_value(other, MAX_DIGITS) != exact]
    for digits in range(3, MAX_DIGITS):
        text = _round_value(value, digits)
        if all(_round_value(other, digits) != text for other in different):
            return text
    return exact


def _round_value(value: object, digits: int) -> str:
    text = str(value)
    try:
        return text if text.lstrip("-").isdigit() else f"{float(f'{float(text):.{digits}g}'):.{max(digits, 6)}g}"
    except ValueError:
        return text
