"""The table of a sweep: one row a trial, made from records."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from linflab.reports import schema
from linflab.reports.tables import (
    CERTIFIED,
    DASH,
    EPOCHS,
    FLOPS,
    METHOD,
    NUMBER,
    ROBUST,
    SETTING,
    TEST,
    VALIDATION,
    VALIDATION_CLEAN,
    Row,
    Table,
    eps_text,
    flops,
    percent,
    text,
)
from linflab.reports.wording import (
    attacks,
    certifiers,
    commit,
    describe_settings,
    duration,
    machines,
    short_name,
    workers,
)

ORDERS = {
    "certified": "certified accuracy on validation",
    "clean": "clean accuracy on validation",
    "flops": "FLOPs",
}
MOST_LOST = 20  # trials without a result whose reasons the notes tell, one by one


def sweep_table(sweep: str, trials: pd.DataFrame, shares: Mapping[str, float] | None = None) -> Table:
    """One row a trial, best first by the sweep's first objective on validation; trials without a result come last.

    Of a race, those trained in full come before shortened ones; repetitions of the best with other seeds come last.

    Args:
        sweep: its name.
        trials: what `read_trials` returns for this sweep, with at least one row.
        shares: how much each setting mattered, for the notes; see `importances`.
    """
    trials = in_order(trials)
    rows = tuple(
        Row(
            {
                NUMBER: text(str(trial[schema.TRIAL])),
                METHOD: text(trial[schema.METHOD]),
                SETTING: text(_setting(trial)),
                EPOCHS: text(trial[schema.EPOCHS]),
                FLOPS: flops(trial[schema.FLOPS]),
                VALIDATION_CLEAN: percent(trial[schema.BEST_VALIDATION_CLEAN]),
                VALIDATION: percent(trial[schema.BEST_VALIDATION_CERTIFIED]),
                TEST: percent(trial[schema.TEST_CLEAN]),
                ROBUST: percent(trial[schema.TEST_ROBUST]),
                CERTIFIED: percent(trial[schema.TEST_CERTIFIED]),
            },
            again=((str(trial[schema.COMMAND]), commit(trial)),),
        )
        for trial in trials.to_dict("records")
    )
    columns = [NUMBER, METHOD, SETTING, EPOCHS, FLOPS, VALIDATION_CLEAN, VALIDATION, TEST, ROBUST, CERTIFIED]
    if trials[schema.EPOCHS].nunique() < 2:
        columns.remove(EPOCHS)
    if "clean" not in objectives_of(trials):
        columns.remove(VALIDATION_CLEAN)
    title = f"Sweep {sweep}: {_known(trials['dataset'])}, eps = {_eps(trials)}"
    return Table(title, tuple(columns), rows, tuple(_notes(trials, shares or {})))


def _known(column: pd.Series) -> str:
    """What the runs have there in common: a run that was only just made has nothing yet."""
    there = column.dropna()
    return str(there.iloc[0]) if len(there) else DASH


def _eps(trials: pd.DataFrame) -> str:
    eps = _known(trials["eps"])
    return eps if eps == DASH else eps_text(float(eps))


def _setting(trial: dict) -> str:
    searched = str(trial[schema.SEARCHED]).split(",")
    return describe_settings({path: trial[path] for path in searched if path in trial and trial[path] == trial[path]})


def in_order(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials as the table has them, with all columns that a table needs; see `sweep_table`."""
    columns = [
        schema.TRIAL,
        schema.METHOD,
        schema.SEARCHED,
        schema.COMMAND,
        schema.HARDWARE,
        schema.FAILURE,
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
        "dataset",
        "eps",
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
    signs = np.array([-1 if more else 1 for _, more in metrics])
    costs = there[[metric for metric, _ in metrics]].to_numpy(dtype=float) * signs
    order = np.lexsort(costs.T[::-1])  # what betters a trial comes before it; equals stay in order
    kept: list[int] = []
    for place in order:
        if not (costs[kept] <= costs[place]).all(axis=1).any():
            kept.append(int(place))
    return there.iloc[sorted(kept)]


def _parse_name(name: str) -> tuple[int, int, int]:
    """Number, round and repetition of a trial: `7.2-seed3` -> (7, 2, 3)."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?(?:-seed(\d+))?", name)
    if match is None:  # it was tagged by somebody else
        return 0, 1, 0
    number, round_, repeat = match.groups()
    return int(number), int(round_ or 1), int(repeat or 0)


def _notes(trials: pd.DataFrame, found: Mapping[str, float]) -> list[str]:
    notes = [
        "Accuracies in percent; Test, Robust and Certified on the whole test set, scored once, at the end of a trial"
        + (", but not for shortened trainings." if trials[schema.EPOCHS].nunique() > 1 else "."),
        f"Rows are ordered by {ORDERS[objectives_of(trials)[0]]}. Each row's epoch was chosen by certified accuracy on "
        "the validation split (Val. certified), which is held out of the training set.",
        f"Certified: certifier {certifiers(trials)}, radius above eps = {_eps(trials)} in pixels.",
        f"Robust: what withstands every attack that ran: {attacks(trials)}.",
    ]
    broken = trials[schema.TEST_BROKEN]
    if broken.notna().any():
        notes.append(f"Certified test samples that an attack broke, over all trials: {int(broken.sum())}.")
    notes += _repetitions(trials)
    objectives = objectives_of(trials)
    if len(objectives) > 1:
        numbers = ", ".join(f"#{name}" for name in front(trials, objectives)[schema.TRIAL])
        notes.append(f"On the front of {' and '.join(objectives)}, none of them worse than another in all: {numbers}.")
    if found:
        shares = ", ".join(f"{short_name(path)} {100 * share:.0f} %" for path, share in found.items())
        notes.append(
            f"Importance of the settings for {ORDERS[objectives[0]]}, relative to one another: {shares} (fANOVA)."
        )
    known = trials.dropna(subset=["compute.workers"]) if "compute.workers" in trials else trials.iloc[:0]
    each = f" Each trial on {workers(known.iloc[0])}." if len(known) else ""
    spent = duration(trials[schema.TRAIN_SECONDS].sum())
    notes.append(f"Machine: {machines(trials)}.{each} Training took {spent} over all trials.")
    return notes + _lost(trials[trials["status"] != "FINISHED"])


def _lost(trials: pd.DataFrame) -> list[str]:
    notes = []
    for trial in trials.head(MOST_LOST).to_dict("records"):
        reason = trial[schema.FAILURE]
        because = f": {reason}" if isinstance(reason, str) else ""
        notes.append(f"Trial {trial[schema.TRIAL]} has no result ({trial['status'].lower()}){because}")
    if len(trials) > MOST_LOST:
        notes.append(f"{len(trials) - MOST_LOST} more trials have no result.")
    return notes


def _repetitions(trials: pd.DataFrame) -> list[str]:
    """Mean and standard deviation over seeds, of the trials that were repeated."""
    names = [_parse_name(name) for name in trials[schema.TRIAL].astype(str)]
    columns = {
        VALIDATION: schema.BEST_VALIDATION_CERTIFIED,
        TEST: schema.TEST_CLEAN,
        ROBUST: schema.TEST_ROBUST,
        CERTIFIED: schema.TEST_CERTIFIED,
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
