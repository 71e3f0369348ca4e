"""Docstrings of public names, parsed as the tools that render documentation parse them."""

import logging
from pathlib import Path

import griffe
import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    file for top in ("models", "platform", "reports", "search_spaces") for file in (ROOT / top).rglob("*.py")
)


def parse_docstrings(item: griffe.Module | griffe.Class) -> int:
    """Parse the docstrings of a module or class and return the number of public names that have one."""
    parsed = 0
    for member in item.members.values():
        if member.is_alias or member.name.startswith("_"):
            continue
        if member.docstring is not None:
            member.docstring.parse("google")
            parsed += 1
        if isinstance(member, griffe.Class):
            parsed += parse_docstrings(member)
    return parsed


def test_griffe_parses_every_public_docstring_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    parsed = 0
    with caplog.at_level(logging.WARNING, logger="griffe"):
        for file in FILES:
            name = ".".join(["linflab", *file.relative_to(ROOT).with_suffix("").parts])
            module = griffe.visit(name, filepath=file, code=file.read_text())
            if module.docstring is not None:
                module.docstring.parse("google")
            parsed += parse_docstrings(module)
    assert not [record.getMessage() for record in caplog.records]
    assert parsed > 500
