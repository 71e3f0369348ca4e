"""Bounds on network outputs over a box of inputs, and the registries of layer rules."""

from linflab.models.robustness.bounds.affine import Affine, affine_map
from linflab.models.robustness.bounds.boxes import Box, perturbation_box
from linflab.models.robustness.bounds.crown import crown_bounds, crown_logit_differences
from linflab.models.robustness.bounds.ibp import ibp_bounds, ibp_logit_differences
from linflab.models.robustness.bounds.relaxations import LinearRelaxation, relax
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.bounds.rules import propagate_layer
from linflab.models.robustness.bounds.worst_case import WorstCaseBounds, WorstCaseOutput

__all__ = [
    "Affine",
    "Box",
    "LinearRelaxation",
    "WorstCaseBounds",
    "WorstCaseOutput",
    "affine_map",
    "crown_bounds",
    "crown_logit_differences",
    "ibp_bounds",
    "ibp_logit_differences",
    "perturbation_box",
    "propagate_layer",
    "relax",
    "strict_float32",
]
