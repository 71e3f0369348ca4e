"""Schedules at their ends, and monotone in between."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linflab.platform.schedules import PSchedule, cheap_exponent, cosine_after, exponential

SHARES = st.floats(0, 0.5)


@given(st.floats(1, 100), st.floats(100, 2000), SHARES, SHARES, st.lists(st.floats(0, 1, exclude_max=True), min_size=2))
def test_p_grows_from_start_to_end_to_infinity(
    start: float, end: float, warmup: float, infinity: float, times: list[float]
) -> None:
    schedule = PSchedule(start=start, end=end, warmup_share=warmup, infinity_share=infinity)
    values = [schedule.at(progress) for progress in sorted(times)]
    assert values == sorted(values)
    assert all(start * (1 - 1e-12) <= p <= end * (1 + 1e-12) or math.isinf(p) for p in values)
    assert schedule.at(0) == pytest.approx(start)
    assert all(math.isinf(schedule.at(t)) == (t >= 1 - infinity) for t in times)


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
