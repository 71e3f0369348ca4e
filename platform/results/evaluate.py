"""Evaluation of trained weights on the whole test set, at one or several eps."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.exceptions import MlflowException

from linflab.platform.config.overrides import build_config, parse_override
from linflab.platform.errors import InputError, TrainingError
from linflab.platform.tracking.mlflow import client_of
from linflab.platform.tracking.runs import Run
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.evaluation import (
    BatchResult,
    EvaluationSpec,
    ImageScores,
    ScoringReport,
    aggregate_results,
    evaluate,
    evaluation_spec,
    limited_certifiers,
    no_time_limit,
    sort_by_position,
)
from linflab.platform.training.weights import load_matching_dataset, load_weights
from linflab.platform.trial import select_evaluation_device
from linflab.reports import schema
from linflab.reports.outputs import write_columns, write_text_atomic
from linflab.reports.records import read_run
from linflab.reports.tables import format_eps
from linflab.reports.verification import Verification, num_verified_images


@dataclass(frozen=True)
class EpsResult:
    """Accuracies at one eps; see `linflab.platform.training.evaluation.Accuracies`."""

    eps: float
    clean: float
    certified: float
    certified_real: float | None
    robust: float | None
    certificate_violations: int | None


@dataclass(frozen=True)
class EvaluationResult:
    """Results of an evaluation, with its certifier, attacks and config.

    Attributes:
        results: Accuracies, one entry per eps.
        certifier: Name of the certifier.
        sound: Whether certificates account for float32 rounding.
        attacks: Names of the attacks; empty if none ran.
        notes: Description of the evaluation for readers.
        experiment: Settings by dotted path.
        num_images: Number of test images that were evaluated, a fixed random sample unless it is all of them.
        split_size: Number of all test images.
        images: Results per test image; None unless certified radii were computed.
    """

    results: list[EpsResult]
    certifier: str
    sound: bool
    attacks: tuple[str, ...]
    notes: str
    experiment: dict[str, object]
    num_images: int
    split_size: int
    images: ImageScores | None = None

    @property
    def certificate(self) -> str:
        """Name of the certifier and its arithmetic, such as `lipschitz-sound`."""
        return EvaluationSpec((), self.certifier, self.sound).certificate


def evaluate_weights(
    path: Path,
    overrides: Sequence[str],
    eps: Sequence[float],
    with_attacks: bool,
    radii: bool,
    workers: int,
    on_report: Callable[[ScoringReport], None] = lambda report: None,
    images: int | None = None,
    time_limit: float | None = None,
) -> EvaluationResult:
    """Evaluate weights on the test set of their dataset.

    Args:
        path: Weights file.
        overrides: Overrides of settings in the section `evaluation`, such as `evaluation.sound=true`.
        eps: Perturbation radii, for pixel values in [0, 1]. If empty, the eps of the config is used.
        with_attacks: Whether to run the config's attacks.
        radii: Whether to compute the certified radius of every image.
        workers: Number of Ray workers that share the images; 0 evaluates in this process.
        on_report: Called with the number of evaluated images, at the start and after each batch.
        images: Number of test images, a fixed random sample; None: the whole test set.
        time_limit: Seconds per image of certifiers with a time limit; None: that of the config.

    Raises:
        InputError: If the weights or the dataset are not readable, an override is not valid, the certifier does not
            support the network or has no time limit, or there are fewer images.
    """
    weights = load_weights(path)
    experiment, network = weights.experiment, weights.network
    changes = dict(map(parse_override, overrides))
    for name, value in changes.items():
        if not name.startswith("evaluation."):
            raise InputError(
                f"{name}={value}: is fixed by training; override only settings in the section `evaluation`"
            )
    if time_limit is not None:
        changes["evaluation.time_limit"] = time_limit
    experiment = build_config(experiment.model_dump(mode="json"), changes, for_evaluation=True)
    spec = evaluation_spec(experiment, network, with_attacks)
    has_limit = spec.certifier in limited_certifiers()
    if time_limit is not None and not has_limit:
        raise InputError(no_time_limit(time_limit, spec.certifier))
    eps_values = tuple(dict.fromkeys(eps)) or spec.eps
    spec = dataclasses.replace(spec, eps=eps_values, radii=radii, rounding_cost=True)
    dataset = load_matching_dataset(weights)
    positions = torch.tensor(sample_positions(len(dataset.test), images)).sort().values
    batch_size = 1 if has_limit else experiment.evaluation.batch_size  # reports each image that may take long
    batch_results: list[BatchResult] = []

    def on_batch(part: BatchResult) -> None:
        batch_results.append(part)
        on_report(ScoringReport(sum(len(part.positions) for part in batch_results), len(positions)))

    on_report(ScoringReport(0, len(positions)))
    if workers:
        from linflab.platform.distributed.train import evaluate_distributed  # imports Ray

        for part in evaluate_distributed(experiment, network, spec, positions.split(batch_size), workers):
            on_batch(part)
    else:
        torch.set_num_threads(min(experiment.compute.cpus_per_worker, os.cpu_count() or 1))
        device = select_evaluation_device(experiment)
        test = dataset.to(device).test
        evaluate(network.to(device), test, spec, batch_size, on_batch, positions.to(device))
    rows = [
        EpsResult(radius, *dataclasses.astuple(one))
        for radius, one in zip(spec.eps, aggregate_results(batch_results, spec), strict=True)
    ]
    attack = spec.attack
    proof = (
        "accounting for float32 rounding"
        if spec.sound
        else "in real arithmetic, so float32 rounding may violate certificates"
    )
    is_sample = len(positions) < len(dataset.test)
    sample = f"{len(positions)} of {len(dataset.test)} test images, a fixed random sample"
    notes = f"Evaluated on {sample if is_sample else f'{len(positions)} test images'}."
    notes += f" Certified by {spec.certifier}, {proof}."
    if has_limit:
        notes += f" Time limit {spec.time_limit:g} s per image."
    if spec.sound:
        num_lost = [round(((row.certified_real or 0.0) - row.certified) * len(positions)) for row in rows]
        costs = ", ".join(f"{count} at eps={format_eps(row.eps)}" for count, row in zip(num_lost, rows, strict=True))
        notes += f" Certificates lost by accounting for rounding: {costs if any(num_lost) else 'none'}."
    notes += "" if attack is None else f" Robust accuracy under {attack.describe()}."
    return EvaluationResult(
        rows,
        spec.certifier,
        spec.sound,
        () if attack is None else attack.methods or (),
        notes,
        experiment.to_flat_dict(),
        len(positions),
        len(dataset.test),
        sort_by_position(batch_results, spec.eps) if radii else None,
    )


def sample_positions(size: int, images: int | None) -> list[int]:
    """Return the positions of a fixed random sample of a split, in random order.

    A larger sample includes each smaller one.

    Args:
        size: Number of images of the split.
        images: Number of images of the sample; None: all.

    Raises:
        InputError: If the split has fewer images.
    """
    if images is not None and images > size:
        raise InputError(f"images={images}: must be at most {size}, the number of all images; leave it out for all")
    order: list[int] = np.random.RandomState(0).permutation(size)[:images].tolist()
    return order


def log_evaluation(storage: Storage, run: str, result: EvaluationResult) -> None:
    """Log an evaluation to its run, as metrics and as files with all results.

    The name of a metric contains the eps, the certifier or the attacks, and the number of images of a sample. The
    evaluations of a run are numbered from 1. The number of an evaluation is the name of the directory of its files, and
    the step of its metrics. The accuracy of `complete` at the eps of the run is also logged for reports, with a
    description of the evaluation, unless an earlier evaluation had more images.

    Args:
        storage: Storage of the run.
        run: Run id.
        result: Results to log.

    Raises:
        TrainingError: If the run is not writable, for example because it was deleted.
    """
    attacks, metrics, verification = "-".join(result.attacks), {}, None
    part = "" if result.num_images == result.split_size else f"/images-{result.num_images}"
    for row in result.results:
        metrics[f"{schema.TEST_CERTIFIED}/{result.certificate}/eps-{row.eps!r}{part}"] = row.certified
        if row.robust is not None:
            metrics[f"{schema.TEST_ROBUST}/{attacks}/eps-{row.eps!r}{part}"] = row.robust
        if result.certifier in limited_certifiers() and row.eps == result.experiment["eps"]:
            time_limit = float(str(result.experiment["evaluation.time_limit"]))
            robust = "" if row.robust is None else f"at most {100 * row.robust:.2f}% robust"
            verification = Verification(
                result.num_images, result.split_size, result.certificate, time_limit, row.certified, robust
            )
    log_files(storage, run, metrics, lambda folder: save_evaluation(folder, result), verification)


def log_files(
    storage: Storage,
    run: str,
    metrics: Mapping[str, float],
    save: Callable[[Path], object],
    verification: Verification | None,
) -> None:
    """Log metrics and files as the next evaluation of a run.

    Args:
        storage: Storage of the run.
        run: Run id.
        metrics: Metrics by name.
        save: Function that writes the files to a directory.
        verification: Accuracy for reports; it replaces only one of at most as many images.

    Raises:
        TrainingError: If the run is not writable, for example because it was deleted.
    """
    client = client_of(storage)
    try:
        folders = (schema.EVALUATIONS_DIR, schema.EARLIER_EVALUATIONS_DIR)
        number = 1 + sum(len(client.list_artifacts(run, folder)) for folder in folders)
        Run(client, run).log_metrics(dict(metrics), step=number)
        if verification is not None:
            _log_verification(Run(client, run), verification, number)
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            client.log_artifacts(run, folder, f"{schema.EVALUATIONS_DIR}/{number}")
    except (MlflowException, OSError) as error:  # the run was deleted, or the disk is full
        raise TrainingError(
            f"run={run}: the evaluation could not be logged ({' '.join(str(error).split())}); fix the cause and "
            "evaluate again"
        ) from None


def _log_verification(run: Run, verification: Verification, step: int) -> None:
    """Log a verification for reports, unless the run has one of more images.

    While the accuracy changes, it has no description, without which reports ignore it. An interruption therefore never
    leaves the description of another accuracy.
    """
    earlier = read_run(run.client, run.id).data.tags.get(schema.TEST_VERIFICATION)
    if earlier is not None:
        if num_verified_images(earlier) > verification.num_images:
            return
        run.client.delete_tag(run.id, schema.TEST_VERIFICATION)
    run.log_metrics({schema.TEST_VERIFIED: verification.certified}, step=step)
    run.log_tags({schema.TEST_VERIFICATION: verification.describe()})


def save_evaluation(folder: Path, result: EvaluationResult) -> list[Path]:
    """Write an evaluation to a directory: JSON with all settings, and image results as CSV and figures.

    `radii.csv` has a row for each test image, with its number, certified radius, label and prediction. A further column
    for each eps has 1 if the image is robust under the attacks that ran, and 0 otherwise. `radii.csv` and the figures
    are written only if certified radii were computed.

    Args:
        folder: Directory, created if missing.
        result: Results to write.

    Returns:
        Paths of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "evaluation.json"]
    write_text_atomic(paths[0], json.dumps(to_dict(result), indent=1))
    if result.images is not None:
        from linflab.reports.figures import certified_accuracy_curve, radius_histogram, save_figure

        paths.append(folder / schema.RADII_FILE)
        radii = result.images.radii
        write_columns(paths[1], result.images.columns())
        data, certificate = str(result.experiment["dataset"]), result.certificate
        for name, figure in (
            ("certified_accuracy", certified_accuracy_curve(radii, data, certificate, robust=_robust(result))),
            ("radius_histogram", radius_histogram(radii, data, certificate)),
        ):
            paths += save_figure(figure, folder, name)
    return paths


def _robust(result: EvaluationResult) -> dict[float, float]:
    return {row.eps: row.robust for row in result.results if row.robust is not None}


def to_dict(result: EvaluationResult) -> dict[str, Any]:
    """Return results as JSON data, with one list per column of `radii.csv` if radii were computed."""
    plain = dataclasses.asdict(dataclasses.replace(result, images=None))
    del plain["images"]
    return plain | ({} if result.images is None else {"images": result.images.columns()})
