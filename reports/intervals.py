"""Confidence intervals of means over seeds."""

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
