"""Square Attack: random search, without gradients, and so not misled by them.

Source: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search", ECCV
2020, for the l_inf norm.
"""

import torch
from torch import Tensor, nn

from linflab.models.robustness.attacks.ball import Ball
from linflab.models.robustness.objectives import margin

FIRST_SHARE = 0.8  # of the image's area, for the first squares
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries; for other numbers in proportion


@torch.no_grad()
def square(network: nn.Module, around: Ball, labels: Tensor, queries: int, generator: torch.Generator) -> Tensor:
    """Move squares of pixels to an end of the ball, and keep what lowers the margin: which images (B) lost their class.

    Args:
        network: in evaluation mode.
        around: where to look.
        labels: (B), the right classes.
        queries: how often the network sees each image.
        generator: of squares and directions.
    """
    batch, channels, height, width = around.centre.shape
    device = labels.device

    def ends(up: Tensor) -> Tensor:
        return torch.where(up.to(device), around.high, around.low)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator)

    best_x = ends(drawn(channels, 1, width) < 0.5)  # stripes
    best = margin(network(best_x), labels)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    for query in range(1, queries):
        alive = (best > 0).nonzero()[:, 0]
        if not len(alive):
            break
        share = FIRST_SHARE / 2 ** sum(query * 10_000 > at * queries for at in HALVED_AT)
        side = min(max(1, round((share * height * width) ** 0.5)), height, width)
        top, left = ((drawn(1, 1, 1) * (size - side + 1)).long() for size in (height, width))
        inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        x = torch.where(inside.to(device), ends(drawn(channels, 1, 1) < 0.5), best_x)[alive]
        found = margin(network(x), labels[alive])
        better = ~(found >= best[alive])  # NaN too
        best_x[alive[better]], best[alive[better]] = x[better], found[better]
    return ~(best > 0)
