"""Loss fusion: the cross entropy over the eps-ball, bounded as one function instead of K logit differences.

Each exp m_j, m_j = z_j - z_y, is below its chord over the range of m_j. The sum of all chords is one linear function of
the logits, so one backward pass is enough, instead of one per class. Source: Xu et al., "Automatic Perturbation
Analysis", NeurIPS 2020.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from linflab.models.robustness.bounds.coefficients import DenseCoefficients
from linflab.models.robustness.bounds.linear_bounds import LinearBounds


class ChordBound(NamedTuple):
    """A linear function of the logits that bounds sum_j exp m_j, m_j = z_j - z_y, scaled by exp(-largest).

    Attributes:
        functions: (B, K) coefficients c of the logits; their sum is 0.
        constant: (B,) constants d, so that sum_j exp(m_j - largest) <= c z + d.
        largest: (B,) largest upper bounds of m_j, including m_y = 0.
    """

    functions: Tensor
    constant: Tensor
    largest: Tensor

    def loss_bound(self, total: Tensor) -> Tensor:
        """Return upper bounds (B,) of the cross entropy, from upper bounds of c z + d (B,)."""
        return self.largest + total.clamp_min(torch.finfo(total.dtype).tiny).log()


def chord_bound(lower: Tensor, upper: Tensor, labels: Tensor) -> ChordBound:
    """Return the sum of the chords of all exp m_j over their ranges."""
    index = labels[:, None]
    largest = upper.scatter(1, index, 0.0).amax(dim=1, keepdim=True).detach()  # subtracted from all exponents
    top, width = (upper - largest).exp(), upper - lower
    # (1 - exp(-w)) / w without cancellation
    slope = top * torch.where(width > 0, -torch.expm1(-width) / torch.where(width > 0, width, 1.0), 1.0)
    slope = slope.scatter(1, index, 0.0)
    constant = (top - slope * upper).scatter(1, index, 0.0).sum(dim=1) + (-largest[:, 0]).exp()
    return ChordBound(slope.scatter(1, index, -slope.sum(dim=1, keepdim=True)), constant, largest[:, 0])


def fused_cross_entropy(bounds: LinearBounds, lower: Tensor, upper: Tensor, labels: Tensor) -> Tensor:
    """Return upper bounds (B,) of the cross entropy log sum_j exp m_j, m_j = z_j - z_y, by loss fusion.

    Args:
        bounds: Linear bounds of the network.
        lower: (B, K) lower bounds of m_j; column y is ignored.
        upper: (B, K) upper bounds of m_j; column y is ignored.
        labels: (B,) true classes y.
    """
    chords = chord_bound(lower, upper, labels)
    total = chords.constant - bounds.lower(bounds.output, DenseCoefficients(-chords.functions[:, None]))[:, 0]
    return chords.loss_bound(total)
