"""Lipschitz certifier: closed-form radii from one forward pass at p = inf."""

import math
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from linflab.models.robustness.bounds.lipschitz import LipschitzRounding, lipschitz_rounding
from linflab.models.robustness.bounds.rounding import unit_roundoff
from linflab.models.robustness.certification.base import Certifier
from linflab.models.robustness.inputs import check_logits, compute_logits
from linflab.models.robustness.margins import margin


class LipschitzCertifier(Certifier):
    """Certifier with radius margin / (2 L), for networks with an attribute `lipschitz_constant` L.

    L refers to the l_inf norm of the pixel values; the margin is z_y - max_{j != y} z_j. Each logit changes by at most
    L times the size of the perturbation, so no perturbation up to the radius changes the predicted class. Images are
    certified at eps if their radius is strictly greater than eps. Source: Zhang et al. 2021, Section 3.

    A sound radius subtracts 4 E from the margin: two logits, each computed at two images in [0, 1], have an error of at
    most E. L is replaced by the larger constant of the weights as computed (see `lipschitz_rounding` for both). The
    margin and the values derived from it are rounded six times. An allowance of 8 u for each, where u is the unit
    roundoff, exceeds these errors. Sound radii are in float64.
    """

    kind: ClassVar[str] = "lipschitz"

    def _compute_radius(self, images: Tensor, labels: Tensor) -> Tensor:
        lipschitz_constant, rounding = self._constants
        if not len(images):
            one = images.new_zeros(1, *images.shape[1:]), labels.new_zeros(1)
            return self._compute_radius(*one)[:0]
        logits = compute_logits(self.network, images)
        check_logits(logits, labels)
        margins = margin(logits, labels)
        if rounding is None:
            radius = margins / (2 * lipschitz_constant)
        else:
            relative_error = 8 * unit_roundoff(margins.dtype)
            sound_margins = (
                margins.double() - relative_error * margins.abs().double() - 4 * rounding.logit_rounding_error
            )
            radius = sound_margins / (2 * lipschitz_constant * rounding.excess)
            radius = radius - relative_error * radius.abs()
        return torch.where(logits.isfinite().all(dim=1), radius, -1.0)

    @cached_property
    def _constants(self) -> tuple[float, LipschitzRounding | None]:
        """Lipschitz constant of the network, and its rounding bounds if `sound`.

        Raises:
            TypeError: If the network has no Lipschitz constant by construction, or no known rounding bound.
            ValueError: If the constant is not positive and finite.
        """
        lipschitz_constant = getattr(self.network, "lipschitz_constant", None)
        if lipschitz_constant is None:
            raise TypeError(
                f"certifier=lipschitz: requires a lipschitz_constant, but {type(self.network).__name__} has none; "
                "use certifier=ibp"
            )
        lipschitz_constant = float(lipschitz_constant)
        if not 0 < lipschitz_constant < math.inf:
            raise ValueError(
                f"lipschitz_constant={lipschitz_constant:g}: must be positive and finite; use a proven constant"
            )
        return lipschitz_constant, lipschitz_rounding(self.network) if self.sound else None
