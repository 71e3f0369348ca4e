"""Clean, robust and certified accuracy of a network on a split."""

from dataclasses import dataclass

import torch
from torch import nn

from linflab.models.networks.layers import recomputed_means
from linflab.models.robustness.attacks import PGDConfig, pgd
from linflab.models.robustness.certification import certifier_of, interval_certified, lipschitz_radius
from linflab.models.robustness.objectives import margin
from linflab.platform.datasets import Split


@dataclass(frozen=True)
class Accuracy:
    """Shares of a split, in [0, 1].

    Attributes:
        clean: classified correctly.
        certified: certified radius strictly above eps, by the certifier of this kind of network (`certifier_of`).
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
    """Score a network in evaluation mode at p = inf; eps in pixels. The attack's random starts come from the seed."""
    was_training = network.training
    network.eval()
    try:
        generator = torch.Generator().manual_seed(seed)
        clean = certified = robust = broken = 0
        for positions in torch.arange(len(split), device=split.indices.device).split(batch_size):
            images, labels = split.batch(positions)
            if certifier_of(network) == "lipschitz":
                radius = lipschitz_radius(network, images, labels)
                right, safe = radius > 0, radius > eps
            else:
                with torch.no_grad():
                    right = margin(network(images), labels) > 0
                safe = interval_certified(network, images, labels, eps)
            clean += int(right.sum())
            certified += int(safe.sum())
            if attack is not None:
                withstands = pgd(network, images, labels, eps, attack, generator)
                robust += int(withstands.sum())
                broken += int((safe & ~withstands).sum())
    finally:
        network.train(was_training)
    total = len(split)
    if attack is None:
        return Accuracy(clean / total, certified / total)
    return Accuracy(clean / total, certified / total, robust / total, broken)


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
