"""Public Python API, re-exported by `linflab`: train, certify, attack and load networks, read runs.

Images have shape (N, C, H, W), or (N, D) for `certify` and `attack`. Radii and eps are for pixel values in [0, 1].
"""

from linflab.platform.api.certify import AttackResult, Certificates, attack, certify
from linflab.platform.api.fit import FitResult, fit
from linflab.platform.api.runs import TrainingResult, load, records, train

__all__ = [
    "AttackResult",
    "Certificates",
    "FitResult",
    "TrainingResult",
    "attack",
    "certify",
    "fit",
    "load",
    "records",
    "train",
]
