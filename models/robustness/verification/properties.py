"""Properties of networks: boxes of inputs for which certain sets of outputs are unsafe."""

from typing import NamedTuple

import torch
from torch import Tensor

from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.rounding import round_up


class OutputSet(NamedTuple):
    """The set of outputs y with coefficients @ y + offsets <= 0 in every row, or < 0 in strict rows.

    Attributes:
        coefficients: (R, K) in float64; R is at least 1.
        offsets: (R,) in float64.
        strict: (R,) bool.
    """

    coefficients: Tensor
    offsets: Tensor
    strict: Tensor

    def violations(self, outputs: Tensor) -> Tensor:
        """Return the largest row of coefficients @ y + offsets, (B,) in float64, for outputs y (B, K).

        It is negative inside the set and positive outside.
        """
        return (outputs.double() @ self.coefficients.mT + self.offsets).amax(dim=1)

    def contains(self, outputs: Tensor) -> Tensor:
        """Return which outputs (B, K) are in the set, as (B,) bool; those with NaN are not."""
        rows = outputs.double() @ self.coefficients.mT + self.offsets
        return torch.where(self.strict, rows < 0, rows <= 0).all(dim=1)

    def is_refuted(self, lower: Tensor) -> Tensor:
        """Return where lower bounds (B, R) of the rows of coefficients @ y prove that no y is in the set, (B,) bool.

        The sum with the offsets is rounded, so it must exceed its rounding error.
        """
        rows = lower + self.offsets
        slack = 2.0**-50 * (lower.abs() + self.offsets.abs())
        return (torch.where(self.strict, rows >= slack, rows > slack) & lower.isfinite()).any(dim=1)


class Region(NamedTuple):
    """A box of inputs whose outputs must not be in any of several sets.

    Attributes:
        lower: (D,) lower bounds of the flattened inputs, in float64.
        upper: (D,) upper bounds of the flattened inputs, in float64.
        unsafe: Sets of unsafe outputs; at least one.
    """

    lower: Tensor
    upper: Tensor
    unsafe: tuple[OutputSet, ...]

    def outer_box(self) -> Box:
        """Return the smallest float32 box (1, D) that contains the region."""
        like = self.lower.float()
        return Box(-round_up(-self.lower, like)[None], round_up(self.upper, like)[None])

    def inner_box(self) -> Box:
        """Return the box (1, D) of all float32 inputs in the region.

        Where the region contains no float32 number, the box has the one that is nearest to its center.
        """
        like = self.lower.float()
        lower, upper = round_up(self.lower, like), -round_up(-self.upper, like)
        nearest = ((self.lower + self.upper) / 2).float()
        return Box(torch.where(lower > upper, nearest, lower)[None], torch.where(lower > upper, nearest, upper)[None])


def robustness_region(lower: Tensor, upper: Tensor, label: int, classes: int) -> Region:
    """Return the property that every input of a box has one class, where ties count as errors.

    Args:
        lower: (D,) lower bounds of the inputs.
        upper: (D,) upper bounds of the inputs.
        label: True class y; outputs with z_j >= z_y for some other class j are unsafe.
        classes: Number of classes.
    """
    unsafe = []
    for other in (j for j in range(classes) if j != label):
        row = torch.zeros(1, classes, dtype=torch.float64)
        row[0, label], row[0, other] = 1, -1
        unsafe.append(OutputSet(row, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.bool)))
    return Region(lower.double(), upper.double(), tuple(unsafe))
