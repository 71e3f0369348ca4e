"""l_p-distance operators and SortNet neurons, with one implementation per device."""

from linflab.models.distance.functional import (
    linf_distance_bounds,
    lp_distance,
    lp_distance_conv2d,
    masked_lp_distance,
    sort_distance,
    sort_distance_bounds,
)

__all__ = [
    "linf_distance_bounds",
    "lp_distance",
    "lp_distance_conv2d",
    "masked_lp_distance",
    "sort_distance",
    "sort_distance_bounds",
]
