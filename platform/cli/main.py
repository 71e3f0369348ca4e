"""The `linflab` command.

The exit status is 0 after success, 1 if training failed, 2 if the input is invalid and nothing was started, and 130
after an interruption.
"""

import io
import sys
from typing import Annotated

import typer

from linflab.platform import signals
from linflab.platform.cli.compare import compare
from linflab.platform.cli.data import data_app
from linflab.platform.cli.describe import describe, json_schema, recipes, space_app
from linflab.platform.cli.doctor import doctor
from linflab.platform.cli.ensemble import ensemble
from linflab.platform.cli.evaluate import certify, evaluate, import_weights
from linflab.platform.cli.exchange import export, pull, push
from linflab.platform.cli.node import node_app
from linflab.platform.cli.report import report_app
from linflab.platform.cli.runs import runs_app
from linflab.platform.cli.slurm import slurm_app
from linflab.platform.cli.sweep import sweep, sweeps
from linflab.platform.cli.train import train
from linflab.platform.cli.ui import ui
from linflab.platform.errors import InputError, RunInterrupted, TrainingError
from linflab.platform.extras import missing_extra
from linflab.platform.source import linflab_version, verify_source_hash
from linflab.reports.plain import one_line

# PyTorch, Ray, MLflow and pandas take seconds to import, so each command imports only those that it needs. The
# slowest ones are imported after validation of the input.

GUIDES = {  # page of each command, which its help names
    "train": "how-to/train.md",
    "compare": "how-to/compare.md",
    "ensemble": "how-to/ensemble.md",
    "sweep": "how-to/sweep.md",
    "sweeps": "how-to/sweep.md",
    "recipes": "how-to/networks-and-objectives.md",
    "describe": "how-to/train.md",
    "evaluate": "how-to/evaluate.md",
    "certify": "how-to/evaluate.md",
    "export": "how-to/export.md",
    "push": "how-to/export.md",
    "pull": "how-to/export.md",
    "doctor": "how-to/install.md",
    "ui": "how-to/report.md",
    "schema": "how-to/search-spaces.md",
    "import-weights": "how-to/evaluate.md",
    "space": "how-to/search-spaces.md",
    "data": "how-to/data.md",
    "report": "how-to/report.md",
    "runs": "how-to/report.md",
    "slurm": "how-to/slurm.md",
    "node": "how-to/cluster.md",
}


def _guide(name: str) -> str:
    return f"Guide: docs/{GUIDES[name]}"


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
for command in (
    train, compare, ensemble, sweep, sweeps, recipes, describe, evaluate, certify, export, push, pull, ui, doctor,
):  # fmt: skip
    app.command(epilog=_guide(command.__name__))(command)
app.command("schema", epilog=_guide("schema"))(json_schema)
app.command("import-weights", epilog=_guide("import-weights"))(import_weights)
for name, group in {
    "space": space_app,
    "data": data_app,
    "report": report_app,
    "runs": runs_app,
    "slurm": slurm_app,
    "node": node_app,
}.items():
    app.add_typer(group, name=name, epilog=_guide(name))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"linflab {linflab_version()}")
        raise typer.Exit


@app.callback()
def linflab(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit")
    ] = False,
) -> None:
    """Train, certify and compare image classifiers that are provably robust to l_inf perturbations.

    The environment variable LINFLAB_IMPORT names modules, separated by commas, that register networks, objectives,
    certifiers or attacks of your own. Sweeps, workers and jobs import them too.
    """


def main() -> None:
    """Run the command, and print each expected error as one line.

    Raises:
        SystemExit: With the exit status of the command.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape what the terminal cannot encode
            stream.reconfigure(errors="backslashreplace")
    try:
        verify_source_hash()
        app()
    except SystemExit as error:
        if error.code == signals.INTERRUPTED:  # Typer's status for an uncaught KeyboardInterrupt
            sys.stderr.write("linflab: interrupted\n")
        raise
    except (InputError, TrainingError, RunInterrupted) as error:
        sys.stderr.write(f"linflab: {one_line(str(error))}\n")
        status = 2 if isinstance(error, InputError) else 130 if isinstance(error, RunInterrupted) else 1
        raise SystemExit(status) from None
    except ImportError as error:
        is_stale = error.name == "kernels of other sources"  # name set by models.distance.cpu, slow to import
        if (line := str(error) if is_stale else missing_extra(error)) is None:
            raise
        sys.stderr.write(f"linflab: {one_line(line)}\n")
        raise SystemExit(2) from None
    except Exception as error:
        if not _is_store_error(error):
            raise
        reason = " ".join(str(error).split())[:300]
        sys.stderr.write(
            f"linflab: tracking store unavailable ({reason}); logged metrics are kept; fix the cause, then rerun\n"
        )
        raise SystemExit(1) from None


def _is_store_error(error: Exception) -> bool:
    """Return True if MLflow or its database raised the error, without importing these packages."""
    kinds = {"mlflow.exceptions": "MlflowException", "sqlalchemy.exc": "SQLAlchemyError"}
    error_classes = [getattr(sys.modules[module], name) for module, name in kinds.items() if module in sys.modules]
    return isinstance(error, tuple(error_classes))
