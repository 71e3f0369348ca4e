"""Parser of S-expressions, the syntax of VNN-LIB and SMT-LIB, for untrusted text."""

import re
from typing import NamedTuple

from linflab.platform.errors import InputError

MAX_DEPTH = 64  # nested parentheses; property files need about ten
MAX_TOKENS = 5_000_000
MAX_SHOWN = 40  # characters of a token in messages

_TOKEN = re.compile(r'(?P<space>\s+)|(?P<comment>;[^\n]*)|(?P<token>[()]|[^\s();"|]+)')


class Atom(NamedTuple):
    """A symbol or number.

    Attributes:
        text: The characters of the file.
        line: Line of the file, from 1.
    """

    text: str
    line: int


class List(NamedTuple):
    """A parenthesized list.

    Attributes:
        items: Its elements.
        line: Line of the opening parenthesis, from 1.
    """

    items: "tuple[Expression, ...]"
    line: int


Expression = Atom | List


def parse_expressions(text: str, name: str) -> list[Expression]:
    """Return the expressions of a text, in order; comments start with a semicolon.

    Nesting is limited, so that functions may recurse over the result.

    Args:
        text: Text to parse.
        name: Name of the file, for messages.

    Raises:
        InputError: If parentheses do not match, or a character or the size of the text is not supported. The message
            has the line.
    """
    open_lists: list[tuple[list[Expression], int]] = []
    items: list[Expression] = []
    position, line, num_tokens = 0, 1, 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise syntax_error(name, line, f"unexpected character {text[position]!r}", "use parentheses and symbols")
        position = match.end()
        token = match["token"]
        if token is None:
            line += match[0].count("\n")
            continue
        num_tokens += 1
        if num_tokens > MAX_TOKENS:
            raise syntax_error(name, line, f"more than {MAX_TOKENS:,} symbols and parentheses", "use a smaller file")
        if token == "(":
            if len(open_lists) == MAX_DEPTH:
                raise syntax_error(name, line, f"more than {MAX_DEPTH} nested parentheses", "use a flatter formula")
            open_lists.append((items, line))
            items = []
        elif token == ")":
            if not open_lists:
                raise syntax_error(name, line, "closing parenthesis without an opening one", "remove it")
            outer, start = open_lists.pop()
            outer.append(List(tuple(items), start))
            items = outer
        else:
            items.append(Atom(token, line))
    if open_lists:
        raise syntax_error(name, open_lists[-1][1], "parenthesis is never closed", "add the missing one")
    return items


def syntax_error(name: str, line: int, problem: str, advice: str) -> InputError:
    """Return the error for a problem at a line of a file."""
    return InputError(f"{name}: line {line}: {problem}; {advice}")


def shorten_token(text: str) -> str:
    """Return a token for messages: printable, and of limited length."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= MAX_SHOWN else shown[: MAX_SHOWN - 3] + "..."
