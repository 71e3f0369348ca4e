"""Check that the changelog and the citation are those of a release: `python .ci/check_release.py v0.1.0`."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def find_problems(tag: str, root: Path = ROOT) -> list[str]:
    """Return what keeps a tag from being released; an empty list if nothing does.

    Args:
        tag: Git tag, `v` and the version.
        root: Directory of the repository.
    """
    (version,) = re.findall(r'^__version__ = "([^"]+)"', (root / "linflab" / "__init__.py").read_text(), re.MULTILINE)
    problems = []
    if tag != f"v{version}":
        problems.append(f"tag={tag}: must be v{version}, since linflab/__init__.py has version {version}")
    if not re.search(rf"^version: {re.escape(version)}$", (root / "CITATION.cff").read_text(), re.MULTILINE):
        problems.append(f"CITATION.cff: must have the line `version: {version}`")
    if not re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", (root / "CHANGELOG.md").read_text(), re.MULTILINE
    ):
        problems.append(f"CHANGELOG.md: must have a section `## [{version}] - YEAR-MONTH-DAY`; rename Unreleased")
    return problems


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/check_release.py TAG")
    if problems := find_problems(sys.argv[1]):
        sys.exit("\n".join(problems))
