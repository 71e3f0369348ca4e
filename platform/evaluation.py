"""Clean, robust and certified accuracy of a network on a split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from linflab.models.networks.layers import recomputed_means
from linflab.models.robustness.attacks import PGDConfig, pgd
from linflab.models.robustness.certification import Certifier, certified, certifier_of, lipschitz_radius
from linflab.models.robustness.objectives import margin
from linflab.platform.datasets import Split


@dataclass(frozen=True)
class Accuracy:
    """Shares of a split, in [0, 1].

    Attributes:
        clean: classified correctly.
        certified: certified radius strictly above eps.
        robust: classified correctly at every point that the attack visited; None where no attack ran.
        certified_but_broken: number of samples that were certified at eps and broken by the attack within eps. With a
            sound certifier it is 0.
    """

    clean: float
    certified: float
    robust: float | None = None
    certified_but_broken: int | None = None


def evaluate(
    network: nn.Module, split: Split, eps: float, batch_size: int, attack: PGDConfig | None = None, seed: int = 0
) -> Accuracy:
    """Score a network at one eps, by the certifier of its kind (`certifier_of`); see `evaluate_at`."""
    (accuracy,) = evaluate_at(network, split, [eps], batch_size, certifier_of(network), attack=attack, seed=seed)
    return accuracy


def evaluate_at(
    network: nn.Module,
    split: Split,
    eps: Sequence[float],
    batch_size: int,
    certifier: Certifier,
    sound: bool = False,
    attack: PGDConfig | None = None,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda samples: None,
) -> list[Accuracy]:
    """Score a network in evaluation mode at p = inf, at several eps in one pass over a split.

    Args:
        network: of any mode; it is left in its mode.
        split: what it is scored on.
        eps: radii in pixels.
        batch_size: samples that are scored together.
        certifier: what certifies.
        sound: account for roundings in certificates.
        attack: what robust accuracy is under; none: it is not measured.
        seed: the attack's random starts come from it, at every eps the same.
        on_batch: is told how many samples have been scored.

    Raises:
        TypeError: see `certified`.
    """
    was_training = network.training
    network.eval()
    generators = [torch.Generator().manual_seed(seed) for _ in eps]
    clean, counts = 0, [[0, 0, 0] for _ in eps]  # certified, robust, certified but broken
    try:
        for positions in torch.arange(len(split), device=split.indices.device).split(batch_size):
            images, labels = split.batch(positions)
            if certifier == "lipschitz":  # one forward pass for all eps
                radius = lipschitz_radius(network, images, labels, sound).double()
            with torch.no_grad():
                right = radius > 0 if certifier == "lipschitz" and not sound else margin(network(images), labels) > 0
            clean += int(right.sum())
            for bound, generator, count in zip(eps, generators, counts, strict=True):
                if certifier == "lipschitz":
                    safe = radius > bound
                else:
                    safe = certified(network, images, labels, bound, certifier, sound)
                count[0] += int(safe.sum())
                if attack is not None:
                    withstands = pgd(network, images, labels, bound, attack, generator)
                    count[1] += int(withstands.sum())
                    count[2] += int((safe & ~withstands).sum())
            on_batch(int(positions[-1]) + 1)
    finally:
        network.train(was_training)
    total = len(split)
    return [
        Accuracy(clean / total, safe / total, *((robust / total, broken) if attack is not None else ()))
        for safe, robust, broken in counts
    ]


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
