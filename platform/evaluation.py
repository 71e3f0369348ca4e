"""Clean, robust and certified accuracy of a network on a split."""

from dataclasses import dataclass

import torch
from torch import nn

from linflab.models.robustness.attacks import PGDConfig, pgd
from linflab.models.robustness.certification import lipschitz_radius
from linflab.platform.datasets import Split


@dataclass(frozen=True)
class Accuracy:
    """Shares of a split, in [0, 1].

    Attributes:
        clean: classified correctly.
        certified: certified radius (certifier `lipschitz`) strictly above eps.
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
            radius = lipschitz_radius(network, images, labels)
            clean += int((radius > 0).sum())
            certified += int((radius > eps).sum())
            if attack is not None:
                withstands = pgd(network, images, labels, eps, attack, generator)
                robust += int(withstands.sum())
                broken += int(((radius > eps) & ~withstands).sum())
    finally:
        network.train(was_training)
    total = len(split)
    if attack is None:
        return Accuracy(clean / total, certified / total)
    return Accuracy(clean / total, certified / total, robust / total, broken)
