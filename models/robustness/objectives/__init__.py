"""Training objectives, one file each: settings, loss, and what the loss needs from a batch."""

from linflab.models.robustness.bounds.worst_case import BoundMethod, WorstCaseOutput
from linflab.models.robustness.margins import cross_entropy_from_differences, logit_differences, margin
from linflab.models.robustness.objectives.adversarial_cross_entropy import (
    AdversarialCrossEntropy,
    AdversarialCrossEntropyConfig,
)
from linflab.models.robustness.objectives.base import Batch, LambdaDecayConfig, Objective, ObjectiveConfig
from linflab.models.robustness.objectives.cc_ibp import CCIBP, CCIBPConfig
from linflab.models.robustness.objectives.clipped_hinge_cross_entropy import (
    ClippedHingeCrossEntropy,
    ClippedHingeCrossEntropyConfig,
)
from linflab.models.robustness.objectives.colt import COLT, COLTConfig
from linflab.models.robustness.objectives.cross_entropy import CrossEntropy, CrossEntropyConfig
from linflab.models.robustness.objectives.exp_ibp import EXPIBP, EXPIBPConfig
from linflab.models.robustness.objectives.hinge import Hinge, HingeConfig
from linflab.models.robustness.objectives.mtl_ibp import MTLIBP, MTLIBPConfig
from linflab.models.robustness.objectives.pvt import PVT, PVTConfig
from linflab.models.robustness.objectives.sabr import SABR, SABRConfig
from linflab.models.robustness.objectives.staps import STAPS, STAPSConfig
from linflab.models.robustness.objectives.taps import TAPS, TAPSConfig
from linflab.models.robustness.objectives.worst_case import WorstCaseObjective
from linflab.models.robustness.objectives.worst_case_cross_entropy import (
    WorstCaseCrossEntropy,
    WorstCaseCrossEntropyConfig,
)
from linflab.models.robustness.objectives.worst_case_hinge import WorstCaseHinge, WorstCaseHingeConfig

__all__ = [
    "CCIBP",
    "COLT",
    "EXPIBP",
    "MTLIBP",
    "PVT",
    "SABR",
    "STAPS",
    "TAPS",
    "AdversarialCrossEntropy",
    "AdversarialCrossEntropyConfig",
    "Batch",
    "BoundMethod",
    "CCIBPConfig",
    "COLTConfig",
    "ClippedHingeCrossEntropy",
    "ClippedHingeCrossEntropyConfig",
    "CrossEntropy",
    "CrossEntropyConfig",
    "EXPIBPConfig",
    "Hinge",
    "HingeConfig",
    "LambdaDecayConfig",
    "MTLIBPConfig",
    "Objective",
    "ObjectiveConfig",
    "PVTConfig",
    "SABRConfig",
    "STAPSConfig",
    "TAPSConfig",
    "WorstCaseCrossEntropy",
    "WorstCaseCrossEntropyConfig",
    "WorstCaseHinge",
    "WorstCaseHingeConfig",
    "WorstCaseObjective",
    "WorstCaseOutput",
    "cross_entropy_from_differences",
    "logit_differences",
    "margin",
]
