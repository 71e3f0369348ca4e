"""Bounds in real arithmetic, as in training; `test_soundness.py` tests those that include rounding."""

from functools import partial

from linflab.models.robustness.bounds import crown, ibp

ibp_bounds = partial(ibp.ibp_bounds, sound=False)
ibp_logit_differences = partial(ibp.ibp_logit_differences, sound=False)
crown_bounds = partial(crown.crown_bounds, sound=False)
crown_logit_differences = partial(crown.crown_logit_differences, sound=False)
