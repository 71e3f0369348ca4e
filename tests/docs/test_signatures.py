"""Calls of linflab's functions in the sentences of README and docs, such as `linflab.fit(...)`, match the functions."""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import linflab
from linflab.models.robustness import bounds, certification
from tests.docs.pages import FENCE, PAGES, ROOT

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(module, name) for module in (bounds, certification) for name in module.__all__},
    **{f"linflab.{name}": getattr(linflab, name) for name in linflab.__all__ if name != "__version__"},
}


def read_calls() -> Iterator[tuple[str, ast.Call]]:
    """Yield the page and the call of each inline code that calls one of `FUNCTIONS`."""
    for path in PAGES:
        for text in re.findall(r"`([\w.]+\([^`]*\)[^`]*)`", FENCE.sub("", path.read_text())):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in FUNCTIONS:
                    yield path.relative_to(ROOT).as_posix(), node


CALLS = list(read_calls())


def test_calls_are_found() -> None:
    assert {"linflab.certify", "linflab.fit", "make_certifier"} <= {ast.unparse(call.func) for _, call in CALLS}


@pytest.mark.parametrize(
    "call", [call for _, call in CALLS], ids=[f"{page}: {ast.unparse(call)}" for page, call in CALLS]
)
def test_calls_match_the_signature(call: ast.Call) -> None:
    signature = inspect.signature(FUNCTIONS[ast.unparse(call.func)])
    signature.bind(*call.args, **{str(one.arg): one.value for one in call.keywords})
