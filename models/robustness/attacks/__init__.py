"""Adversarial attacks; importing the package registers them in this order."""

from linflab.models.robustness.attacks.base import Attack, AttackConfig, AttackMethod, TargetedAttack
from linflab.models.robustness.attacks.linf_ball import LinfBall
from linflab.models.robustness.attacks.pgd import PGD, SurrogatePGD

# isort: split
from linflab.models.robustness.attacks.apgd import APGD, DLRAPGD, CrossEntropyAPGD, TargetedAPGD, TargetedDLRAPGD
from linflab.models.robustness.attacks.fab import FAB
from linflab.models.robustness.attacks.square import Square
from linflab.models.robustness.attacks.suite import AutoAttack, default_attacks, robust_under_attack
from linflab.models.robustness.attacks.surrogate import surrogate_gradients

__all__ = [
    "APGD",
    "DLRAPGD",
    "FAB",
    "PGD",
    "Attack",
    "AttackConfig",
    "AttackMethod",
    "AutoAttack",
    "CrossEntropyAPGD",
    "LinfBall",
    "Square",
    "SurrogatePGD",
    "TargetedAPGD",
    "TargetedAttack",
    "TargetedDLRAPGD",
    "default_attacks",
    "robust_under_attack",
    "surrogate_gradients",
]
