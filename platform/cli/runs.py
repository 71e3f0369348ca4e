"""`linflab runs`, with the commands `export` and `import`."""

from pathlib import Path
from typing import Annotated

import typer

from linflab.platform.cli.options import (
    DEFAULT_STORAGE,
    AsJson,
    OnCluster,
    StorageFolder,
    open_storage,
    parse_filters,
    parse_tags,
)
from linflab.platform.cli.output import console, print_run_table
from linflab.platform.tracking.storage import Storage

runs_app = typer.Typer()
MAX_SHOWN_SETTINGS = 8  # per run


@runs_app.callback(invoke_without_command=True)
def runs(
    context: typer.Context,
    storage_dir: StorageFolder = DEFAULT_STORAGE,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Only runs with this value in a column or setting, such as status=finished or model.width=64; may be "
            "repeated",
        ),
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", metavar="KEY=VALUE", help="Only runs with this user tag; repeatable")
    ] = None,
    as_json: AsJson = False,
    cluster: OnCluster = False,
) -> None:
    """List runs, newest first, with the ids that `evaluate` and `report` accept, and their accuracies.

    Column `settings` shows those that differ between runs of one method, dataset and eps. Accuracies are in percent:
    `val_certified` on the validation split; `clean`, `robust` and `test_certified` on the test set. An interrupted
    run may keep the status `running` until it is resumed.
    """
    if context.invoked_subcommand:
        return
    filters, tags = parse_filters(where), parse_tags(tag)
    from linflab.platform.tracking.mlflow import wrap_errors
    from linflab.reports.formatting import describe_settings
    from linflab.reports.records import list_runs
    from linflab.reports.tables import format_eps

    with open_storage(storage_dir, cluster) as storage, wrap_errors(storage):
        table = list_runs(storage.tracking_uri, filters, tags)
    if not as_json:
        table["run"] = table["run"].map(lambda run: run[:8])
        table["eps"] = table["eps"].map(format_eps)
        table["tags"] = table["tags"].map(lambda tags: " ".join(f"{key}={value}" for key, value in tags.items()))
        table["settings"] = table["settings"].map(
            lambda settings: (
                describe_settings(dict(list(settings.items())[:MAX_SHOWN_SETTINGS]))
                + (", ..." if len(settings) > MAX_SHOWN_SETTINGS else "")
            )
        )
        order = [
            "run",
            "method",
            "settings",
            "val_certified",
            "clean",
            "robust",
            "test_certified",
            "status",
            "start_time",
            "dataset",
        ]
        table = table[[*order, "eps", "sweep", "trial", "tags", "name"]]
        # Drop empty optional columns.
        table = table[[name for name in table if name in order or (table[name] != "").any() or table.empty]]
    print_run_table(table, ("val_certified", "clean", "robust", "test_certified"), as_json)


@runs_app.command("export")
def runs_export(
    file: Annotated[Path, typer.Argument(help="JSONL file to write")],
    names: Annotated[list[str] | None, typer.Argument(help="Runs and sweeps to export; default: all")] = None,
    storage_dir: StorageFolder = DEFAULT_STORAGE,
    cluster: OnCluster = False,
) -> None:
    """Export runs without weights to a JSONL file, from which tables can be made."""
    from linflab.platform.tracking.export import export_runs
    from linflab.platform.tracking.mlflow import wrap_errors

    with open_storage(storage_dir, cluster) as storage, wrap_errors(storage):
        count, num_excluded = export_runs(storage, names or [], file)
    console.print(
        f"Exported {count} runs to {file}; import them into another storage with `linflab runs import {file}`."
    )
    if num_excluded:
        console.print(f"Excluded {num_excluded} runs that have not ended, or whose sweep has not ended.")


@runs_app.command("import")
def runs_import(
    file: Annotated[Path, typer.Argument(help="JSONL file written by `linflab runs export`")],
    storage_dir: StorageFolder = DEFAULT_STORAGE,
) -> None:
    """Import runs from a JSONL file, except those that the storage already has."""
    from linflab.platform.tracking.export import import_runs
    from linflab.platform.tracking.mlflow import wrap_errors

    storage = Storage.open(storage_dir)
    with wrap_errors(storage):
        counts = import_runs(storage, file)
    console.print(f"Imported {counts.imported} runs into {storage.location}; {counts.present} were already there.")
    if counts.outdated:
        console.print(
            f"{counts.outdated} of these were imported before and have other results in the file. They are not "
            "changed; to replace them, delete them in the MLflow UI and import the file again."
        )
