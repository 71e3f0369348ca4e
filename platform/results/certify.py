"""Certification of user images with a trained network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.certification import make_certifier
from linflab.platform.config.overrides import build_config
from linflab.platform.data.images import find_images, read_images
from linflab.platform.training.evaluation import evaluation_spec
from linflab.platform.training.weights import load_weights


@dataclass(frozen=True)
class CertifiedImage:
    """The prediction for an image, and its certificate.

    Attributes:
        image: Name of the image.
        prediction: Predicted class.
        radius: Certified l_inf radius, for pixel values in [0, 1].
        certifier: Name of the certifier.
    """

    image: str
    prediction: int
    radius: float
    certifier: str


def certify_images(path: Path, images: Sequence[Path], certifier: str, sound: bool = True) -> list[CertifiedImage]:
    """Classify images from files, and certify the predictions.

    Args:
        path: Weights file.
        images: Image files, .npy arrays (see `read_images`), and directories with such files.
        certifier: Name of the certifier, or auto.
        sound: Whether certificates account for float32 rounding.

    Returns:
        One result per image, in the order of the files.

    Raises:
        InputError: If a file is not readable, an image has the wrong size, or the certifier does not support the
            network.
    """
    weights = load_weights(path)
    network = weights.network
    experiment = build_config(weights.experiment.model_dump(mode="json"), {"evaluation.certifier": certifier})
    name = evaluation_spec(experiment, network, with_attacks=False).certifier
    instance = make_certifier(network, name, sound)
    files = [read_images(image, weights.image_shape) for image in find_images(images)]
    names = [name for file_names, _ in files for name in file_names]
    rows: list[CertifiedImage] = []
    for batch in torch.cat([images for _, images in files]).split(experiment.evaluation.batch_size):
        with torch.no_grad(), strict_float32():  # certificates hold for logits in strict float32
            predictions = network(batch).argmax(dim=1)
            radii = instance.compute_radius(batch, predictions)
        rows += [
            CertifiedImage(names[len(rows) + k], int(prediction), max(0.0, float(radius)), name)
            for k, (prediction, radius) in enumerate(zip(predictions, radii, strict=True))
        ]
    return rows
