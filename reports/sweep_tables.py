"""Table of a sweep: one row per trial."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from linflab.reports import schema
from linflab.reports.formatting import (
    describe_attacks,
    describe_certifiers,
    describe_hardware,
    describe_settings,
    describe_status,
    describe_workers,
    format_duration,
    reproduce_command,
    short_commit,
    short_name,
)
from linflab.reports.tables import (
    CERTIFIED,
    EPOCHS,
    FLOPS,
    METHOD,
    MISSING,
    NUMBER,
    ROBUST,
    SETTING,
    TEST,
    VALIDATION,
    VALIDATION_CLEAN,
    VERIFIED,
    Row,
    Table,
    flops_cell,
    format_eps,
    percent_cell,
    text_cell,
)

OBJECTIVE_LABELS = {
    "certified": "validation certified accuracy",
    "clean": "validation clean accuracy",
    "flops": "FLOPs",
}
MAX_LISTED_FAILURES = 20  # failures that the notes list with their reasons


def sweep_table(sweep: str, trials: pd.DataFrame, importances: Mapping[str, float] | None = None) -> Table:
    """Return the table of a sweep, sorted from the best trial to the worst.

    Verified trials come first. The first objective of the sweep, on the validation split, decides. In successive
    halving, later rungs come first. Trials without results follow, then seed replicates.

    Args:
        sweep: Name of the sweep.
        trials: At least one trial, as returned by `read_trials`.
        importances: Importance of each setting, for the notes; see `param_importances`.
    """
    trials = rank_trials(trials)
    rows = tuple(
        Row(
            {
                NUMBER: text_cell(str(trial[schema.TRIAL])),
                METHOD: text_cell(trial[schema.METHOD]),
                SETTING: text_cell(_setting(trial)),
                EPOCHS: text_cell(trial[schema.EPOCHS]),
                FLOPS: flops_cell(trial[schema.FLOPS]),
                VALIDATION_CLEAN: percent_cell(trial[schema.BEST_VALIDATION_CLEAN]),
                VALIDATION: percent_cell(trial[schema.BEST_VALIDATION_CERTIFIED]),
                VERIFIED: percent_cell(trial[schema.VERIFIED_VALIDATION]),
                TEST: percent_cell(trial[schema.TEST_CLEAN]),
                ROBUST: percent_cell(trial[schema.TEST_ROBUST]),
                CERTIFIED: percent_cell(trial[schema.TEST_CERTIFIED]),
            },
            reproduce_commands=((reproduce_command(trial), short_commit(trial)),),
        )
        for trial in trials.to_dict("records")
    )
    columns = [NUMBER, METHOD, SETTING, EPOCHS, FLOPS, VALIDATION_CLEAN, VALIDATION, VERIFIED, TEST, ROBUST, CERTIFIED]
    if trials[schema.EPOCHS].nunique() < 2:
        columns.remove(EPOCHS)
    if trials[schema.VERIFIED_VALIDATION].isna().all():
        columns.remove(VERIFIED)
    if "clean" not in sweep_objectives(trials):
        columns.remove(VALIDATION_CLEAN)
    title = f"Sweep {sweep}: {_common_value(trials['dataset'])}, eps = {_eps(trials)}"
    return Table(title, tuple(columns), rows, tuple(_notes(trials, importances or {})))


def _common_value(column: pd.Series) -> str:
    """Return the value that the runs share; runs that have just started may lack it."""
    values = column.dropna()
    return str(values.iloc[0]) if len(values) else MISSING


def _eps(trials: pd.DataFrame) -> str:
    eps = _common_value(trials["eps"])
    return format_eps(eps)


def _setting(trial: dict) -> str:
    paths = str(trial[schema.SEARCHED_SETTINGS]).split(",")
    return describe_settings({path: trial[path] for path in paths if path in trial and trial[path] == trial[path]})


def rank_trials(trials: pd.DataFrame) -> pd.DataFrame:
    """Return trials in the order of `sweep_table`, with all columns that the table needs."""
    columns = [
        schema.TRIAL,
        schema.METHOD,
        schema.SEARCHED_SETTINGS,
        schema.COMMAND,
        schema.HARDWARE,
        schema.FAILURE,
        schema.BEST_VALIDATION_CERTIFIED,
        schema.BEST_VALIDATION_CLEAN,
        schema.VERIFIED_VALIDATION,
        schema.VERIFICATION,
        schema.TEST_CLEAN,
        schema.TEST_ROBUST,
        schema.TEST_CERTIFIED,
        schema.TEST_VIOLATIONS,
        schema.FLOPS,
        schema.TRAIN_SECONDS,
        schema.TEST_CERTIFIED_REAL,
        schema.CERTIFIER,
        schema.ATTACK,
        schema.EPOCHS,
        "dataset",
        "eps",
    ]
    trials = trials.reindex(columns=trials.columns.union(columns))
    # Ties are broken by other validation accuracies, then by trial number, never by test results.
    metric, is_maximized = schema.OBJECTIVE_METRICS[sweep_objectives(trials)[0]]
    names = [_parse_name(name) for name in trials[schema.TRIAL].astype(str)]
    keys = trials.assign(
        repeat=[repeat for *_, repeat in names],
        lost=trials[metric].isna(),
        round=[-round_ for _, round_, _ in names],
        verified=-trials[schema.VERIFIED_VALIDATION].fillna(-1),
        first=trials[metric] * (-1 if is_maximized else 1),
        certified=-trials[schema.BEST_VALIDATION_CERTIFIED],
        clean=-trials[schema.BEST_VALIDATION_CLEAN],
        number=[number for number, *_ in names],
    ).sort_values(["repeat", "lost", "round", "verified", "first", "certified", "clean", "number"])
    return trials.loc[keys.index]


def sweep_objectives(trials: pd.DataFrame) -> list[str]:
    """Return the objectives of the sweep of these trials, in order."""
    return str(trials[schema.OBJECTIVES].iloc[0]).split(",") if schema.OBJECTIVES in trials else ["certified"]


def pareto_front(trials: pd.DataFrame, objectives: Sequence[str]) -> pd.DataFrame:
    """Return the trials that no other trial dominates; of equal trials, the first is kept.

    Only trials of the same budget and seed are compared: in successive halving, those of the last rung.

    Args:
        trials: Trials, as returned by `read_trials`.
        objectives: Keys of `linflab.reports.schema.OBJECTIVE_METRICS`.
    """
    names = [_parse_name(name) for name in trials[schema.TRIAL].astype(str)]
    last = max(round_ for _, round_, _ in names)
    candidates = trials[[round_ == last and not repeat for _, round_, repeat in names]]
    metrics = [schema.OBJECTIVE_METRICS[name] for name in objectives]
    candidates = candidates.dropna(subset=[metric for metric, _ in metrics])
    signs = np.array([-1 if is_maximized else 1 for _, is_maximized in metrics])
    costs = candidates[[metric for metric, _ in metrics]].to_numpy(dtype=float) * signs
    order = np.lexsort(costs.T[::-1])  # dominating trials come first; ties keep order
    front: list[int] = []
    for index in order:
        if not (costs[front] <= costs[index]).all(axis=1).any():
            front.append(int(index))
    return candidates.iloc[sorted(front)]


def _parse_name(name: str) -> tuple[int, int, int]:
    """Return number, rung and seed index of a trial: `7.2-seed3` -> (7, 2, 3)."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?(?:-seed(\d+))?", name)
    if match is None:  # another tool set the tag
        return 0, 1, 0
    number, round_, repeat = match.groups()
    return int(number), int(round_ or 1), int(repeat or 0)


def _notes(trials: pd.DataFrame, setting_importances: Mapping[str, float]) -> list[str]:
    notes = [
        "Accuracies in percent. Clean, Robust and Certified: whole test set, evaluated once, at the end of a trial"
        + (" with the full budget." if trials[schema.EPOCHS].nunique() > 1 else "."),
        f"Order: {OBJECTIVE_LABELS[sweep_objectives(trials)[0]]}. Each row uses the epoch with the best certified "
        "accuracy on the validation split (Val. certified), which is held out of the training set.",
        f"Certified: radius above eps = {_eps(trials)}, for pixel values in [0, 1]. "
        f"Certifier {describe_certifiers(trials)}.",
        f"Robust: accuracy under all attacks together: {describe_attacks(trials)}.",
    ]
    verifications = dict.fromkeys(trials[schema.VERIFICATION].dropna())
    if verifications:
        notes.append(
            "Val. verified: certified by the cascade of all certifiers; the best trial is chosen by it. "
            f"{'; '.join(verifications)}."
        )
    violations = trials[schema.TEST_VIOLATIONS]
    if violations.notna().any():
        notes.append(f"Certificate violations over all trials: {int(violations.sum())}.")
    notes += _seed_statistics(trials)
    objectives = sweep_objectives(trials)
    if len(objectives) > 1:
        numbers = ", ".join(f"#{name}" for name in pareto_front(trials, objectives)[schema.TRIAL])
        notes.append(f"Pareto front of {' and '.join(objectives)}: {numbers}.")
    if setting_importances:
        importances = ", ".join(f"{short_name(path)} {100 * share:.0f}%" for path, share in setting_importances.items())
        notes.append(
            f"Relative importance of the settings for {OBJECTIVE_LABELS[objectives[0]]} (fANOVA): {importances}."
        )
    known_trials = trials.dropna(subset=["compute.workers"]) if "compute.workers" in trials else trials.iloc[:0]
    workers_note = f" Each trial on {describe_workers(known_trials.iloc[0])}." if len(known_trials) else ""
    seconds = trials[schema.TRAIN_SECONDS].dropna()  # logged at the end of a trial
    subset = "all trials" if len(seconds) == len(trials) else f"{len(seconds)} of {len(trials)} trials"
    duration = f"{subset}: {format_duration(seconds.sum())}" if len(seconds) else "trials was not logged"
    notes.append(f"Hardware: {describe_hardware(trials)}.{workers_note} Training time over {duration}.")
    return notes + _failure_notes(trials[trials["status"] != "FINISHED"])


def _failure_notes(trials: pd.DataFrame) -> list[str]:
    notes = []
    for trial in trials.head(MAX_LISTED_FAILURES).to_dict("records"):
        reason = trial[schema.FAILURE]
        cause = f": {reason}" if isinstance(reason, str) else ""
        notes.append(f"Trial {trial[schema.TRIAL]} has no results ({describe_status(trial['status'])}){cause}")
    if len(trials) > MAX_LISTED_FAILURES:
        notes.append(f"{len(trials) - MAX_LISTED_FAILURES} more trials have no results.")
    return notes


def _seed_statistics(trials: pd.DataFrame) -> list[str]:
    """Return notes with mean and standard deviation of the trials that have seed replicates."""
    names = [_parse_name(name) for name in trials[schema.TRIAL].astype(str)]
    columns = {
        VALIDATION: schema.BEST_VALIDATION_CERTIFIED,
        TEST: schema.TEST_CLEAN,
        ROBUST: schema.TEST_ROBUST,
        CERTIFIED: schema.TEST_CERTIFIED,
    }
    notes = []
    for number, round_ in dict.fromkeys(name[:2] for name in names if name[2] > 0):  # in the table's order
        replicates = trials[[name[:2] == (number, round_) for name in names]].dropna(subset=[schema.TEST_CERTIFIED])
        if len(replicates) < 2:
            continue
        statistics = ", ".join(
            f"{name} {100 * replicates[key].mean():.2f} ± {100 * replicates[key].std():.2f}"
            for name, key in columns.items()
        )
        notes.append(
            f"#{number}, mean ± std over {len(replicates)} seeds, including the one used for selection: {statistics}."
        )
    return notes
