"""`linflab train`."""

import os
import shlex
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from linflab.platform import signals
from linflab.platform.cli.options import (
    DEFAULT_STORAGE,
    OnCluster,
    Overrides,
    Recipe,
    StorageFolder,
    Tags,
    job_name,
    parse_tags,
    storage_options,
)
from linflab.platform.cli.output import console, log_optional, print_warning, show_output, ui_command
from linflab.platform.errors import InputError, RunInterrupted, WorkerLostError
from linflab.platform.source import is_cluster_job
from linflab.platform.tracking.storage import Storage

if TYPE_CHECKING:
    from linflab.platform.config.experiment import ExperimentConfig
    from linflab.platform.data.datasets import Dataset
    from linflab.platform.training.estimate import StepTime
    from linflab.platform.trial import TrialRequest, TrialResult

SLURM_JOB_VAR = "LINFLAB_SLURM_JOB"  # set by a batch script; a requeued job then resumes only its own run


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    storage_dir: StorageFolder = DEFAULT_STORAGE,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Resume the latest run with these settings, or complete its evaluation and figures"
        ),
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="With --resume: train again if the latest run has finished")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate time and memory from a few steps, without training or logging")
    ] = False,
    name: Annotated[str, typer.Option(help="Name of the run; default: the recipe and its overrides")] = "",
    tag: Tags = None,
    cluster: OnCluster = False,
) -> None:
    """Train a recipe, evaluate it on the test set, and log the run to MLflow."""
    if dry_run and (resume or again):
        raise InputError(f"dry-run: is not supported with {'--resume' if resume else '--again'}; leave one of them out")
    own_tags = parse_tags(tag)
    with console.status("Loading PyTorch ..."):
        from linflab.platform.config.overrides import load_config, radius_note, read_recipe
        from linflab.platform.data.datasets import load_dataset

        experiment = load_config(recipe, overrides or [])
    print_warning(radius_note(recipe, overrides or []))
    if cluster:
        if dry_run:
            raise InputError("dry-run: is not supported with --cluster; leave one of them out")
        from linflab.platform.cluster.head import run_on_cluster
        from linflab.platform.source import package_input_file

        sent_recipe, files = package_input_file(recipe, lambda: read_recipe(recipe))
        flags = [flag for flag, is_set in (("--resume", resume), ("--again", again)) if is_set]
        flags += [f"--name={name}"] if name else []
        flags += [f"--tag={key}={value}" for key, value in own_tags.items()]
        sent_command = ["train", sent_recipe, *(overrides or []), *flags]
        run_on_cluster(sent_command, job_name(recipe), files, console.width, show_output)
        return
    with console.status(f"Opening {experiment.dataset} ..."):
        dataset = load_dataset(experiment.dataset, experiment.augmentation)
    if dry_run:
        print_estimate(experiment, dataset)
        return
    storage = Storage.open(storage_dir)

    with console.status("Loading MLflow ..."):
        from linflab.platform.training.trainer import check_dataset_compatibility
        from linflab.platform.trial import TrialRequest, default_run_name, find_resumable_run, train_command
        from linflab.reports import schema

        signals.watch_again()  # imported libraries may have replaced the handlers
    check_dataset_compatibility(experiment, dataset)
    command = train_command(recipe, overrides or [])
    user_tags = {schema.USER_TAG + key: value for key, value in own_tags.items()}
    tags = {
        schema.KIND: "trial",
        schema.INVOCATION_ID: uuid.uuid4().hex,
        schema.RECIPE: recipe,
        schema.COMMAND: command,
        schema.MISSING: "model and figures",  # until they are logged
        **({schema.SLURM_JOB: slurm_job} if (slurm_job := os.environ.get(SLURM_JOB_VAR, "")) else {}),
        **user_tags,
    }
    given_name, name = name, name or default_run_name(recipe, overrides or [])
    if not resume:
        print_warning(_note_on_name(storage, name))
    resume_command = " ".join([command, *map(shlex.quote, storage_options(storage)), "--resume"])
    try:
        with signals.guarded(f"resume with `{resume_command}`"):
            earlier_run = find_resumable_run(storage, experiment, slurm_job=slurm_job) if resume else None
            if earlier_run is not None and earlier_run.is_finished and again:
                earlier_run = None
            run = earlier_run.result.run_id if earlier_run else None
            if run is not None:
                _set_tags(storage, run, {**user_tags, **({schema.NAME: given_name} if given_name else {})})
            if earlier_run is not None and earlier_run.is_finished:
                console.print(f"Run {run} has finished already. Train again with `{resume_command} --again`.")
                result = earlier_run.result
            else:
                if resume:
                    console.print(f"Resuming run {run}." if run else "No interrupted run found; starting a new run.")
                request = TrialRequest(experiment, storage, name, tags, resume_run_id=run)
                result = train_request(request, f"resume with `{resume_command}`")
            _show_training(storage, experiment, result, resume_command)
    except (KeyboardInterrupt, SystemExit, RunInterrupted, WorkerLostError) as error:
        reason = str(error) if isinstance(error, RunInterrupted | WorkerLostError) else "interrupted"
        raise RunInterrupted(
            f"{reason}; logged metrics are kept; resume from the last checkpoint with `{resume_command}`"
        ) from None


def train_request(request: "TrialRequest", hint: str) -> "TrialResult":
    """Train a request with a progress line, in this process or on Ray workers, and return its result.

    Ray starts if the config requires it, and then runs until this process ends.

    Args:
        request: Config and run to train; its tags include `schema.INVOCATION_ID`.
        hint: Text for the line that is printed if Ray stops: how to resume.

    Raises:
        InputError: If the machine or cluster is too small, or another process trains the run.
        TrainingError: If training failed.
        RunInterrupted: If a signal stopped the run.
    """
    from linflab.platform.cli.progress import TrainingProgress
    from linflab.platform.distributed.address import needs_ray
    from linflab.platform.tracking.mlflow import retrying_client
    from linflab.platform.tracking.runs import terminate_open_runs
    from linflab.platform.trial import check_local_resources, checkpoint_store, run_trial
    from linflab.reports import schema

    experiment, storage, invocation = request.experiment, request.storage, request.tags[schema.INVOCATION_ID]
    on_ray = needs_ray(experiment) or is_cluster_job()
    run_training: Callable[..., TrialResult | None] = run_trial
    watcher: AbstractContextManager[None] = nullcontext()
    if on_ray:
        with console.status("Starting Ray ..."):
            from linflab.platform.distributed.train import start_ray, train_distributed, wait_for_nodes
            from linflab.platform.distributed.watch import watch_ray

            signals.watch_again()
            start_ray()
        wait_for_nodes(experiment, console.print)
        run_training = train_distributed
        if request.resume_run_id:
            with checkpoint_store(storage, request.resume_run_id).lock():
                pass  # another process may be training the run, which then must keep its tag
            # `terminate_open_runs` finds runs by this tag.
            retrying_client(storage).set_tag(request.resume_run_id, schema.INVOCATION_ID, invocation)
        watcher = watch_ray(hint, partial(terminate_open_runs, storage, invocation), 130)
    else:
        check_local_resources(experiment)
    try:
        with watcher, TrainingProgress(console, experiment) as bar:
            result = run_training(request, bar.on_report)
    finally:
        if on_ray:
            terminate_open_runs(storage, invocation)  # killed workers leave their runs open
    assert result is not None  # only workers other than the first return None
    return result


def _set_tags(storage: Storage, run: str, tags: Mapping[str, str]) -> None:
    """Add tags that the user has given to a run that existed before."""
    from linflab.platform.tracking.mlflow import retrying_client

    for key, value in tags.items():
        retrying_client(storage).set_tag(run, key, value)


def _note_on_name(storage: Storage, name: str) -> str | None:
    """Return a warning if the storage has a run with this name; None if it has none, or cannot be read."""
    from linflab.platform.tracking.mlflow import STORE_ERRORS
    from linflab.reports import schema
    from linflab.reports.records import read_runs

    with suppress(*STORE_ERRORS):
        if len(read_runs(storage.tracking_uri, {schema.KIND: "trial", schema.NAME: name})):
            return (
                f"name={name}: is the name of another run, so commands will require ids; use another --name, "
                "or --resume if the settings are the same"
            )
    return None


def _show_training(
    storage: Storage, experiment: "ExperimentConfig", result: "TrialResult", resume_command: str
) -> None:
    """Print the test accuracies of a run, log its model and figures, and print its id."""
    from linflab.platform.trial import describe_selection
    from linflab.reports import schema
    from linflab.reports.tables import format_eps

    metrics, run_id = result.metrics, result.run_id

    def log_artifacts() -> None:
        from linflab.platform.results.publish import log_model_and_figures  # imports Matplotlib

        log_model_and_figures(storage, run_id)

    clean, robust, certified = (
        f"{100 * metrics[name]:.2f}%" for name in (schema.TEST_CLEAN, schema.TEST_ROBUST, schema.TEST_CERTIFIED)
    )
    console.print(
        f"Test set, eps={format_eps(experiment.eps)}: clean {clean}, robust {robust}, certified {certified} "
        f"({result.certificate}). Selected epoch {metrics[schema.BEST_EPOCH]:g} ({describe_selection(experiment)})."
    )
    if experiment.eps > 0 and metrics[schema.TEST_CLEAN] == metrics[schema.TEST_CERTIFIED] <= 0.5:
        console.print(
            "All images that are classified correctly are certified: the network may be constant; see "
            "docs/about/troubleshooting.md."
        )
    with console.status("Logging model and figures ..."):
        log_optional(log_artifacts, resume_command)
    hint = (
        ""
        if is_cluster_job()
        else f" Evaluate again with `{shlex.join(['linflab', 'evaluate', run_id, *storage_options(storage)])}`."
    )
    console.print(f"Logged run {run_id} to {storage.location}.{hint}")
    console.print(f"Open the MLflow UI with `{ui_command(storage)}`.")


def print_estimate(experiment: "ExperimentConfig", dataset: "Dataset") -> None:
    """Time a few training steps, and print the estimated time and memory of a run.

    Raises:
        InputError: If config and dataset are incompatible, or a step does not fit into memory.
    """
    from linflab.platform.host import describe_hardware
    from linflab.platform.training.estimate import estimate_cost
    from linflab.platform.training.trainer import check_dataset_compatibility
    from linflab.platform.trial import check_local_resources, select_device

    check_local_resources(experiment)
    check_dataset_compatibility(experiment, dataset)
    load = os.getloadavg()[0]
    with_p = experiment.model.has_distances

    def show(step: "StepTime") -> None:
        console.print(f"{f'{step.at.p:<6.4g}  ' if with_p else ''}{step.seconds:.4g}")

    console.print("Timing training steps, then evaluation; this takes about half a minute.")
    console.print(f"{'p       ' if with_p else ''}seconds per step")
    try:
        estimate = estimate_cost(experiment, dataset.to(select_device(experiment)), show)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        raise InputError(
            f"training.batch_size={experiment.training.batch_size}: requires more memory than this machine has "
            f"({' '.join(str(error).split())[:200]}); use a smaller batch or network"
        ) from None
    total_hours = estimate.training_hours + estimate.evaluation_hours
    unit, per_hour = ("hours", 1) if total_hours > 0.1 else ("seconds", 3600)
    hours, steps, evaluation = (
        part * per_hour for part in (total_hours, estimate.training_hours, estimate.evaluation_hours)
    )
    console.print(
        f"\nAbout {hours:.3g} {unit} ({steps:.3g} training, {evaluation:.3g} evaluation) and "
        f"{estimate.memory / 2**30:.2g} GiB, on {describe_hardware()}."
    )
    if estimate.timed_images < estimate.batch_images:
        console.print(
            f"Timed steps used at most {estimate.timed_images} of the {estimate.batch_images} images of a batch; time "
            "and memory are extrapolated."
        )
    print_load(load)
    if experiment.compute.workers > 1:
        console.print(f"One of {experiment.compute.workers} workers was timed, without communication between workers.")


def print_load(load: float) -> None:
    """Print a note if other processes kept the machine busy before an estimate; `load` is the load average."""
    if load > 1:
        console.print(
            f"The estimate is for an idle machine. The load average of the last minute is {load:.0f}, so the run takes "
            "longer while the other processes continue."
        )
