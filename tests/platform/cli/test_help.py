"""Help screens: every command documents itself, and terminals of any usual width show it in whole words."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from linflab.platform.cli.main import app


def _walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from _walk(child, (*path, name))


COMMANDS = dict(_walk(typer.main.get_command(app)))


def _show_help(path: tuple[str, ...], width: int) -> str:
    done = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    return done.output


def _words(text: str) -> list[str]:
    return re.sub("[│|]", " ", text.replace("`", "")).split()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_folds_no_word(path: tuple[str, ...], width: int) -> None:
    screen = _show_help(path, width)
    assert max(map(len, screen.splitlines())) <= width
    shown = set(_words(screen))
    command = COMMANDS[path]
    assert command.help, path
    for text in (command.help, *(parameter.help for parameter in command.params if parameter.help)):
        assert set(_words(text)) <= shown, text


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_wraps_paragraphs_at_the_width_of_the_terminal(path: tuple[str, ...]) -> None:
    lines = [" ".join(_words(line)) for line in _show_help(path, 1000).splitlines()]
    for paragraph in COMMANDS[path].help.split("\n\n"):
        assert " ".join(_words(paragraph)) in lines


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_marks_required_arguments_and_shows_defaults(path: tuple[str, ...]) -> None:
    screen = " ".join(_words(_show_help(path, 120)))
    for parameter in COMMANDS[path].params:
        if parameter.required:
            assert "[required]" in screen
        elif parameter.default and not parameter.is_flag:
            assert f"[default: {parameter.default}" in screen
