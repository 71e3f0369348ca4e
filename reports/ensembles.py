"""Rows of ensembles: which ensembles differ only in seeds, and commands that repeat an ensemble with its members.

Members of an ensemble are runs themselves. Their settings and commands are known if they are among the runs of a table.
"""

import math
from typing import Any

import pandas as pd

from linflab.reports import schema
from linflab.reports.formatting import reproduce_command, short_commit

MEMBER_RUNS, MEMBER_WEIGHTS = "model.runs", "model.weights"  # settings
ID_CHARS = 8  # of an id in a command, which starts the id of a run and is the name of a repeated one
Commands = tuple[tuple[str, str], ...]  # with the commit of linflab, empty if unknown


def find_members(runs: pd.DataFrame) -> dict[int, list[int]]:
    """Return the positions of the members of each ensemble by its own position, without ensembles of other runs.

    Args:
        runs: Runs, as returned by `read_runs`. Members have the id of the run, or its id before export and import.
    """
    if schema.MEMBERS not in runs:
        return {}
    columns = [runs[name] for name in (schema.ORIGINAL_RUN_ID, "run_id") if name in runs]
    positions = {one: position for column in columns for position, one in enumerate(column) if isinstance(one, str)}
    found = {}
    for position, ids in enumerate(runs[schema.MEMBERS]):
        members = [positions.get(one) for one in ids.split(",")] if isinstance(ids, str) else []
        known = [one for one in members if one is not None]
        if members and len(known) == len(members):
            found[position] = known
    return found


def repeat_commands(runs: pd.DataFrame) -> list[Commands]:
    """Return the commands that repeat each run; none if its command is unknown.

    Those of an ensemble start with the commands of its members, which are named after the original runs. The ensemble's
    own command uses these names, so it averages original or repeated members.
    """
    commands = [_command(run) for _, run in runs.iterrows()]
    for position, members in find_members(runs).items():
        if commands[position] and all(commands[member] for member in members):
            [(own, commit)] = commands[position]
            training = []
            for run_id, member in zip(runs[schema.MEMBERS].iloc[position].split(","), members, strict=True):
                [(command, member_commit)] = commands[member]
                training.append((f"{command} --name {run_id[:ID_CHARS]}", member_commit))
                own = own.replace(run_id, run_id[:ID_CHARS])
            commands[position] = (*training, (own, commit))
    return commands


def _command(run: pd.Series) -> Commands:
    return ((reproduce_command(run), short_commit(run)),) if isinstance(run.get(schema.COMMAND), str) else ()


def compare_by_members(settings: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return settings in which ensembles are equal if their members are equal up to seeds.

    Ids of the members become the settings of their runs, and weights that were chosen on validation images do not
    count. Ensembles of unknown members keep their ids.

    Args:
        settings: Compared settings of runs, as text.
        runs: The runs, in the same order.
    """
    if MEMBER_RUNS not in settings:
        return settings
    texts = ["\n".join(f"{path}={value}" for path, value in row.items() if value) for _, row in settings.iterrows()]
    members, weights = settings[MEMBER_RUNS].tolist(), settings[MEMBER_WEIGHTS].tolist()
    for position, parts in find_members(runs).items():
        members[position] = "\n\n".join(texts[part] for part in parts)
    for position, rule in enumerate(runs[schema.SELECTION]):
        if isinstance(rule, str) and rule.endswith(schema.CHOSEN_WEIGHTS):
            weights[position] = schema.CHOSEN_WEIGHTS
    return settings.assign(**{MEMBER_RUNS: members, MEMBER_WEIGHTS: weights})


def describe_seeds(runs: pd.DataFrame, column: str) -> list[Any]:
    """Return the seed of each run as text; that of an ensemble has the seeds of its members, as in `0+3`."""
    seeds = runs[column].tolist()
    for position, members in find_members(runs).items():
        seeds[position] = "+".join(str(runs[column].iloc[member]) for member in members)
    return seeds


def sort_by_seed(runs: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return runs in the order of their seeds, which `describe_seeds` wrote."""

    def key(position: int) -> list[float]:
        parts = str(runs[column].iloc[position]).split("+")
        return [float(part) if part.isdigit() else math.inf for part in parts]

    return runs.iloc[sorted(range(len(runs)), key=key)]
