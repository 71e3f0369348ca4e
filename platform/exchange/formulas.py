"""Formulas of VNN-LIB: linear inequalities, and their combinations in disjunctive normal form."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from linflab.platform.exchange.s_expressions import Atom, Expression, shorten_token, syntax_error

MAX_ALTERNATIVES = 2**14
MAX_INEQUALITIES = 2**22  # in all alternatives of a formula together

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_VARIABLE = re.compile(r"([XY])_(0|[1-9][0-9]{0,8})")


class Variables(NamedTuple):
    """Numbers of declared variables.

    Attributes:
        inputs: Number of inputs X_i.
        outputs: Number of outputs Y_j.
    """

    inputs: int
    outputs: int


class InputBound(NamedTuple):
    """A bound of one input; strict ones are moved to the next number in float64.

    Attributes:
        variable: Index i of the input X_i.
        bound: The bound.
        is_upper: True for X_i <= bound, False for X_i >= bound.
    """

    variable: int
    bound: float
    is_upper: bool


class OutputInequality(NamedTuple):
    """An inequality sum_j coefficients[j] Y_j + offset <= 0, or < 0 if `strict`.

    Attributes:
        coefficients: Coefficients by index of the output.
        offset: Constant term.
        strict: True for <.
    """

    coefficients: dict[int, float]
    offset: float
    strict: bool


Conjunction = Sequence[InputBound | OutputInequality]


class _LinearForm(NamedTuple):
    """A linear function of variables: coefficients by letter and index, and a constant."""

    coefficients: dict[tuple[str, int], float]
    constant: float


_COMPARISONS: dict[str, tuple[bool, bool]] = {  # are the sides exchanged, is it strict
    "<=": (False, False),
    "<": (False, True),
    ">=": (True, False),
    ">": (True, True),
}


def to_alternatives(formula: Expression, variables: Variables, name: str) -> list[Conjunction]:
    """Return a formula as a disjunction of conjunctions; an empty list is false, an empty conjunction is true.

    Args:
        formula: Formula of an assertion.
        variables: Numbers of declared variables.
        name: Name of the file, for messages.

    Raises:
        InputError: If the formula is not supported. The message has the line.
    """
    operation, arguments = _operation(formula, name, "formula")
    if operation in _COMPARISONS:
        return _inequality(operation, arguments, formula.line, variables, name)
    if operation not in ("and", "or") or not arguments:
        raise syntax_error(
            name, formula.line, f"formula {shorten_token(operation)!r} is not supported",
            "use and, or, <= and >=, each with arguments",
        )  # fmt: skip
    parts = [to_alternatives(argument, variables, name) for argument in arguments]
    if operation == "or":
        alternatives = [conjunction for part in parts for conjunction in part]
    else:
        alternatives = combine(parts, formula.line, name)
    _check_size(len(alternatives), sum(map(len, alternatives)), formula.line, name)
    return alternatives


def combine(parts: Sequence[Sequence[Conjunction]], line: int, name: str) -> list[Conjunction]:
    """Return the conjunction of formulas in disjunctive normal form, in the same form.

    Args:
        parts: Alternatives of each formula.
        line: Line of the file, for messages.
        name: Name of the file, for messages.

    Raises:
        InputError: If the result is too large.
    """
    if not all(parts):
        return []
    common = [inequality for part in parts if len(part) == 1 for inequality in part[0]]
    alternatives: list[Conjunction] = [common]
    for part in parts:
        if len(part) > 1:
            size = len(part) * sum(map(len, alternatives)) + len(alternatives) * sum(map(len, part))
            _check_size(len(alternatives) * len(part), size, line, name)
            alternatives = [[*one, *other] for one in alternatives for other in part]
    return alternatives


def _check_size(count: int, size: int, line: int, name: str) -> None:
    if count > MAX_ALTERNATIVES or size > MAX_INEQUALITIES:
        raise syntax_error(
            name, line, f"{count:,} alternatives with {size:,} inequalities",
            f"use at most {MAX_ALTERNATIVES:,} with {MAX_INEQUALITIES:,}, or several files",
        )  # fmt: skip


def _operation(expression: Expression, name: str, kind: str) -> tuple[str, Sequence[Expression]]:
    """Return the operator of an expression, and its arguments."""
    if isinstance(expression, Atom):
        raise syntax_error(name, expression.line, f"{shorten_token(expression.text)!r} is not a {kind}", "use one")
    if not expression.items or not isinstance(expression.items[0], Atom):
        raise syntax_error(name, expression.line, f"{kind} without an operator", "use (<= X_0 1.0), for example")
    return expression.items[0].text, expression.items[1:]


def _inequality(
    comparison: str, arguments: Sequence[Expression], line: int, variables: Variables, name: str
) -> list[Conjunction]:
    """Return an inequality as a disjunction of conjunctions."""
    if len(arguments) != 2:
        raise syntax_error(name, line, f"{comparison} has {len(arguments)} arguments", "use two")
    left, right = (_linear_form(argument, variables, name) for argument in arguments)
    is_exchanged, strict = _COMPARISONS[comparison]
    form = _add(right, left, -1.0) if is_exchanged else _add(left, right, -1.0)
    if not all(map(math.isfinite, (*form.coefficients.values(), form.constant))):
        raise syntax_error(name, line, "number is too large", "use numbers that float64 represents")
    coefficients = {variable: factor for variable, factor in form.coefficients.items() if factor}
    letters = {letter for letter, _ in coefficients}
    if not letters:
        is_true = form.constant < 0 if strict else form.constant <= 0
        return [()] if is_true else []
    if letters == {"Y"}:
        rows = {index: factor for (_, index), factor in coefficients.items()}
        return [(OutputInequality(rows, form.constant, strict),)]
    if len(coefficients) > 1:
        raise syntax_error(
            name, line, f"inequality of {len(coefficients)} variables, of them inputs, is not supported",
            "use bounds of one input each, and inequalities of outputs",
        )  # fmt: skip
    ((_, index), factor), *_ = coefficients.items()
    bound = -form.constant / factor
    if not math.isfinite(bound):
        raise syntax_error(name, line, "number is too large", "use numbers that float64 represents")
    if strict:
        bound = math.nextafter(bound, -math.inf if factor > 0 else math.inf)
    return [(InputBound(index, bound, factor > 0),)]


def _linear_form(expression: Expression, variables: Variables, name: str) -> _LinearForm:
    """Return the linear function that an expression computes."""
    if isinstance(expression, Atom):
        return _term(expression, variables, name)
    operation, arguments = _operation(expression, name, "term")
    forms = [_linear_form(argument, variables, name) for argument in arguments]
    if operation == "+" and forms:
        return _fold(forms, 1.0)
    if operation == "-" and len(forms) == 1:
        return _scale(forms[0], -1.0)
    if operation == "-" and forms:
        return _fold(forms, -1.0)
    if operation == "*" and len(forms) == 2:
        constant = next((form for form in forms if not form.coefficients), None)
        if constant is not None:
            return _scale(forms[1] if constant is forms[0] else forms[0], constant.constant)
    raise syntax_error(
        name, expression.line, f"term {shorten_token(operation)!r} of {len(forms)} arguments is not supported",
        "use +, -, and products of a number and a term",
    )  # fmt: skip


def _term(atom: Atom, variables: Variables, name: str) -> _LinearForm:
    """Return a number or variable as a linear function."""
    if _NUMBER.fullmatch(atom.text):
        return _LinearForm({}, float(atom.text))
    match = _VARIABLE.fullmatch(atom.text)
    if match is None:
        raise syntax_error(
            name, atom.line, f"{shorten_token(atom.text)!r} is not a number or variable", "use X_i, Y_j or decimals"
        )
    letter, index = match[1], int(match[2])
    if index >= (variables.inputs if letter == "X" else variables.outputs):
        raise syntax_error(name, atom.line, f"{atom.text} is not declared", "declare it with declare-const")
    return _LinearForm({(letter, index): 1.0}, 0.0)


def _fold(forms: Sequence[_LinearForm], factor: float) -> _LinearForm:
    """Return the first function plus a factor times the sum of the others."""
    coefficients, constant = dict(forms[0].coefficients), forms[0].constant
    for form in forms[1:]:
        constant += factor * form.constant
        for variable, value in form.coefficients.items():
            coefficients[variable] = coefficients.get(variable, 0.0) + factor * value
    return _LinearForm(coefficients, constant)


def _add(one: _LinearForm, other: _LinearForm, factor: float) -> _LinearForm:
    return _fold((one, other), factor)


def _scale(form: _LinearForm, factor: float) -> _LinearForm:
    return _LinearForm(
        {variable: factor * value for variable, value in form.coefficients.items()}, factor * form.constant
    )
