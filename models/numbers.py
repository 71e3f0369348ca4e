"""Numbers in settings, as decimals such as 0.03 or fractions such as 8/255."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

FRACTION = r"\s*\d{1,20}(\.\d{1,20})?\s*/\s*\d{1,20}(\.\d{1,20})?\s*"


def read_fraction(value: Any) -> Any:
    """Return the value of a fraction such as "8/255" as a float.

    Args:
        value: Value of a setting.

    Returns:
        The quotient. Other values, and fractions with denominator 0, are returned unchanged; validation rejects them
        unless they are valid.
    """
    if not isinstance(value, str) or not re.fullmatch(FRACTION, value):
        return value
    above, below = (float(part) for part in value.split("/"))
    return above / below if below else value


# Metadata of float settings that accept fractions, as in Annotated[float, AsFraction, ...].
AsFraction = BeforeValidator(
    read_fraction, json_schema_input_type=float | Annotated[str, Field(pattern=f"^{FRACTION}$")]
)
