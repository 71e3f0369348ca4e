"""IBP certifier, for every network whose layers have rules."""

from typing import ClassVar

from torch import Tensor

from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.ibp import ibp_margins
from linflab.models.robustness.bounds.steps import Trace
from linflab.models.robustness.certification.base import TracingCertifier


class IBPCertifier(TracingCertifier):
    """Certifier by interval bounds of every layer over the box of images, intersected with [0, 1]."""

    kind: ClassVar[str] = "ibp"

    def bound_margins(self, traced: Trace, box: Box, labels: Tensor) -> Tensor:
        """Return upper bounds (B, K) of z_j - z_y by IBP."""
        return ibp_margins(traced, box, labels, self.sound)
