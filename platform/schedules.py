"""What changes during training, as functions of progress: the share of all steps that are done, in [0, 1).

Shares, not epochs, so that the same schedule fits a run of any length.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]


class PSchedule(BaseModel):
    """p of the l_p-distance neurons: `start`, then up to `end`, then inf until training ends.

    Source: Zhang et al. 2021, Section 4 (smoothed approximated gradients).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: float = Field(8.0, ge=1, allow_inf_nan=False, description="p at the start")
    # in float32 gradients err by about p 2^-22
    end: float = Field(1000.0, ge=1, le=1e5, allow_inf_nan=False, description="p before it becomes inf")
    shape: Literal["exponential", "linear"] = Field("exponential", description="how p goes from start to end")
    warmup_share: Share = Field(0.0, description="share of the training at p = start, before p grows")
    infinity_share: Share = Field(0.1, description="share of the training at p = inf, at the end")
    cheap_exponents: bool = Field(
        False,
        description="step from start to end through 2, 3, 4, 6, 8, 12, 16, ..., whose powers are few multiplications",
    )

    @model_validator(mode="after")
    def _start_before_end(self) -> Self:
        if self.start > self.end:
            raise ValueError(f"start={self.start:g} is above end={self.end:g}; p grows, so start <= end is needed")
        if self.warmup_share + self.infinity_share > 1:
            raise ValueError(
                f"warmup_share={self.warmup_share:g} and infinity_share={self.infinity_share:g} "
                "are more than the whole training; their sum can be at most 1"
            )
        return self

    def growth(self, progress: float) -> float:
        """How far p has come from start to end: 0 during the warm-up, 1 from where p is inf."""
        left, right = self.warmup_share, 1 - self.infinity_share
        if progress >= right:
            return 1.0
        return 0.0 if progress <= left else (progress - left) / (right - left)

    def at(self, progress: float) -> float:
        """p at this progress."""
        if progress >= 1 - self.infinity_share:
            return math.inf
        grown = self.growth(progress)
        if self.shape == "linear":
            p = self.start + (self.end - self.start) * grown
        else:
            p = exponential(self.start, self.end, grown)
        return max(self.start, cheap_exponent(p)) if self.cheap_exponents else p


class EpsRamp(BaseModel):
    """eps of an objective that has one: 0, then up to its `eps_train`, and on from there.

    Sources: Zhang et al. 2021 (linear); Xu et al., "Automatic Perturbation Analysis", NeurIPS 2020, as SortNet uses it
    (smooth: a quartic, then from 0.4 of the ramp on the line that goes on from it).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    warmup_share: Share = Field(0.0, description="share of the training at eps = 0, before eps grows")
    share: Share = Field(0.0, description="share of the training in which eps grows")
    shape: Literal["linear", "smooth"] = "linear"

    @model_validator(mode="after")
    def _within_training(self) -> Self:
        if self.warmup_share + self.share > 1:
            raise ValueError(
                f"warmup_share={self.warmup_share:g} and share={self.share:g} are more than the whole training; their "
                "sum can be at most 1"
            )
        return self

    def at(self, progress: float) -> float:
        """The share of eps_train at this progress."""
        if progress >= self.warmup_share + self.share:
            return 1.0
        if progress <= self.warmup_share:
            return 0.0
        way = (progress - self.warmup_share) / self.share
        if self.shape == "linear":
            return way
        bend = 0.4
        factor = 1 / (bend**3 * (4 - 3 * bend))  # of the quartic: values and slopes agree at the bend
        return factor * way**4 if way < bend else 1 - 4 * factor * bend**3 * (1 - way)


def cheap_exponent(p: float) -> float:
    """The largest power of two, or three times one, that is not above p >= 1."""
    power = 2.0 ** (math.frexp(p)[1] - 1)  # exact, where a rounded logarithm is not
    return 1.5 * power if power > 1 and p >= 1.5 * power else power


def exponential(start: float, end: float, share: float) -> float:
    """From start to end with a constant ratio between equal steps of share; start and end positive."""
    return start * (end / start) ** share


def cosine_after(hold_share: float, progress: float) -> float:
    """1 until `hold_share` of the training is done, then half a cosine down to 0 at its end."""
    if progress <= hold_share:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - hold_share) / (1 - hold_share)))
