"""`linflab data`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from linflab.platform.cli.options import AsJson
from linflab.platform.cli.output import console, print_rows

data_app = typer.Typer(help="List and prepare datasets.", no_args_is_help=True)


@data_app.command("list")
def data_list(as_json: AsJson = False) -> None:
    """List datasets with size, location, and whether the images have the published means."""
    from linflab.platform.data.datasets import list_datasets

    rows = [dataclasses.asdict(entry) for entry in list_datasets()]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        row["images"] = "" if row["train"] is None else "{train} + {validation} + {test}".format(**row)
        row["shape"] = "" if row["shape"] is None else " x ".join(map(str, row["shape"]))
        row["mean"] = "" if row["mean"] is None else " ".join(f"{mean:.4f}" for mean in row["mean"])
        row["classes"] = row["classes"] or ""
    console.print("images: training + validation + test")
    print_rows(rows, ["name", "images", "shape", "classes", "mean", "state", "location"], as_json=False)


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="Dataset name")],
    source: Annotated[
        Path | None, typer.Option(help="Directory or file with the raw files; default: download them")
    ] = None,
) -> None:
    """Convert a dataset's raw files to the arrays that training reads, downloading them if needed."""
    from linflab.platform.data.datasets import prepare_dataset

    console.print(f"Prepared {name} in {prepare_dataset(name, source)}")
