"""Verification of properties: linear constraints on the outputs of networks over boxes of inputs."""

from linflab.models.robustness.verification.output_bounds import OutputBound
from linflab.models.robustness.verification.properties import OutputSet, Region, robustness_region
from linflab.models.robustness.verification.search import Answer, Verdict, verify

__all__ = ["Answer", "OutputBound", "OutputSet", "Region", "Verdict", "robustness_region", "verify"]
