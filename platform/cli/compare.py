"""`linflab compare`."""

import os
import shlex
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linflab.platform import signals
from linflab.platform.cli.options import (
    DEFAULT_STORAGE,
    StorageFolder,
    check_writable,
    complete_recipe,
    storage_options,
)
from linflab.platform.cli.output import console, print_files, print_rows, print_warning, ui_command
from linflab.platform.cli.train import print_load, train_request
from linflab.platform.errors import InputError, RunInterrupted, RunLockedError, TrainingError, WorkerLostError
from linflab.platform.tracking.storage import Storage

if TYPE_CHECKING:
    from linflab.platform.results.compare import PlannedRun
    from linflab.reports.pages import Page


def compare(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE",
            help="Recipe names, or paths of YAML files, with the same dataset and eps",
            autocompletion=complete_recipe,
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="Number of seeds of each recipe")] = 3,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Number of epochs of all runs; default: that of each recipe"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Setting to override in all recipes; may be repeated"),
    ] = None,
    quoted: Annotated[bool, typer.Option(help="Include published results for the same dataset and eps")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the runs and estimated times, without training or logging")
    ] = False,
    storage_dir: StorageFolder = DEFAULT_STORAGE,
    out: Annotated[
        Path | None,
        typer.Option("--output-dir", "--output", help="Output directory; default: reports/ in the storage directory"),
    ] = None,
) -> None:
    """Train recipes over several seeds, and compare their accuracies with each other and with published results.

    Runs are trained one after another. The same command continues after an interruption: finished runs of the same
    settings are reused, and interrupted ones resume.
    """
    with console.status("Loading PyTorch ..."):
        from linflab.platform.config.overrides import radius_note
        from linflab.platform.data.datasets import load_dataset
        from linflab.platform.distributed.address import needs_ray
        from linflab.platform.results.compare import comparison_name, plan_runs
        from linflab.platform.training.trainer import check_dataset_compatibility
        from linflab.platform.trial import check_local_resources

        overrides = list(settings or [])
        if epochs is not None:
            if any(override.startswith("training.epochs=") for override in overrides):
                raise InputError(f"epochs={epochs}: must not be combined with --set training.epochs; use one of them")
            overrides.append(f"training.epochs={epochs}")
        rows = plan_runs(recipes, overrides, seeds)
    for recipe in recipes:
        if note := radius_note(recipe, overrides):
            print_warning(f"{recipe}: {note}")
    with console.status(f"Opening {rows[0][0].experiment.dataset} ..."):
        for runs in rows:
            experiment = runs[0].experiment
            check_dataset_compatibility(experiment, load_dataset(experiment.dataset, experiment.augmentation))
            if not needs_ray(experiment):
                check_local_resources(experiment)
    if dry_run:
        _print_plan(rows, Storage.from_path(storage_dir))
        return
    storage = Storage.open(storage_dir)
    with console.status("Loading MLflow ..."):
        from linflab.platform.tracking.mlflow import wrap_errors

        signals.watch_again()  # imported libraries may have replaced the handlers
    if out is not None:
        check_writable("output-dir", out)  # before training
    with wrap_errors(storage):
        storage.reports.mkdir(parents=True, exist_ok=True)
    options = [f"--seeds={seeds}", *([f"--epochs={epochs}"] if epochs is not None else [])]
    options += [part for setting in settings or [] for part in ("--set", setting)]
    options += ["--no-quoted"] if not quoted else []
    options += ["--output-dir", str(out)] if out is not None else []
    command = shlex.join(["linflab", "compare", *recipes, *options, *storage_options(storage)])
    try:
        with signals.guarded(f"continue with `{command}`"):
            outcome = _train_all(rows, storage, f"continue with `{command}`")
            if outcome.run_ids:
                from linflab.platform.results.report import report_recipes

                name = comparison_name(recipes, overrides)
                _print_comparison(report_recipes(storage, name, outcome.run_ids, outcome.notes, quoted, out))
                console.print(f"Open the MLflow UI with `{ui_command(storage)}`.")
    except (KeyboardInterrupt, SystemExit, RunInterrupted, WorkerLostError) as error:
        reason = str(error) if isinstance(error, RunInterrupted | WorkerLostError) else "interrupted"
        raise RunInterrupted(f"{reason}; finished runs are kept; continue with `{command}`") from None
    if outcome.failures:
        raise TrainingError(
            f"{len(outcome.failures)} of {seeds * len(recipes)} runs failed ({outcome.failures[0]}); change the "
            f"settings, or try again with `{command}`"
        )


@dataclass
class _Outcome:
    """Finished runs of a comparison by recipe, and the reasons of failed ones."""

    run_ids: dict[str, list[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        return [f"Failed, and not part of any row: {failure}." for failure in self.failures]


def _train_all(rows: Sequence[Sequence["PlannedRun"]], storage: Storage, hint: str) -> _Outcome:
    """Train the runs that are not finished, the first seed of all recipes first, and return all results."""
    from linflab.platform.trial import TrialRequest, default_run_name, find_resumable_run, train_command
    from linflab.reports import schema

    outcome, invocation = _Outcome(), uuid.uuid4().hex
    runs = [run for same_seed in zip(*rows, strict=True) for run in same_seed]
    for number, run in enumerate(runs, 1):
        title = f"run={number}/{len(runs)} recipe={run.recipe} seed={run.experiment.seed}"
        earlier = find_resumable_run(storage, run.experiment, prefer_finished=True)
        if earlier is not None and earlier.is_finished:
            result = earlier.result
            console.print(f"{title} status=reused run_id={result.run_id}")
        else:
            console.print(f"{title} status={'started' if earlier is None else 'resumed'}")
            tags = {
                schema.KIND: "trial",
                schema.INVOCATION_ID: invocation,
                schema.RECIPE: run.recipe,
                schema.COMMAND: train_command(run.recipe, run.overrides),
            }
            name, run_id = default_run_name(run.recipe, run.overrides), earlier.result.run_id if earlier else None
            try:
                result = train_request(TrialRequest(run.experiment, storage, name, tags, run_id), hint)
            except WorkerLostError:
                raise
            except (TrainingError, RunLockedError) as error:  # a locked run is trained by another process
                outcome.failures.append(f"{run.recipe}, seed {run.experiment.seed}: {error}")
                console.print(f"{title} status=failed reason={error}")
                continue
            accuracies = " ".join(
                f"{label}={100 * result.metrics[metric]:.2f}%"
                for label, metric in (
                    ("test_clean", schema.TEST_CLEAN),
                    ("test_robust", schema.TEST_ROBUST),
                    ("test_certified", schema.TEST_CERTIFIED),
                )
            )
            console.print(f"{title} status=finished {accuracies} run_id={result.run_id}")
        outcome.run_ids.setdefault(run.recipe, []).append(result.run_id)
    return outcome


def _print_comparison(page: "Page") -> None:
    """Print the table of a comparison, a command for each measured row, and the paths of its files."""
    from linflab.reports.rendering import print_table

    print_table(page.table, console)
    console.print("\nCommands that repeat the first seed of each row; the files have all commands:")
    for row in page.table.rows:
        for command, _ in row.reproduce_commands[:1]:
            console.print(f"  [{row.footnote_mark}] {command}")
    print_files(page.files, "Files:")


def _print_plan(rows: Sequence[Sequence["PlannedRun"]], storage: Storage) -> None:
    """Print the runs of each recipe that are finished, and the estimated time of the others."""
    from linflab.platform.data.datasets import load_dataset
    from linflab.platform.host import describe_hardware
    from linflab.platform.training.estimate import estimate_cost
    from linflab.platform.trial import find_resumable_run, select_device

    load = os.getloadavg()[0]
    stored = Storage.open_existing(storage.root) if storage.has_runs else None
    console.print("Timing training steps and evaluation of each recipe; this takes up to half a minute for each.")
    plan, total = [], 0.0
    for runs in rows:
        experiment = runs[0].experiment
        earlier = [find_resumable_run(stored, run.experiment, prefer_finished=True) if stored else None for run in runs]
        num_finished = sum(one is not None and one.is_finished for one in earlier)
        dataset = load_dataset(experiment.dataset, experiment.augmentation).to(select_device(experiment))
        estimate = estimate_cost(experiment, dataset)
        hours = estimate.training_hours + estimate.evaluation_hours
        total += hours * (len(runs) - num_finished)
        plan.append(
            {
                "recipe": runs[0].recipe,
                "epochs": experiment.training.epochs,
                "seeds": ",".join(str(run.experiment.seed) for run in runs),
                "finished": num_finished,
                "interrupted": sum(one is not None for one in earlier) - num_finished,
                "time_each": _format_hours(hours),
                "memory": f"{estimate.memory / 2**30:.2g} GiB",
            }
        )
    print_rows(plan, list(plan[0]), as_json=False)
    note = "; interrupted runs count in full" if any(row["interrupted"] for row in plan) else ""
    console.print(f"About {_format_hours(total)} in total{note}, on {describe_hardware()}.")
    print_load(load)


def _format_hours(hours: float) -> str:
    return f"{hours:.2g} hours" if hours > 0.1 else f"{3600 * hours:.2g} seconds"
