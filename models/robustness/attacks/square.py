"""Square Attack: random search without gradients, which gradient masking does not mislead.

Source: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search", ECCV
2020, for the l_inf norm.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from linflab.models.robustness.attacks.base import Attack
from linflab.models.robustness.attacks.linf_ball import LinfBall
from linflab.models.robustness.margins import margin

P_INIT = 0.8  # area of the first squares, as a fraction of the image
P_HALVING_QUERIES = (
    10,
    50,
    200,
    500,
    1000,
    2000,
    4000,
    6000,
    8000,
)  # for 10,000 queries; scaled for other numbers


@torch.no_grad()
def square_attack(
    network: nn.Module, ball: LinfBall, labels: Tensor, queries: int, generator: torch.Generator
) -> Tensor:
    """Move random squares to the ends of the ball, and return which images (B,) were misclassified.

    A move is kept if it lowers the margin.

    Args:
        network: Network in evaluation mode.
        ball: Perturbation sets of images (B, C, H, W) or (B, D).
        labels: (B,) true classes.
        queries: Number of network evaluations per image.
        generator: CPU generator for squares and directions.
    """
    flat = ball.center.dim() == 2  # segments of a pixel row take the place of squares
    sizes = (1, 1, ball.center.shape[1]) if flat else ball.center.shape[1:]
    maps = LinfBall(*(images.reshape(-1, *sizes) for images in ball))
    batch, (channels, height, width), device = len(labels), sizes, labels.device

    def margins(x: Tensor, labels: Tensor) -> Tensor:
        return margin(network(x.reshape(-1, *ball.center.shape[1:])), labels)

    def ends(up: Tensor) -> Tensor:
        return torch.where(up.to(device), maps.upper, maps.lower)

    def draw(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, device=generator.device)

    first = draw(channels, 1, width)
    best_x = ends(first < 0.5)  # the search starts with vertical stripes
    best = margins(best_x, labels)
    rows, columns = torch.arange(height, device=first.device)[:, None], torch.arange(width, device=first.device)
    for query in range(1, queries):
        remaining = (best > 0).nonzero()[:, 0]
        if not len(remaining):
            break
        share = P_INIT / 2 ** sum(query * 10_000 > threshold * queries for threshold in P_HALVING_QUERIES)
        side = min(max(1, round((share * height * width) ** 0.5)), height, width)
        length = max(1, round(share * width)) if flat else side
        top, left = ((draw(1, 1, 1) * (size - part + 1)).long() for size, part in ((height, side), (width, length)))
        inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + length)
        x = torch.where(inside.to(device), ends(draw(channels, 1, 1) < 0.5), best_x)[remaining]
        new_margins = margins(x, labels[remaining])
        better = ~(new_margins >= best[remaining])  # true for NaN
        best_x[remaining[better]], best[remaining[better]] = x[better], new_margins[better]
    return ~(best > 0)


class Square(Attack):
    """Square Attack, in a single run."""

    kind: ClassVar[str] = "square"
    follows_surrogate: ClassVar[bool] = False
    effort: ClassVar[str] = "queries"

    def describe(self) -> str:
        """Return the attack with its settings, as text for table notes."""
        return f"Square ({self.config.queries} queries)"

    def count_runs(self, classes: int) -> int:
        """Return 1: the attack has no restarts."""
        return 1

    def run(
        self, network: nn.Module, ball: LinfBall, labels: Tensor, eps: float, generator: torch.Generator, number: int
    ) -> Tensor:
        """Return which images (B,) the search misclassified."""
        return square_attack(network, ball, labels, self.config.queries, generator)
