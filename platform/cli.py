"""The command `linflab`.

Exit status: 0 done, 1 training went wrong, 2 wrong input and nothing was started, 130 interrupted.
"""

import dataclasses
import json
import math
import os
import re
import shlex
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from linflab.platform.errors import Interrupted, SettingError, TrainingError
from linflab.platform.ports import RAY_PORT, RECORD_PORT, answers
from linflab.platform.shipping import check_code
from linflab.platform.storage import Storage
from linflab.reports.papers import table_names, table_title
from linflab.search_spaces.space import SearchSpace, load_space, space_names

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from linflab.platform.config import Experiment
    from linflab.platform.datasets import Dataset
    from linflab.platform.sweep import SweepPlan
    from linflab.reports.pages import Page

# PyTorch, Ray, MLflow and pandas take seconds to import: the commands that use them import them, the slowest ones after
# the input is checked.

app = typer.Typer(
    help="Train, certify and compare image classifiers that withstand l_inf perturbations.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
space_app = typer.Typer(help="Search spaces: what a sweep may vary.", no_args_is_help=True)
app.add_typer(space_app, name="space")
data_app = typer.Typer(help="Data sets: what is there, and fetching more.", no_args_is_help=True)
app.add_typer(data_app, name="data")
report_app = typer.Typer(help="Tables from records.", no_args_is_help=True)
app.add_typer(report_app, name="report")
records_app = typer.Typer(help="Records as a file: out of one storage, into another.", no_args_is_help=True)
app.add_typer(records_app, name="records")
node_app = typer.Typer(help="What cluster files run on the machines of a cluster.", no_args_is_help=True)
app.add_typer(node_app, name="node")

console = Console(highlight=False, soft_wrap=True, markup=False)

Recipe = Annotated[str, typer.Argument(help="a recipe's name, or the path of a YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings to change, such as model.width=128")]
StorageFolder = Annotated[
    Path, typer.Option("--storage", envvar="LINFLAB_STORAGE", help="folder of records, weights and tables")
]
OutFolder = Annotated[
    Path | None, typer.Option("--out", help="folder for the files; by default reports/ of the storage folder")
]
OnCluster = Annotated[
    bool, typer.Option("--cluster", help="on the cluster of ./cluster.yaml, or of the file that LINFLAB_CLUSTER names")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
RUNS = Path("runs")


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    storage: StorageFolder = RUNS,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the latest run of it that was cut")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="estimate hours and memory from a few steps; train and record nothing")
    ] = False,
    cluster: OnCluster = False,
) -> None:
    """Train a recipe, score it on the test set once, and record both."""
    from linflab.platform.config import load_experiment, read_recipe
    from linflab.platform.datasets import load_dataset

    experiment = load_experiment(recipe, overrides or [])
    if cluster:
        if dry_run:
            raise SettingError("dry-run: estimates for this machine; leave --cluster out")
        from linflab.platform.cluster import run_on_cluster
        from linflab.platform.shipping import file_to_send

        sent, files = file_to_send(recipe, lambda: read_recipe(recipe))
        flags = ["--resume"] if resume else []
        run_on_cluster(["train", sent, *(overrides or []), *flags], _job_name(recipe), files, console)
        return
    dataset = load_dataset(experiment.dataset, experiment.augmentation)
    if dry_run and resume:
        raise SettingError("dry-run: estimates a whole training; leave --resume out")
    if dry_run:
        _estimate(experiment, dataset)
        return
    place = Storage.open(storage)

    from linflab.platform.evaluation import scoring_of
    from linflab.platform.progress import TrainingBar
    from linflab.platform.publishing import publish_launch, publish_run
    from linflab.platform.shipping import sent_here
    from linflab.platform.tracking import end_open_runs, run_to_resume
    from linflab.platform.training import check_fits
    from linflab.platform.trial import check_machine, run_trial, selection, train_command
    from linflab.platform.workers import start_ray, train_on_workers, wait_for_machines
    from linflab.reports import schema

    check_fits(experiment, dataset)
    launch = uuid.uuid4().hex
    tags = {
        schema.KIND: "trial",
        schema.LAUNCH: launch,
        schema.RECIPE: recipe,
        schema.COMMAND: train_command(recipe, overrides or []),
    }
    name = Path(recipe).stem if "/" in recipe else recipe
    cut = run_to_resume(place, experiment) if resume else None
    if resume:
        console.print(f"Going on with run {cut}." if cut else "No run of it was cut and left a checkpoint: a new one.")
    if experiment.compute.workers > 1 or sent_here():
        start_ray()
        wait_for_machines(experiment, console.print)
        train_it: Callable[..., dict[str, float]] = train_on_workers
    else:
        check_machine(experiment)
        train_it = run_trial
    try:
        with TrainingBar(console, experiment) as bar:
            metrics = train_it(experiment, place, name, tags, bar.on_epoch, bar.on_step, checkpointed=True, resume=cut)
    except (KeyboardInterrupt, SystemExit, Interrupted) as error:  # Ray Train exits by itself
        what = str(error) if isinstance(error, Interrupted) else "interrupted"
        again = [tags[schema.COMMAND], *map(shlex.quote, _where(place))]
        how = f"`{' '.join([*again, '--resume'])}` goes on from the last checkpoint"
        if run_to_resume(place, experiment) is None:
            how = "there was no checkpoint yet to go on from"
        raise Interrupted(f"{what}; what was logged is kept, and {how}") from None
    finally:
        end_open_runs(place, launch)  # of workers that were killed
    certificate = scoring_of(experiment, _network_without_weights(experiment)[0], attacked=True).certificate
    clean, robust, certified = (
        f"{100 * metrics[name]:.2f}%" for name in (schema.TEST_CLEAN, schema.TEST_ROBUST, schema.TEST_CERTIFIED)
    )
    console.print(
        f"Test: clean {clean}, robust {robust}, certified ({certificate}) {certified} at eps = {experiment.eps:g}, "
        f"by the network after epoch {metrics[schema.BEST_EPOCH]:g}: {selection(experiment)}."
    )
    _publish(lambda: publish_run(place, cut) if cut else publish_launch(place, launch))
    from linflab.reports.records import read_runs

    run = cut or read_runs(place.tracking_uri, {schema.LAUNCH: launch})["run_id"].iloc[0]
    hint = "" if sent_here() else f"; `{shlex.join(['linflab', 'evaluate', run, *_where(place)])}` scores it again"
    console.print(f"Recorded in {place.root} as run {run}{hint}.")
    console.print(f"Browse it: {_ui_command(place)}")


@app.command()
def sweep(
    recipe: Annotated[str | None, typer.Argument(help="a recipe's name, or the path of a YAML file")] = None,
    space: Annotated[str | None, typer.Argument(help="a search space's name, or the path of a YAML file")] = None,
    overrides: Overrides = None,
    name: Annotated[str, typer.Option(help="the sweep's name; by default the space's and the time")] = "",
    budget: Annotated[
        str | None, typer.Option(help="trials, as in 20, or hours in which trials may start, as in 1.5h  [default: 20]")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="tpe, random, grid, nsga2 or cmaes, all of Optuna  [default: tpe]")
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(help="of certified, clean (accuracies on validation) and flops, by commas  [default: certified]"),
    ] = None,
    race: Annotated[
        int | None,
        typer.Option(
            help="3, 9, ...: train all points for that part of the epochs, and the best third, by the first objective, "
            "for longer"
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="train the best point with so many seeds  [default: 1]")] = None,
    resume: Annotated[str, typer.Option(metavar="NAME", help="go on with a sweep that was cut, or do more of it")] = "",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="with --resume: failed trials too")] = False,
    storage: StorageFolder = RUNS,
    cluster: OnCluster = False,
) -> None:
    """Search a space with Ray Tune and Optuna, record every trial, and print the comparison table."""
    from linflab.platform.config import load_experiment
    from linflab.platform.datasets import load_dataset

    asked = {"sampler": sampler, "objectives": objectives.split(",") if objectives else None, "race": race}
    if resume:
        refused = {"recipe": recipe, "space": space, "overrides": overrides, "name": name, **asked}
        for what, value in refused.items():
            if value:
                raise SettingError(f"{what}={value}: is part of the sweep {resume} already; leave it out of --resume")
    else:
        if recipe is None or space is None:
            raise SettingError("sweep: needs a recipe and a search space, or --resume NAME")
        if retry_failed:
            raise SettingError("retry-failed: goes with --resume NAME")
        experiment = load_experiment(recipe, overrides or [])  # before the slow imports
        dataset = None if cluster else load_dataset(experiment.dataset, experiment.augmentation)
        _load_space(space)
    place = Storage.at(storage) if cluster else Storage.open(storage)

    from linflab.platform.sweep import SweepPlan, check_new, plan_sweep, run_sweep, search_config
    from linflab.platform.tracking import STORE_ERRORS

    if not resume:
        assert recipe is not None and space is not None
        settings = {key: value for key, value in {**asked, "seeds": seeds}.items() if value is not None}
        search = search_config(budget or "20", **settings)
        name = name or f"{_job_name(space)}-{time.strftime('%Y%m%d-%H%M%S')}"
        plan = plan_sweep(recipe, overrides or [], space, name, search, dataset)
    if cluster:
        flags = {"budget": budget, "sampler": sampler, "objectives": objectives, "race": race, "seeds": seeds}
        typed = [f"--{flag}={value}" for flag, value in flags.items() if value is not None]
        typed += ["--retry-failed"] if retry_failed else []
        _sweep_on_cluster(None if resume else plan, resume or name, space or "", typed, storage)
        return
    if resume:
        plan = SweepPlan.load(place, resume).extended(budget, seeds)
        load_dataset(plan.base.dataset, plan.base.augmentation)
    else:
        check_new(plan, place)
    again = ["linflab", "sweep", "--resume", plan.name, *_where(place)]
    try:
        lost = run_sweep(plan, place, console, retry_failed)
    except KeyboardInterrupt:
        if not (place.sweeps / plan.name / "sweep.yaml").exists():
            raise Interrupted("interrupted before anything was recorded") from None
        raise Interrupted(f"interrupted; what was recorded is kept, and `{shlex.join(again)}` goes on") from None
    except (SettingError, TrainingError):
        raise
    except Exception as error:  # of the record, the disk, or Ray
        what = "the record can't be used" if isinstance(error, STORE_ERRORS) else "the sweep came to an early end"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise TrainingError(f"{what} ({reason}); once that is mended, `{shlex.join(again)}` goes on") from None
    from linflab.platform.publishing import publish_sweep
    from linflab.platform.reporting import report_sweep

    page = report_sweep(place, plan.name, None)
    _show_sweep(page)
    _publish(lambda: publish_sweep(place, plan.name, page))
    console.print(f"Browse the runs: {_ui_command(place)}")
    if lost:
        raise TrainingError(
            f"{lost} trials have no result; the table's notes, and the runs' tag linflab.failure, say why"
        )


def _sweep_on_cluster(plan: "SweepPlan | None", name: str, space: str, flags: list[str], storage: Path) -> None:
    """Start a sweep on the cluster, or go on with one (`plan` is None) there; its report is made here."""
    from linflab.platform.cluster import run_on_cluster
    from linflab.platform.reporting import one_error, report_sweep
    from linflab.platform.shipping import file_to_send
    from linflab.reports.records import read_sweeps

    with _records(storage, cluster=True) as place, one_error(place):
        known = read_sweeps(place.tracking_uri)["sweep"].tolist()
    files: dict[str, str] = {}
    if plan is None:
        if name not in known:
            raise SettingError(
                f"resume={name}: there is no such sweep on the cluster; there are: {', '.join(known) or 'none yet'}"
            )
        command = ["sweep", "--resume", name, *flags]
    else:
        if name in known:
            raise SettingError(
                f"name={name}: this sweep is already on the cluster; choose another name, or go on with it by "
                f"`linflab sweep --resume {name} --cluster`"
            )
        recipe, own_recipe = file_to_send(plan.recipe, lambda: plan.tree)
        sent_space, own_space = file_to_send(
            space, lambda: plan.space.model_dump(mode="json", exclude={"include"}), taken=recipe
        )
        files = own_recipe | own_space
        command = ["sweep", recipe, sent_space, *plan.overrides, "--name", name, *flags]
    failure: TrainingError | None = None
    try:
        run_on_cluster(command, name, files, console)
    except TrainingError as error:  # some trials may have a result
        failure = error
    with _records(storage, cluster=True) as place:
        try:
            _wrote(report_sweep(place, name, None).files, "The report, on this machine:")
        except SettingError:
            if failure is None:
                raise
    if failure is not None:
        raise failure


def _job_name(what: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", Path(what).stem if "/" in what else what).strip("._-")


def _where(place: Storage) -> list[str]:
    """The options by which a command, typed again by the user, finds the same storage."""
    from linflab.platform.shipping import sent_here

    if sent_here():
        return ["--cluster"]
    return [] if place.root == RUNS.absolute() else ["--storage", str(place.root)]


@contextmanager
def _records(storage: Path, cluster: bool) -> Iterator[Storage]:
    """The storage, to read from; with `cluster`, the record is the cluster's, and the folder is for reports."""
    if not cluster:
        yield Storage.with_records(storage)
        return
    from linflab.platform.cluster import record

    with record() as server:
        yield Storage.with_records(storage, server)


@app.command()
def sweeps(storage: StorageFolder = RUNS, as_json: AsJson = False, cluster: OnCluster = False) -> None:
    """The sweeps, the latest first: their state, how many trials are done, the best on validation.

    Those `killed` (by Ctrl-C) or `cut` go on with `linflab sweep --resume NAME`.
    """
    from linflab.platform.checkpoints import exclusive_lock
    from linflab.platform.reporting import one_error
    from linflab.reports.records import read_sweeps

    with _records(storage, cluster) as place, one_error(place):
        found = read_sweeps(place.tracking_uri)
    jobs: list[str] = []
    if cluster and "running" in set(found["state"]):
        from linflab.platform.cluster import running_jobs

        jobs = running_jobs()
    for number, name in enumerate(found["sweep"]):
        lock = place.sweeps / name / "lock"
        if found.loc[number, "state"] != "running":
            continue
        if cluster:  # by the record: its process may be gone
            found.loc[number, "state"] = "running" if any(job.startswith(f"{name}-") for job in jobs) else "cut"
        elif lock.exists():
            # where it can't be asked, as on storage of somebody else's, the record stands
            with suppress(OSError), exclusive_lock(lock) as free:
                found.loc[number, "state"] = "cut" if free else "running"
    _print_found(found, ("best",), as_json)


@app.command()
def runs(storage: StorageFolder = RUNS, as_json: AsJson = False, cluster: OnCluster = False) -> None:
    """The trainings, the latest first: their ids, by which `evaluate`, `report` and `records` know them, and scores.

    By the record one that was cut is `running`, until it is resumed.
    """
    from linflab.platform.reporting import one_error
    from linflab.reports.records import list_runs

    with _records(storage, cluster) as place, one_error(place):
        found = list_runs(place.tracking_uri)
    if not as_json:
        found["run"] = found["run"].map(lambda run: run[:8])
    _print_found(found, ("validation", "test"), as_json)


@report_app.callback(invoke_without_command=True)
def report(
    context: typer.Context,
    everything: Annotated[
        bool, typer.Option("--all", help="all tables and sweeps, and a page for each run in a table, with an index")
    ] = False,
    storage: StorageFolder = RUNS,
    out: OutFolder = None,
    cluster: OnCluster = False,
) -> None:
    """Tables and figures from records, as Markdown, LaTeX, HTML and CSV; quoted rows beside measured ones."""
    for name in ("storage", "out", "cluster"):
        source = context.get_parameter_source(name)
        if context.invoked_subcommand is not None and source is not None and source.name == "COMMANDLINE":
            raise SettingError(f"{name}: goes after {context.invoked_subcommand}, or with --all")
    if context.invoked_subcommand is None and not everything:
        typer.echo(context.get_help())
    elif context.invoked_subcommand is None:
        from linflab.platform.reporting import report_all

        with _records_if_any(storage, cluster) as place:
            _wrote(report_all(place, out), "All reports are linked by")
    elif everything:
        raise SettingError(f"all: is all there is; leave {context.invoked_subcommand} out")


@report_app.command("sweep")
def report_sweep(
    name: Annotated[str, typer.Argument(help="the sweep's name")],
    storage: StorageFolder = RUNS,
    out: OutFolder = None,
    cluster: OnCluster = False,
) -> None:
    """The comparison table of a sweep: one row a trial, best first by its first objective, on validation."""
    from linflab.platform.reporting import report_sweep

    with _records(storage, cluster) as place:
        _show_sweep(report_sweep(place, name, out))


@report_app.command("run")
def report_run(
    run: Annotated[str, typer.Argument(help="a run's id, or its beginning")],
    storage: StorageFolder = RUNS,
    out: OutFolder = None,
    cluster: OnCluster = False,
) -> None:
    """One run: its row of a table, its learning curves and certificates."""
    from linflab.platform.reporting import report_run

    with _records(storage, cluster) as place:
        _show(report_run(place, run, out))


@report_app.command("compare")
def report_compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN_OR_SWEEP...", help="ids of runs, names of sweeps")],
    quoted: Annotated[bool, typer.Option(help="with what papers report of the same data and eps")] = True,
    storage: StorageFolder = RUNS,
    out: OutFolder = None,
    cluster: OnCluster = False,
) -> None:
    """Runs, and the best trials of sweeps with all their seeds, side by side."""
    from linflab.platform.reporting import report_comparison

    with _records(storage, cluster) as place:
        _show(report_comparison(place, names, quoted, out))


@report_app.command("table")
def report_table(
    file: Annotated[str, typer.Argument(help="a YAML file that says which rows and columns; or a shipped table")],
    storage: StorageFolder = RUNS,
    out: OutFolder = None,
    cluster: OnCluster = False,
) -> None:
    """A table of one's own: which data sets, methods, columns and quoted rows it has is said in YAML."""
    from linflab.platform.reporting import report_table, table_definition

    definition = table_definition(file)
    if definition.records is not None and cluster:
        raise SettingError(
            f"cluster: table={file} is made of {definition.records}, not of a cluster's record; leave it out"
        )
    # records of its own need no storage
    opened = _records_if_any(storage, cluster) if definition.records is None else nullcontext(Storage.at(storage))
    with opened as place:
        _show(report_table(place, file, definition, out))


def _add_shipped_table(name: str) -> None:
    @report_app.command(name, help=f"The shipped table: {table_title(name)}.")
    def command(storage: StorageFolder = RUNS, out: OutFolder = None, cluster: OnCluster = False) -> None:
        report_table(name, storage, out, cluster)


for _name in table_names():
    _add_shipped_table(_name)


def _publish(adding: Callable[[], None]) -> None:
    """Add model and figures to what has been recorded: if that goes wrong, results are not lost with it."""
    try:
        adding()
    except Exception as error:  # of the store, the disk, an export, a figure
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        console.print(
            f"All scores are recorded, but its model and figures could not be added to the record ({reason})."
        )


@contextmanager
def _records_if_any(storage: Path, cluster: bool) -> Iterator[Storage]:
    """As `_records`, of a storage that may have no records yet: quoted rows need none."""
    if not cluster and not Storage.at(storage).has_records:
        yield Storage.at(storage)
        return
    with _records(storage, cluster) as place:
        yield place


def _show(page: "Page") -> None:
    from linflab.reports.rendering import print_table

    print_table(page.table, console)
    _wrote(page.files, "As files:")


def _show_sweep(page: "Page") -> None:
    from linflab.reports.rendering import of_commit, print_table
    from linflab.reports.tables import VALIDATION

    print_table(page.table, console)
    best = page.table.rows[0]
    if best.cell(VALIDATION).value is not None:
        (command, commit), *_ = best.again
        console.print(f"\nThe best trial again (number {best.cell('#').text}){of_commit(commit)}:\n  {command}")
    _wrote(page.files, "As files:")


def _wrote(files: Iterable[Path], what: str) -> None:
    console.print(what)
    for path in files:
        console.print(f"  {path}")


@records_app.command("export")
def records_export(
    file: Annotated[Path, typer.Argument(help="to write")],
    names: Annotated[list[str] | None, typer.Argument(help="runs and sweeps; all by default")] = None,
    storage: StorageFolder = RUNS,
    cluster: OnCluster = False,
) -> None:
    """Write what tables are made of, without weights, to a file that can be kept beside a paper."""
    from linflab.platform.exchange import export_records
    from linflab.platform.reporting import one_error

    with _records(storage, cluster) as place, one_error(place):
        count, left_out = export_records(place, names or [], file)
    console.print(f"{count} runs are in {file}; `linflab records import {file}` adds them to another storage.")
    if left_out:
        console.print(f"{left_out} were left out: they, or their sweep, have not ended.")


@records_app.command("import")
def records_import(
    file: Annotated[Path, typer.Argument(help="that `linflab records export` wrote")], storage: StorageFolder = RUNS
) -> None:
    """Add the runs of a file to the record; those that are there stay as they are."""
    from linflab.platform.exchange import import_records
    from linflab.platform.reporting import one_error

    place = Storage.open(storage)
    with one_error(place):
        added, before = import_records(place, file)
    console.print(f"{added} runs were added to {place.root}; {before} had been there before.")


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """The shipped recipes."""
    from linflab.platform.config import read_recipe, recipe_names

    rows = []
    for name in recipe_names():
        tree = read_recipe(name)
        rows.append({key: tree.get(key) for key in ("method", "dataset", "eps")} | {"recipe": name})
    _print_rows(rows, ["recipe", "method", "dataset", "eps"], as_json)


@app.command()
def describe(recipe: Recipe, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """The settings of a recipe, its network's layers, parameters and FLOPs, and the counted cost of a training step."""
    from linflab.models.networks.cost import count_parameters, layer_costs
    from linflab.platform.config import load_experiment

    experiment = load_experiment(recipe, overrides or [])

    network, input_shape = _network_without_weights(experiment)
    layers = [dataclasses.asdict(layer) for layer in layer_costs(network, input_shape)]
    parameters, flops = count_parameters(network), sum(layer["flops"] for layer in layers)
    forward = experiment.training.batch_size * flops
    step = {"forward_flops": forward, "backward_flops": 2 * forward, "state_bytes": 16 * parameters}
    if as_json:
        cost = {"parameters": parameters, "flops": flops, "layers": layers, "step": step}
        typer.echo(json.dumps({**cost, "settings": experiment.settings()}))
        return
    console.print(experiment.to_yaml(), end="")
    console.print()
    for layer in layers:
        layer["output"] = " x ".join(map(str, layer["output_shape"]))
        layer |= {key: f"{layer[key]:,}" for key in ("parameters", "flops")}
    _print_rows(layers, ["name", "kind", "output", "parameters", "flops"], as_json=False)
    console.print(f"\n{parameters:,} parameters, {flops:,} FLOPs an image")
    console.print(
        f"A step on {experiment.training.batch_size} images: {forward:,} FLOPs forward, twice that for both "
        f"gradients; {step['state_bytes'] / 2**20:,.1f} MiB of weights, gradients and Adam's two moments"
    )


@space_app.command("list")
def space_list(as_json: AsJson = False) -> None:
    """The shipped search spaces."""
    rows = [{"space": name, "description": load_space(name).description} for name in space_names()]
    _print_rows(rows, ["space", "description"], as_json)


@space_app.command("show")
def space_show(
    name: Annotated[str, typer.Argument(help="a search space's name, or the path of a YAML file")],
    as_json: AsJson = False,
) -> None:
    """The settings that a space varies, and over what values."""
    space = _load_space(name)
    if as_json:
        typer.echo(space.model_dump_json())
        return
    rows = [{"setting": path, "values": str(distribution)} for path, distribution in space.parameters.items()]
    console.print(space.description)
    _print_rows(rows, ["setting", "values"], as_json=False)
    for point in space.try_first:
        console.print("first: " + ", ".join(f"{path}={value}" for path, value in point.items()))


@app.command("schema")
def json_schema(what: Annotated[str, typer.Argument(help="experiment, or space")]) -> None:
    """The JSON schema of recipes or search spaces, for editors that check and complete YAML."""
    from linflab.platform.config import Experiment

    models: dict[str, type[BaseModel]] = {"experiment": Experiment, "space": SearchSpace}
    if what not in models:
        raise SettingError(f"schema={what}: must be one of {', '.join(models)}")
    typer.echo(json.dumps(models[what].model_json_schema(), indent=1))


@data_app.command("list")
def data_list(as_json: AsJson = False) -> None:
    """The data sets, what is there of each and where, and whether its images have the published means."""
    from linflab.platform.datasets import inventory

    rows = [dataclasses.asdict(entry) for entry in inventory()]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        row["images"] = "" if row["train"] is None else "{train} + {validation} + {test}".format(**row)
        row["shape"] = "" if row["shape"] is None else " x ".join(map(str, row["shape"]))
        row["mean"] = "" if row["mean"] is None else " ".join(f"{mean:.4f}" for mean in row["mean"])
        row["classes"] = row["classes"] or ""
    console.print("images: training + validation + test")
    _print_rows(rows, ["name", "images", "shape", "classes", "mean", "state", "place"], as_json=False)


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="the data set")],
    source: Annotated[
        Path | None, typer.Option(help="folder or file with the original files; without, they are downloaded")
    ] = None,
) -> None:
    """Convert a data set's originals, downloaded or already there, to the form that training reads."""
    from linflab.platform.datasets import prepare_dataset

    console.print(f"{name} is prepared, in {prepare_dataset(name, source)}")


@app.command()
def evaluate(
    what: Annotated[str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="a run's id, or the path of its weights")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings of evaluation to change, such as evaluation.attack.steps=100")
    ] = None,
    eps: Annotated[str, typer.Option(help="radii in pixels, separated by commas; by default the recipe's")] = "",
    certifier: Annotated[str, typer.Option(help="lipschitz, interval or crown; by default the recipe's")] = "",
    sound: Annotated[bool, typer.Option("--sound", help="certificates that account for float32 rounding")] = False,
    attack: Annotated[
        str,
        typer.Option(
            help="pgd, surrogate_pgd, apgd, targeted_apgd, square, several separated by commas, or none; by default "
            "the recipe's"
        ),
    ] = "",
    radii: Annotated[
        Path | None,
        typer.Option(help="folder for the certified radius of every image, the curve over eps and a histogram"),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Ray workers that share the images; 0: none")] = 0,
    storage: StorageFolder = RUNS,
    as_json: AsJson = False,
) -> None:
    """Score trained weights on the whole test set: clean, robust and certified accuracy, at one or many eps.

    Robust is what withstands every attack that ran.
    """
    bounds = _radii(eps)
    settings = [*(overrides or [])]
    settings += [f"evaluation.certifier={certifier}"] if certifier else []
    settings += ["evaluation.sound=true"] if sound else []
    from linflab.models.robustness.attacks.suite import ATTACKS

    kinds = [kind.strip() for kind in attack.split(",")] if attack else []
    if kinds and kinds != ["none"] and not set(kinds) <= set(ATTACKS):
        raise SettingError(f"attack={attack}: must be none, or of {', '.join(ATTACKS)}, separated by commas")
    if kinds == ["none"] and any(setting.startswith("evaluation.attack.") for setting in settings):
        raise SettingError("attack=none: no attack runs, so leave out settings of evaluation.attack")
    settings += [f"evaluation.attack.kinds=[{','.join(kinds)}]"] if kinds not in ([], ["none"]) else []
    if radii is not None:
        try:
            radii.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError(f"radii={radii}: can't be a folder for results ({error.strerror})") from None
    from linflab.platform.scoring import as_plain_data, record_scores, score, weights_of_run, write_scores

    path, place = Path(what), None
    if "/" in what or what.endswith(".pt"):
        if not path.is_file():
            raise SettingError(f"{what}: there is no such file")
    else:
        place = Storage.with_records(storage)
        what = _run_id(place, what)
        path = weights_of_run(place, what)
    scores = score(path, settings, bounds, kinds != ["none"], radii is not None, workers, console)
    files = write_scores(radii, scores) if radii is not None else []
    if as_json:
        typer.echo(json.dumps(as_plain_data(scores)))
    else:
        shown = ["clean", "robust", "certified"]
        rows = [dataclasses.asdict(row) for row in scores.rows]
        cells = [
            {"eps": f"{row['eps']:.4g}"}
            | {name: "-" if row[name] is None else f"{100 * row[name]:.2f}" for name in shown}
            for row in rows
        ]
        _print_rows(cells, ["eps", *shown], as_json=False)
        console.print(f"\nIn percent. {scores.notes}")
        for file in files:
            console.print(f"  {file}")
    if place is not None:
        record_scores(place, what, scores)
    broken = sum(row.certified_but_broken or 0 for row in scores.rows)
    if broken:
        hint = "" if scores.sound else "; --sound accounts for rounding"
        raise TrainingError(f"attacks broke {broken} samples that {scores.certifier} had certified{hint}")


def _run_id(place: Storage, beginning: str) -> str:
    """The id of the run whose id alone begins so."""
    from linflab.platform.reporting import TRIALS, one_error
    from linflab.reports.comparison import run_of
    from linflab.reports.records import read_runs

    with one_error(place):
        runs = read_runs(place.tracking_uri, TRIALS)
        if runs.empty:
            raise SettingError(f"{beginning}: is no file, and no run has been recorded in {place.root}")
        return str(run_of(runs, beginning)["run_id"].iloc[0])


def _radii(text: str) -> list[float]:
    try:
        radii = [float(Fraction(part.strip())) for part in text.split(",") if part.strip()]
    except (ValueError, ZeroDivisionError):
        radii = [-1.0]
    if not all(0 <= radius <= 1 for radius in radii) or (text and not radii):
        raise SettingError(f"eps={text}: must be numbers from 0 to 1, separated by commas, as in 0.05,8/255")
    return radii


@app.command()
def certify(
    checkpoint: Annotated[Path, typer.Argument(help="the path of trained weights")],
    images: Annotated[list[Path], typer.Argument(help="image files, of the size that the network sees")],
    certifier: Annotated[str, typer.Option(help="lipschitz, interval, crown; auto: by the network's kind")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Classify images of one's own, with the radius up to which the class is proven, float32 rounding included."""
    from linflab.platform.scoring import certify_images

    rows = [dataclasses.asdict(one) for one in certify_images(checkpoint, images, certifier)]
    if not as_json:  # never more than what is proven
        rows = [{**row, "radius": f"{math.floor(1e4 * row['radius']) / 1e4:.4f}"} for row in rows]
    _print_rows(rows, ["image", "prediction", "radius", "certifier"], as_json)


@app.command("import-weights")
def import_weights(
    file: Annotated[Path, typer.Argument(help="published weights of an l_inf-dist net or SortNet")],
    recipe: Annotated[str, typer.Option(help="the recipe whose network they are of, or the path of a YAML file")],
    output: Annotated[Path, typer.Option(help="the file of weights to write")],
    overrides: Overrides = None,
) -> None:
    """Convert weights that the authors of l_inf-dist nets and SortNet published, for `linflab evaluate`."""
    from linflab.platform.config import load_experiment
    from linflab.platform.published_weights import import_weights as convert

    experiment = load_experiment(recipe, overrides or [])
    count = convert(file, experiment, output)
    console.print(f"{count} tensors of {file} are in {output}, as the network of {recipe}.")


@app.command()
def ui(
    storage: StorageFolder = RUNS,
    port: Annotated[int, typer.Option(min=1, max=65535, help="port on localhost")] = 5000,
    cluster: OnCluster = False,
) -> None:
    """Browse the runs in the MLflow UI, on this machine only."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SettingError(f"port={port}: can't be used ({error.strerror}); choose another, as in 5050") from None
    if cluster:
        from linflab.platform.cluster import record

        with record(port) as uri:
            console.print("MLflow is open, on this machine only, through ssh; Ctrl-C ends that. The runs:")
            _print_links(uri, port)
            sys.stdout.flush()
            with suppress(KeyboardInterrupt):
                while answers(port):
                    time.sleep(5)
        return
    place = Storage.with_records(storage)
    if place.server is not None:
        console.print(f"MLflow is at {place.server} (LINFLAB_MLFLOW).")
        return
    console.print(
        "MLflow opens in about 15 seconds, on this machine only; Ctrl-C ends it. The runs, by data set and eps:"
    )
    _print_links(place.tracking_uri, port)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", place.tracking_uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # signals to this process are then signals to MLflow


def _print_links(tracking_uri: str, port: int) -> None:
    from linflab.reports.records import read_experiments

    for name, number in read_experiments(tracking_uri).items():
        # without the mode, MLflow opens its pages for language models
        console.print(f"  {name}: http://127.0.0.1:{port}/#/experiments/{number}/runs?workflowType=machine_learning")


@node_app.command("serve")
def node_serve(
    storage: Annotated[Path, typer.Option(envvar="LINFLAB_STORAGE", help="a folder that all machines see")],
    database: Annotated[str, typer.Option(help="URI of MLflow's database, on a disk that outlives the cluster")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="where the cluster expects it")] = RECORD_PORT,
) -> None:
    """On the head: start MLflow's server, with all that is recorded, for as long as Ray runs."""
    from linflab.platform.node import serve

    serve(Storage.open(storage), database, port)


@node_app.command("end-with-head")
def node_end_with_head(
    head: Annotated[str, typer.Argument(help="the head's address")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="of the head's Ray")] = RAY_PORT,
) -> None:
    """On a worker: see to it, in the background, that nothing of Ray is left once its head is gone."""
    from linflab.platform.node import end_with_head

    end_with_head(head, port)


@node_app.command("close-ports")
def node_close_ports(
    storage: Annotated[Path, typer.Option(envvar="LINFLAB_STORAGE", help="a folder that all machines see")],
) -> None:
    """On each machine of one's own: let only the cluster's machines reach its ports, all but ssh; needs nftables."""
    from linflab.platform.node import close_ports

    close_ports(Storage.open(storage))


def _network_without_weights(experiment: "Experiment") -> tuple["nn.Module", tuple[int, ...]]:
    """The network of an experiment with shapes alone, and the shape (C, H, W) of its images."""
    import torch

    from linflab.platform.datasets import facts_of
    from linflab.platform.weights import image_shape, network_of

    with torch.device("meta"):
        return network_of(experiment), image_shape(experiment, facts_of(experiment.dataset))


def _estimate(experiment: "Experiment", dataset: "Dataset") -> None:
    from linflab.platform.config import DISTANCE_NETS
    from linflab.platform.estimate import estimate
    from linflab.platform.tracking import hardware
    from linflab.platform.trial import check_machine, device_of

    check_machine(experiment)
    load = os.getloadavg()[0]
    try:
        guess = estimate(experiment, dataset.to(device_of(experiment)))
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        raise SettingError(f"recipe: needs more memory than there is ({' '.join(str(error).split())[:200]})") from None
    columns = ["p", "seconds a step"] if experiment.model.kind in DISTANCE_NETS else ["seconds a step"]
    _print_rows([{"p": p, "seconds a step": seconds} for p, seconds in guess.steps], columns, as_json=False)
    whole = guess.training_hours + guess.scoring_hours
    unit, per_hour = ("hours", 1) if whole > 0.1 else ("seconds", 3600)
    hours, steps, scoring = (part * per_hour for part in (whole, guess.training_hours, guess.scoring_hours))
    console.print(
        f"\nAbout {hours:.3g} {unit} ({steps:.3g} of steps, {scoring:.3g} of scoring) and "
        f"{guess.memory / 2**30:.2g} GiB, on {hardware()}."
    )
    if load > 1:
        console.print(f"In the minute before, {load:.0f} other processes wanted a core: on a free machine it is less.")
    if experiment.compute.workers > 1:
        console.print(f"Of {experiment.compute.workers} workers one was timed, without what passes between them.")


def _load_space(name: str) -> SearchSpace:
    try:
        return load_space(name)
    except ValueError as error:
        raise SettingError(str(error)) from None


def _ui_command(place: Storage) -> str:
    return shlex.join(["linflab", "ui", *_where(place)])


def _print_found(found: "pd.DataFrame", shares: Sequence[str], as_json: bool) -> None:
    """Rows of a record; shares, which may be missing, in percent for reading."""
    rows = [{str(name): value for name, value in row.items()} for row in found.to_dict("records")]
    for row in rows:
        for name in shares:
            missing = row[name] != row[name]
            row[name] = (None if missing else row[name]) if as_json else "-" if missing else f"{100 * row[name]:.2f}%"
    _print_rows(rows, list(found.columns), as_json)


def _print_rows(rows: list[dict[str, Any]], columns: list[str], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        cells = (row[column] for column in columns)
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    # in files and pipes no line is broken
    (console if console.is_terminal else Console(file=console.file, highlight=False, width=1000)).print(table)


def main() -> None:
    """Run the command; what goes wrong ends in one line that says what would do."""
    try:
        check_code()
        app()
    except (SettingError, TrainingError, Interrupted) as error:
        sys.stderr.write(f"linflab: {' '.join(str(error).split())}\n")
        status = 2 if isinstance(error, SettingError) else 130 if isinstance(error, Interrupted) else 1
        raise SystemExit(status) from None
    except ImportError as error:
        if error.name != "kernels of other sources":  # models.distance.cpu's: to import that name takes seconds
            raise
        sys.stderr.write(f"linflab: {error}\n")
        raise SystemExit(2) from None
