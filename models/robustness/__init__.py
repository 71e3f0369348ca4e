"""Training, attacks and certification for robustness to l_inf perturbations."""

from linflab.models.robustness.attacks import Attack, AttackConfig, default_attacks, robust_under_attack
from linflab.models.robustness.bounds import (
    Box,
    WorstCaseBounds,
    crown_bounds,
    crown_logit_differences,
    ibp_bounds,
    ibp_logit_differences,
    perturbation_box,
    strict_float32,
)
from linflab.models.robustness.certification import (
    Certifier,
    certified_radius,
    certify,
    default_certifier,
    lipschitz_radius,
    make_certifier,
)
from linflab.models.robustness.margins import logit_differences, margin
from linflab.models.robustness.objectives import Batch, Objective, ObjectiveConfig

__all__ = [
    "Attack",
    "AttackConfig",
    "Batch",
    "Box",
    "Certifier",
    "Objective",
    "ObjectiveConfig",
    "WorstCaseBounds",
    "certified_radius",
    "certify",
    "crown_bounds",
    "crown_logit_differences",
    "default_attacks",
    "default_certifier",
    "ibp_bounds",
    "ibp_logit_differences",
    "lipschitz_radius",
    "logit_differences",
    "make_certifier",
    "margin",
    "perturbation_box",
    "robust_under_attack",
    "strict_float32",
]
