"""`linflab evaluate --certifier cascade`: verdicts on test images, kept as they arrive."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from linflab.platform import signals
from linflab.platform.cli.output import console, print_rows
from linflab.platform.cli.progress import ProgressLine, format_clock
from linflab.platform.errors import RunInterrupted, TrainingError, WorkerLostError
from linflab.platform.tracking.storage import Storage
from linflab.reports.tables import format_eps

if TYPE_CHECKING:
    from linflab.platform.results.cascade import CascadeResult, CascadeRun
    from linflab.platform.results.verdicts import ImageVerdict, VerdictStore


def evaluate_by_cascade(
    run_or_weights: str,
    eps: Sequence[float],
    sound: bool,
    timeout: float | None,
    images: int | None,
    workers: int,
    output_dir: Path | None,
    storage_dir: Path,
    as_json: bool,
) -> None:
    """Certify test images by the cascade at each eps; print and log the results.

    Args:
        run_or_weights: Run id or name, or path of weights.
        eps: Radii for pixel values in [0, 1]; empty: that of the run.
        sound: Whether certificates account for float32 rounding.
        timeout: Seconds of branch and bound per image; None: the time limit of the run.
        images: Number of test images; None: all.
        workers: Number of Ray workers; 0 runs without Ray.
        output_dir: Directory for the verdicts; None: they are only kept in the storage.
        storage_dir: Storage directory, which keeps the verdicts.
        as_json: Print JSON.

    Raises:
        InputError: If an argument is not valid.
        RunInterrupted: If the user interrupts the command; verdicts so far are kept.
        TrainingError: If images have errors, or the results cannot be logged.
    """
    from linflab.models.robustness.certification.cascade import CascadeSettings
    from linflab.platform.results.cascade import FOLDER, CascadeRun, log_result, save_result
    from linflab.platform.results.load import find_weights
    from linflab.platform.results.verdicts import VerdictStore

    path, storage, run = find_weights(run_or_weights, storage_dir)
    results: list[CascadeResult] = []
    problems: list[str] = []
    settings = None if timeout is None else CascadeSettings(time_limit=timeout)
    radii: Sequence[float | None] = eps or [None]
    for radius in radii:
        certification = CascadeRun(path, settings, radius, sound, images, workers)
        with VerdictStore.open(Storage.from_path(storage_dir).root / FOLDER, certification.plan) as store:
            try:
                _certify(certification, store, silent=as_json)
            except (KeyboardInterrupt, WorkerLostError):
                results.append(certification.result(store))
                if not as_json:
                    _print(results)
                raise RunInterrupted(
                    f"interrupted; verdicts on {len(results[-1].verdicts)} of {len(certification.positions)} images "
                    "are kept; continue with the same command"
                ) from None
            results.append(certification.result(store))
            if output_dir is not None:
                folder = output_dir if len(eps) < 2 else output_dir / f"eps-{certification.plan.eps!r}"
                try:
                    files = save_result(folder, results[-1], store)
                except OSError as error:
                    problems.append(f"radii-dir={folder}: files cannot be written ({error}); use another directory")
                else:
                    for file in [] if as_json else files:
                        console.print(f"  {file}")
            if storage is not None and storage.is_writable:
                try:
                    log_result(storage, run, results[-1], store)
                except TrainingError as error:
                    problems.append(str(error))
            elif storage is not None:
                problems.append(f"storage={storage.root}: cannot be written, so the result is not logged to its run")
    if as_json:
        typer.echo(json.dumps([result.to_dict() for result in results]))
    else:
        _print(results)
    errors = [one for result in results for one in result.verdicts if one.status == "error"]
    if errors:
        problems.append(
            f"{len(errors)} images have errors, the first one image {errors[0].image} in {errors[0].certifier} "
            f"({errors[0].message}); the same command tries them again"
        )
    if problems:
        raise TrainingError("; ".join(problems))


def _certify(certification: "CascadeRun", store: "VerdictStore", silent: bool) -> None:
    """Certify the remaining images with a progress line; print the estimated duration first, unless `silent`."""
    total, counts = len(certification.positions), Counter(one.status for one in certification.result(store).verdicts)
    estimate = certification.estimate(store)
    if not silent:
        console.print(
            f"Cascade at eps={format_eps(certification.plan.eps)}: {total} images, {total - estimate.images} of them "
            "known."
        )
        if estimate.images:
            console.print(f"Estimate: {_describe(estimate.least_seconds, estimate.most_seconds)}.")
    with (
        signals.guarded("verdicts are kept; continue with the same command"),
        ProgressLine(console, "stage=cascade", "images") as line,
    ):

        def show(record: "ImageVerdict") -> None:
            counts[record.status] += 1
            fields = [f"{status}={count}" for status, count in counts.items()]
            line.update(counts.total(), total, optional=fields)

        certification.certify(store, show)


def _describe(least: float, most: float) -> str:
    """Return an estimate of a duration as text."""
    if math.isinf(most):
        return f"at least {format_clock(least)}, without an upper limit"
    return f"{format_clock(least)} to {format_clock(max(least, most))} (h:mm:ss), by the first stages on a few images"


def _print(results: Sequence["CascadeResult"]) -> None:
    """Print accuracies in percent, and the stages that decided."""
    rows = []
    for result in results:
        interval = result.interval
        row = {
            "eps": format_eps(result.plan.eps),
            "images": str(len(result.verdicts)),
            "clean": f"{100 * result.clean:.2f}",
            "certified": f"{100 * result.certified:.2f}",
            "robust_at_most": f"{100 * result.robust:.2f}",
            "unknown": str(result.counts["unknown"]),
            "error": str(result.counts["error"]),
        }
        if interval is not None:
            row["certified_95%_interval"] = f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}"
        rows.append(row)
    print_rows(rows, list(dict.fromkeys(name for row in rows for name in row)), as_json=False)
    for result in results:
        stages = Counter(one.certifier for one in result.verdicts if one.status in ("certified", "falsified"))
        console.print(
            f"\nAccuracies in percent. Decided at eps={format_eps(result.plan.eps)} by "
            f"{', '.join(f'{name} {count}' for name, count in stages.items()) or 'no stage'}. "
            f"Verdicts and adversarial images: {result.folder}"
        )
    if any(result.interval is not None for result in results):
        console.print("The interval is for the whole test set; the images are a fixed random sample of it.")
