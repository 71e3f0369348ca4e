"""Clean, robust and certified accuracy of a network on a split."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linflab.models.networks.layers import recomputed_means
from linflab.models.robustness.attacks.suite import AttackConfig, withstands
from linflab.models.robustness.bounds.rounding import exact_products
from linflab.models.robustness.certification import Certifier, certified, certified_radius, certifier_of
from linflab.models.robustness.objectives import margin
from linflab.platform.config import Experiment
from linflab.platform.datasets import Split
from linflab.platform.process import settle_process


@dataclass(frozen=True)
class Scoring:
    """By what a network is scored, in evaluation mode at p = inf.

    Attributes:
        eps: radii in pixels.
        certifier: what certifies.
        sound: account for roundings in certificates.
        attack: what robust accuracy is under; none: it is not measured.
        seed: what chance decides in attacks comes from it, at every eps the same.
        radii: find the certified radius of every sample, too; by bisection, but for `lipschitz`.
    """

    eps: tuple[float, ...]
    certifier: Certifier
    sound: bool = False
    attack: AttackConfig | None = None
    seed: int = 0
    radii: bool = False

    @property
    def certificate(self) -> str:
        """What certified accuracies are by, for the record: `interval`, or `interval-sound`."""
        return f"{self.certifier}{'-sound' if self.sound else ''}"


def scoring_of(experiment: Experiment, network: nn.Module, attacked: bool) -> Scoring:
    """How an experiment's networks are scored, with its attack or without one."""
    evaluation = experiment.evaluation
    certifier = certifier_of(network) if evaluation.certifier == "auto" else evaluation.certifier
    attack = evaluation.attack if attacked else None
    return Scoring((experiment.eps,), certifier, evaluation.sound, attack, experiment.seed)


@dataclass(frozen=True)
class Accuracy:
    """Shares of a split, in [0, 1].

    Attributes:
        clean: classified correctly.
        certified: certified radius strictly above eps.
        certified_exact: of sound certificates, what those of exact arithmetic come to: the difference is rounding.
        robust: classified correctly at every point that the attacks visited; None where none ran.
        certified_but_broken: number of samples that were certified at eps and broken by an attack within eps. With a
            sound certifier it is 0.
    """

    clean: float
    certified: float
    certified_exact: float | None = None
    robust: float | None = None
    certified_but_broken: int | None = None


@dataclass(frozen=True)
class BatchScore:
    """What was found of some samples of a split: for each whether it holds, at each eps, as rows (eps, B)."""

    positions: Tensor
    clean: Tensor  # (B)
    certified: Tensor
    certified_exact: Tensor | None
    robust: Tensor | None
    radii: Tensor | None  # (B), in float64


def score_batch(network: nn.Module, split: Split, positions: Tensor, scoring: Scoring) -> BatchScore:
    """Score the samples at these positions of a split.

    What chance decides depends on the seed and the first position alone.

    Args:
        network: in evaluation mode.

    Raises:
        TypeError: see `certified`.
    """
    images, labels = split.batch(positions)
    certifier, sound = scoring.certifier, scoring.sound
    with exact_products() if sound else nullcontext():
        with torch.no_grad():
            clean = margin(network(images), labels) > 0

        def proven(sound: bool) -> tuple[Tensor, Tensor | None]:
            if certifier == "lipschitz":  # the radii are one forward pass for all eps
                radii = certified_radius(network, images, labels, certifier, sound).double()
                return torch.stack([radii > eps for eps in scoring.eps]), radii
            rows = [certified(network, images, labels, eps, certifier, sound) for eps in scoring.eps]
            return torch.stack(rows), None

        safe, radii = proven(sound)
        if scoring.radii and radii is None:
            radii = certified_radius(network, images, labels, certifier, sound)
        robust = None
        if scoring.attack is not None:
            seed = (scoring.seed * 1_000_003 + int(positions[0])) % 2**63
            generators = (torch.Generator().manual_seed(seed) for _ in scoring.eps)
            robust = torch.stack(
                [
                    withstands(network, images, labels, eps, scoring.attack, generator)
                    for eps, generator in zip(scoring.eps, generators, strict=True)
                ]
            )
        exact = proven(False)[0] if sound else None

    def kept(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.cpu()

    found = (kept(exact), kept(robust), kept(radii if scoring.radii else None))
    return BatchScore(positions.cpu(), clean.cpu(), safe.cpu(), *found)


def evaluate(
    network: nn.Module,
    split: Split,
    scoring: Scoring,
    batch_size: int,
    on_batch: Callable[[BatchScore], None] = lambda score: None,
) -> list[Accuracy]:
    """Score a network, which is left in its mode, on a split: accuracies at each eps of the scoring, in one pass.

    Raises:
        TypeError: see `certified`.
    """
    settle_process()
    was_training = network.training
    network.eval()
    scores = []
    try:
        for positions in batches(split, batch_size):
            scores.append(score_batch(network, split, positions, scoring))
            on_batch(scores[-1])
    finally:
        network.train(was_training)
    return accuracies(scores, scoring)


def batches(split: Split, batch_size: int) -> tuple[Tensor, ...]:
    """The positions of a split, in order, as many at once as a batch has."""
    return torch.arange(len(split), device=split.indices.device).split(batch_size)


def accuracies(scores: Sequence[BatchScore], scoring: Scoring) -> list[Accuracy]:
    """The accuracies at each eps that the scores of all batches of a split come to."""
    total = sum(len(score.positions) for score in scores)
    clean = sum(int(score.clean.sum()) for score in scores) / total

    def share(parts: Sequence[Tensor | None], at: int) -> float | None:
        found = [part[at] for part in parts if part is not None]
        return sum(int(part.sum()) for part in found) / total if found else None

    rows = []
    for at in range(len(scoring.eps)):
        safe = share([score.certified for score in scores], at)
        assert safe is not None
        exact = share([score.certified_exact for score in scores], at)
        robust = share([score.robust for score in scores], at)
        broken = [int((score.certified[at] & ~score.robust[at]).sum()) for score in scores if score.robust is not None]
        rows.append(Accuracy(clean, safe, exact, robust, sum(broken) if broken else None))
    return rows


def recompute_means(network: nn.Module, split: Split, images: int, batch_size: int) -> None:
    """Compute a network's running means anew in evaluation mode, from so many images of a split, always the same.

    For SortNet, whose neurons in evaluation are others than in training. Only whole batches count.
    """
    was_training = network.training
    network.eval()
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    positions = order[:images].to(split.indices.device)
    batch_size = min(batch_size, len(positions))
    with recomputed_means(network):
        for batch in positions[: len(positions) // batch_size * batch_size].split(batch_size):
            network(split.batch(batch)[0])
    network.train(was_training)
