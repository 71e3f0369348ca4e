"""CROWN certifier, tighter than `ibp` for networks that were not trained with IBP."""

from typing import ClassVar

from torch import Tensor

from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.crown import crown_margins
from linflab.models.robustness.bounds.steps import Trace
from linflab.models.robustness.certification.base import TracingCertifier


class CROWNCertifier(TracingCertifier):
    """Certifier by CROWN: backward linear bounds through affine layers and relaxed activations."""

    kind: ClassVar[str] = "crown"

    def bound_margins(self, traced: Trace, box: Box, labels: Tensor) -> Tensor:
        """Return upper bounds (B, K) of z_j - z_y by CROWN."""
        return crown_margins(traced, box, labels, sound=self.sound)
