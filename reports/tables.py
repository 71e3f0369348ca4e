"""Comparison tables: rows as they stand in a paper, made from records."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from linflab.reports import schema
from linflab.reports.importance import importances

METHOD, SETTING, EPOCHS, FLOPS = "Method", "Setting", "Epochs", "FLOPs"
VALIDATION_CLEAN, VALIDATION = "Val. clean", "Val. certified"
TEST, ROBUST, CERTIFIED = "Test", "Robust", "Certified"
NUMBER = "#"


@dataclass(frozen=True)
class Table:
    """A table to be rendered.

    Attributes:
        title: what it compares.
        rows: one row a line, columns in order of appearance; accuracies in percent, NaN where there is no value.
        notes: what a reader must know to trust the numbers, one sentence each.
        commands: for each row its name and the command that repeats it.
    """

    title: str
    rows: pd.DataFrame
    notes: tuple[str, ...]
    commands: tuple[tuple[str, str], ...]


def sweep_table(sweep: str, trials: pd.DataFrame) -> Table:
    """One row a trial, best first by the sweep's first objective on validation; trials without a result come last.

    Of a race, those trained in full come before shortened ones; repetitions of the best with other seeds come last.

    `trials` is what `read_trials` returns for this sweep, with at least one row.
    """
    trials = in_order(trials)
    objectives = objectives_of(trials)
    rows = pd.DataFrame(
        {
            NUMBER: trials[schema.TRIAL].astype(str),
            METHOD: trials[schema.METHOD],
            SETTING: [
                describe_settings({path: trial[path] for path in str(trial[schema.SEARCHED]).split(",")})
                for _, trial in trials.iterrows()
            ],
            EPOCHS: trials[schema.EPOCHS],
            FLOPS: [_flops(count) for count in trials[schema.FLOPS]],
            VALIDATION_CLEAN: 100 * trials[schema.BEST_VALIDATION_CLEAN],
            VALIDATION: 100 * trials[schema.BEST_VALIDATION_CERTIFIED],
            TEST: 100 * trials[schema.TEST_CLEAN],
            ROBUST: 100 * trials[schema.TEST_ROBUST],
            CERTIFIED: 100 * trials[schema.TEST_CERTIFIED],
        }
    ).reset_index(drop=True)
    if rows[EPOCHS].nunique() < 2:
        rows = rows.drop(columns=EPOCHS)
    if "clean" not in objectives:
        rows = rows.drop(columns=VALIDATION_CLEAN)
    first = trials.iloc[0]
    commands = tuple((str(trial[schema.TRIAL]), str(trial[schema.COMMAND])) for _, trial in trials.iterrows())
    title = f"Sweep {sweep}: {first['dataset']}, eps = {_short(first['eps'])}"
    return Table(title, rows, tuple(_notes(trials)), commands)


def in_order(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials as the table has them, with all columns that a table needs; see `sweep_table`."""
    columns = [
        schema.BEST_VALIDATION_CERTIFIED,
        schema.BEST_VALIDATION_CLEAN,
        schema.TEST_CLEAN,
        schema.TEST_ROBUST,
        schema.TEST_CERTIFIED,
        schema.TEST_BROKEN,
        schema.FLOPS,
        schema.TRAIN_SECONDS,
        schema.TEST_CERTIFIED_EXACT,
        schema.CERTIFIER,
        schema.ATTACK,
        schema.EPOCHS,
    ]
    trials = trials.reindex(columns=trials.columns.union(columns))
    # equals are told apart by other accuracies on validation, then by number: never by the test set
    metric, more = schema.OBJECTIVE_METRICS[objectives_of(trials)[0]]
    names = [_parse_name(name) for name in trials[schema.TRIAL].astype(str)]
    keys = trials.assign(
        repeat=[repeat for *_, repeat in names],
        lost=trials[metric].isna(),
        round=[-round_ for _, round_, _ in names],
        first=trials[metric] * (-1 if more else 1),
        certified=-trials[schema.BEST_VALIDATION_CERTIFIED],
        clean=-trials[schema.BEST_VALIDATION_CLEAN],
        number=[number for number, *_ in names],
    ).sort_values(["repeat", "lost", "round", "first", "certified", "clean", "number"])
    return trials.loc[keys.index]


def objectives_of(trials: pd.DataFrame) -> list[str]:
    """What the sweep of these trials optimizes, the first one first."""
    return str(trials[schema.OBJECTIVES].iloc[0]).split(",") if schema.OBJECTIVES in trials else ["certified"]


def front(trials: pd.DataFrame, objectives: Sequence[str]) -> pd.DataFrame:
    """The trials that no other one equals or betters in all objectives at once (of equals, the first stays).

    Trials of one length and seed are compared: of a race, those of its last round.
    """
    names = [_parse_name(name) for name in trials[schema.TRIAL].astype(str)]
    last = max(round_ for _, round_, _ in names)
    there = trials[[round_ == last and not repeat for _, round_, repeat in names]]
    metrics = [schema.OBJECTIVE_METRICS[name] for name in objectives]
    there = there.dropna(subset=[metric for metric, _ in metrics])
    costs = [tuple(-row[metric] if more else row[metric] for metric, more in metrics) for _, row in there.iterrows()]
    kept = [
        not any(
            all(a <= b for a, b in zip(other, cost, strict=True)) and (other != cost or k < n)
            for k, other in enumerate(costs)
            if k != n
        )
        for n, cost in enumerate(costs)
    ]
    return there[kept]


def _parse_name(name: str) -> tuple[int, int, int]:
    """Number, round and repetition of a trial: `7.2-seed3` -> (7, 2, 3)."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?(?:-seed(\d+))?", name)
    assert match is not None, name
    number, round_, repeat = match.groups()
    return int(number), int(round_ or 1), int(repeat or 0)


def _notes(trials: pd.DataFrame) -> list[str]:
    first = trials.iloc[0]
    notes = [
        "Accuracies in percent; Test, Robust and Certified on the whole test set, scored once, at the end of a trial"
        + (", but not for shortened trainings." if trials[schema.EPOCHS].nunique() > 1 else "."),
        f"Rows are ordered by {ORDERS[objectives_of(trials)[0]]}. Each row's epoch was chosen by certified accuracy on "
        "the validation split (Val. certified), which is held out of the training set.",
        f"Certified: certifier {_certifiers(trials)}, radius above eps = {_short(first['eps'])} in pixels.",
        f"Robust: what withstands every attack that ran: {_attacks(trials)}.",
    ]
    broken = trials[schema.TEST_BROKEN]
    if broken.notna().any():
        notes.append(f"Certified test samples that an attack broke, over all trials: {int(broken.sum())}.")
    notes += _repetitions(trials)
    objectives = objectives_of(trials)
    if len(objectives) > 1:
        numbers = ", ".join(f"#{name}" for name in front(trials, objectives)[schema.TRIAL])
        notes.append(f"On the front of {' and '.join(objectives)}, none of them worse than another in all: {numbers}.")
    if found := importances(trials, schema.OBJECTIVE_METRICS[objectives[0]][0]):
        shares = ", ".join(f"{_short_name(path)} {100 * share:.0f} %" for path, share in found.items())
        notes.append(
            f"Importance of the settings for {ORDERS[objectives[0]]}, relative to one another: {shares} (fANOVA)."
        )
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


ORDERS = {
    "certified": "certified accuracy on validation",
    "clean": "clean accuracy on validation",
    "flops": "FLOPs",
}


def _repetitions(trials: pd.DataFrame) -> list[str]:
    """Mean and standard deviation over seeds, of the trials that were repeated."""
    names = trials[schema.TRIAL].astype(str).map(_parse_name)
    columns = {
        "Val. certified": schema.BEST_VALIDATION_CERTIFIED,
        "Test": schema.TEST_CLEAN,
        "Robust": schema.TEST_ROBUST,
        "Certified": schema.TEST_CERTIFIED,
    }
    notes = []
    for number, round_ in dict.fromkeys(name[:2] for name in names if name[2] > 0):  # in the table's order
        mine = trials[[name[:2] == (number, round_) for name in names]].dropna(subset=[schema.TEST_CERTIFIED])
        if len(mine) < 2:
            continue
        of = ", ".join(
            f"{name} {100 * mine[key].mean():.2f} ± {100 * mine[key].std():.2f}" for name, key in columns.items()
        )
        notes.append(
            f"#{number} with {len(mine)} seeds, the one it was chosen by included, mean ± standard deviation: {of}."
        )
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
