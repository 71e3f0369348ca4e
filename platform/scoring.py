"""Trained weights scored after the training: on a test set, at many eps, or on images of one's own."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from linflab.models.robustness.bounds.rounding import exact_products
from linflab.models.robustness.certification import Certifier, certified_radius
from linflab.platform.config import build_experiment, parse_override
from linflab.platform.datasets import facts_of, load_dataset
from linflab.platform.errors import SettingError, TrainingError
from linflab.platform.evaluation import BatchScore, Scoring, accuracies, batches, evaluate, scoring_of
from linflab.platform.storage import Storage
from linflab.platform.tracking import Run
from linflab.platform.trial import device_of
from linflab.platform.weights import image_shape, load_network
from linflab.platform.workers import scores_by_workers
from linflab.reports import schema
from linflab.reports.figures import certified_accuracy_figure, radius_histogram, write_figure


@dataclass(frozen=True)
class Score:
    """Accuracies at one eps, as `linflab.platform.evaluation.Accuracy` has them."""

    eps: float
    clean: float
    certified: float
    certified_exact: float | None
    robust: float | None
    certified_but_broken: int | None


@dataclass(frozen=True)
class Scores:
    """What `score` found, and by what.

    Attributes:
        radii: the certified radius of every test image, in their order, if it was asked for.
    """

    rows: list[Score]
    certifier: str
    sound: bool
    attacks: tuple[str, ...]  # none where none ran
    notes: str
    experiment: dict[str, object]
    radii: np.ndarray | None = None

    @property
    def certificate(self) -> str:
        return Scoring((), cast(Certifier, self.certifier), self.sound).certificate


@dataclass(frozen=True)
class CertifiedImage:
    """The class of an image, and the l_inf radius in pixels of [0, 1] up to which it is proven to stay the same."""

    image: str
    prediction: int
    radius: float
    certifier: str


def score(
    path: Path,
    overrides: Sequence[str],
    eps: Sequence[float],
    attacked: bool,
    radii: bool,
    workers: int,
    console: Console,
) -> Scores:
    """Score weights on the whole test set of their experiment.

    Args:
        path: of the weights.
        overrides: settings of the experiment's section `evaluation` that are changed, as `evaluation.sound=true`.
        eps: radii in pixels; none: the experiment's own.
        attacked: run the experiment's attacks.
        radii: find the certified radius of every image.
        workers: Ray workers that share the images; 0: this process does it.
        console: where the progress is shown.

    Raises:
        SettingError: the file or data set can't be read, or the certifier does not work for the network.
    """
    experiment, network = load_network(path)
    changes = dict(map(parse_override, overrides))
    for name, value in changes.items():
        if not name.startswith("evaluation."):
            raise SettingError(f"{name}={value}: is part of what was trained; settings of `evaluation` can be changed")
    experiment = build_experiment(experiment.model_dump(mode="json"), changes)
    scoring = scoring_of(experiment, network, attacked)
    scoring = dataclasses.replace(scoring, eps=tuple(dict.fromkeys(eps)) or scoring.eps, radii=radii)
    dataset = load_dataset(experiment.dataset, experiment.augmentation)
    batch_size = experiment.evaluation.batch_size
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("test images", total=len(dataset.test))

        found: list[BatchScore] = []

        def on_batch(part: BatchScore) -> None:
            found.append(part)
            progress.advance(task, len(part.positions))

        if workers:
            positions = batches(dataset.test, batch_size)
            for part in scores_by_workers(experiment, network, scoring, positions, workers):
                on_batch(part)
        else:
            torch.set_num_threads(min(experiment.compute.cpus_per_worker, os.cpu_count() or 1))
            # where there is no CUDA device, weights that were trained on one are scored on the CPU
            device = device_of(experiment) if torch.cuda.is_available() else torch.device("cpu")
            test = dataset.to(device).test
            evaluate(network.to(device), test, scoring, batch_size, on_batch)
    rows = [
        Score(radius, *dataclasses.astuple(one))
        for radius, one in zip(scoring.eps, accuracies(found, scoring), strict=True)
    ]
    attack = scoring.attack
    proof = "float32 rounding included" if scoring.sound else "of exact arithmetic"
    notes = f"On {len(dataset.test)} test images. Certified: by {scoring.certifier}, {proof}."
    if scoring.sound:
        lost = ", ".join(f"{round(((row.certified_exact or 0.0) - row.certified) * len(dataset.test))}" for row in rows)
        notes += f" Accounting for rounding costs {lost} certificates."
    notes += "" if attack is None else f" Robust: what withstands {attack.describe()}."
    return Scores(
        rows,
        scoring.certifier,
        scoring.sound,
        () if attack is None else attack.kinds,
        notes,
        experiment.settings(),
        _in_order(found) if radii else None,
    )


def _in_order(scores: Sequence[BatchScore]) -> np.ndarray:
    """The radii of all batches by position."""
    parts = sorted(scores, key=lambda part: int(part.positions[0]))
    return torch.cat([part.radii for part in parts if part.radii is not None]).double().numpy()


def certify_images(path: Path, images: Sequence[Path], certifier: str) -> list[CertifiedImage]:
    """Classify image files, and certify the class that the network gives them, with sound bounds.

    Raises:
        SettingError: a file can't be read, an image has another size, or the certifier does not work for the network.
    """
    experiment, network = load_network(path)
    experiment = build_experiment(experiment.model_dump(mode="json"), {"evaluation.certifier": certifier})
    name = scoring_of(experiment, network, attacked=False).certifier
    shape = image_shape(experiment, facts_of(experiment.dataset))
    batch = torch.stack([_read_image(image, shape) for image in images])
    with torch.no_grad(), exact_products():
        predictions = network(batch).argmax(dim=1)
        radii = certified_radius(network, batch, predictions, name, sound=True)
    return [
        CertifiedImage(str(image), int(prediction), max(0.0, float(radius)), name)
        for image, prediction, radius in zip(images, predictions, radii, strict=True)
    ]


def _read_image(path: Path, shape: tuple[int, int, int]) -> torch.Tensor:
    channels, height, width = shape
    if channels not in (1, 3):
        raise SettingError(f"{path}: the network sees {channels} channels, and image files have 1 or 3")
    try:
        with Image.open(path) as image:
            if image.mode not in ("1", "L", "P", "RGB"):  # others would be cut or stretched to 8 bits
                raise ValueError(f"its mode is {image.mode}; 8 bits of grey or RGB without transparency will do")
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # a damaged file can raise nearly anything
        raise SettingError(f"{path}: can't be read as an image ({' '.join(str(error).split())})") from None
    if pixels.shape[:2] != (height, width):
        raise SettingError(
            f"{path}: has {pixels.shape[0]} x {pixels.shape[1]} pixels, and the network sees {height} x {width}"
        )
    return torch.from_numpy(pixels.copy()).view(height, width, channels).permute(2, 0, 1).float() / 255


def weights_of_run(storage: Storage, run: str) -> Path:
    """Where the weights of a run are.

    Raises:
        SettingError: there is no such run, or it has left none.
    """
    client = MlflowClient(storage.tracking_uri)
    try:
        if schema.IMPORTED in client.get_run(run).data.tags:
            raise SettingError(f"{run}: was imported from a file of records, which has no weights")
        return Path(client.download_artifacts(run, schema.WEIGHTS_FILE))
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingError(f"{run}: has no weights in {storage.root} ({reason})") from None


def record_scores(storage: Storage, run: str, scores: Scores) -> None:
    """Add scores to the record of a run: metrics whose names say eps and by what they are, and files of all there is.

    Each scoring has its number in the run: its files are in a folder of that name, and it is the metrics' step.

    Raises:
        TrainingError: the run can't be written to any more.
    """
    attacks, metrics = "-".join(scores.attacks), {}
    for row in scores.rows:
        metrics[f"{schema.TEST_CERTIFIED}/{scores.certificate}/eps-{row.eps!r}"] = row.certified
        if row.robust is not None:
            metrics[f"{schema.TEST_ROBUST}/{attacks}/eps-{row.eps!r}"] = row.robust
    client = MlflowClient(storage.tracking_uri)
    try:
        number = len(client.list_artifacts(run, schema.SCORES_FOLDER)) + 1
        Run(client, run).log_metrics(metrics, step=number)
        with tempfile.TemporaryDirectory() as folder:
            write_scores(Path(folder), scores)
            client.log_artifacts(run, folder, f"{schema.SCORES_FOLDER}/{number}")
    except MlflowException as error:  # deleted meanwhile, say
        raise TrainingError(f"the scores could not be added to run {run} ({' '.join(str(error).split())})") from None


def write_scores(folder: Path, scores: Scores) -> list[Path]:
    """Write scores to a folder: as JSON with all settings; and the radii, if there are any, as CSV and figures."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "scores.json"]
    paths[0].write_text(json.dumps(as_plain_data(scores), indent=1))
    if scores.radii is not None:
        paths.append(folder / "radii.csv")
        lines = (f"{k},{radius!r}" for k, radius in enumerate(scores.radii.tolist()))
        paths[1].write_text("\n".join(["image,certified_radius", *lines, ""]))
        data, by = str(scores.experiment["dataset"]), scores.certificate
        for name, figure in (
            ("certified_accuracy", certified_accuracy_figure(scores.radii, data, by, robust=_robust(scores))),
            ("radius_histogram", radius_histogram(scores.radii, data, by)),
        ):
            paths += write_figure(figure, folder, name)
    return paths


def _robust(scores: Scores) -> dict[float, float]:
    return {row.eps: row.robust for row in scores.rows if row.robust is not None}


def as_plain_data(scores: Scores) -> dict[str, Any]:
    """Scores without the radii, for JSON."""
    return {name: value for name, value in dataclasses.asdict(scores).items() if name != "radii"}
