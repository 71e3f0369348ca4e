"""Rows of ensembles: which ensembles differ only in seeds, and commands that repeat an ensemble with its members.

Members of an ensemble are runs themselves. If they are among all runs, their settings, seeds and commands are known.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from linflab.reports import labels, schema
from linflab.reports.added_settings import ADDED_TEXTS
from linflab.reports.formatting import reproduce_command, short_commit
from linflab.reports.methods import mirror_flags
from linflab.reports.records import param_columns

# Columns that are added to runs.
SEEDS = "linflab.seeds"  # seed as text; that of an ensemble has the seeds of its members, as in 0+3
MEMBER_SETTINGS = "linflab.member_settings"  # settings of the members without seeds; empty for other runs
MEMBER_COMMANDS = "linflab.member_commands"  # (command, commit) of each member; none for other runs

# Settings of ensembles.
MEMBER_RUNS, MEMBER_WEIGHTS, MIRROR = "model.runs", "model.weights", "model.mirror"
CPU_SETTINGS = ("compute.workers", "compute.cpus_per_worker")
MACHINE_COLUMNS = (*CPU_SETTINGS, schema.HARDWARE)
ATTACKS = "evaluation.attack.methods"  # in the order of the members
ID_CHARS = 8  # of an id in a command: the start of a run's id, and the name of a repeated run


def add_member_columns(runs: pd.DataFrame, seed: str, uncompared: tuple[str, ...]) -> pd.DataFrame:
    """Return all runs with columns that describe the members of ensembles.

    Ensembles of known members get no ids in `model.runs`, so they are equal if their members are equal up to seeds.
    Weights that were chosen on validation images are shown as `auto`. The order of the members matters only if their
    weights were given. CPUs and hardware are those of the members, which the hours are from; workers and CPUs are
    missing if they differ or are unknown.

    Args:
        runs: All runs, as returned by `read_runs`.
        seed: Column of the seeds.
        uncompared: Settings in which equal members may differ.
    """
    seeds = [str(value) if value == value and value is not None else "unknown" for value in runs[seed]]
    settings: list[str] = [""] * len(runs)
    commands: list[tuple[tuple[str, str], ...]] = [()] * len(runs)
    added: dict[str, list[Any]] = {SEEDS: seeds, MEMBER_SETTINGS: settings, MEMBER_COMMANDS: commands}
    ensembles = [position for position, ids in enumerate(runs[schema.MEMBERS]) if isinstance(ids, str)]
    if not ensembles:
        return runs.assign(**added)
    positions = _positions_by_id(runs)
    compared = [path for path in param_columns(runs) if path not in uncompared and labels.affects_results(path)]
    member_runs, weights, mirrors = (
        runs.get(path, pd.Series("", index=runs.index)).tolist() for path in (MEMBER_RUNS, MEMBER_WEIGHTS, MIRROR)
    )
    machines = {path: runs.get(path, pd.Series(index=runs.index, dtype=object)).tolist() for path in MACHINE_COLUMNS}
    for position in ensembles:
        rule = runs[schema.SELECTION].iloc[position]
        if isinstance(rule, str) and rule.endswith(schema.CHOSEN_WEIGHTS):
            weights[position] = "auto"
        ids = runs[schema.MEMBERS].iloc[position].split(",")
        for path in CPU_SETTINGS:
            machines[path][position] = None
        if not all(one in positions for one in ids):
            machines[schema.HARDWARE][position] = None
            continue
        members = [runs.iloc[positions[one]] for one in ids]
        if len({tuple(str(member.get(path)) for path in CPU_SETTINGS) for member in members}) == 1:
            for path in CPU_SETTINGS:
                machines[path][position] = members[0].get(path)
        names = {member.get(schema.HARDWARE) for member in members}
        machines[schema.HARDWARE][position] = "; ".join(sorted(name for name in names if isinstance(name, str))) or None
        flags = mirror_flags(mirrors[position], len(ids))
        described = [
            (f"{MIRROR}={flag}\n{_describe(member, compared)}", seeds[positions[one]])
            for member, one, flag in zip(members, ids, flags, strict=True)
        ]
        if weights[position] in ("auto", "[]") or not isinstance(weights[position], str):
            described.sort()
        settings[position] = "\n\n".join(text for text, _ in described)
        seeds[position] = "+".join(text for _, text in described)
        member_runs[position] = ""
        commands[position] = tuple(
            (f"{reproduce_command(member)} --name {one[:ID_CHARS]}", short_commit(member))
            for member, one in zip(members, ids, strict=True)
            if isinstance(member.get(schema.COMMAND), str)
        )
    return runs.assign(**added, **machines, **{MEMBER_RUNS: member_runs, MEMBER_WEIGHTS: weights})


def merge_member_settings(settings: pd.DataFrame) -> pd.DataFrame:
    """Return settings that are equal for ensembles of the same known members in another order.

    An ensemble inherits settings of training from its first member; `MEMBER_SETTINGS` has those of all members. Only
    settings of the evaluation and given weights are its own.

    Args:
        settings: Settings of runs as text, with the column `MEMBER_SETTINGS`.
    """
    are_ensembles = settings[MEMBER_SETTINGS] != ""
    own = (MEMBER_SETTINGS, MEMBER_WEIGHTS)
    inherited = [path for path in settings if path not in own and not str(path).startswith("evaluation.")]
    merged = settings.copy()
    merged.loc[are_ensembles, inherited] = ""
    if ATTACKS in settings:
        merged.loc[are_ensembles, ATTACKS] = [
            " ".join(sorted(re.findall(r"\w+", text))) for text in settings.loc[are_ensembles, ATTACKS]
        ]
    return merged


def group_by_training(settings: pd.DataFrame) -> pd.Series:
    """Return a number for each run, equal for runs whose settings differ only in evaluation, also in their members'.

    Args:
        settings: Settings of runs as text, as returned by `merge_member_settings`.
    """
    columns = [path for path in settings if not str(path).startswith("evaluation.")]
    members = settings[MEMBER_SETTINGS].str.replace(r"(?m)^evaluation\..*\n?", "", regex=True)
    return settings.assign(**{MEMBER_SETTINGS: members}).groupby(columns, sort=False).ngroup()


def _positions_by_id(runs: pd.DataFrame) -> Mapping[str, int]:
    """Return the position of each run by its id, and by its id before export and import."""
    columns = [runs[name] for name in (schema.ORIGINAL_RUN_ID, "run_id") if name in runs]
    return {one: position for column in columns for position, one in enumerate(column) if isinstance(one, str)}


def _describe(run: pd.Series, paths: list[str]) -> str:
    """Return the settings of a run as text; settings that earlier versions lack have their defaults."""
    texts = {path: "" if run[path] != run[path] or run[path] is None else str(run[path]) for path in paths}
    return "\n".join(f"{path}={text or ADDED_TEXTS.get(path, '')}" for path, text in texts.items())


def repeat_commands(run: pd.Series) -> tuple[tuple[str, str], ...]:
    """Return the commands that repeat a run, with the commit of linflab (empty if unknown); none if unknown.

    Those of an ensemble start with the commands of its members, if they are known. They name each repeated member after
    the start of the original id. The last command uses these names, so it also works with the original members.
    """
    if not isinstance(run.get(schema.COMMAND), str):
        return ()
    own, members = reproduce_command(run), run[MEMBER_COMMANDS]
    ids = run[schema.MEMBERS].split(",") if members else []
    if len(members) < len(ids):  # the command of a member is unknown
        ids, members = [], ()
    for one in ids:
        own = own.replace(one, one[:ID_CHARS])
    return (*members, (own, short_commit(run)))


def share_members(runs: pd.DataFrame) -> bool:
    """Return whether a network is a member of several of the runs."""
    ids = [one for text in runs[schema.MEMBERS] if isinstance(text, str) for one in text.split(",")]
    return len(set(ids)) < len(ids)


def sort_by_seed(runs: pd.DataFrame) -> pd.DataFrame:
    """Return runs in the order of their seeds."""

    def key(position: int) -> list[float]:
        parts = str(runs[SEEDS].iloc[position]).split("+")
        return [float(part) if part.isdigit() else math.inf for part in parts]

    return runs.iloc[sorted(range(len(runs)), key=key)]
