"""`linflab slurm`: batch scripts for Slurm."""

import shlex
import time as clock
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from linflab.platform.cli.options import job_name
from linflab.platform.cli.output import console
from linflab.platform.cli.sweep import sweep
from linflab.platform.cli.train import train
from linflab.platform.cluster.slurm import TASK, Allocation, Job, log_file, submit, write_script
from linflab.platform.errors import InputError
from linflab.platform.tracking.storage import Storage

if TYPE_CHECKING:
    from linflab.platform.data.datasets import Dataset

RESUBMIT = "submit the script again"
SEARCH_OPTIONS = ("sampler", "halving", "seeds", "verify_front", "verify_images")
slurm_app = typer.Typer(
    help="Write or submit a batch script that trains or sweeps on nodes of a Slurm cluster.", no_args_is_help=True
)
_parsers = typer.Typer()  # parses the arguments of the batch job's command
_parsers.command("train")(train)
_parsers.command("sweep")(sweep)

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
Nodes = Annotated[int, typer.Option(min=1, help="Number of nodes; with several, Ray connects them")]
Gpus = Annotated[int, typer.Option(min=0, help="GPUs of each node")]
Cpus = Annotated[
    int | None,
    typer.Option(
        min=1, help="CPUs of each node; default: whole nodes. Several nodes are always used as a whole", metavar="CPUS"
    ),
]
Time = Annotated[str, typer.Option(metavar="HH:MM:SS", help="Time limit, also D-HH:MM:SS")]
Account = Annotated[str, typer.Option(help="Slurm account that is charged")]
Partition = Annotated[str, typer.Option(help="Slurm partition")]
Array = Annotated[
    str,
    typer.Option(
        metavar="SETTING=NUMBERS",
        help="Array job with one task per number, such as seed=0-4 or model.width=64,128. Without "
        "LINFLAB_TRACKING_URI, task 3 logs to seed-3/ in the storage directory",
    ),
]
Sbatch = Annotated[
    list[str] | None,
    typer.Option("--sbatch", metavar="OPTION", help="Other option of sbatch, such as mem=64G; may be repeated"),
]
StopBefore = Annotated[
    int,
    typer.Option(
        min=30, metavar="SECONDS", help="Time before the time limit at which the command writes its state and stops"
    ),
]
MaxRequeues = Annotated[
    int, typer.Option(min=0, help="Number of times that a job is requeued at its time limit, to resume")
]
Submit = Annotated[bool, typer.Option("--submit", help="Submit the script with sbatch")]


@slurm_app.command("train", context_settings=PASS_ON)
def slurm_train(
    arguments: Annotated[list[str], typer.Argument(help="Arguments and options of `linflab train`")],
    time: Time,
    nodes: Nodes = 1,
    gpus_per_node: Gpus = 0,
    cpus_per_node: Cpus = None,
    account: Account = "",
    partition: Partition = "",
    array: Array = "",
    sbatch: Sbatch = None,
    stop_before: StopBefore = 120,
    max_requeues: MaxRequeues = 20,
    submit_job: Submit = False,
) -> None:
    """Write a batch script for `linflab train`, and submit it with `--submit`.

    The command writes its state before the time limit, the job is requeued, and it resumes. The storage directory, the
    datasets and this installation must be on a file system that all nodes share.
    """
    from linflab.platform.trial import default_run_name

    options = _sbatch_options(account, partition, sbatch)
    allocation = Allocation(nodes, gpus_per_node, cpus_per_node, time, stop_before, max_requeues, array, options)
    settings = _parse("train", arguments)
    for task in allocation.tasks or (None,):
        override = [] if task is None else [f"{allocation.setting}={task}"]
        _check_experiment(settings["recipe"], [*(settings["overrides"] or []), *override], allocation)
    command = ("train", *arguments, *_task_override(allocation))
    # The first start of another job with this script trains a new run, unless the command itself resumes.
    resume, advice = (*command, "--resume"), "add --resume to the command linflab slurm train, and submit its script"
    if settings["resume"]:
        resume, advice = command, RESUBMIT
    name = settings["name"] or default_run_name(settings["recipe"], settings["overrides"] or [])
    job = _job(settings, name, command, resume, '[ "${SLURM_RESTART_COUNT:-0}" != 0 ]', advice)
    _write(replace(job, resumes_own_runs=not settings["resume"]), allocation, submit_job)


@slurm_app.command("sweep", context_settings=PASS_ON)
def slurm_sweep(
    arguments: Annotated[list[str], typer.Argument(help="Arguments and options of `linflab sweep`")],
    time: Time,
    nodes: Nodes = 1,
    gpus_per_node: Gpus = 0,
    cpus_per_node: Cpus = None,
    account: Account = "",
    partition: Partition = "",
    array: Array = "",
    sbatch: Sbatch = None,
    stop_before: StopBefore = 120,
    max_requeues: MaxRequeues = 20,
    submit_job: Submit = False,
) -> None:
    """Write a batch script for `linflab sweep`, and submit it with `--submit`.

    The trials run on all nodes. They keep their checkpoints at the time limit, the job is requeued, and the sweep
    resumes. The storage directory, the datasets and this installation must be on a file system that all nodes share.
    """
    options = _sbatch_options(account, partition, sbatch)
    allocation = Allocation(nodes, gpus_per_node, cpus_per_node, time, stop_before, max_requeues, array, options)
    settings = _parse("sweep", arguments)
    name, command = settings["resume"], ("sweep", *arguments)
    if not name:
        name = _check_sweep(settings, allocation)
        task_name = f"{name}-{TASK}" if array else name
        command = (*_without_name(command), *_task_override(allocation), "--name", task_name)
        resume: tuple[str, ...] = ("sweep", "--resume", task_name)
        is_started = f'[ -e "$storage/sweeps/{task_name}/sweep.yaml" ]'
    elif array:
        raise InputError(f"array={array}: is not supported with --resume {name}; submit one job per sweep")
    else:
        resume, is_started = command, "false"
    _write(_job(settings, name, command, resume, is_started, RESUBMIT), allocation, submit_job)


def _without_name(command: Sequence[str]) -> list[str]:
    """Return the words of a command without the option --name and its value."""
    words, rest = [], iter(command)
    for word in rest:
        if word == "--name":
            next(rest)
        elif not word.startswith("--name="):
            words.append(word)
    return words


def _sbatch_options(account: str, partition: str, others: list[str] | None) -> tuple[str, ...]:
    named = {"account": account, "partition": partition}
    return (*(f"{name}={value}" for name, value in named.items() if value), *(others or []))


def _parse(name: str, arguments: list[str]) -> dict[str, Any]:
    """Return the parameters of a linflab command by name, and reject those that a batch job does not support."""
    group = typer.main.get_command(_parsers)
    assert isinstance(group, TyperGroup)
    settings = group.commands[name].make_context(f"linflab slurm {name}", list(arguments)).params
    for option in ("cluster", "dry_run"):
        if settings.get(option):
            raise InputError(f"{option.replace('_', '-')}: is not supported in a batch job; leave it out")
    return settings


def _first_task(allocation: Allocation) -> list[str]:
    """Return the override of an array job's first task, for a check of the config."""
    return [f"{allocation.setting}={task}" for task in allocation.tasks[:1]]


def _task_override(allocation: Allocation) -> list[str]:
    return [f"{allocation.setting}={TASK}"] if allocation.array else []


def _check_experiment(recipe: str, overrides: list[str], allocation: Allocation) -> "Dataset":
    """Check a config, and return its dataset; download the dataset here, since compute nodes may lack internet access.

    Raises:
        InputError: If the config is not valid, or requires more CPUs or GPUs than the job has.
    """
    from linflab.platform.config.overrides import load_config
    from linflab.platform.data.datasets import load_dataset
    from linflab.platform.training.trainer import check_dataset_compatibility

    experiment = load_config(recipe, overrides)
    workers, gpus = experiment.compute.workers, allocation.nodes * allocation.gpus_per_node
    cpus, cpus_per_node = experiment.compute.cpus_per_worker, allocation.cpus_per_node
    if cpus_per_node is not None and not allocation.uses_whole_nodes and cpus > cpus_per_node:
        raise InputError(
            f"compute.cpus_per_worker={cpus}: must be at most cpus-per-node={cpus_per_node}, since a worker has one "
            "node; use fewer CPUs per worker, or more per node"
        )
    if gpus and workers > gpus:
        raise InputError(
            f"compute.workers={workers}: requires a GPU per worker, but the job has {gpus}; use more nodes"
        )
    dataset = load_dataset(experiment.dataset, experiment.augmentation)
    check_dataset_compatibility(experiment, dataset, on_this_machine=False)
    return dataset


def _check_sweep(settings: dict[str, Any], allocation: Allocation) -> str:
    """Check the settings of a sweep, and return its name."""
    from linflab.platform.sweeps.plan import check_name_available, parse_search_options, plan_sweep

    recipe, space, overrides = settings["recipe"], settings["space"], settings["overrides"] or []
    if recipe is None or space is None:
        raise InputError("slurm sweep: requires a recipe and a search space; add both, or use --resume NAME")
    search_options = {name: settings[name] for name in SEARCH_OPTIONS if settings[name] is not None}
    if settings["objectives"]:
        search_options["objectives"] = settings["objectives"].split(",")
    search = parse_search_options(settings["budget"] or "20", **search_options)
    name = settings["name"] or f"{job_name(space)}-{clock.strftime('%Y%m%d-%H%M%S')}"
    overrides = [*overrides, *_first_task(allocation)]
    plan = plan_sweep(recipe, overrides, space, name, search, _check_experiment(recipe, overrides, allocation))
    if not allocation.array:
        check_name_available(plan, Storage.open(settings["storage_dir"]))
    return name


def _job(
    settings: dict[str, Any], name: str, command: tuple[str, ...], resume: tuple[str, ...], is_started: str, advice: str
) -> Job:
    from linflab.platform.data.datasets import data_dir

    storage = Storage.open(settings["storage_dir"])
    name = job_name(name.replace("/", "_")) or "job"  # a slash in a name, such as eps=8/255, is not a path
    return Job(name, storage.root, storage.tracking_server, data_dir(), command, resume, is_started, advice)


def _write(job: Job, allocation: Allocation, submit_job: bool) -> None:
    """Write the batch script, and submit it if wanted; print how to watch the job."""
    script = write_script(job, allocation)
    if not submit_job:
        console.print(f"Wrote {script}. Submit it with `sbatch {shlex.quote(str(script))}`.")
        return
    number = submit(script)
    console.print(
        f"Submitted job {number}. Stop it with `scancel {number}`. Output: {log_file(job, allocation, number)}"
    )
