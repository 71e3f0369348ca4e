"""Certification of images by the cascade: resumable, in one process or on Ray workers."""

import csv
import dataclasses
import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from linflab.models.robustness.certification import CascadeCertifier, Verdict
from linflab.models.robustness.certification.cascade import CascadeSettings
from linflab.platform.data.datasets import Split, SplitName
from linflab.platform.errors import InputError, TrainingError
from linflab.platform.files import open_regular
from linflab.platform.host import configure_process
from linflab.platform.results.evaluate import log_files, sample_positions
from linflab.platform.results.load import download_weights
from linflab.platform.results.verdicts import ImageVerdict, VerdictPlan, VerdictStore, as_columns
from linflab.platform.source import linflab_version
from linflab.platform.tracking.mlflow import client_of
from linflab.platform.tracking.runs import Run
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.weights import load_matching_dataset, load_weights
from linflab.platform.trial import select_evaluation_device
from linflab.reports import schema
from linflab.reports.intervals import proportion_interval
from linflab.reports.outputs import write_text_atomic, write_whole
from linflab.reports.verification import Verification

CHUNK, WORKER_CHUNK = 16, 4  # images that the first stages process at once; a worker returns them together
FOLDER = "verdicts"


@dataclass(frozen=True)
class CascadeResult:
    """Verdicts on images of a split at one eps.

    Attributes:
        plan: What determines the verdicts.
        verdicts: Verdicts in the order of the split.
        split_size: Number of images of the whole split.
        folder: Folder of the verdicts and adversarial images.
        training_eps: Radius of the run, for pixel values in [0, 1].
    """

    plan: VerdictPlan
    verdicts: list[ImageVerdict]
    split_size: int
    folder: Path
    training_eps: float

    @property
    def counts(self) -> Counter[str]:
        """Number of images by status."""
        return Counter(one.status for one in self.verdicts)

    @property
    def clean(self) -> float:
        """Fraction of images that are classified correctly."""
        return 1 - self._share(lambda one: one.certifier == "forward" and one.status == "falsified")

    @property
    def certified(self) -> float:
        """Fraction of certified images, a lower bound on robust accuracy."""
        return self._share(lambda one: one.status == "certified")

    @property
    def robust(self) -> float:
        """Fraction of images that are not falsified, an upper bound on robust accuracy."""
        return 1 - self._share(lambda one: one.status == "falsified")

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of 95% confidence for the certified accuracy of the whole split; None if it is known."""
        if len(self.verdicts) == self.split_size:
            return None
        return proportion_interval(self.counts["certified"], len(self.verdicts))

    def _share(self, is_counted: Callable[[ImageVerdict], bool]) -> float:
        return sum(map(is_counted, self.verdicts)) / max(1, len(self.verdicts))

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        return {
            **dataclasses.asdict(self.plan),
            "split_size": self.split_size,
            "images": len(self.verdicts),
            "clean": self.clean,
            "certified": self.certified,
            "certified_interval": self.interval,
            "robust": self.robust,
            **{status: self.counts[status] for status in ("unknown", "error")},
            "decided_by": dict(Counter(one.certifier for one in self.verdicts)),
            "verdicts": as_columns(self.verdicts),
        }


@dataclass(frozen=True)
class CascadeEstimate:
    """Estimated cost of a certification.

    Attributes:
        images: Number of images without a verdict.
        least_seconds: Duration if branch and bound decides immediately.
        most_seconds: Duration if branch and bound always takes its time limit, on as many images as the 95% confidence
            interval of their share allows.
    """

    images: int
    least_seconds: float
    most_seconds: float


class CascadeRun:
    """Certification of images of one network at one eps.

    Args:
        path: Weights file.
        settings: Time limit and number of subproblems per image; None: the time limit of the run.
        eps: Radius for pixel values in [0, 1]; None: that of the run.
        sound: Whether certificates account for float32 rounding.
        images: Number of images, a fixed random sample; None: the whole split.
        workers: Number of Ray workers; 0 certifies in this process.
        split: Which images to certify; the validation split for selection.

    Raises:
        InputError: If weights or dataset are not readable or do not fit, no certifier supports the network, or `images`
            is too large.
    """

    def __init__(
        self,
        path: Path,
        settings: CascadeSettings | None = None,
        eps: float | None = None,
        sound: bool = True,
        images: int | None = None,
        workers: int = 0,
        split: SplitName = "test",
    ) -> None:
        self.weights, self.workers = load_weights(path), workers
        self.settings = settings or CascadeSettings(time_limit=self.weights.experiment.evaluation.time_limit)
        dataset = load_matching_dataset(self.weights)
        self._split = dataset.evaluation_split(split)
        self.split_size = len(self._split)
        self.positions = sample_positions(self.split_size, images)
        with open_regular(path) as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        self.plan = VerdictPlan(
            linflab_version(),
            digest,
            _hash_images(self._split),
            self.weights.experiment.dataset,
            split,
            self.weights.experiment.eps if eps is None else eps,
            sound,
            self.settings.time_limit,
            self.settings.max_subproblems,
        )
        configure_process()
        experiment = self.weights.experiment
        device = select_evaluation_device(experiment)
        self._network, self._labels = self.weights.network.to(device).eval(), self._split.labels[self._split.indices]
        self._split = self._split.to(device)
        self._certifier = CascadeCertifier(self._network, sound, self.settings)
        try:
            self._certifier.judge(*self._batch(self.positions[:1]), self.plan.eps, cheap_only=True)
        except TypeError as error:
            raise InputError(str(error)) from None

    def estimate(self, store: VerdictStore) -> CascadeEstimate:
        """Estimate the cost of the remaining images from the first stages on a few of them."""
        remaining = self.remaining(store)
        if not remaining:
            return CascadeEstimate(0, 0.0, 0.0)
        sample = self._batch(remaining[:CHUNK])
        start = time.monotonic()
        verdicts = self._certifier.judge(*sample, self.plan.eps, cheap_only=True)
        seconds = (time.monotonic() - start) / len(verdicts)
        # Cheap stages may decide all of these few images, so the upper end takes that of the confidence interval.
        _, share = proportion_interval(sum(one.status == "unknown" for one in verdicts), len(verdicts))
        each = len(remaining) / max(1, self.workers)
        limit = share * self.settings.time_limit if share else 0.0
        return CascadeEstimate(len(remaining), each * seconds, each * (seconds + limit))

    def remaining(self, store: VerdictStore) -> list[int]:
        """Return the images without a verdict; errors are tried again."""
        known = {image for image, one in store.verdicts.items() if one.status != "error"}
        return [position for position in self.positions if position not in known]

    def certify(self, store: VerdictStore, on_verdict: Callable[[ImageVerdict], None]) -> None:
        """Certify the remaining images, and add each verdict to the store.

        Args:
            store: Open store of this plan.
            on_verdict: Called after each verdict.

        Raises:
            InputError: If there are too few CPUs for the workers.
            TrainingError: If Ray is gone.
        """

        def add(position: int, verdict: Verdict) -> None:
            record = ImageVerdict.of(position, int(self._labels[position]), verdict)
            store.add(record, None if verdict.adversarial is None else verdict.adversarial.cpu().numpy())
            on_verdict(record)

        remaining = self.remaining(store)
        size = WORKER_CHUNK if self.workers else CHUNK
        chunks = [remaining[start : start + size] for start in range(0, len(remaining), size)]
        for position, verdict in self._judge(chunks, add):
            add(position, verdict)

    def result(self, store: VerdictStore) -> CascadeResult:
        """Return the verdicts so far."""
        found = [store.verdicts[position] for position in sorted(self.positions) if position in store.verdicts]
        return CascadeResult(self.plan, found, self.split_size, store.folder, self.weights.experiment.eps)

    def _judge(
        self, chunks: Sequence[Sequence[int]], add: Callable[[int, Verdict], None]
    ) -> Iterator[tuple[int, Verdict]]:
        """Judge chunks of images: in this process with `add` for each image, or on workers, yielding the verdicts."""
        if self.workers:
            from linflab.platform.distributed.judge import judge_distributed  # imports Ray

            yield from judge_distributed(
                self.weights.experiment,
                self._network,
                self.plan.split,
                self.plan.eps,
                self.plan.sound,
                self.settings,
                chunks,
                self.workers,
            )
            return
        for chunk in chunks:
            self._certifier.judge(*self._batch(chunk), self.plan.eps, _with_positions(chunk, add))

    def _batch(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._split.batch(torch.tensor(positions, device=self._split.indices.device))


def _with_positions(chunk: Sequence[int], add: Callable[[int, Verdict], None]) -> Callable[[int, Verdict], None]:
    """Return `add` as a function of the index in a chunk of positions."""
    return lambda index, verdict: add(chunk[index], verdict)


def _hash_images(split: Split) -> str:
    """Return the SHA-256 of the images and labels of a split."""
    digest = hashlib.sha256()
    for part in (split.images, split.labels):
        digest.update(part[split.indices].contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_result(folder: Path, result: CascadeResult, store: VerdictStore) -> list[Path]:
    """Write `cascade.json`, `verdicts.csv`, and the adversarial images in `adversarial.npz` by their position.

    Args:
        folder: Directory, created if missing.
        result: Verdicts to write.
        store: Store of the adversarial images.

    Returns:
        Paths of the files.
    """
    content = result.to_dict()
    verdicts = content.pop("verdicts")
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([list(verdicts), *zip(*verdicts.values(), strict=True)])
    paths = [folder / "cascade.json", folder / "verdicts.csv", folder / "adversarial.npz"]
    write_text_atomic(paths[0], json.dumps(content, indent=1))
    write_text_atomic(paths[1], text.getvalue())
    falsified = [one.image for one in result.verdicts if one.status == "falsified"]
    arrays: dict[str, Any] = {str(image): store.read_adversarial(image) for image in falsified}
    write_whole(paths[2], lambda file: np.savez_compressed(file, **arrays))
    return paths


def log_result(storage: Storage, run: str, result: CascadeResult, store: VerdictStore) -> None:
    """Log a result to its run: certified accuracy as a metric, and all verdicts as files.

    The name of the metric contains the eps, and the number of images unless these are the whole split. The accuracy at
    the eps of the run is also logged for reports, with a description of the verification, unless an earlier
    evaluation had more images.

    Args:
        storage: Storage of the run.
        run: Run id.
        result: Result to log.
        store: Store of the adversarial images.

    Raises:
        TrainingError: If the run is not writable, for example because it was deleted.
    """
    part = "" if result.interval is None else f"/images-{len(result.verdicts)}"
    certificate = f"cascade{schema.SOUND if result.plan.sound else ''}"
    name = f"{schema.TEST_CERTIFIED}/{certificate}/eps-{result.plan.eps!r}{part}"
    verification = None
    if result.plan.eps == result.training_eps and result.verdicts:
        undecided = (result.counts["unknown"] + result.counts["error"]) / len(result.verdicts)
        verification = Verification(
            len(result.verdicts),
            result.split_size,
            certificate,
            result.plan.time_limit,
            result.certified,
            f"{100 * undecided:.2f}% undecided",
        )
    log_files(storage, run, {name: result.certified}, lambda folder: save_result(folder, result, store), verification)


def verify_run(storage: Storage, images: int, run: str, workers: int) -> float:
    """Certify validation images for a trained run by the cascade, and log the accuracy to the run.

    Verdicts are kept, so that a verification can be interrupted.

    Args:
        storage: Storage of the run.
        images: Number of validation images, a fixed random sample; more than there are means all of them.
        run: Run id.
        workers: Number of Ray workers.

    Returns:
        Certified accuracy, a fraction.

    Raises:
        TrainingError: If images have errors, or Ray is gone.
    """
    path = download_weights(storage, run)
    weights = load_weights(path)
    count = min(images, len(load_matching_dataset(weights).validation))
    sound = weights.experiment.evaluation.sound
    certification = CascadeRun(path, sound=sound, images=count, workers=workers, split="validation")
    with VerdictStore.open(storage.root / FOLDER, certification.plan) as store:
        certification.certify(store, lambda record: None)
        result = certification.result(store)
    failed = [one for one in result.verdicts if one.status == "error"]
    if failed:
        raise TrainingError(
            f"verification of run {run}: {len(failed)} images have errors, the first one validation image "
            f"{failed[0].image} in {failed[0].certifier} ({failed[0].message})"
        )
    record = Run(client_of(storage), run)
    size = f"{count} validation images, up to {certification.settings.time_limit:g} s of branch and bound per image"
    record.log_tags({schema.VERIFICATION: f"{size}{'' if sound else ', real arithmetic'}"})
    record.log_metrics({schema.VERIFIED_VALIDATION: result.certified})
    return result.certified
