"""Confidence intervals of means over seeds, and of fractions of test images."""

import math
from collections.abc import Sequence

CONFIDENCE = 0.95  # probability with which an interval covers the expected accuracy


def confidence_half_width(values: Sequence[float], confidence: float = CONFIDENCE) -> float | None:
    """Return half the width of the confidence interval of a mean, by Student's t distribution.

    The values are assumed to be independent draws from a normal distribution of unknown variance. The interval covers
    the variation between them, such as between seeds, and not that between samples of test images.

    Args:
        values: Values of one metric, one for each seed; missing values are NaN.
        confidence: Probability of the interval, in (0, 1).

    Returns:
        The half-width, in the unit of the values; None for fewer than two values.
    """
    from scipy.stats import t  # slow to import, and most tables have no intervals

    known = [value for value in values if not math.isnan(value)]
    count = len(known)
    if count < 2:
        return None
    mean = math.fsum(known) / count
    variance = math.fsum((value - mean) ** 2 for value in known) / (count - 1)
    return float(t.ppf((1 + confidence) / 2, count - 1)) * math.sqrt(variance / count)


def proportion_interval(count: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the confidence interval of a fraction, such as an accuracy, from a random sample.

    Exact interval for independent draws (Clopper and Pearson, 1934). For draws without replacement, as from a test set,
    it is wider than necessary.

    Args:
        count: Number of draws with the property, such as certified images.
        total: Number of draws.
        confidence: Probability of the interval, in (0, 1).

    Returns:
        Ends of the interval, in [0, 1].
    """
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = 0.0 if count == 0 else float(beta.ppf(tail, count, total - count + 1))
    high = 1.0 if count == total else float(beta.ppf(1 - tail, count + 1, total - count))
    return low, high
