"""Alpha-CROWN certifier: CROWN with optimized slopes, at least as tight as `ibp` and `crown` on every image."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linflab.models.robustness.bounds.alpha_crown import alpha_crown_margins, has_linear_bounds
from linflab.models.robustness.bounds.backward_steps import check_sound_dtype
from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.crown import crown_margins
from linflab.models.robustness.bounds.ibp import ibp_margins
from linflab.models.robustness.bounds.input_splitting import is_undecided
from linflab.models.robustness.bounds.steps import Trace
from linflab.models.robustness.certification.base import CertifierSettings, TracingCertifier


class AlphaCROWNSettings(CertifierSettings):
    """Settings of alpha-CROWN."""

    steps: int = Field(30, ge=0, description="optimization steps of the slopes for the logit differences")
    neuron_steps: int = Field(10, ge=0, description="optimization steps of the slopes for the bounds of neurons")


class AlphaCROWNCertifier(TracingCertifier):
    """Certifier by CROWN with optimized slopes; images that IBP or CROWN certify are not optimized."""

    kind: ClassVar[str] = "alpha_crown"
    settings_class: ClassVar[type[CertifierSettings]] = AlphaCROWNSettings
    settings: AlphaCROWNSettings

    def bound_margins(self, traced: Trace, box: Box, labels: Tensor) -> Tensor:
        """Return upper bounds (B, K) of z_j - z_y: the best of IBP, CROWN and alpha-CROWN.

        Raises:
            TypeError: If no layer has a linear relaxation, or if `sound` and the network is not in float32.
        """
        check_sound_dtype(self.kind, self.sound, box)
        if not has_linear_bounds(traced):
            raise TypeError("alpha_crown: requires an activation or max pooling with a linear relaxation; use ibp")
        best = ibp_margins(traced, box, labels, self.sound).double()
        steps = self.settings.steps, self.settings.neuron_steps
        for bound in (
            lambda part, y: crown_margins(traced, part, y, sound=self.sound),
            lambda part, y: alpha_crown_margins(traced, part, y, *steps, self.sound),
        ):
            is_open = is_undecided(best, labels)
            if bool(is_open.any()):
                found = bound(Box(box.lower[is_open], box.upper[is_open]), labels[is_open]).double()
                best[is_open] = torch.minimum(best[is_open], torch.where(found.isnan(), torch.inf, found))
        return best
