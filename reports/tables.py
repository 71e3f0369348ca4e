"""Comparison tables: rows as they stand in a paper, made from records."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from linflab.reports import schema

METHOD, SETTING, FLOPS, VALIDATION = "Method", "Setting", "FLOPs", "Val. certified"
TEST, ROBUST, CERTIFIED = "Test", "Robust", "Certified"
NUMBER = "#"


@dataclass(frozen=True)
class Table:
    """A table to be rendered.

    Attributes:
        title: what it compares.
        rows: one row a line, columns in order of appearance; accuracies in percent, NaN where there is no value.
        notes: what a reader must know to trust the numbers, one sentence each.
        commands: for each row its number and the command that repeats it.
    """

    title: str
    rows: pd.DataFrame
    notes: tuple[str, ...]
    commands: tuple[tuple[int, str], ...]


def sweep_table(sweep: str, trials: pd.DataFrame) -> Table:
    """One row a trial, best first by certified accuracy on validation; trials without a result come last.

    `trials` is what `read_trials` returns for this sweep, with at least one row.
    """
    columns = [
        schema.BEST_VALIDATION_CERTIFIED,
        schema.TEST_CLEAN,
        schema.TEST_ROBUST,
        schema.TEST_CERTIFIED,
        schema.TEST_BROKEN,
        schema.FLOPS,
        schema.TRAIN_SECONDS,
        schema.TEST_CERTIFIED_EXACT,
        schema.CERTIFIER,
        schema.ATTACK,
    ]
    trials = trials.reindex(columns=trials.columns.union(columns))
    trials = trials.assign(**{schema.TRIAL: trials[schema.TRIAL].astype(int)})
    # equals are told apart by clean accuracy on validation, then by number: never by the test set
    tie = schema.BEST_VALIDATION_CLEAN if schema.BEST_VALIDATION_CLEAN in trials else schema.BEST_VALIDATION_CERTIFIED
    trials = trials.sort_values(
        [schema.BEST_VALIDATION_CERTIFIED, tie, schema.TRIAL], ascending=[False, False, True], na_position="last"
    )
    rows = pd.DataFrame(
        {
            NUMBER: trials[schema.TRIAL],
            METHOD: trials[schema.METHOD],
            SETTING: [
                describe_settings({path: trial[path] for path in str(trial[schema.SEARCHED]).split(",")})
                for _, trial in trials.iterrows()
            ],
            FLOPS: [_flops(count) for count in trials[schema.FLOPS]],
            VALIDATION: 100 * trials[schema.BEST_VALIDATION_CERTIFIED],
            TEST: 100 * trials[schema.TEST_CLEAN],
            ROBUST: 100 * trials[schema.TEST_ROBUST],
            CERTIFIED: 100 * trials[schema.TEST_CERTIFIED],
        }
    ).reset_index(drop=True)
    first = trials.iloc[0]
    commands = tuple((int(trial[schema.TRIAL]), str(trial[schema.COMMAND])) for _, trial in trials.iterrows())
    title = f"Sweep {sweep}: {first['dataset']}, eps = {_short(first['eps'])}"
    return Table(title, rows, tuple(_notes(trials)), commands)


def _notes(trials: pd.DataFrame) -> list[str]:
    first = trials.iloc[0]
    notes = [
        "Accuracies in percent; Test, Robust and Certified on the whole test set, scored once, at the end of a trial.",
        "Rows are ordered, and each row's epoch was chosen, by certified accuracy on the validation split "
        "(Val. certified), which is held out of the training set.",
        f"Certified: certifier {_certifiers(trials)}, radius above eps = {_short(first['eps'])} in pixels.",
        f"Robust: what withstands every attack that ran: {_attacks(trials)}.",
    ]
    broken = trials[schema.TEST_BROKEN]
    if broken.notna().any():
        notes.append(f"Certified test samples that an attack broke, over all trials: {int(broken.sum())}.")
    hardware = "; ".join(sorted(set(trials[schema.HARDWARE])))
    seconds = trials[schema.TRAIN_SECONDS].sum()
    spent = f"{seconds / 3600:.2f} hours" if seconds >= 3600 else f"{seconds:.0f} seconds"
    notes.append(f"Machine: {hardware}. Each trial on {_workers(first)}; training took {spent} over all trials.")
    lost = trials[trials["status"] != "FINISHED"]
    for _, trial in lost.iterrows():
        reason = trial.get(schema.FAILURE)
        because = f": {reason}" if isinstance(reason, str) else ""
        notes.append(f"Trial {trial[schema.TRIAL]} has no result ({trial['status'].lower()}){because}")
    return notes


WAYS = {
    "lipschitz": "margin/2 at p = inf",
    "interval": "bounds through every layer at p = inf",
    "crown": "linear bounds through the head, intervals before it, at p = inf",
}


def _certifiers(trials: pd.DataFrame) -> str:
    scored = trials[trials[schema.TEST_CERTIFIED].notna()]
    names = sorted(set(scored[schema.CERTIFIER].fillna("lipschitz")))  # once the only one, and not in the record
    ways = [f"{name} ({WAYS[name.removesuffix('-sound')]})" for name in names]
    cost = (scored[schema.TEST_CERTIFIED_EXACT] - scored[schema.TEST_CERTIFIED]).mean()
    rounding = [] if pd.isna(cost) else [f"float32 rounding included, at a cost of {100 * cost:.2f} points on average"]
    return "; ".join([" or ".join(ways) or "none, for want of results", *rounding])


def _attacks(trials: pd.DataFrame) -> str:
    return " or ".join(sorted(set(trials[schema.ATTACK].dropna()))) or "not in the record"


def _workers(trial: pd.Series) -> str:
    workers, cpus = int(trial["compute.workers"]), int(trial["compute.cpus_per_worker"])
    return f"{workers} worker{'s' * (workers > 1)} of {cpus} CPU{'s' * (cpus > 1)}"


def describe_settings(values: Mapping[str, object]) -> str:
    """Settings by dotted path for reading, by short names where they say enough: `p_start=7.34, width=96`."""
    short = [_short_name(path) for path in values]
    names = [name if short.count(name) == 1 else path for name, path in zip(short, values, strict=True)]
    return ", ".join(f"{name}={_short(value)}" for name, value in zip(names, values.values(), strict=True))


def _short_name(path: str) -> str:
    """`model.width` -> `width`; of a schedule's settings, with what it schedules: `p_schedule.start` -> `p_start`."""
    *sections, name = path.split(".")
    if sections and sections[-1].endswith("_schedule"):
        return f"{sections[-1].removesuffix('schedule')}{name}"
    return name


def _short(value: object) -> str:
    """A setting for reading: reals to three significant digits. The exact value is in the command."""
    text = str(value)
    try:
        return text if text.lstrip("-").isdigit() else f"{float(f'{float(text):.3g}'):g}"
    except ValueError:
        return text


def _flops(count: float) -> str | None:
    """As the paper writes them: 8.8K, 82.7M, 5.22G."""
    if pd.isna(count):
        return None
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= 0.9995 * size:  # what rounds to 1000K is 1M
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
