"""Description of a verification on test images, which reports compare and show."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from linflab.reports.schema import SOUND


@dataclass(frozen=True)
class Verification:
    """Accuracy certified by `complete` or `cascade` at the eps of a run.

    Attributes:
        num_images: Number of verified test images.
        split_size: Number of all test images.
        certificate: Name of the certifier, with the suffix `-sound` if float32 rounding is included.
        time_limit: Seconds per image.
        certified: Certified accuracy, a fraction.
        details: Further results, such as `3.00% undecided`.
    """

    num_images: int
    split_size: int
    certificate: str
    time_limit: float
    certified: float
    details: str = ""

    def describe(self) -> str:
        """Return the text of the tag `linflab.reports.schema.TEST_VERIFICATION`."""
        arithmetic = "" if self.certificate.endswith(SOUND) else "real arithmetic, "
        basis = f"{self.num_images} of {self.split_size} images by {self.certificate}"
        results = ", ".join(filter(None, (f"{100 * self.certified:.2f}% certified", self.details)))
        return f"{basis} ({arithmetic}time limit {self.time_limit:g} s): {results}"


def verification_bases(descriptions: Iterable[str]) -> list[str]:
    """Return the different conditions in descriptions: images, certifier, arithmetic and time limit."""
    return list(dict.fromkeys(description.partition(":")[0] for description in descriptions))


def num_verified_images(description: str) -> int:
    """Return the number of images in a description; 0 if it has none."""
    number = re.match(r"\d+", description)
    return int(number.group()) if number else 0
