"""`linflab ensemble`."""

import shlex
from typing import Annotated

import typer

from linflab.platform import signals
from linflab.platform.cli.options import DEFAULT_STORAGE, StorageFolder, Tags, parse_tags, storage_options
from linflab.platform.cli.output import console, describe_store, log_optional
from linflab.platform.errors import InputError, RunInterrupted, TrainingError
from linflab.platform.tracking.storage import Storage


def ensemble(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Ids or names of two or more trained runs")],
    name: Annotated[str, typer.Option(help="Name of the new run")],
    tag: Tags = None,
    storage_dir: StorageFolder = DEFAULT_STORAGE,
) -> None:
    """Average the logits of trained runs, evaluate the mean, and log it as one run.

    The runs must have the same dataset, eps and input shape. The mean of Lipschitz networks is Lipschitz with the mean
    of their constants, and is certified from its margin (lipschitz). With other networks among the runs, such as ReLU
    networks trained with IBP, interval bounds certify it (ibp). Settings of the evaluation are those of the first run,
    with the attacks of all runs. Epochs and training time are sums over the runs.
    """
    own_tags = parse_tags(tag)
    if not name.strip():
        raise InputError("name=: must not be empty; use the name of the new run")
    storage = Storage.open_existing(storage_dir)
    with console.status("Loading networks ..."):
        from linflab.platform.cli.progress import ProgressLine
        from linflab.platform.results.ensemble import log_ensemble, prepare_ensemble
        from linflab.platform.results.publish import log_model_and_figures
        from linflab.reports import schema

        signals.watch_again()  # imported libraries may have replaced the handlers
        prepared = prepare_ensemble(storage, runs)
    if not storage.is_writable:
        raise InputError(f"storage={storage.root}: is not writable; use a writable storage")
    ids = [member.run_id for member in prepared.members]
    flags = [f"--tag={key}={value}" for key, value in own_tags.items()]
    command = shlex.join(["linflab", "ensemble", *ids, "--name", name, *flags])
    tags = {schema.COMMAND: command, **{schema.USER_TAG + key: value for key, value in own_tags.items()}}
    repeat = " ".join([command, *map(shlex.quote, storage_options(storage))])
    try:
        with (
            signals.guarded(f"repeat with `{repeat}`"),
            ProgressLine(console, "stage=evaluation", "images") as line,
        ):
            result = log_ensemble(storage, prepared, name, tags, lambda report: line.update(report.done, report.total))
    except (KeyboardInterrupt, SystemExit):
        raise RunInterrupted(f"interrupted; repeat with `{repeat}`") from None
    metrics = result.metrics
    clean, robust, certified = (
        f"{100 * metrics[metric]:.2f}%" for metric in (schema.TEST_CLEAN, schema.TEST_ROBUST, schema.TEST_CERTIFIED)
    )
    console.print(
        f"Test set, eps={prepared.experiment.eps:g}: clean {clean}, robust {robust}, certified {certified} "
        f"({result.certificate}). Mean of {len(ids)} networks."
    )
    with console.status("Logging model and figures ..."):
        log_optional(lambda: log_model_and_figures(storage, result.run_id), repeat)
    hint = shlex.join(["linflab", "evaluate", result.run_id, *storage_options(storage)])
    console.print(f"Logged run {result.run_id} to {describe_store(storage)}. Evaluate again with `{hint}`.")
    if violations := metrics[schema.TEST_VIOLATIONS]:
        raise TrainingError(f"certificate violation: attacks succeeded on {violations:g} certified images")
