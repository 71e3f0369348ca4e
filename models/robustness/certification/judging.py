"""Verdicts on images at one eps, by any certifier."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.certification.base import Certifier
from linflab.models.robustness.certification.cascade import FORWARD, CascadeCertifier, Verdict
from linflab.models.robustness.certification.complete import CompleteCertifier
from linflab.models.robustness.inputs import check_batch, check_logits, compute_logits
from linflab.models.robustness.margins import margin


def judge_images(
    certifier: Certifier,
    images: Tensor,
    labels: Tensor,
    eps: float,
    on_verdict: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Return a verdict on each image.

    Args:
        certifier: Certifier of a network; `complete` and `cascade` decide image by image, others the whole batch.
        images: (B, C, H, W) or flat (B, D), pixel values in [0, 1].
        labels: (B,) true classes, of any integer dtype.
        eps: Radius of the l_inf ball, for pixel values in [0, 1].
        on_verdict: Called with each verdict; in the order of decision for `cascade`.

    Returns:
        Verdicts. The certifier of misclassified images is `forward`, and their duration that of their batch, divided
        by the number of images, except for `complete` and `cascade`.

    Raises:
        TypeError: If the certifier does not support the network, or an argument has the wrong type or dtype.
        ValueError: If the network is in training mode, or shapes, pixel values, labels or eps are invalid.
    """
    if isinstance(certifier, CascadeCertifier):
        return certifier.judge(images, labels, eps, lambda position, verdict: on_verdict(verdict))
    if isinstance(certifier, CompleteCertifier):
        labels = check_batch(certifier.network, images, labels)
        verdicts = []
        for image, label in zip(images.split(1), labels.split(1), strict=True) if len(images) else ():
            decision = certifier.decide(image, label, eps)
            # Attacks return other images, since they run on images that are classified correctly.
            is_wrong = decision.adversarial is not None and torch.equal(decision.adversarial, image[0])
            name = FORWARD if is_wrong else certifier.kind
            verdicts.append(Verdict(decision.status, name, decision.seconds, decision.adversarial))
            on_verdict(verdicts[-1])
        return verdicts
    start = time.monotonic()
    certified = certifier.certify(images, labels, eps)
    is_correct = is_classified_correctly(certifier.network, images, labels.to(images.device, torch.int64))
    seconds = (time.monotonic() - start) / max(1, len(images))
    verdicts = [
        Verdict("certified", certifier.kind, seconds)
        if is_certified
        else Verdict("unknown", certifier.kind, seconds)
        if correct
        else Verdict("falsified", FORWARD, seconds, image)
        for is_certified, correct, image in zip(certified.tolist(), is_correct.tolist(), images, strict=True)
    ]
    for verdict in verdicts:
        on_verdict(verdict)
    return verdicts


@strict_float32()
@torch.no_grad()
def is_classified_correctly(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return (B,) bool: True if the image is classified correctly, by the arithmetic of certificates; a tie is wrong.

    Args:
        network: Network in evaluation mode.
        images: (B, C, H, W) or flat (B, D), pixel values in [0, 1].
        labels: (B,) true classes, on the device of the images.

    Raises:
        ValueError: If the network fails on the images, or does not return logits of these classes.
    """
    if not len(images):
        return torch.zeros(0, dtype=torch.bool)
    logits = compute_logits(network, images)
    check_logits(logits, labels)
    return margin(logits, labels) > 0
