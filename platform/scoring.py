"""Trained weights scored after the training: on a test set, at many eps, or on images of one's own."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import nn

from linflab.models.robustness.certification import Certifier, certified_radius, certifier_of
from linflab.platform.datasets import facts_of, load_dataset
from linflab.platform.errors import SettingError, TrainingError
from linflab.platform.evaluation import evaluate_at
from linflab.platform.storage import Storage
from linflab.platform.tracking import Run
from linflab.platform.trial import device_of
from linflab.platform.weights import image_shape, load_network
from linflab.reports import schema


@dataclass(frozen=True)
class Score:
    """Accuracies at one eps, as `linflab.platform.evaluation.Accuracy` has them."""

    eps: float
    clean: float
    certified: float
    robust: float | None
    certified_but_broken: int | None


@dataclass(frozen=True)
class Scores:
    """What `score` found, and by what."""

    rows: list[Score]
    certifier: str
    sound: bool
    attack: str  # empty where none ran
    notes: str


@dataclass(frozen=True)
class CertifiedImage:
    """The class of an image, and the l_inf radius in pixels of [0, 1] up to which it is proven to stay the same."""

    image: str
    prediction: int
    radius: float
    certifier: str


def score(path: Path, eps: Sequence[float], certifier: str, sound: bool, attacked: bool, console: Console) -> Scores:
    """Score weights on the whole test set of their experiment; without `eps` at the experiment's own.

    Raises:
        SettingError: the file or data set can't be read, or the certifier does not work for the network.
    """
    experiment, network = load_network(path)
    name = _certifier(certifier, network)
    # where there is no CUDA device, weights that were trained on one are scored on the CPU
    device = device_of(experiment) if torch.cuda.is_available() else torch.device("cpu")
    dataset = load_dataset(experiment.dataset, experiment.augmentation).to(device)
    torch.set_num_threads(min(experiment.compute.cpus_per_worker, os.cpu_count() or 1))
    attack = experiment.evaluation.attack if attacked else None
    radii = list(dict.fromkeys(eps)) or [experiment.eps]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("test images", total=len(dataset.test))
        accuracies = evaluate_at(
            network.to(dataset.test.images.device),
            dataset.test,
            radii,
            experiment.evaluation.batch_size,
            name,
            sound,
            attack,
            experiment.seed,
            lambda samples: progress.update(task, completed=samples),
        )
    rows = [
        Score(radius, one.clean, one.certified, one.robust, one.certified_but_broken)
        for radius, one in zip(radii, accuracies, strict=True)
    ]
    ran = "" if attack is None else f"PGD, {attack.steps} steps of {attack.step_size:g} eps, {attack.restarts} restarts"
    proof = "float32 rounding included" if sound else "of exact arithmetic"
    notes = f"On {len(dataset.test)} test images. Certified: by {name}, {proof}."
    return Scores(rows, name, sound, ran, f"{notes} Robust: {ran}." if ran else notes)


def certify_images(path: Path, images: Sequence[Path], certifier: str) -> list[CertifiedImage]:
    """Classify image files, and certify the class that the network gives them, with sound bounds.

    Raises:
        SettingError: a file can't be read, an image has another size, or the certifier does not work for the network.
    """
    experiment, network = load_network(path)
    name = _certifier(certifier, network)
    shape = image_shape(experiment, facts_of(experiment.dataset))
    batch = torch.stack([_read_image(image, shape) for image in images])
    with torch.no_grad():
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


def _certifier(asked: str, network: nn.Module) -> Certifier:
    """The certifier asked for, or that of the network's kind."""
    own = certifier_of(network)
    if asked == "lipschitz" and own != "lipschitz":
        raise SettingError(
            f"certifier=lipschitz: {type(network).__name__} has no Lipschitz constant by construction; interval will do"
        )
    return cast(Certifier, asked) if asked else own


def weights_of_run(storage: Storage, run: str) -> Path:
    """Where the weights of a run are.

    Raises:
        SettingError: there is no such run, or it has left none.
    """
    client = MlflowClient(storage.tracking_uri)
    try:
        return Path(client.download_artifacts(run, schema.WEIGHTS_FILE))
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingError(
            f"{run}: is neither a file nor a run in {storage.root} that has weights ({reason})"
        ) from None


def record_scores(storage: Storage, run: str, scores: Scores) -> None:
    """Add scores to the record of a run: metrics whose names say eps and certifier."""
    kind = f"{scores.certifier}{'-sound' if scores.sound else ''}"
    metrics = {}
    for row in scores.rows:
        metrics[f"{schema.TEST_CERTIFIED}/{kind}/eps-{row.eps!r}"] = row.certified
        if row.robust is not None:
            metrics[f"{schema.TEST_ROBUST}/eps-{row.eps!r}"] = row.robust
    try:
        Run(MlflowClient(storage.tracking_uri), run).log_metrics(metrics)
    except MlflowException as error:  # deleted meanwhile, say
        raise TrainingError(f"the scores could not be added to run {run} ({' '.join(str(error).split())})") from None
