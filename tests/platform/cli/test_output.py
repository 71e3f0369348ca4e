"""Tables of commands on narrow terminals, and radii as fractions."""

import io
import json

import pytest

from linflab.models.numbers import read_fraction
from linflab.platform.cli import output
from linflab.reports.terminal import PlainConsole
from tests.conftest import RunCli


@pytest.mark.parametrize("width", [20, 40, 60])
def test_numbers_are_not_broken_on_narrow_terminals(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    console = PlainConsole(io.StringIO(), width=width, force_terminal=True, color_system=None, soft_wrap=True)
    monkeypatch.setattr(output, "console", console)
    rows = [
        {"name": "a long name of a sweep that wraps", "accuracy": "71.25%", "eps": "8/255", "seconds": 1234.5},
        {"name": "another", "accuracy": "-", "eps": "0.1", "seconds": 1e-5},
    ]
    output.print_rows(rows, ["name", "accuracy", "eps", "seconds"], as_json=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(number in text for number in ("71.25%", "8/255", "0.1", "1234", "1e-05", "accuracy"))


def test_recipes_show_radii_as_fractions(run_cli: RunCli) -> None:
    shown = run_cli("recipes").stdout
    rows = json.loads(run_cli("recipes", "--json").stdout)
    assert all(isinstance(row["eps"], float) for row in rows) and "0.03" not in shown
    for row in rows:
        (line,) = (line for line in shown.splitlines() if line.split()[0] == row["recipe"])
        assert read_fraction(line.split()[-1]) in (row["eps"], str(row["eps"]))
