"""Result of a check: what was found, whether it works, and what to do."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """Status of a check, from best to worst."""

    OK = "ok"
    NOTE = "note"  # optional part that is missing
    SLOW = "slow"  # works, but slower than it could
    FAILED = "failed"


@dataclass(frozen=True)
class Check:
    """Result of a check.

    Attributes:
        name: What was checked.
        status: Whether it works.
        found: What was found, as text.
        advice: What to do; empty if nothing needs to be done.
        values: The same for programs, in types of JSON.
    """

    name: str
    status: Status
    found: str
    advice: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def worst_status(checks: list[Check]) -> Status:
    """Return the worst status of some checks; `OK` without checks."""
    order = list(Status)
    return max((check.status for check in checks), key=order.index, default=Status.OK)
