"""`linflab report`: tables and figures of runs."""

import shlex
from contextlib import nullcontext
from typing import Annotated

import typer

from linflab.platform.cli.options import (
    DEFAULT_STORAGE,
    OnCluster,
    OutFolder,
    StorageFolder,
    open_storage,
    open_storage_if_exists,
    storage_options,
)
from linflab.platform.cli.output import console, print_files, print_page, print_sweep_page
from linflab.platform.errors import InputError
from linflab.platform.source import is_cluster_job
from linflab.platform.tracking.storage import Storage
from linflab.reports.papers import list_tables, table_title

report_app = typer.Typer(help="Write tables and figures of runs.", no_args_is_help=True)


@report_app.callback(invoke_without_command=True)
def report(
    context: typer.Context,
    all_reports: Annotated[
        bool, typer.Option("--all", help="Report all tables, all sweeps and all runs in tables, with an index page")
    ] = False,
    storage_dir: StorageFolder = DEFAULT_STORAGE,
    out: OutFolder = None,
    cluster: OnCluster = False,
) -> None:
    """Write tables and figures of measured and quoted results, as Markdown, LaTeX, HTML and CSV."""
    for name, option in (("storage_dir", "storage"), ("out", "output-dir"), ("cluster", "cluster")):
        source = context.get_parameter_source(name)
        if context.invoked_subcommand is not None and source is not None and source.name == "COMMANDLINE":
            raise InputError(
                f"{option}: is not supported before the command {context.invoked_subcommand}; use --{option} after the "
                "command, or with --all"
            )
    if context.invoked_subcommand is None and not all_reports:
        typer.echo(context.get_help())
    elif context.invoked_subcommand is None:
        from linflab.platform.results.report import report_all

        with open_storage_if_exists(storage_dir, cluster) as storage:
            print_files(report_all(storage, out), "Index of all reports:")
    elif all_reports:
        raise InputError(
            f"all: is not supported with the command {context.invoked_subcommand}; use `linflab report --all`"
        )


@report_app.command("sweep")
def report_sweep(
    name: Annotated[str, typer.Argument(help="Sweep name")],
    storage_dir: StorageFolder = DEFAULT_STORAGE,
    out: OutFolder = None,
    cluster: OnCluster = False,
) -> None:
    """Report a sweep: one row per trial, sorted by the first objective on the validation split."""
    from linflab.platform.results.report import report_sweep

    with open_storage(storage_dir, cluster) as storage:
        print_sweep_page(report_sweep(storage, name, out))


@report_app.command("run")
def report_run(
    run: Annotated[str, typer.Argument(help="Run name, id, or prefix of an id")],
    storage_dir: StorageFolder = DEFAULT_STORAGE,
    out: OutFolder = None,
    cluster: OnCluster = False,
) -> None:
    """Report a run: its table row, learning curves and certificates."""
    from linflab.platform.results.report import has_weights, report_run

    with open_storage(storage_dir, cluster) as storage:
        page = report_run(storage, run, out)
        print_page(page)
        has_radii = any(path.stem.endswith("certified_accuracy") for path in page.files)
        can_add_radii = not has_radii and not cluster and not is_cluster_job() and has_weights(storage, page)
    if can_add_radii:
        command = shlex.join(["linflab", "evaluate", run, *storage_options(storage), "--radii-dir"])
        console.print(f"The run has no figures of certified radii; draw them with `{command} DIRECTORY`.")


@report_app.command("bound")
def report_bound(
    run: Annotated[str, typer.Argument(help="Run name, id, or prefix of an id")],
    images: Annotated[
        int | None, typer.Option(help="Number of training images to use, the first ones; all by default")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Probability with which the bound holds")] = 0.95,
    storage_dir: StorageFolder = DEFAULT_STORAGE,
    out: OutFolder = None,
    cluster: OnCluster = False,
) -> None:
    """Bound the robust test error of a distance net from its margins on training images."""
    from linflab.platform.results.bound import report_bound

    with open_storage(storage_dir, cluster) as storage:
        print_page(report_bound(storage, run, images, confidence, out))


@report_app.command("compare")
def report_compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN_OR_SWEEP", help="Run ids, run names or sweep names")],
    quoted: Annotated[bool, typer.Option(help="Include quoted results for the same dataset and eps")] = True,
    storage_dir: StorageFolder = DEFAULT_STORAGE,
    out: OutFolder = None,
    cluster: OnCluster = False,
) -> None:
    """Compare runs, and the best trials of sweeps with all their seeds."""
    from linflab.platform.results.report import report_comparison

    with open_storage(storage_dir, cluster) as storage:
        print_page(report_comparison(storage, names, quoted, out))


@report_app.command("table")
def report_table(
    file: Annotated[str, typer.Argument(help="YAML file of a table, or name of a shipped table")],
    storage_dir: StorageFolder = DEFAULT_STORAGE,
    out: OutFolder = None,
    cluster: OnCluster = False,
) -> None:
    """Write a table defined by a YAML file: its datasets, methods, columns and quoted rows."""
    from linflab.platform.results.report import load_table_definition, report_table

    definition = load_table_definition(file)
    if definition.runs_file is not None and cluster:
        raise InputError(
            f"cluster: is not supported for table={file}, whose runs are in {definition.runs_file}; leave it out"
        )
    # A table of exported runs reads them from its own file, so it needs no storage.
    context = (
        open_storage_if_exists(storage_dir, cluster)
        if definition.runs_file is None
        else nullcontext(Storage.from_path(storage_dir))
    )
    with context as storage:
        print_page(report_table(storage, file, definition, out))


def _add_shipped_table(name: str) -> None:
    @report_app.command(name, help=f"Write the shipped table: {table_title(name)}.")
    def command(
        storage_dir: StorageFolder = DEFAULT_STORAGE, out: OutFolder = None, cluster: OnCluster = False
    ) -> None:
        report_table(name, storage_dir, out, cluster)


for _name in list_tables():
    _add_shipped_table(_name)
