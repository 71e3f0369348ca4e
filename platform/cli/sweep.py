"""`linflab sweep` and `linflab sweeps`."""

import re
import shlex
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linflab.platform import signals
from linflab.platform.cli.options import (
    DEFAULT_STORAGE,
    AsJson,
    OnCluster,
    Overrides,
    StorageFolder,
    complete_recipe,
    complete_space,
    job_name,
    open_storage,
    read_space,
    storage_options,
)
from linflab.platform.cli.output import (
    console,
    log_optional,
    print_files,
    print_run_table,
    print_sweep_page,
    print_warning,
    show_output,
    ui_command,
)
from linflab.platform.errors import InputError, RunInterrupted, TrainingError
from linflab.platform.tracking.storage import SWEEP_NAME, Storage

if TYPE_CHECKING:
    from linflab.platform.sweeps.plan import SweepPlan


def sweep(
    recipe: Annotated[
        str | None,
        typer.Argument(help="Recipe name, or path of a YAML file", autocompletion=complete_recipe),
    ] = None,
    space: Annotated[
        str | None,
        typer.Argument(help="Search space name, or path of a YAML file", autocompletion=complete_space),
    ] = None,
    overrides: Overrides = None,
    name: Annotated[str, typer.Option(help="Sweep name; default: the name of the search space and the time")] = "",
    budget: Annotated[
        str | None,
        typer.Option(help="Number of trials (20), or time during which new trials may start (1.5h); default: 20"),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Optuna sampler: tpe, random, grid, nsga2 or cmaes; default: tpe")
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated objectives: certified, clean (validation accuracies), flops; default: certified"
        ),
    ] = None,
    halving: Annotated[
        int | None,
        typer.Option(
            help="Successive halving: train every configuration for 1/N of the epochs first (N = 3, 9, ...), then "
            "promote the best third by the first objective to the next rung"
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Number of seeds to train the best configuration with; default: 1")
    ] = None,
    verify_front: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Certify validation images by the cascade for the N best trials before the best one is chosen",
        ),
    ] = None,
    verify_images: Annotated[
        int | None,
        typer.Option(metavar="N", help="Number of images for --verify-front, a fixed random sample; default: 1000"),
    ] = None,
    resume: Annotated[
        str, typer.Option(metavar="NAME", help="Resume an interrupted sweep, or extend one with a larger --budget")
    ] = "",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: train failed trials again")
    ] = False,
    storage_dir: StorageFolder = DEFAULT_STORAGE,
    cluster: OnCluster = False,
) -> None:
    """Search hyperparameters with Optuna on Ray Tune, log every trial to MLflow, and print the comparison table."""
    from linflab.platform.config.overrides import load_config, radius_note
    from linflab.platform.data.datasets import load_dataset

    search_options = {
        "sampler": sampler,
        "objectives": objectives.split(",") if objectives else None,
        "halving": halving,
        "verify_front": verify_front,
        "verify_images": verify_images,
    }
    if resume:
        fixed_options = {"recipe": recipe, "space": space, "overrides": overrides, "name": name, **search_options}
        for what, value in fixed_options.items():
            if value:
                raise InputError(
                    f"{what.replace('_', '-')}={value}: is not supported with --resume {resume}, which fixes it; leave "
                    "it out"
                )
    else:
        if recipe is None or space is None:
            raise InputError("sweep: requires a recipe and a search space; add both, or use --resume NAME")
        if retry_failed:
            raise InputError("retry-failed: requires a sweep to resume; use --resume NAME --retry-failed")
        experiment = load_config(recipe, overrides or [])  # validate before the slow imports
        dataset = None if cluster else load_dataset(experiment.dataset, experiment.augmentation)
        print_warning(radius_note(recipe, overrides or [], read_space(space).parameters))
    storage = Storage.from_path(storage_dir) if cluster else Storage.open(storage_dir)

    from linflab.platform.cli.sweep_view import SweepProgress
    from linflab.platform.results.cascade import verify_run
    from linflab.platform.sweeps.plan import SweepPlan, check_name_available, parse_search_options, plan_sweep
    from linflab.platform.sweeps.run import run_sweep
    from linflab.platform.tracking.mlflow import STORE_ERRORS

    signals.watch_again()  # imported libraries may have replaced the handlers
    if not resume:
        assert recipe is not None and space is not None
        settings = {key: value for key, value in {**search_options, "seeds": seeds}.items() if value is not None}
        search = parse_search_options(budget or "20", **settings)
        name = name or f"{job_name(space)}-{time.strftime('%Y%m%d-%H%M%S')}"
        plan = plan_sweep(recipe, overrides or [], space, name, search, dataset)
    if cluster:
        options = {"budget": budget, "sampler": sampler, "objectives": objectives, "halving": halving, "seeds": seeds}
        options |= {"verify-front": verify_front, "verify-images": verify_images}
        arguments = [f"--{flag}={value}" for flag, value in options.items() if value is not None]
        arguments += ["--retry-failed"] if retry_failed else []
        _sweep_on_cluster(None if resume else plan, resume or name, space or "", arguments, storage_dir)
        return
    if resume:
        plan = SweepPlan.load(storage, resume).with_budget(budget, seeds)
        load_dataset(plan.base.dataset, plan.base.augmentation)
    else:
        check_name_available(plan, storage)
    resume_command = ["linflab", "sweep", "--resume", plan.name, *storage_options(storage)]
    hint = f"logged trials are kept; resume with `{shlex.join(resume_command)}`"
    try:
        with signals.guarded(hint):
            with SweepProgress(console) as view:
                verify = partial(verify_run, storage, plan.search.num_verify_images)
                num_failed = run_sweep(plan, storage, retry_failed, hint=hint, view=view, verify=verify)
            _finish_sweep(storage, plan.name, shlex.join(resume_command))
    except (KeyboardInterrupt, SystemExit):  # Ray may raise SystemExit
        if not (storage.sweeps / plan.name / "sweep.yaml").exists():
            raise RunInterrupted("interrupted before any trial started") from None
        raise RunInterrupted(f"interrupted; {hint}") from None
    except (InputError, TrainingError):
        raise
    except Exception as error:  # from MLflow, the disk, or Ray
        what = "tracking store unavailable" if isinstance(error, STORE_ERRORS) else "sweep stopped early"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise TrainingError(
            f"{what} ({reason}); fix the cause, then resume with `{shlex.join(resume_command)}`"
        ) from None
    if num_failed:
        raise TrainingError(
            f"{num_failed} trials failed; see the report's notes or the MLflow tag linflab.failure_reason"
        )


def _finish_sweep(storage: Storage, name: str, resume_command: str) -> None:
    """Write, print and log the report of a finished sweep, with the model and figures of the best trial."""
    from linflab.platform.results.publish import log_sweep_report
    from linflab.platform.results.report import report_sweep

    page = report_sweep(storage, name, None)
    print_sweep_page(page)
    log_optional(lambda: log_sweep_report(storage, name, page), resume_command)
    console.print(f"Open the MLflow UI with `{ui_command(storage)}`.")


def _sweep_on_cluster(plan: "SweepPlan | None", name: str, space: str, flags: list[str], storage_dir: Path) -> None:
    """Start a sweep on the cluster, or resume one if `plan` is None, and write its report on this machine."""
    from linflab.platform.cluster.head import run_on_cluster
    from linflab.platform.results.report import report_sweep
    from linflab.platform.source import package_input_file
    from linflab.platform.tracking.mlflow import wrap_errors
    from linflab.reports.records import read_sweeps

    with open_storage(storage_dir, cluster=True) as storage, wrap_errors(storage):
        existing_sweeps = read_sweeps(storage.tracking_uri)["sweep"].tolist()
    files: dict[str, str] = {}
    if plan is None:
        if name not in existing_sweeps:
            raise InputError(
                f"resume={name}: sweep not found on the cluster; available sweeps: "
                f"{', '.join(existing_sweeps) or 'none'}"
            )
        command = ["sweep", "--resume", name, *flags]
    else:
        if name in existing_sweeps:
            raise InputError(
                f"name={name}: already used by a sweep on the cluster; use another name, or resume that sweep with "
                f"`linflab sweep --resume {name} --cluster`"
            )
        recipe, own_recipe = package_input_file(plan.recipe, lambda: plan.raw_config)
        sent_space, own_space = package_input_file(
            space, lambda: plan.space.model_dump(mode="json", exclude={"include"}), other_file=recipe
        )
        files = own_recipe | own_space
        command = ["sweep", recipe, sent_space, *plan.overrides, "--name", name, *flags]
    failure: TrainingError | None = None
    try:
        run_on_cluster(command, name, files, console.width, show_output)
    except TrainingError as error:  # some trials may have results to report
        failure = error
    with open_storage(storage_dir, cluster=True) as storage:
        try:
            print_files(report_sweep(storage, name, None).files, "Report on this machine:")
        except InputError:
            if failure is None:
                raise
    if failure is not None:
        raise failure


def sweeps(storage_dir: StorageFolder = DEFAULT_STORAGE, as_json: AsJson = False, cluster: OnCluster = False) -> None:
    """List sweeps, newest first: status, number of finished trials, best validation accuracy.

    Resume a sweep with status `interrupted` (by Ctrl-C, or since its process is gone) with
    `linflab sweep --resume NAME`.
    """
    from linflab.platform.locks import file_lock
    from linflab.platform.tracking.mlflow import wrap_errors
    from linflab.reports.records import read_sweeps

    with open_storage(storage_dir, cluster) as storage, wrap_errors(storage):
        table = read_sweeps(storage.tracking_uri)
    jobs: list[str] = []
    if cluster and "running" in set(table["status"]):
        from linflab.platform.cluster.head import active_job_ids, is_job_of

        jobs = active_job_ids()
    for number, name in enumerate(table["sweep"]):
        lock = storage.sweeps / name / "lock"
        if table.loc[number, "status"] != "running":
            continue
        if cluster:  # the sweep's job may be gone
            is_running = any(is_job_of(job, name) for job in jobs)
            table.loc[number, "status"] = "running" if is_running else "interrupted"
        elif re.fullmatch(SWEEP_NAME, name) and lock.is_file():  # stored names may be invalid
            # If the lock is not accessible, as in another user's storage, the stored status is kept.
            with suppress(OSError), file_lock(lock) as free:
                table.loc[number, "status"] = "interrupted" if free else "running"
    print_run_table(table, ("best_val_certified",), as_json)
