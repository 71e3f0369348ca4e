"""Schedules: their values at the ends, and monotonicity in between."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from linflab.platform.config.schedules import (
    EpsSchedule,
    PSchedule,
    constant_then_cosine,
    exponential_interpolation,
    fast_exponent,
)

FRACTIONS = st.floats(0, 0.5)


@given(
    st.floats(1, 100),
    st.floats(100, 2000),
    FRACTIONS,
    FRACTIONS,
    st.sampled_from(["exponential", "linear"]),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=2),
)
def test_p_grows_from_start_to_end_to_infinity(
    start: float, end: float, warmup: float, infinity: float, shape: str, times: list[float]
) -> None:
    schedule = PSchedule(start=start, end=end, warmup_fraction=warmup, inf_fraction=infinity, shape=shape)
    values = [schedule.value_at(progress) for progress in sorted(times)]
    assert values == sorted(values)
    assert all(start * (1 - 1e-12) <= p <= end * (1 + 1e-12) or math.isinf(p) for p in values)
    assert schedule.value_at(0) == pytest.approx(start)
    assert all(math.isinf(schedule.value_at(t)) == (t >= 1 - infinity) for t in times)


def test_p_is_linear_in_between() -> None:
    schedule = PSchedule(start=8, end=512, warmup_fraction=0.2, inf_fraction=0.2, shape="linear")
    assert [schedule.value_at(t) for t in (0.2, 0.35, 0.5)] == pytest.approx([8, 134, 260])


def test_p_is_exponential_in_between() -> None:
    schedule = PSchedule(start=8, end=512, warmup_fraction=0.2, inf_fraction=0.2)
    assert schedule.value_at(0.2) == pytest.approx(8)
    assert schedule.value_at(0.5) == pytest.approx(64)
    assert schedule.value_at(0.8 - 1e-12) == pytest.approx(512)


def test_p_schedule_uses_only_fast_exponents() -> None:
    smooth = PSchedule(start=8, end=1000, inf_fraction=0.1)
    stairs = smooth.model_copy(update={"fast_exponents": True})
    times = [step / 2000 for step in range(2000)]
    seen = sorted({stairs.value_at(t) for t in times} - {math.inf})
    assert seen == [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768]
    for t in times:
        assert stairs.value_at(t) == smooth.value_at(t) == math.inf or stairs.value_at(t) <= smooth.value_at(
            t
        ) <= 1.5 * stairs.value_at(t)


def test_fast_exponents_keep_the_start() -> None:
    assert PSchedule(start=9.7, fast_exponents=True).value_at(0) == 9.7
    assert [fast_exponent(p) for p in (1, 1.9, 2, 2.9, 3, 4, 5.9, 6, 7.9)] == [1, 1, 2, 2, 3, 4, 4, 6, 6]


def test_p_is_always_infinite_when_inf_fraction_is_one() -> None:
    assert math.isinf(PSchedule(inf_fraction=1.0).value_at(0.0))


@given(st.floats(0, 0.99), st.floats(0, 1))
def test_learning_rate_is_constant_then_decays_to_0(hold: float, progress: float) -> None:
    factor = constant_then_cosine(hold, progress)
    assert 0 <= factor <= 1
    assert (factor == 1) >= (progress <= hold)
    assert constant_then_cosine(hold, 1.0) == pytest.approx(0, abs=1e-12)


def test_exponential_interpolation_is_geometric() -> None:
    assert [exponential_interpolation(1, 0.01, fraction) for fraction in (0, 0.5, 1)] == pytest.approx([1, 0.1, 0.01])


@given(
    st.floats(0.01, 1), st.sampled_from(["linear", "smooth", "smooth_quarter"]), st.lists(st.floats(0, 1), min_size=2)
)
def test_eps_grows_to_its_end(fraction: float, shape: str, times: list[float]) -> None:
    ramp = EpsSchedule(rampup_fraction=fraction, shape=shape)
    values = [ramp.value_at(progress) for progress in sorted(times)]
    assert values == sorted(values) and all(0 <= value <= 1 for value in values)
    assert ramp.value_at(0) == 0 and ramp.value_at(fraction) == 1 and ramp.value_at(1) == 1
    assert ramp.value_at(fraction * (1 - 1e-9)) == pytest.approx(1)


@pytest.mark.parametrize(("shape", "bend"), [("smooth", 0.4), ("smooth_quarter", 0.25)])
def test_smooth_ramps_are_a_quartic_and_its_tangent(shape: str, bend: float) -> None:
    """Value and slope of c t^4 and of the line through (1, 1) are equal at the bend, which determines c."""
    ramp = EpsSchedule(warmup_fraction=0.1, rampup_fraction=0.5, shape=shape)
    system = np.array([[bend**4, 0, -1], [4 * bend**3, -1, 0], [0, 1 - bend, 1]])  # unknowns: c, slope, value at bend
    factor, slope, value = np.linalg.solve(system, [0, 0, 1])
    for done in np.linspace(0, 1, 201)[1:-1]:  # fraction of the ramp-up
        expected = factor * done**4 if done <= bend else value + slope * (done - bend)
        assert ramp.value_at(0.1 + 0.5 * done) == pytest.approx(expected, rel=1e-9)
    assert ramp.value_at(0.1 + 0.5 * bend) == pytest.approx(bend / (4 - 3 * bend))
    assert EpsSchedule(rampup_fraction=0.5).value_at(0.1) == pytest.approx(0.2)
    assert EpsSchedule().value_at(0) == 1  # no ramp-up: full eps from the first step
