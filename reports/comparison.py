"""Comparison tables of rows quoted from papers and rows measured with linflab.

A table is defined by YAML (a file in `papers/`, or your own):

    title: Our nets
    columns: [Method, FLOPs, Clean, Robust, Certified]
    groups: [{dataset: fashion_mnist, eps: 0.1}]
    quoted: [zhang2021_table1]          # names of sources in literature.yaml
    measured: {min_seeds: 3, group_by: [method, model.width], filters: {training.epochs: 25}}
    runs_file: ours.jsonl               # from `linflab runs export`; default: runs in the storage directory
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from itertools import count, product
from pathlib import Path
from string import ascii_lowercase
from typing import Annotated, Any, Literal, Self

import numpy as np
import pandas as pd
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from linflab.reports import labels, schema
from linflab.reports.added_settings import ADDED_TEXTS
from linflab.reports.ensembles import (
    CPU_SETTINGS,
    MEMBER_RUNS,
    MEMBER_SETTINGS,
    SEEDS,
    add_member_columns,
    group_by_training,
    merge_member_settings,
    repeat_commands,
    share_members,
    sort_by_seed,
)
from linflab.reports.formatting import (
    describe_attacks,
    describe_certifiers,
    describe_hardware,
    describe_settings,
    describe_status,
    describe_workers,
    format_duration,
    is_sound,
)
from linflab.reports.intervals import CONFIDENCE, confidence_half_width
from linflab.reports.literature import dataset_title, parse_eps, quoted_rows, sources
from linflab.reports.methods import KINDS, NETWORK_KINDS, describe_method, method_name
from linflab.reports.papers import list_tables
from linflab.reports.plain import shorten
from linflab.reports.records import has_values, is_value, logged_values, param_columns
from linflab.reports.renames import FIELDS, current_setting, current_settings
from linflab.reports.sweep_tables import OBJECTIVE_LABELS, rank_trials, sweep_objectives
from linflab.reports.tables import (
    CERTIFIED,
    CPUS,
    EPOCH_SECONDS,
    EPOCHS,
    FLOPS,
    HIGHER_IS_BETTER,
    HOURS,
    INTERVALS,
    METHOD,
    MISSING,
    MODEL,
    ROBUST,
    RUNS,
    TEST,
    TEST_MARK,
    TEST_VERIFIED,
    VALIDATION,
    Cell,
    Row,
    Table,
    flops_cell,
    format_eps,
    highlight_best,
    number_cell,
    text_cell,
)
from linflab.reports.verification import verification_bases

ACCURACIES = {TEST: schema.TEST_CLEAN, ROBUST: schema.TEST_ROBUST, CERTIFIED: schema.TEST_CERTIFIED}  # their metrics
TIE_TOLERANCE = 1e-9  # of accuracies averaged over seeds; one image is far more
SEED, INCLUDE_VALIDATION = "seed", "training.include_validation"
UNCOMPARED_SETTINGS = (SEED, INCLUDE_VALIDATION)  # settings without effect on results are not compared either
SOUND = "evaluation.sound"
LATEST = "Latest configuration, since no run has validation results"
SIZE_SETTINGS = ("depth", "width", "hidden_size", "q")  # shown in the column Model
Column = Literal[
    "Method", "Model", "Epochs", "FLOPs", "Val. certified", "Clean", "Robust", "Certified", "Hours", "CPUs", "Runs",
    "Time/epoch (s)", "Verified", "Clean CI", "Robust CI", "Certified CI",
]  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Group(_Strict):
    """Rows of one dataset and eps."""

    dataset: str
    eps: Annotated[float, BeforeValidator(parse_eps)]

    @property
    def title(self) -> str:
        """Heading of the rows, such as `MNIST (eps = 0.3)`."""
        return f"{dataset_title(self.dataset)} (eps = {format_eps(self.eps)})"


class MeasuredRows(_Strict):
    """Rows made from runs: the best configuration of each group, selected on validation images.

    Ties go to the configuration with the shortest training time. A configuration certified in real arithmetic
    does not compete with the same training certified with float32 rounding.

    Attributes:
        group_by: Settings by dotted path. Runs compete for one row if they have equal values of these settings, the
            same kinds of network and the same derived method name (`linflab.reports.methods`).
        filters: Required values by setting.
        min_seeds: Number of seeds that a configuration needs to compete. If no configuration has that many seeds, those
            with the most seeds compete.
    """

    group_by: tuple[str, ...] = ("method",)
    filters: dict[str, str | bool | int | float | None] = {}
    min_seeds: int = Field(default=3, ge=1)

    @field_validator("filters")
    @classmethod
    def _check_filters(cls, filters: dict[str, Any]) -> dict[str, Any]:
        if earlier := [path for path in filters if current_setting(path) != path]:
            raise ValueError(f"filters.{earlier[0]}: was renamed; use {current_setting(earlier[0])}")
        for path, value in current_settings(filters).items():
            if value != filters[path]:
                raise ValueError(f"filters.{path}={filters[path]}: was renamed; use {path}={value}")
        return filters

    @field_validator("group_by")
    @classmethod
    def _check_group_by(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        if earlier := [path for path in paths if current_setting(path) != path]:
            raise ValueError(f"group_by={earlier[0]}: was renamed; use {current_setting(earlier[0])}")
        if not paths or len(set(paths)) < len(paths):
            raise ValueError(
                f"group_by={list(paths)}: must be one or more different settings; use a list such as "
                "[method, model.width]"
            )
        for path in paths:
            if path in (*UNCOMPARED_SETTINGS, MEMBER_RUNS) or not labels.affects_results(path):
                raise ValueError(
                    f"group_by={path}: is not supported, since runs that differ only in it share a row; "
                    "use another setting"
                )
        return paths


class TableDefinition(_Strict):
    """Definition of a comparison table; the module docstring has an example."""

    title: str
    columns: tuple[Column, ...] = Field(default=("Method", "FLOPs", "Clean", "Robust", "Certified"), min_length=1)
    groups: tuple[Group, ...] = Field(min_length=1)
    quoted: tuple[str, ...] = ()
    measured: MeasuredRows | None = MeasuredRows()
    runs_file: Path | None = Field(None, description="exported runs (JSONL) for the measured rows")

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        for name in self.quoted:
            if name not in sources():
                raise ValueError(f"quoted={shorten(name)}: source not found; use one of {', '.join(sources())}")
        return self


NESTED: Mapping[str, type[_Strict]] = {"groups": Group, "measured": MeasuredRows}  # fields that have fields themselves


def load_definition(name: str, read: Callable[[Path], Any]) -> TableDefinition:
    """Return the definition of a shipped table, or of a YAML file.

    A relative `runs_file` is resolved against the folder of the definition.

    Args:
        name: Name of a shipped table, or path of a YAML file.
        read: Function that returns the mapping in a YAML file; it may raise OSError or ValueError.

    Raises:
        ValueError: If the table is not found or not valid; the message names the field.
    """
    is_shipped = name in list_tables()
    file = Path(str(resources.files("linflab.reports.papers"))) / f"{name}.yaml" if is_shipped else Path(name)
    try:
        tree = read(file)
    except OSError as error:
        problem = "not found" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
        raise ValueError(
            f"table={name}: {problem}; use a YAML file or a shipped table: {', '.join(list_tables())}"
        ) from None
    except ValueError as error:
        raise ValueError(f"table={name}: must be YAML with title and groups: {error}") from None
    try:
        definition = TableDefinition.model_validate(tree)
    except ValidationError as error:
        details = error.errors()[0]
        if details["type"] == "value_error":
            raise ValueError(f"table={name}: {details['ctx']['error']}") from None
        field_path = ".".join(str(part) for part in details["loc"])
        if (field := FIELDS["table"].get(str(details["loc"][-1]))) is not None:
            raise ValueError(f"table={name}: {field_path}: was renamed; use {field}") from None
        message = details["msg"][0].lower() + details["msg"][1:]
        value_text = "" if details["type"] == "missing" else f"={shorten(details['input'])}"
        if details["type"] == "extra_forbidden":
            fields = NESTED.get(str(details["loc"][0]), TableDefinition).model_fields
            message = f"unknown field; use one of {', '.join(fields)}"
        raise ValueError(f"table={name}: {field_path}{value_text}: {message}") from None
    if definition.runs_file is None:
        return definition
    try:
        runs_file = file.parent / definition.runs_file.expanduser()
    except RuntimeError as error:  # ~ of an unknown user
        raise ValueError(f"table={name}: runs_file={definition.runs_file}: {error}; use a path without ~") from None
    return definition.model_copy(update={"runs_file": runs_file})


def comparison_table(definition: TableDefinition, runs: pd.DataFrame) -> Table:
    """Return the table of a definition.

    Args:
        definition: The definition.
        runs: Trials, as returned by `read_runs`; may be empty.
    """
    runs = _with_columns(runs)
    rows: list[Row] = []
    notes: list[str] = []
    groups_without_runs: list[str] = []
    letters = _footnote_marks()
    for group in definition.groups:
        for quotation in quoted_rows():
            if quotation.row.source in definition.quoted and _is_in_group(quotation.dataset, quotation.eps, group):
                rows.append(_assign_group(quotation.row, group))
        if definition.measured is None:
            continue
        group_runs = _filter_group(runs, group)
        for path in [*definition.measured.filters, *definition.measured.group_by]:
            if len(group_runs) and not has_values(group_runs, path):
                notes.append(f"{group.title}: no run has the setting {path}.")
        for path, value in definition.measured.filters.items():
            matches = [is_value(one, str(value)) for one in logged_values(group_runs, path, runs)]
            group_runs = group_runs[pd.Series(matches, index=group_runs.index, dtype=bool)]
        scored_runs = group_runs[(group_runs["status"] == "FINISHED") & group_runs[schema.TEST_CERTIFIED].notna()]
        selected = list(_select_best_settings(scored_runs, definition.measured))
        measured = _measured_rows(selected, group, definition.measured.group_by, letters)
        rows += [
            dataclasses.replace(row, selected_on="unknown" if selection == LATEST else "validation")
            for row, (_, selection) in zip(measured, selected, strict=True)
        ]
        if not selected:
            groups_without_runs.append(group.title)
        if excluded := _exclusion_note(group_runs):
            notes.append(f"{group.title}, excluded runs: {excluded}.")
    if groups_without_runs:
        notes.append(f"No runs with test results: {', '.join(groups_without_runs)}.")
    if any(row.runs and row.selected_on == "validation" for row in rows):
        notes += [
            "Configurations are selected by mean certified accuracy on validation images, never on test images; "
            "ties go to the fastest to train. A configuration certified in real arithmetic does not compete with the "
            "same training certified with float32 rounding.",
            "Epochs are selected in the same way; runs that train on validation images use the last epoch.",
        ]
    if definition.runs_file is not None:
        notes.append(f"Measured rows use the runs in {definition.runs_file.name}.")
    return make_table(definition.title, definition.columns, rows, notes)


def table_for_names(runs: pd.DataFrame, names: Sequence[str], quoted: bool, title: str = "") -> Table:
    """Return a table with one row per run or sweep.

    The row of a sweep shows its best configuration, with all seeds of that configuration.

    Args:
        runs: Trials, as returned by `read_runs`.
        names: Sweeps by name, and runs by name, by id or by the beginning of the id.
        quoted: Add quoted rows of the same datasets and eps.
        title: Title of the table; the default title lists the names.

    Raises:
        LookupError: If a run or sweep is not found, or has no test results.
    """
    runs = _with_columns(runs)
    selections = [(name, *_select_runs(runs, name)) for name in names]
    groups: dict[Group, list[tuple[pd.DataFrame, str]]] = {}
    for name, selected_runs, selection in selections:
        groups.setdefault(_find_group(name, selected_runs.iloc[0]), []).append((selected_runs, selection))
    letters = _footnote_marks()
    rows: list[Row] = []
    for group, selected in groups.items():
        rows += quoted_rows_of(group) if quoted else []
        rows += _measured_rows(selected, group, ("method",), letters)
    columns = (METHOD, FLOPS, VALIDATION, TEST, ROBUST, CERTIFIED)
    return make_table(title or f"Comparison of {', '.join(names)}", columns, rows, [])


def measured_rows(selected: Sequence[tuple[pd.DataFrame, str]], group: Group) -> list[Row]:
    """Return one row for each given set of runs, whose settings were not selected on test images.

    Args:
        selected: Runs of each row, as returned by `read_runs`, and the note on their selection.
        group: Dataset and eps of all runs.
    """
    complete = [(_with_columns(runs), selection) for runs, selection in selected]
    rows = _measured_rows(complete, group, ("method",), _footnote_marks())
    return [dataclasses.replace(row, selected_on="validation") for row in rows]


def quoted_rows_of(group: Group) -> list[Row]:
    """Return all quoted rows of a dataset and eps that have a certified accuracy."""
    rows = [quote.row for quote in quoted_rows() if _is_in_group(quote.dataset, quote.eps, group)]
    return [_assign_group(row, group) for row in rows if CERTIFIED in row.cells]


def _find_group(name: str, run: pd.Series) -> Group:
    try:
        return Group(dataset=run["dataset"], eps=run["eps"])
    except ValidationError:
        raise LookupError(
            f"{name}: requires a dataset and eps for a comparison, but has dataset={run['dataset']}, "
            f"eps={run['eps']}; use another run"
        ) from None


def groups_with_results(runs: pd.DataFrame) -> list[Group]:
    """Return the datasets and eps of all runs with test results, in order."""
    runs = _with_columns(runs)
    scored_runs = runs[(runs["status"] == "FINISHED") & runs[schema.TEST_CERTIFIED].notna()]
    groups = set()
    for dataset, eps in scored_runs[["dataset", "eps"]].drop_duplicates().itertuples(index=False):
        with suppress(ValidationError):
            groups.add(Group(dataset=dataset, eps=eps))
    return sorted(groups, key=lambda group: (group.dataset, group.eps))


def _select_runs(runs: pd.DataFrame, name: str) -> tuple[pd.DataFrame, str]:
    """Return the runs for the row of a sweep or run, and a note on how they were selected."""
    trials = runs[runs[schema.SWEEP] == name]
    if len(trials):
        trials = rank_trials(trials)
        best = trials.iloc[0]
        number = str(best[schema.TRIAL])
        seeds = trials[[str(trial).split("-seed")[0] == number for trial in trials[schema.TRIAL]]]
        seeds = seeds[seeds[schema.TEST_CERTIFIED].notna()]
        if len(seeds):
            objective = OBJECTIVE_LABELS[sweep_objectives(trials)[0]]
            if not math.isnan(float(best[schema.VERIFIED_VALIDATION])):
                objective = "validation verified accuracy"
            return seeds, f"Best of sweep {name} by {objective}, trial {number}"
        raise LookupError(f"{name}: this sweep has no trial with test results yet; use another sweep or run")
    run = find_run(runs, name)
    if run[schema.TEST_CERTIFIED].isna().all():
        raise LookupError(
            f"{name}: this run has no test results ({describe_status(run['status'].iloc[0])}); use another run"
        )
    return run, f"Run {run['run_id'].iloc[0]}, as requested"


def find_run(runs: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the run with this id, name or unique beginning of an id, as a DataFrame with one row.

    The original id of an imported run is accepted, too.

    Raises:
        LookupError: If no run or several runs match.
    """
    id_pairs = runs.reindex(columns=["run_id", schema.ORIGINAL_RUN_ID]).itertuples(index=False)
    starts_with_name = [any(isinstance(one, str) and one.startswith(name) for one in ids) for ids in id_pairs]
    has_id = [run_id == name for run_id in runs.get("run_id", [])]
    has_name = [one == name for one in runs.get(schema.NAME, [])]
    matches = runs[next((flags for flags in (has_id, has_name) if any(flags)), starts_with_name)]
    if len(matches) != 1:
        sweeps = sorted(set(runs[schema.SWEEP].dropna())) if schema.SWEEP in runs else []
        if name in sweeps:
            raise LookupError(f"run={name}: must be a run, but is a sweep; use an id from `linflab runs`")
        ambiguity = f"is the name of {len(matches)} runs" if any(has_name) else "matches the ids of several runs"
        problem = ambiguity if len(matches) else "run or sweep not found"
        raise LookupError(
            f"run={name}: {problem}; use an id from `linflab runs`{', or a sweep: ' if sweeps else ''}"
            f"{', '.join(sweeps)}"
        )
    return matches


def _with_columns(runs: pd.DataFrame) -> pd.DataFrame:
    columns = [
        "run_id", "status", "start_time", "dataset", "eps", "method", SEED, INCLUDE_VALIDATION, schema.METHOD,
        schema.COMMAND, schema.SWEEP, schema.TRIAL, schema.HARDWARE, schema.CERTIFIER, schema.ATTACK, schema.EPOCHS,
        schema.FLOPS,
        schema.BEST_VALIDATION_CERTIFIED, schema.TEST_CLEAN, schema.TEST_ROBUST, schema.TEST_CERTIFIED,
        schema.TEST_CERTIFIED_REAL, schema.TEST_VERIFIED, schema.TEST_VERIFICATION, schema.TEST_VIOLATIONS,
        schema.TRAIN_SECONDS, schema.SELECTION, schema.MEMBERS, SOUND,
    ]  # fmt: skip
    complete = runs.reindex(columns=[*runs.columns, *(name for name in columns if name not in runs)])
    return complete if SEEDS in complete else add_member_columns(complete, SEED, UNCOMPARED_SETTINGS)


def _footnote_marks() -> Iterator[str]:
    """Yield a, b, ..., z, aa, ab, ..."""
    for length in count(1):
        yield from ("".join(letters) for letters in product(ascii_lowercase, repeat=length))


def _is_in_group(dataset: str, eps: float, group: Group) -> bool:
    return dataset == group.dataset and abs(eps - group.eps) < 1e-9


def _filter_group(runs: pd.DataFrame, group: Group) -> pd.DataFrame:
    has_eps = (pd.to_numeric(runs["eps"], errors="coerce") - group.eps).abs() < 1e-9
    return runs[(runs["dataset"] == group.dataset) & has_eps]


def _assign_group(row: Row, group: Group) -> Row:
    """Return a quoted row with its group, and its source as basis: attacks and machines differ between sources."""
    return dataclasses.replace(row, group=group.title, basis=dict.fromkeys((ROBUST, EPOCH_SECONDS), row.source))


def _exclusion_note(runs: pd.DataFrame) -> str:
    states = runs["status"].map(describe_status).value_counts()
    parts = [f"{count} {state}" for state, count in states.items() if state != "finished"]
    num_without_results = int(((runs["status"] == "FINISHED") & runs[schema.TEST_CERTIFIED].isna()).sum())
    return ", ".join(parts + ([f"{num_without_results} without test results"] if num_without_results else []))


def _select_best_settings(scored_runs: pd.DataFrame, measured: MeasuredRows) -> Iterator[tuple[pd.DataFrame, str]]:
    """Yield the runs of each row, and a note on their selection, which never uses test results."""
    if scored_runs.empty:
        return
    compared_columns = [MEMBER_SETTINGS]
    compared_columns += [
        name for name in param_columns(scored_runs) if name not in UNCOMPARED_SETTINGS and labels.affects_results(name)
    ]
    settings = scored_runs[compared_columns].fillna("").astype(str)
    for path in settings.columns.intersection(list(ADDED_TEXTS)):  # earlier versions did not log these settings
        settings[path] = settings[path].replace("", ADDED_TEXTS[path])
    compared = merge_member_settings(settings)
    scored_runs = scored_runs.assign(
        configuration=compared.groupby(compared_columns, sort=False).ngroup(),
        training=group_by_training(compared),
    )
    scored_runs = scored_runs.drop_duplicates(
        ["configuration", SEEDS, INCLUDE_VALIDATION]
    )  # keeps the latest of runs with equal settings and seed
    rows = settings.reindex(columns=list(measured.group_by)).fillna("").loc[scored_runs.index]
    kinds = settings.reindex(columns=list(KINDS)).fillna("").loc[scored_runs.index]
    # Objectives with the same name in papers, such as both hinge losses of l_inf-dist nets, compete for one row.
    method = kinds.apply(method_name, axis=1)
    networks = [kinds[path] for path in NETWORK_KINDS if path not in measured.group_by]
    row_groups = scored_runs.groupby([*(rows[path] for path in measured.group_by), method, *networks], sort=False)
    for _, candidates in sorted(row_groups, key=lambda pair: [_sortable(str(value)) for value in pair[0]]):
        is_retrained = candidates[INCLUDE_VALIDATION] == "True"
        competing = candidates[~is_retrained & candidates[schema.BEST_VALIDATION_CERTIFIED].notna()]
        if competing.empty:
            latest = candidates[candidates["configuration"] == candidates["configuration"].iloc[0]]
            yield latest, LATEST
            continue
        configurations = competing.groupby("configuration", sort=False).agg(
            size=("start_time", "size"),
            mean=(schema.BEST_VALIDATION_CERTIFIED, "mean"),
            seconds=(schema.TRAIN_SECONDS, "mean"),
            training=("training", "first"),
            is_sound=(SOUND, lambda texts: texts.iloc[0] == "True"),
        )
        is_eligible = configurations["size"] >= min(measured.min_seeds, configurations["size"].max())
        is_final = configurations.index.isin(candidates["configuration"][is_retrained])
        is_replaced = _replaced_by_sound(configurations, is_eligible, is_final)
        configurations, eligible = configurations[~is_replaced], configurations[~is_replaced & is_eligible]
        tied = eligible[eligible["mean"] > eligible["mean"].max() - TIE_TOLERANCE]
        best = tied["seconds"].fillna(math.inf).idxmin()
        accuracy = f"{100 * eligible['mean'][best]:.2f}"
        selection = f"Best of {len(configurations)} on validation ({accuracy}%)"
        if len(configurations) == 1:
            selection = f"Only configuration ({accuracy}% on validation)"
        elif len(eligible) < len(configurations):
            seeds_note = f"with at least {eligible['size'].min()} seeds"
            selection = f"Best of {len(eligible)} of {len(configurations)} {seeds_note} on validation ({accuracy}%)"
        certifiers = competing[schema.CERTIFIER][competing["configuration"].isin(eligible.index)].dropna()
        if certifiers.str.removesuffix(schema.SOUND).nunique() > 1:
            selection += ", by different certifiers"
        retrained = candidates[is_retrained & (candidates["configuration"] == best)]
        if len(retrained):
            yield retrained, f"{selection}, retrained with validation images"
        else:
            yield competing[competing["configuration"] == best], selection


def _replaced_by_sound(configurations: pd.DataFrame, is_eligible: pd.Series, is_final: np.ndarray) -> pd.Series:
    """Return which configurations in real arithmetic a sound one of the same training replaces.

    Real arithmetic never certifies fewer images, so it would always be selected. The sound configuration must be
    eligible, and trained on validation images too if the other one is.

    Args:
        configurations: Configurations, with the columns `training` and `is_sound`.
        is_eligible: Whether each has enough seeds.
        is_final: Whether each was also trained on validation images.
    """
    replaces = is_eligible & configurations["is_sound"]
    has_replacement = [
        bool(((configurations["training"] == training) & replaces & (is_final | ~final)).any())
        for training, final in zip(configurations["training"], is_final, strict=True)
    ]
    return pd.Series(has_replacement, index=configurations.index) & ~configurations["is_sound"]


def _sortable(value: str) -> tuple[bool, float, str]:
    """Return a sort key: numbers by value, then words."""
    try:
        return False, float(value), ""
    except ValueError:
        return True, 0.0, value


def _measured_rows(
    selected: Sequence[tuple[pd.DataFrame, str]], group: Group, group_by: Sequence[str], letters: Iterator[str]
) -> list[Row]:
    """Return the rows of a group, with distinguishing labels; `selected` holds runs and selection notes."""
    runs_by_row = [sort_by_seed(runs) for runs, _ in selected]
    grouped = [
        {
            path: runs.iloc[0][path]
            for path in group_by
            if path != "method" and path in runs and runs.iloc[0][path] == runs.iloc[0][path]
        }
        for runs in runs_by_row
    ]
    names, settings = [], []
    for runs, row_settings in zip(runs_by_row, grouped, strict=True):
        first = runs.iloc[0]
        method = describe_method({str(path): value for path, value in first.items()}, first["method"]) or MISSING
        names.append(method + (f" ({describe_settings(row_settings, grouped)})" if row_settings else ""))
        seeds = ", ".join(runs[SEEDS])
        shared_settings = {
            path: first[path] for path in param_columns(runs) if path not in (SEED, INCLUDE_VALIDATION, *group_by)
        }
        settings.append(
            {
                **shared_settings,
                SEED: seeds,
                INCLUDE_VALIDATION: first[INCLUDE_VALIDATION],
                "run": ", ".join(str(run_id)[:8] for run_id in runs["run_id"]),
            }
        )
    row_labels = labels.distinguish(names, settings)
    return [
        _measured_row(runs, group, label, selection, next(letters))
        for runs, label, (_, selection) in zip(runs_by_row, row_labels, selected, strict=True)
    ]


def _measured_row(runs: pd.DataFrame, group: Group, method: str, selection: str, mark: str) -> Row:
    first = runs.iloc[0]
    network = {
        path: first[path] for path in runs.columns if path.startswith("model.") and path.split(".")[-1] in SIZE_SETTINGS
    }
    network = {path: value for path, value in network.items() if value == value}
    epochs = pd.to_numeric(runs[schema.EPOCHS], errors="coerce")
    seconds = runs[schema.TRAIN_SECONDS]
    descriptions = runs[schema.TEST_VERIFICATION].dropna()
    verified = runs[schema.TEST_VERIFIED].where(runs[schema.TEST_VERIFICATION].notna())
    bases = verification_bases(descriptions)
    cells = {
        METHOD: text_cell(method),
        MODEL: text_cell(describe_settings(network)),
        EPOCHS: _count(epochs.iloc[0]),
        FLOPS: flops_cell(first[schema.FLOPS]),
        VALIDATION: _mean(100 * runs[schema.BEST_VALIDATION_CERTIFIED]),
        TEST: _mean(100 * runs[schema.TEST_CLEAN]),
        ROBUST: _mean(100 * runs[schema.TEST_ROBUST]),
        CERTIFIED: _mean(100 * runs[schema.TEST_CERTIFIED]),
        TEST_VERIFIED: _mean(100 * verified) if len(bases) == 1 else Cell(),
        EPOCH_SECONDS: _mean(seconds / epochs, digits=1),
        HOURS: _mean(seconds / 3600, digits=_digits(seconds.mean() / 3600)),
        CPUS: _cpus(runs),
        RUNS: _count(len(runs)),
    }
    for column, name in ACCURACIES.items():
        cells[INTERVALS[column]] = _interval(100 * runs[name])
    seeds = ", ".join(runs[SEEDS])
    has_several_runs = len(runs) > 1
    parts = [f"Seed{'s' * has_several_runs} {seeds}", selection]
    if first.get("objective.bound") == "hybrid_zonotope":
        parts.append("Bounds tighter than DiffAI's, which lose correlations at linear layers")
    parts += [f"Certifier {describe_certifiers(runs, details=False)}", f"Attacks: {describe_attacks(runs)}"]
    if len(descriptions):
        parts.append(f"Verified: {'; '.join(dict.fromkeys(descriptions))}")
    if len(bases) > 1:
        parts.append("No mean of verified accuracies, whose images, certifiers, arithmetic or time limits differ")
    mean_seconds = seconds.mean()
    cost = "" if mean_seconds != mean_seconds else f", {format_duration(mean_seconds)}{' each' * has_several_runs}"
    workers = set(map(describe_workers, (run for _, run in runs.iterrows())))
    workers_note = f" on {workers.pop()}" if len(workers) == 1 and _cpus(runs).value is not None else ""
    num_epochs = _count(epochs.iloc[0]).text
    parts.append(f"{num_epochs} epoch{'s' * (num_epochs != '1')}{cost}{workers_note}; {describe_hardware(runs)}")
    for name, values in (
        (schema.TEST_CLEAN, runs[schema.TEST_CLEAN]),
        (schema.TEST_ROBUST, runs[schema.TEST_ROBUST]),
        (schema.TEST_VERIFIED, verified),
    ):
        if 0 < values.notna().sum() < len(runs):
            parts.append(f"{name} from {values.notna().sum()} of {len(runs)} runs")
    num_violations = runs[schema.TEST_VIOLATIONS].sum()
    if num_violations > 0:
        parts.append(f"Certificate violations: {int(num_violations)}")
    if share_members(runs):
        parts.append("Runs share members, so they vary less than independent ones")
    commands = (command for _, run in runs.iterrows() for command in repeat_commands(run))
    reproduce_commands = tuple(dict.fromkeys(commands))  # a shared member is trained once
    note = f"{'. '.join(parts)}."
    basis = {ROBUST: describe_attacks(runs), CERTIFIED: "sound" if is_sound(runs) else "exact"}
    basis[TEST_VERIFIED] = "; ".join(bases)
    basis[EPOCH_SECONDS] = f"{workers_note}; {describe_hardware(runs)}"
    return Row(
        cells,
        group.title,
        "measured",
        mark,
        note,
        reproduce_commands=reproduce_commands,
        runs=tuple(runs["run_id"]),
        basis=basis,
    )


def _are_alike(rows: Sequence[Row], column: str) -> bool:
    """Return whether the numbers of a column have the same basis within every group."""
    bases_by_group: dict[str, set[str]] = {}
    for row in rows:
        if column in row.basis and row.cell(column).value is not None:
            bases_by_group.setdefault(row.group, set()).add(row.basis[column])
    return all(len(bases) == 1 for bases in bases_by_group.values())


def _cpus(runs: pd.DataFrame) -> Cell:
    """Return the number of CPUs per run; a dash if it is unknown or differs between runs."""
    parts = runs.reindex(columns=list(CPU_SETTINGS)).apply(pd.to_numeric, errors="coerce")
    counts = parts.prod(axis=1, skipna=False).unique()
    return _count(counts[0]) if len(counts) == 1 else Cell()


def _count(value: float) -> Cell:
    return Cell() if value != value else Cell(str(int(value)), int(value))


def _digits(value: float) -> int:
    """Return the number of decimals, at least two, that shows two digits of a small number."""
    return 2 if not 0 < value < 0.095 else min(9, 1 - math.floor(math.log10(value)))


def _mean(values: pd.Series, digits: int = 2) -> Cell:
    return number_cell(values.mean(), values.std(), digits)  # the std of a single value is NaN, so it is not shown


def _interval(values: pd.Series) -> Cell:
    half_width = confidence_half_width(values.astype(float).tolist())
    return Cell() if half_width is None else Cell(f"± {half_width:.2f}", half_width)


def make_table(title: str, columns: Sequence[str], rows: Sequence[Row], notes: Sequence[str]) -> Table:
    """Return a table of measured and quoted rows, with the best ones emphasized and notes on all columns.

    Args:
        title: Title of the table.
        columns: Columns of the table.
        rows: Rows, in order.
        notes: Further notes.
    """
    table_notes = []
    if set(columns) & {VALIDATION, TEST, ROBUST, CERTIFIED, TEST_VERIFIED}:
        table_notes.append("Accuracies in percent.")
    kinds = {row.origin for row in rows}
    if "measured" in kinds:
        quoted = "; the others are quoted" * (len(kinds) > 1)
        table_notes.append(f"Rows with a letter: measured with linflab, mean ± std over seeds{quoted}.")
    compared_columns = [column for column in columns if column in HIGHER_IS_BETTER]
    if compared_columns:
        kinds_note = "; underlined: best of its measured or quoted rows" if len(kinds) > 1 else ""
        differing_columns = [
            column
            for column in (ROBUST, CERTIFIED, EPOCH_SECONDS)
            if column in compared_columns and not _are_alike(rows, column)
        ]
        exception = f"; no mark in {', '.join(differing_columns)} where conditions differ" if differing_columns else ""
        table_notes.append(f"Bold: best of its group{kinds_note}{exception}.")
    if set(columns) & set(INTERVALS.values()) and "measured" in kinds:
        single = " Rows of one seed have none." if any(len(row.runs) == 1 for row in rows) else ""
        table_notes.append(
            f"CI: half-width of the {100 * CONFIDENCE:g}% confidence interval of the mean, by Student's t over seeds. "
            f"It covers the variation between seeds, not between test images.{single}"
        )
    if HOURS in columns and "measured" in kinds:
        table_notes.append("Hours: training and evaluation on validation images, without evaluation on test images.")
    if EPOCH_SECONDS in columns and "measured" in kinds:
        table_notes.append("Time/epoch of measured rows includes evaluation on validation images, if any.")
    if TEST_VERIFIED in columns:
        table_notes.append(
            "Verified: certified by complete or cascade on the images in the note of the row, for each run the latest "
            "such evaluation on the most images; Certified is always on the whole test set."
        )
    measured = [row for row in rows if row.origin == "measured"]
    if TEST_VERIFIED in columns and not _are_alike(measured, TEST_VERIFIED):
        table_notes.append(
            "Verified: images, certifiers, arithmetic or time limits differ between measured rows; see their notes."
        )
    if ROBUST in columns and not _are_alike(measured, ROBUST):
        table_notes.append("Robust: attacks differ between measured rows; see their notes.")
    if CERTIFIED in columns and not _are_alike(measured, CERTIFIED):
        table_notes.append("Certified: only some measured rows include float32 rounding; see their notes.")
    if any(row.selected_on == "test" for row in rows):
        table_notes.append(
            f"{TEST_MARK}: settings, runs or epochs were selected on test images, which favors these rows."
        )
    for name in dict.fromkeys(row.source for row in rows if row.source):
        table_notes.append(f"Quoted: {sources()[name].citation()}.")
    return Table(title, tuple(columns), highlight_best(rows, compared_columns), (*table_notes, *notes))
