"""Comparison tables: rows quoted from papers, and rows measured here, side by side.

A table is defined by YAML (`papers/`, or a file of one's own):

    title: Our nets
    columns: [Method, FLOPs, Test, Robust, Certified]
    groups: [{dataset: fashion_mnist, eps: 0.1}]
    quoted: [zhang2021_table1]          # names of sources in literature.yaml
    measured: {seeds: 3, by: [method, model.width], where: {training.epochs: 25}}
    records: ours.jsonl                 # of `linflab records export`; else those of the storage
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import count, product
from pathlib import Path
from string import ascii_lowercase
from typing import Annotated, Literal, Self

import pandas as pd
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from linflab.reports import schema
from linflab.reports.literature import dataset_title, parse_eps, quotations, sources
from linflab.reports.papers import table_names
from linflab.reports.records import parameters
from linflab.reports.sweep_tables import ORDERS, in_order, objectives_of
from linflab.reports.tables import (
    CERTIFIED,
    CPUS,
    EPOCH_SECONDS,
    EPOCHS,
    FLOPS,
    HOURS,
    METHOD,
    MODEL,
    MORE_IS_BETTER,
    ROBUST,
    RUNS,
    TEST,
    VALIDATION,
    Cell,
    Row,
    Table,
    emphasized,
    eps_text,
    flops,
    number,
    text,
)
from linflab.reports.wording import attacks, certifiers, commit, describe_settings, machines, workers

ROUNDING = 1e-9  # of means over seeds: far below a share of any number of images
SEED, FINAL = "seed", "training.include_validation"
NOT_COMPARED = (SEED, FINAL, "training.checkpoint_epochs", "evaluation.batch_size")  # as is compute
SIZES = ("depth", "width", "dense_width", "hidden", "q")  # settings of a network that tell its size
Column = Literal[
    "Method", "Model", "Epochs", "FLOPs", "Val. certified", "Test", "Robust", "Certified", "Hours", "CPUs", "Runs",
    "Per-epoch Time (seconds)",
]  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Group(_Strict):
    """Rows of one data set and eps."""

    dataset: str
    eps: Annotated[float, BeforeValidator(parse_eps)]

    @property
    def title(self) -> str:
        return f"{dataset_title(self.dataset)} (eps = {eps_text(self.eps)})"


class Measured(_Strict):
    """Which rows are made of the record: one for each method, or whatever `by` names, chosen on validation.

    Attributes:
        by: settings, by dotted path; runs that agree in them compete for one row.
        where: only runs with these settings.
        seeds: settings with fewer seeds don't compete, where some have so many; where none has, those with most do.
    """

    by: tuple[str, ...] = ("method",)
    where: dict[str, str | bool | int | float | None] = {}
    seeds: int = Field(default=3, ge=1)

    @field_validator("by")
    @classmethod
    def _by_what_tells_methods_apart(cls, by: tuple[str, ...]) -> tuple[str, ...]:
        if not by or len(set(by)) < len(by):
            raise ValueError(f"by={list(by)}: must be settings, at least one, each once, as in [method, model.width]")
        for path in by:
            if path in NOT_COMPARED or path.startswith("compute."):
                raise ValueError(f"by={path}: runs that differ in it alone are of one row")
        return by


class TableDefinition(_Strict):
    """What a comparison table has; see the head of this file."""

    title: str
    columns: tuple[Column, ...] = Field(default=("Method", "FLOPs", "Test", "Robust", "Certified"), min_length=1)
    groups: tuple[Group, ...] = Field(min_length=1)
    quoted: tuple[str, ...] = ()
    measured: Measured | None = Measured()
    records: Path | None = Field(None, description="a file of records, whose runs measured rows are of")

    @model_validator(mode="after")
    def _sources_are_known(self) -> Self:
        for name in self.quoted:
            if name not in sources():
                raise ValueError(f"quoted={name}: there is no such source; there are: {', '.join(sources())}")
        return self


def load_definition(name: str) -> TableDefinition:
    """A shipped table by its name, or one of the user's by the path of its YAML file.

    The file of records that it names is looked for beside it.

    Raises:
        ValueError: there is no such table, or it can't be understood; says where.
    """
    if name in table_names():
        file = Path(str(resources.files("linflab.reports.papers"))) / f"{name}.yaml"
        content = file.read_text()
    else:
        file = Path(name)
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise ValueError(
                f"table={name}: is neither a file nor one of the shipped tables, {', '.join(table_names())}"
            ) from None
    try:
        tree = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates that are none
        raise ValueError(f"table={name}: is no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise ValueError(f"table={name}: must have title and groups, as in {{title: ..., groups: [...]}}")
    try:
        definition = TableDefinition.model_validate(tree)
    except ValidationError as error:
        complaint = error.errors()[0]
        if complaint["type"] == "value_error":
            raise ValueError(f"table={name}: {complaint['ctx']['error']}") from None
        place = ".".join(str(part) for part in complaint["loc"])
        message = complaint["msg"][0].lower() + complaint["msg"][1:]
        given = "" if complaint["type"] == "missing" else f"={complaint['input']}"
        raise ValueError(f"table={name}: {place}{given}: {message}") from None
    if definition.records is None:
        return definition
    return definition.model_copy(update={"records": file.parent / definition.records.expanduser()})


def comparison_table(definition: TableDefinition, runs: pd.DataFrame) -> Table:
    """The table of a definition; `runs` is what `read_runs` returns of trials, and may be empty."""
    runs = _with_columns(runs)
    rows: list[Row] = []
    notes: list[str] = []
    attacked: set[str] = set()
    letters = _letters()
    for group in definition.groups:
        for quotation in quotations():
            if quotation.row.source in definition.quoted and _same(quotation.dataset, quotation.eps, group):
                rows.append(_in_group(quotation.row, group))
        if definition.measured is None:
            continue
        there = _of_group(runs, group)
        for path in [*definition.measured.where, *definition.measured.by]:
            if len(there) and path not in there:
                notes.append(f"No run of {group.title} has a setting {path}.")
        for path, value in definition.measured.where.items():
            found = there[path] if path in there else pd.Series(None, index=there.index, dtype=object)
            there = there[pd.Series([_equal(one, value) for one in found], index=there.index, dtype=bool)]
        scored = there[(there["status"] == "FINISHED") & there[schema.TEST_CERTIFIED].notna()]
        mine = list(_chosen(scored, definition.measured))
        rows += [_measured_row(chosen, group, definition.measured.by, how, next(letters)) for chosen, how in mine]
        attacked |= {attacks(chosen) for chosen, _ in mine}
        if not mine:
            notes.append(f"Of {group.title}, no run with test scores is on record.")
        if left_out := _left_out(there):
            notes.append(f"Of {group.title}, left out: {left_out}.")
    if ROBUST in definition.columns and len(attacked) > 1:
        notes.append("Robust: not all measured rows were attacked alike; their notes say how each was.")
    if definition.records is not None:
        notes.append(f"Measured rows are of the records in {definition.records.name}.")
    return _table(definition.title, definition.columns, rows, notes)


def table_of(runs: pd.DataFrame, names: Sequence[str], quoted: bool, title: str = "") -> Table:
    """One row for each run, by its id or the beginning of it, and for each sweep, by its name: its best, all seeds.

    Args:
        runs: what `read_runs` returns of trials.
        quoted: beside them, what papers report of the same data sets and eps.
        title: left out: that it compares the names.

    Raises:
        LookupError: there is no such run or sweep, or it has no test scores.
    """
    runs = _with_columns(runs)
    found = [(name, *_named(runs, name)) for name in names]
    groups: dict[Group, list[tuple[pd.DataFrame, str]]] = {}
    for _, chosen, how in found:
        first = chosen.iloc[0]
        groups.setdefault(Group(dataset=first["dataset"], eps=first["eps"]), []).append((chosen, how))
    letters = _letters()
    rows: list[Row] = []
    for group, mine in groups.items():
        if quoted:
            same = [quote.row for quote in quotations() if _same(quote.dataset, quote.eps, group)]
            rows += [_in_group(row, group) for row in same if CERTIFIED in row.cells]
        rows += [_measured_row(chosen, group, ("method",), how, next(letters)) for chosen, how in mine]
    columns = (METHOD, FLOPS, VALIDATION, TEST, ROBUST, CERTIFIED)
    return _table(title or f"Comparison of {', '.join(names)}", columns, rows, [])


def _named(runs: pd.DataFrame, name: str) -> tuple[pd.DataFrame, str]:
    """The runs that a row is made of, and how it was chosen: of a sweep, else of a run."""
    trials = runs[runs[schema.SWEEP] == name]
    if len(trials):
        trials = in_order(trials)
        best = trials.iloc[0]
        number = str(best[schema.TRIAL])
        seeds = trials[[str(trial).split("-seed")[0] == number for trial in trials[schema.TRIAL]]]
        seeds = seeds[seeds[schema.TEST_CERTIFIED].notna()]
        if len(seeds):
            of = ORDERS[objectives_of(trials)[0]]
            return seeds, f"the best of sweep {name} by {of}, its trial {number}"
        raise LookupError(f"{name}: no trial of this sweep has test scores yet")
    mine = run_of(runs, name)
    if mine[schema.TEST_CERTIFIED].isna().all():
        raise LookupError(f"{name}: this run has no test scores ({mine['status'].iloc[0].lower()})")
    return mine, f"run {mine['run_id'].iloc[0]}, as asked for"


def run_of(runs: pd.DataFrame, name: str) -> pd.DataFrame:
    """The run of this id, or whose id alone begins so, as one row; of an imported run, the id that it had will do.

    Raises:
        LookupError: there is none, or there are several.
    """
    known = runs.reindex(columns=["run_id", schema.IMPORTED]).itertuples(index=False)
    begin = [any(isinstance(one, str) and one.startswith(name) for one in ids) for ids in known]
    exact = [run_id == name for run_id in runs.get("run_id", [])]
    mine = runs[exact if any(exact) else begin]
    if len(mine) != 1:
        sweeps = ", ".join(sorted(set(runs[schema.SWEEP].dropna()))) if schema.SWEEP in runs else ""
        many = "are several runs whose ids begin so" if len(mine) else "is no such run or sweep"
        raise LookupError(f"{name}: there {many}; `linflab runs` lists the runs; sweeps: {sweeps or 'none yet'}")
    return mine


def _with_columns(runs: pd.DataFrame) -> pd.DataFrame:
    columns = [
        "run_id", "status", "started", "dataset", "eps", "method", SEED, FINAL, schema.METHOD, schema.COMMAND,
        schema.SWEEP, schema.TRIAL, schema.HARDWARE, schema.CERTIFIER, schema.ATTACK, schema.EPOCHS, schema.FLOPS,
        schema.BEST_VALIDATION_CERTIFIED, schema.TEST_CLEAN, schema.TEST_ROBUST, schema.TEST_CERTIFIED,
        schema.TEST_CERTIFIED_EXACT, schema.TEST_BROKEN, schema.TRAIN_SECONDS, schema.SELECTION,
    ]  # fmt: skip
    return runs.reindex(columns=[*runs.columns, *(name for name in columns if name not in runs)])


def _letters() -> Iterator[str]:
    """a, b, ..., z, aa, ab and so on."""
    for length in count(1):
        yield from ("".join(letters) for letters in product(ascii_lowercase, repeat=length))


def _same(dataset: str, eps: float, group: Group) -> bool:
    return dataset == group.dataset and abs(eps - group.eps) < 1e-9


def _of_group(runs: pd.DataFrame, group: Group) -> pd.DataFrame:
    near = (pd.to_numeric(runs["eps"], errors="coerce") - group.eps).abs() < 1e-9
    return runs[(runs["dataset"] == group.dataset) & near]


def _in_group(row: Row, group: Group) -> Row:
    return dataclasses.replace(row, group=group.title)


def _equal(found: object, wanted: object) -> bool:
    """Whether a parameter, which is text, is the value."""
    if isinstance(wanted, int | float) and not isinstance(wanted, bool):
        try:
            return float(str(found)) == wanted
        except ValueError:
            return False
    return str(found) == str(wanted)


def _left_out(runs: pd.DataFrame) -> str:
    states = runs["status"].astype(str).str.lower().value_counts()
    parts = [f"{count} runs that {'are' if state == 'running' else 'were' if state == 'killed' else 'have'} {state}"
             for state, count in states.items() if state != "finished"]  # fmt: skip
    unscored = int(((runs["status"] == "FINISHED") & runs[schema.TEST_CERTIFIED].isna()).sum())
    return ", ".join(parts + ([f"{unscored} that were not scored on the test set"] if unscored else []))


def _chosen(scored: pd.DataFrame, measured: Measured) -> Iterator[tuple[pd.DataFrame, str]]:
    """For each row the runs that it is made of, and how they were chosen: never by the test set."""
    if scored.empty:
        return
    same = [name for name in parameters(scored) if name not in NOT_COMPARED and not name.startswith("compute.")]
    settings = scored[same].fillna("").astype(str)
    scored = scored.assign(configuration=settings.groupby(same, sort=False).ngroup())
    scored = scored.drop_duplicates(["configuration", SEED, FINAL])  # the same run again: the latest stands
    rows = settings.reindex(columns=list(measured.by)).fillna("").loc[scored.index]
    found = scored.groupby([rows[path] for path in measured.by], sort=False)
    for _, candidates in sorted(found, key=lambda pair: [_sortable(str(value)) for value in pair[0]]):
        final = candidates[FINAL] == "True"
        competing = candidates[~final & candidates[schema.BEST_VALIDATION_CERTIFIED].notna()]
        if competing.empty:
            chosen = candidates[candidates["configuration"] == candidates["configuration"].iloc[0]]
            yield chosen, "not chosen by validation, which none of its runs has: the latest settings on record"
            continue
        by = competing.groupby("configuration", sort=False).agg(
            size=("started", "size"),
            mean=(schema.BEST_VALIDATION_CERTIFIED, "mean"),
            seconds=(schema.TRAIN_SECONDS, "mean"),
        )
        enough = by[by["size"] >= min(measured.seeds, by["size"].max())]
        equal = enough[enough["mean"] > enough["mean"].max() - ROUNDING]
        best = equal["seconds"].fillna(math.inf).idxmin()
        reached = f"{100 * enough['mean'][best]:.2f}"
        how = f"settings chosen by certified accuracy on validation ({reached}) among {len(enough)}"
        if len(by) == 1:
            how = f"the only settings on record (certified on validation: {reached})"
        elif len(enough) < len(by):
            how += f" of {len(by)} on record, those with at least {enough['size'].min()} seeds"
        else:
            how += " on record"
        if len(equal) > 1:
            how += f" ({len(equal)} came to it; the quickest of them to train was taken)"
        again = candidates[final & (candidates["configuration"] == best)]
        if len(again):
            yield again, f"{how}, then trained on training and validation images, the last epoch kept"
        else:
            yield competing[competing["configuration"] == best], how


def _sortable(value: str) -> tuple[bool, float, str]:
    """Numbers by size, before words."""
    try:
        return False, float(value), ""
    except ValueError:
        return True, 0.0, value


def _measured_row(runs: pd.DataFrame, group: Group, by: Sequence[str], how: str, mark: str) -> Row:
    runs = runs.iloc[pd.to_numeric(runs[SEED], errors="coerce").argsort(kind="stable")]
    first = runs.iloc[0]
    of = {path: first[path] for path in by if path != "method" and path in first and first[path] == first[path]}
    method = str(first["method"]) + (f" ({describe_settings(of)})" if of else "")
    network = {path: first[path] for path in runs.columns if path.startswith("model.") and path.split(".")[-1] in SIZES}
    network = {path: value for path, value in network.items() if value == value}
    epochs = pd.to_numeric(runs[schema.EPOCHS], errors="coerce")
    seconds = runs[schema.TRAIN_SECONDS]
    cells = {
        METHOD: text(method),
        MODEL: text(describe_settings(network)),
        EPOCHS: _count(epochs.iloc[0]),
        FLOPS: flops(first[schema.FLOPS]),
        VALIDATION: _mean(100 * runs[schema.BEST_VALIDATION_CERTIFIED]),
        TEST: _mean(100 * runs[schema.TEST_CLEAN]),
        ROBUST: _mean(100 * runs[schema.TEST_ROBUST]),
        CERTIFIED: _mean(100 * runs[schema.TEST_CERTIFIED]),
        EPOCH_SECONDS: _mean(seconds / epochs, digits=1),
        HOURS: _mean(seconds / 3600),
        CPUS: _cpus(runs),
        RUNS: _count(len(runs)),
    }
    seeds = ", ".join(str(seed) for seed in runs[SEED])
    several = len(runs) > 1
    parts = [f"{len(runs)} runs (seeds {seeds}), mean ± standard deviation" if several else f"1 run (seed {seeds})"]
    if "objective.kind" in first and first["objective.kind"] == first["objective.kind"]:
        parts.append(f"objective {first['objective.kind']}")
    parts += [how, f"certifier {certifiers(runs)}", f"robust under {attacks(runs)}"]
    spent = seconds.mean()
    cost = "" if spent != spent else f", {spent / 3600:.2f} hours{' each' * several}"
    each = f" on {workers(first)}" if first.get("compute.workers") == first.get("compute.workers") else ""
    trained = _count(epochs.iloc[0]).text
    parts.append(f"{trained} epoch{'s' * (trained != '1')}{each}{cost}, on {machines(runs)}")
    for name in (schema.TEST_CLEAN, schema.TEST_ROBUST):
        if 0 < runs[name].notna().sum() < len(runs):
            parts.append(f"{name} is of {runs[name].notna().sum()} of them")
    broken = runs[schema.TEST_BROKEN].sum()
    if broken > 0:
        parts.append(f"attacks broke {int(broken)} samples that had been certified")
    again = tuple((str(run[schema.COMMAND]), commit(run)) for _, run in runs.iterrows() if run.notna()[schema.COMMAND])
    note = f"measured: {'; '.join(parts)}."
    return Row(cells, group.title, "measured", mark, note, again=again, runs=tuple(runs["run_id"]))


def _cpus(runs: pd.DataFrame) -> Cell:
    """How many CPUs a training had; a dash where that is not in the record, or not the same of all."""
    parts = runs.reindex(columns=["compute.workers", "compute.cpus_per_worker"]).apply(pd.to_numeric, errors="coerce")
    counts = parts.prod(axis=1, skipna=False).unique()
    return _count(counts[0]) if len(counts) == 1 else Cell()


def _count(value: float) -> Cell:
    return Cell() if value != value else Cell(str(int(value)), int(value))


def _mean(values: pd.Series, digits: int = 2) -> Cell:
    return number(values.mean(), values.std(), digits)  # of one value, no deviation


def _table(title: str, columns: Sequence[str], rows: Sequence[Row], notes: Sequence[str]) -> Table:
    said = []
    if set(columns) & {VALIDATION, TEST, ROBUST, CERTIFIED}:
        said.append("Accuracies in percent.")
    kinds = {row.kind for row in rows}
    if "measured" in kinds:
        said.append(f"Rows with a letter were measured with linflab{'; the others are quoted' * (len(kinds) > 1)}.")
    compared = [column for column in columns if column in MORE_IS_BETTER]
    if compared:
        both = "; underlined: the best of its kind, measured or quoted" if len(kinds) > 1 else ""
        said.append(f"Bold: the best of its group{both}.")
    if HOURS in columns and "measured" in kinds:
        said.append(
            "Hours of a training, scoring on validation images (where there is any) included, on test images not."
        )
    if EPOCH_SECONDS in columns and "measured" in kinds:
        said.append("Seconds of an epoch that was measured include its scoring on validation images, where it has any.")
    for name in dict.fromkeys(row.source for row in rows if row.source):
        said.append(f"Quoted: {sources()[name].describe()}.")
    return Table(title, tuple(columns), emphasized(rows, compared), (*said, *notes))
