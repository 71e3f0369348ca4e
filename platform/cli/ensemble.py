"""`linflab ensemble`."""

import shlex
from typing import Annotated, Literal

import typer

from linflab.platform import signals
from linflab.platform.cli.options import DEFAULT_STORAGE, StorageFolder, Tags, parse_tags, storage_options
from linflab.platform.cli.output import console, log_optional
from linflab.platform.errors import InputError, RunInterrupted, TrainingError
from linflab.platform.tracking.storage import Storage
from linflab.reports.plain import shorten


def ensemble(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Ids or names of trained runs")],
    name: Annotated[str, typer.Option(help="Name of the new run")],
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS|auto",
            help="Weight of each run, as in 1,10; auto: chosen on validation images; default: equal weights",
        ),
    ] = None,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="Also average over mirror images, for runs trained with random flips")
    ] = False,
    tag: Tags = None,
    storage_dir: StorageFolder = DEFAULT_STORAGE,
) -> None:
    """Average the logits of trained runs, evaluate the mean, and log it as one run.

    The runs must have the same dataset, eps and input shape. The mean of Lipschitz networks is Lipschitz with the mean
    of their constants, and is certified from its margin (lipschitz). With other networks among the runs, such as ReLU
    networks trained with IBP, interval bounds certify it (ibp). If all runs have the same certifier, it is used
    instead. The attacks are those of all runs, with the steps and restarts of the first one. Epochs and training time
    are sums over the runs.

    With --mirror, the logits of runs trained with augmentation.horizontal_flip=true are also computed for the image
    mirrored left to right, and averaged. Other runs have not seen mirror images, and are averaged as without --mirror.
    One run is enough. The mean is certified in the same way, since a perturbation is mirrored with its image.

    Networks of different kinds have logits of different sizes, which need weights. With --weights auto, the weight of
    a run is the inverse of the mean magnitude of its worst-case margins on validation images, by interval bounds. In
    ensembles of at most 6 runs, these weights are multiplied by powers of 2 that certify the most validation images.
    """
    own_tags = parse_tags(tag)
    numbers = parse_weights(weights)
    if not name.strip():
        raise InputError("name=: must not be empty; use the name of the new run")
    storage = Storage.open_existing(storage_dir)
    if not storage.is_writable:
        raise InputError(f"storage={storage.root}: is not writable; use a writable storage")
    with console.status("Loading networks ..."):
        from linflab.platform.cli.progress import ProgressLine
        from linflab.platform.results.ensemble import log_ensemble, prepare_ensemble
        from linflab.platform.results.publish import log_model_and_figures
        from linflab.reports import schema
        from linflab.reports.tables import format_eps

        signals.watch_again()  # imported libraries may have replaced the handlers
        prepared = prepare_ensemble(storage, runs, numbers, mirror)
    ids = [member.run_id for member in prepared.members]
    flags = [f"--tag={key}={value}" for key, value in own_tags.items()]
    if mirror:
        flags = ["--mirror", *flags]
    if numbers:
        flags = [f"--weights={numbers if isinstance(numbers, str) else ','.join(map(repr, numbers))}", *flags]
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
    networks = f"{len(ids)} network{'s' * (len(ids) > 1)}{prepared.mirror_note}"
    weighting = f" Weights: {', '.join(f'{weight:g}' for weight in prepared.weights)}." if prepared.weights else ""
    console.print(
        f"Test set, eps={format_eps(prepared.experiment.eps)}: clean {clean}, robust {robust}, certified {certified} "
        f"({result.certificate}). Mean of {networks}.{weighting}"
    )
    with console.status("Logging model and figures ..."):
        log_optional(lambda: log_model_and_figures(storage, result.run_id), repeat)
    hint = shlex.join(["linflab", "evaluate", result.run_id, *storage_options(storage)])
    console.print(f"Logged run {result.run_id} to {storage.location}. Evaluate again with `{hint}`.")
    if violations := metrics[schema.TEST_VIOLATIONS]:
        raise TrainingError(f"certificate violation: attacks succeeded on {violations:g} certified images")


def parse_weights(text: str | None) -> tuple[float, ...] | Literal["auto"]:
    """Return the value of --weights; no numbers if it is not given.

    Raises:
        InputError: If the value is neither `auto` nor positive numbers with commas between them.
    """
    if text is None:
        return ()
    if text.strip() == "auto":
        return "auto"
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < float("inf") for number in numbers):
        raise InputError(
            f"weights={shorten(text)}: must be auto, or one positive number per run, as in 1,10; use these"
        )
    return numbers
