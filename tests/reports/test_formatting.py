"""Descriptions of runs in table notes."""

import pandas as pd

from linflab.reports import schema
from linflab.reports.formatting import describe_certifiers


def test_certifier_notes_name_the_arithmetic_of_each_run() -> None:
    """Old runs have no certifier, or one in real arithmetic; sound ones report the cost of rounding."""
    runs = pd.DataFrame(
        {
            schema.TEST_CERTIFIED: [0.75, 0.74, 0.73],
            schema.TEST_CERTIFIED_REAL: [None, None, 0.7302],
            schema.CERTIFIER: [None, "ibp", "ibp-sound"],
        }
    )
    old, real, sound = (describe_certifiers(runs.iloc[[k]]) for k in range(3))
    assert "lipschitz" in old and "real arithmetic" in old
    assert "ibp" in real and "real arithmetic" in real
    assert "ibp" in sound and "real arithmetic" not in sound and "0.02 points" in sound and "-sound" not in sound
    together = describe_certifiers(runs)
    assert all(words in together for words in (old, real, sound))
