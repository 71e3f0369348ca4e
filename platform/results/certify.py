"""Certification of user images with a trained network."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.certification import Certifier, judge_images
from linflab.platform.config.overrides import build_config
from linflab.platform.data.images import find_images, read_images
from linflab.platform.errors import InputError
from linflab.platform.training.evaluation import evaluation_spec, limited_certifiers, no_time_limit
from linflab.platform.training.weights import load_weights


@dataclass(frozen=True)
class CertifiedImage:
    """The prediction for an image, and its certificate.

    Attributes:
        image: Name of the image.
        prediction: Predicted class.
        radius: Certified l_inf radius, for pixel values in [0, 1]; None if the image was certified at one eps.
        certifier: Name of the certifier, or of the stage of `cascade` that decided.
        status: certified, falsified, unknown or error, at one eps; None for radii.
        seconds: Duration at one eps; None for radii.
    """

    image: str
    prediction: int
    radius: float | None
    certifier: str
    status: str | None = None
    seconds: float | None = None


def certify_images(
    path: Path,
    images: Sequence[Path],
    certifier: str,
    sound: bool = True,
    eps: float | None = None,
    time_limit: float | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[CertifiedImage]:
    """Classify images from files, and certify the predictions.

    Args:
        path: Weights file.
        images: Image files, .npy arrays (see `read_images`), and directories with such files.
        certifier: Name of the certifier, or auto.
        sound: Whether certificates account for float32 rounding.
        eps: Radius to certify, for pixel values in [0, 1]; None: certified radii are computed.
        time_limit: Seconds per image of `complete` and `cascade`; None: the time limit of the run.
        on_progress: Called with the number of certified images and of all images, at the start and after each batch;
            `complete` and `cascade` have batches of one image.

    Returns:
        One result per image, in the order of the files.

    Raises:
        InputError: If a file is not readable, an image has the wrong size, the certifier does not support the network,
            or it has no time limit.
    """
    weights = load_weights(path)
    network = weights.network
    changes: dict[str, object] = {"evaluation.certifier": certifier}
    if time_limit is not None:
        changes["evaluation.time_limit"] = time_limit
    experiment = build_config(weights.experiment.model_dump(mode="json"), changes, for_evaluation=True)
    spec = evaluation_spec(experiment, network, with_attacks=False)
    if time_limit is not None and spec.certifier not in limited_certifiers():
        raise InputError(no_time_limit(time_limit, spec.certifier))
    instance, _ = dataclasses.replace(spec, sound=sound).certifiers(network)
    files = [read_images(image, weights.image_shape) for image in find_images(images)]
    names = [name for file_names, _ in files for name in file_names]
    batch_size = 1 if instance.has_time_limit() else experiment.evaluation.batch_size
    rows: list[CertifiedImage] = []
    on_progress(0, len(names))
    for batch in torch.cat([images for _, images in files]).split(batch_size):
        rows += _certify(instance, batch, names[len(rows) : len(rows) + len(batch)], eps)
        on_progress(len(rows), len(names))
    return rows


def _certify(certifier: Certifier, images: Tensor, names: Sequence[str], eps: float | None) -> Iterator[CertifiedImage]:
    """Yield the results for a batch of images."""
    with torch.no_grad(), strict_float32():  # certificates hold for logits in strict float32
        predictions = certifier.network(images).argmax(dim=1)
    if eps is None:
        radii = certifier.compute_radius(images, predictions)
        for name, prediction, radius in zip(names, predictions.tolist(), radii.tolist(), strict=True):
            yield CertifiedImage(name, prediction, max(0.0, radius), certifier.kind)
        return
    verdicts = judge_images(certifier, images, predictions, eps)
    for name, prediction, verdict in zip(names, predictions.tolist(), verdicts, strict=True):
        yield CertifiedImage(name, prediction, None, verdict.certifier, verdict.status, verdict.seconds)
