"""Schedules at their ends, and monotone in between."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linflab.platform.schedules import EpsRamp, PSchedule, cheap_exponent, cosine_after, exponential

SHARES = st.floats(0, 0.5)


@given(
    st.floats(1, 100),
    st.floats(100, 2000),
    SHARES,
    SHARES,
    st.sampled_from(["exponential", "linear"]),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=2),
)
def test_p_grows_from_start_to_end_to_infinity(
    start: float, end: float, warmup: float, infinity: float, shape: str, times: list[float]
) -> None:
    schedule = PSchedule(start=start, end=end, warmup_share=warmup, infinity_share=infinity, shape=shape)
    values = [schedule.at(progress) for progress in sorted(times)]
    assert values == sorted(values)
    assert all(start * (1 - 1e-12) <= p <= end * (1 + 1e-12) or math.isinf(p) for p in values)
    assert schedule.at(0) == pytest.approx(start)
    assert all(math.isinf(schedule.at(t)) == (t >= 1 - infinity) for t in times)


def test_p_is_linear_in_between() -> None:
    schedule = PSchedule(start=8, end=512, warmup_share=0.2, infinity_share=0.2, shape="linear")
    assert [schedule.at(t) for t in (0.2, 0.35, 0.5)] == pytest.approx([8, 134, 260])


def test_p_is_exponential_in_between() -> None:
    schedule = PSchedule(start=8, end=512, warmup_share=0.2, infinity_share=0.2)
    assert schedule.at(0.2) == pytest.approx(8)
    assert schedule.at(0.5) == pytest.approx(64)
    assert schedule.at(0.8 - 1e-12) == pytest.approx(512)


def test_cheap_exponents_only() -> None:
    smooth = PSchedule(start=8, end=1000, infinity_share=0.1)
    stairs = smooth.model_copy(update={"cheap_exponents": True})
    times = [step / 2000 for step in range(2000)]
    seen = sorted({stairs.at(t) for t in times} - {math.inf})
    assert seen == [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768]
    for t in times:
        assert stairs.at(t) == smooth.at(t) == math.inf or stairs.at(t) <= smooth.at(t) <= 1.5 * stairs.at(t)


def test_cheap_exponents_keep_the_start() -> None:
    assert PSchedule(start=9.7, cheap_exponents=True).at(0) == 9.7
    assert [cheap_exponent(p) for p in (1, 1.9, 2, 2.9, 3, 4, 5.9, 6, 7.9)] == [1, 1, 2, 2, 3, 4, 4, 6, 6]


def test_training_at_infinity_alone() -> None:
    assert math.isinf(PSchedule(infinity_share=1.0).at(0.0))


@given(st.floats(0, 0.99), st.floats(0, 1))
def test_cosine(hold: float, progress: float) -> None:
    factor = cosine_after(hold, progress)
    assert 0 <= factor <= 1
    assert (factor == 1) >= (progress <= hold)
    assert cosine_after(hold, 1.0) == pytest.approx(0, abs=1e-12)


def test_exponential() -> None:
    assert [exponential(1, 0.01, share) for share in (0, 0.5, 1)] == pytest.approx([1, 0.1, 0.01])


@given(st.floats(0.01, 1), st.sampled_from(["linear", "smooth"]), st.lists(st.floats(0, 1), min_size=2))
def test_eps_grows_to_its_end(share: float, shape: str, times: list[float]) -> None:
    ramp = EpsRamp(share=share, shape=shape)
    values = [ramp.at(progress) for progress in sorted(times)]
    assert values == sorted(values) and all(0 <= value <= 1 for value in values)
    assert ramp.at(0) == 0 and ramp.at(share) == 1 and ramp.at(1) == 1
    assert ramp.at(share * (1 - 1e-9)) == pytest.approx(1)


def test_the_smooth_ramp_is_a_quartic_and_its_tangent() -> None:
    ramp = EpsRamp(share=0.5, shape="smooth")
    assert ramp.at(0.1) == pytest.approx(ramp.at(0.2) / 2**4)  # 0.2 is where it bends
    slopes = [(ramp.at(t + 1e-6) - ramp.at(t - 1e-6)) / 2e-6 for t in (0.2 - 2e-6, 0.3, 0.45)]
    assert slopes == pytest.approx([slopes[1]] * 3, rel=1e-4)
    assert EpsRamp(share=0.5).at(0.1) == pytest.approx(0.2)
    assert EpsRamp().at(0) == 1  # no ramp: the whole eps from the first step
