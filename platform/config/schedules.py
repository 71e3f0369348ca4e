"""Schedules as functions of training progress: steps done / total steps, in [0, 1).

Schedules use fractions of training instead of epochs, so that the same schedule fits a run of any length.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from linflab.models.numbers import AsFraction

UnitInterval = Annotated[float, AsFraction, Field(ge=0, le=1)]


class PSchedule(BaseModel):
    """Schedule of p of the l_p-distance neurons: `start`, growth to `end`, then inf until training ends.

    Source: Zhang et al. 2021, Section 4 (smoothed approximated gradients).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: float = Field(8.0, ge=1, allow_inf_nan=False, description="initial p")
    # The relative error of float32 gradients is about p * 2^-22.
    end: float = Field(1000.0, ge=1, le=1e5, allow_inf_nan=False, description="last finite p")
    shape: Literal["exponential", "linear"] = Field("exponential", description="growth of p from start to end")
    warmup_fraction: UnitInterval = Field(0.0, description="fraction of training at p = start, before p grows")
    inf_fraction: UnitInterval = Field(0.1, description="fraction of training at p = inf, at the end")
    fast_exponents: bool = Field(
        False,
        description="restrict p to 2, 3, 4, 6, 8, 12, 16, ..., for which x^p takes few multiplications",
    )

    @model_validator(mode="after")
    def _start_before_end(self) -> Self:
        if self.start > self.end:
            raise ValueError(f"start={self.start:g}: must be at most end={self.end:g}, since p grows; use a larger end")
        if self.warmup_fraction + self.inf_fraction > 1:
            raise ValueError(
                f"warmup_fraction={self.warmup_fraction:g} and inf_fraction={self.inf_fraction:g}: "
                "their sum must be at most 1; reduce one of them"
            )
        return self

    def ramp_progress(self, progress: float) -> float:
        """Return the fraction of the growth from start to end that is done: 0 during warm-up, 1 once p is inf."""
        start, end = self.warmup_fraction, 1 - self.inf_fraction
        if progress >= end:
            return 1.0
        return 0.0 if progress <= start else (progress - start) / (end - start)

    def value_at(self, progress: float) -> float:
        """Return p at this progress of training."""
        if progress >= 1 - self.inf_fraction:
            return math.inf
        ramp_progress = self.ramp_progress(progress)
        if self.shape == "linear":
            p = self.start + (self.end - self.start) * ramp_progress
        else:
            p = exponential_interpolation(self.start, self.end, ramp_progress)
        return max(self.start, fast_exponent(p)) if self.fast_exponents else p


BENDS = {"smooth": 0.4, "smooth_quarter": 0.25}  # fraction of the ramp-up at which growth becomes linear


class EpsSchedule(BaseModel):
    """Schedule of the objective's eps: 0 during warm-up, ramp-up to `eps_train`, then constant.

    Both smooth shapes are a quartic at first, then its tangent line. Sources: Zhang et al. 2021 (linear); Xu et al.,
    "Automatic Perturbation Analysis", NeurIPS 2020 (smooth_quarter: a quartic up to a quarter of the ramp-up, the
    default of auto_LiRPA's `SmoothedScheduler`, also in papers on certified training since 2021); the same as in
    SortNet (smooth: a quartic up to 0.4 of the ramp-up).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    warmup_fraction: UnitInterval = Field(0.0, description="fraction of training at eps = 0, before eps grows")
    rampup_fraction: UnitInterval = Field(0.0, description="fraction of training during which eps grows")
    shape: Literal["linear", "smooth", "smooth_quarter"] = Field(
        "linear",
        description="growth of eps; smooth: with exponent 4 up to 0.4 of the ramp-up, then linear, as in SortNet; "
        "smooth_quarter: with exponent 4 up to 0.25, then linear, as in auto_LiRPA and its successors",
    )

    @model_validator(mode="after")
    def _within_training(self) -> Self:
        if self.warmup_fraction + self.rampup_fraction > 1:
            raise ValueError(
                f"warmup_fraction={self.warmup_fraction:g} and rampup_fraction={self.rampup_fraction:g}: "
                "their sum must be at most 1; reduce one of them"
            )
        return self

    def value_at(self, progress: float) -> float:
        """Return eps / eps_train at this progress of training, in [0, 1]."""
        if progress >= self.warmup_fraction + self.rampup_fraction:
            return 1.0
        if progress <= self.warmup_fraction:
            return 0.0
        ramp_progress = (progress - self.warmup_fraction) / self.rampup_fraction
        if self.shape == "linear":
            return ramp_progress
        bend = BENDS[self.shape]
        factor = 1 / (bend**3 * (4 - 3 * bend))  # both parts have equal values and slopes at the bend
        return factor * ramp_progress**4 if ramp_progress < bend else 1 - 4 * factor * bend**3 * (1 - ramp_progress)


def fast_exponent(p: float) -> float:
    """Return the largest number of the form 2^k or 3 * 2^k that is at most p, for p >= 1."""
    power = 2.0 ** (math.frexp(p)[1] - 1)  # exact, unlike a rounded logarithm
    return 1.5 * power if power > 1 and p >= 1.5 * power else power


def exponential_interpolation(start: float, end: float, fraction: float) -> float:
    """Interpolate geometrically between two positive numbers, for `fraction` in [0, 1]."""
    return start * (end / start) ** fraction


def constant_then_cosine(constant_lr_fraction: float, progress: float) -> float:
    """Return the learning-rate factor: 1 up to `constant_lr_fraction` of training, then cosine decay to 0."""
    if progress <= constant_lr_fraction:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - constant_lr_fraction) / (1 - constant_lr_fraction)))


def step_decay(milestones: Sequence[float], factor: float, progress: float) -> float:
    """Return the learning-rate factor: `factor` to the power of the number of milestones that are reached."""
    return factor ** sum(progress >= milestone for milestone in milestones)
