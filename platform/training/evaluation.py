"""Evaluation of a network on a split: clean, robust and certified accuracy."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linflab.models.networks.running_statistics import Kinds, recalibrate_running_statistics
from linflab.models.robustness.attacks.suite import AttackConfig, robust_under_attack
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.certification import Certifier, default_certifier, make_certifier
from linflab.models.robustness.margins import margin
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.data.datasets import Split
from linflab.platform.host import configure_process
from linflab.reports.schema import SOUND


@dataclass(frozen=True)
class EvaluationSpec:
    """Specification of an evaluation, which takes place in evaluation mode at p = inf.

    Attributes:
        eps: Radii for pixel values in [0, 1].
        certifier: Name of the certifier.
        sound: Account for float32 rounding in certificates; otherwise they hold for real arithmetic.
        attack: Attacks for robust accuracy; None to skip attacks and robust accuracy.
        seed: Seed of the random draws of attacks; each eps uses the same draws.
        radii: Compute the certified radius of every sample too. All certifiers except `lipschitz` use bisection for it.
        time_limit: Seconds per image of the certifiers that have such a limit.
        rounding_cost: Compute certificates for real arithmetic in addition to sound ones.
    """

    eps: tuple[float, ...]
    certifier: str
    sound: bool = True
    attack: AttackConfig | None = None
    seed: int = 0
    radii: bool = False
    time_limit: float = 30.0
    rounding_cost: bool = False

    @property
    def certificate(self) -> str:
        """Name of the certifier with soundness, as logged: `ibp` or `ibp-sound`."""
        return f"{self.certifier}{SOUND if self.sound else ''}"

    def certifiers(self, network: nn.Module) -> tuple[Certifier, Certifier | None]:
        """Return the certifier of a network, and one for real arithmetic if `rounding_cost` requires it."""
        settings = {"time_limit": self.time_limit} if self.certifier in limited_certifiers() else {}
        exact = None
        if self.sound and self.rounding_cost:
            exact = make_certifier(network, self.certifier, sound=False, **settings)
        return make_certifier(network, self.certifier, self.sound, **settings), exact


def limited_certifiers() -> list[str]:
    """Return the certifiers that have a time limit per image, and decide image by image."""
    return [kind for kind, one in Certifier.registry.items() if one.has_time_limit()]


def no_time_limit(time_limit: float, certifier: str) -> str:
    """Return the message about a time limit for a certifier that has none."""
    return (
        f"timeout={time_limit:g}: is not supported by certifier={certifier}, which has no time limit; leave it out, or "
        f"use --certifier {' or '.join(limited_certifiers())}"
    )


def evaluation_spec(experiment: ExperimentConfig, network: nn.Module, with_attacks: bool) -> EvaluationSpec:
    """Return the specification of an evaluation with the settings of a config.

    Args:
        experiment: All settings.
        network: The network to evaluate; determines the certifier if `evaluation.certifier` is `auto`.
        with_attacks: Whether to attack and to measure the cost of rounding: True for the test set, False for model
            selection.
    """
    evaluation = experiment.evaluation
    certifier = default_certifier(network) if evaluation.certifier == "auto" else evaluation.certifier
    attack = evaluation.attack if with_attacks else None
    return EvaluationSpec(
        (experiment.eps,),
        certifier,
        evaluation.sound,
        attack,
        experiment.seed,
        time_limit=evaluation.time_limit,
        rounding_cost=with_attacks,
    )


@dataclass(frozen=True)
class Accuracies:
    """Accuracies on a split, as fractions in [0, 1].

    Attributes:
        clean: Fraction classified correctly.
        certified: Fraction with certified radius strictly above eps.
        certified_real: Fraction certified for real arithmetic. Its difference from `certified` is the cost of rounding;
            None unless the evaluation measures this cost.
        robust: Fraction classified correctly at every point that the attacks visited; None without attacks.
        certificate_violations: Number of samples that are certified at eps, yet attacked successfully within eps. Must
            be 0 with a sound certifier.
    """

    clean: float
    certified: float
    certified_real: float | None = None
    robust: float | None = None
    certificate_violations: int | None = None


@dataclass(frozen=True)
class BatchResult:
    """Results for B samples. Certified and robust results are (E, B) bool, for E values of eps."""

    positions: Tensor
    labels: Tensor  # (B)
    predictions: Tensor  # (B), predicted classes of the unperturbed images
    clean: Tensor  # (B)
    certified: Tensor
    certified_real: Tensor | None
    robust: Tensor | None
    radii: Tensor | None  # (B) float64


@dataclass(frozen=True)
class ImageScores:
    """Results of each test image, in dataset order.

    Attributes:
        labels: (N) correct classes.
        predictions: (N) predicted classes of the unperturbed images.
        radii: (N) certified radii for pixel values in [0, 1]; zero or negative for misclassified images.
        robust: For each eps, (N) bool: True if no attack within eps was successful; empty without attacks.
    """

    labels: np.ndarray
    predictions: np.ndarray
    radii: np.ndarray
    robust: dict[float, np.ndarray]

    def columns(self) -> dict[str, list[Any]]:
        """Return the results as columns of plain data; `robust_eps_0.1`, for example, is 1 if robust, else 0."""
        return {
            "certified_radius": self.radii.tolist(),
            "label": self.labels.tolist(),
            "prediction": self.predictions.tolist(),
            **{f"robust_eps_{eps!r}": robust.astype(int).tolist() for eps, robust in self.robust.items()},
        }


@dataclass(frozen=True)
class ScoringReport:
    """Progress of an evaluation, in images."""

    done: int
    total: int


def evaluate_batch(
    network: nn.Module,
    split: Split,
    positions: Tensor,
    spec: EvaluationSpec,
    certifiers: tuple[Certifier, Certifier | None] | None = None,
) -> BatchResult:
    """Evaluate the samples at some positions of a split.

    Random draws depend only on the seed and the first position.

    Args:
        network: Network in evaluation mode.
        split: Split of a dataset.
        positions: (B) positions in the split.
        spec: Specification of the evaluation.
        certifiers: Certifiers from `spec.certifiers(network)`, to reuse them for several batches.

    Returns:
        Results on the CPU.

    Raises:
        TypeError: If the certifier does not support the network.
    """
    images, labels = split.batch(positions)
    certifier, real_certifier = certifiers or spec.certifiers(network)
    with strict_float32() if spec.sound else nullcontext():
        with torch.no_grad():
            logits = network(images)
            predictions, clean = logits.argmax(dim=1), margin(logits, labels) > 0

        def certify_batch(certifier: Certifier) -> tuple[Tensor, Tensor | None]:
            if not certifier.bisects:  # one forward pass gives radii, which decide for all eps
                radii = certifier.compute_radius(images, labels).double()
                return torch.stack([radii > eps for eps in spec.eps]), radii
            return torch.stack([certifier.certify(images, labels, eps) for eps in spec.eps]), None

        certified, radii = certify_batch(certifier)
        if spec.radii and radii is None:
            radii = certifier.compute_radius(images, labels)
        robust = None
        if spec.attack is not None:
            seed = (spec.seed * 1_000_003 + int(positions[0])) % 2**63
            generators = (torch.Generator().manual_seed(seed) for _ in spec.eps)
            robust = torch.stack(
                [
                    robust_under_attack(network, images, labels, eps, spec.attack, generator)
                    for eps, generator in zip(spec.eps, generators, strict=True)
                ]
            )
        certified_real = None if real_certifier is None else certify_batch(real_certifier)[0]

    def to_cpu(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.cpu()

    optional_results = (to_cpu(certified_real), to_cpu(robust), to_cpu(radii if spec.radii else None))
    return BatchResult(
        positions.cpu(), labels.cpu(), predictions.cpu(), clean.cpu(), certified.cpu(), *optional_results
    )


def evaluate(
    network: nn.Module,
    split: Split,
    spec: EvaluationSpec,
    batch_size: int,
    on_batch: Callable[[BatchResult], None] = lambda score: None,
    positions: Tensor | None = None,
) -> list[Accuracies]:
    """Evaluate a network on a split in one pass, then restore its training or evaluation mode.

    Args:
        network: Network to evaluate.
        split: Split of a dataset.
        spec: Specification of the evaluation.
        batch_size: Number of samples that are evaluated at once.
        on_batch: Called with the results of each batch.
        positions: Positions in the split to evaluate; None: all.

    Returns:
        Accuracies at each eps of `spec`.

    Raises:
        TypeError: If the certifier does not support the network.
    """
    configure_process()
    was_training = network.training
    network.eval()
    scores, certifiers = [], spec.certifiers(network)
    try:
        batches = batch_indices(split, batch_size) if positions is None else positions.split(batch_size)
        for batch in batches:
            scores.append(evaluate_batch(network, split, batch, spec, certifiers))
            on_batch(scores[-1])
    finally:
        network.train(was_training)
    return aggregate_results(scores, spec)


def batch_indices(split: Split, batch_size: int) -> tuple[Tensor, ...]:
    """Return the positions of a split in order, divided into batches."""
    return torch.arange(len(split), device=split.indices.device).split(batch_size)


def aggregate_results(scores: Sequence[BatchResult], spec: EvaluationSpec) -> list[Accuracies]:
    """Return the accuracies at each eps from the results of all batches of a split."""
    total = sum(len(score.positions) for score in scores)
    clean = sum(int(score.clean.sum()) for score in scores) / total

    def share(parts: Sequence[Tensor | None], index: int) -> float | None:
        values = [part[index] for part in parts if part is not None]
        return sum(int(part.sum()) for part in values) / total if values else None

    rows = []
    for index in range(len(spec.eps)):
        certified = share([score.certified for score in scores], index)
        assert certified is not None
        certified_real = share([score.certified_real for score in scores], index)
        robust = share([score.robust for score in scores], index)
        violations = [
            int((score.certified[index] & ~score.robust[index]).sum()) for score in scores if score.robust is not None
        ]
        rows.append(Accuracies(clean, certified, certified_real, robust, sum(violations) if violations else None))
    return rows


def sort_by_position(scores: Sequence[BatchResult], eps: Sequence[float]) -> ImageScores:
    """Return the results of all batches, sorted by position; all batches must have radii."""
    parts = sorted(scores, key=lambda part: int(part.positions[0]))
    radii = torch.cat([part.radii for part in parts if part.radii is not None]).double()
    robust_parts = [part.robust for part in parts if part.robust is not None]
    robust = dict(zip(eps, torch.cat(robust_parts, dim=1).numpy(), strict=True)) if robust_parts else {}
    labels = torch.cat([part.labels for part in parts]).numpy()
    predictions = torch.cat([part.predictions for part in parts]).numpy()
    return ImageScores(labels, predictions, radii.numpy(), robust)


def recalibrate(network: nn.Module, split: Split, images: int, batch_size: int, kinds: Kinds) -> None:
    """Recalibrate a network's running statistics in evaluation mode, on a fixed random sample of a split.

    SortNet requires it, since its neurons compute different functions in training and evaluation. Networks with batch
    normalization have other statistics on clean images than on those of training, and averaged weights have none of
    their own. An incomplete last batch is ignored. As in evaluations, the images are not augmented. The code of
    SortNet's authors augments them.

    Args:
        network: Network whose running statistics are replaced.
        split: Split to sample from.
        images: Number of images.
        batch_size: Number of images that are processed at once.
        kinds: Layers to recalibrate; none: the network stays unchanged.
    """
    if not kinds:
        return
    was_training = network.training
    network.eval()
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    positions = order[:images].to(split.indices.device)
    batch_size = min(batch_size, len(positions))
    with recalibrate_running_statistics(network, kinds):
        for batch in positions[: len(positions) // batch_size * batch_size].split(batch_size):
            network(split.batch(batch)[0])
    network.train(was_training)
