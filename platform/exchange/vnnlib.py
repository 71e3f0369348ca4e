"""VNN-LIB 1.0 properties, as the competition VNN-COMP uses them: reading and writing.

A file declares the inputs X_0, X_1, ... and the outputs Y_0, Y_1, ... of a network as real numbers. Its assertions
describe counterexamples: the property holds ("unsat") if no inputs and their outputs satisfy all of them. An assertion
is a linear inequality, or a combination of inequalities by `and` and `or`. Each inequality constrains one input, or
outputs only. Source: Demarchi et al., "Supporting Standardization of Neural Networks Verification with VNN-LIB and
CoCoNet", FoMLAS 2023, and the rules of VNN-COMP.
"""

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.verification import OutputSet, Region
from linflab.platform.errors import InputError
from linflab.platform.exchange.formulas import (
    Conjunction,
    InputBound,
    OutputInequality,
    Variables,
    combine,
    to_alternatives,
)
from linflab.platform.exchange.s_expressions import (
    Atom,
    Expression,
    List,
    parse_expressions,
    shorten_token,
    syntax_error,
)
from linflab.platform.files import read_text

IGNORED_COMMANDS = {"set-logic", "set-info", "set-option", "check-sat", "get-model", "exit"}
MAX_VARIABLES = 2**22
MAX_REGION_NUMBERS = 2**26  # memory limit: regions times inputs


@dataclass(frozen=True)
class Property:
    """Content of a VNN-LIB file.

    Attributes:
        regions: Boxes of inputs with their unsafe outputs; the property holds if no region has a counterexample.
        num_inputs: Number D of inputs.
        num_outputs: Number K of outputs.
    """

    regions: tuple[Region, ...]
    num_inputs: int
    num_outputs: int


def read_property(path: Path) -> Property:
    """Read a VNN-LIB file.

    Raises:
        InputError: If the file cannot be read, or is not a VNN-LIB file with supported constraints. The message has the
            line.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read ({reason}); use a VNN-LIB file") from None
    return parse_property(text, str(path))


def parse_property(text: str, name: str) -> Property:
    """Return the property of a VNN-LIB text.

    Args:
        text: Content of the file.
        name: Name of the file, for messages.

    Raises:
        InputError: If it is not VNN-LIB, or a constraint is not supported. The message has the line.
    """
    declared: dict[str, list[int]] = {"X": [], "Y": []}
    assertions: list[tuple[Expression, int]] = []
    for expression in parse_expressions(text, name):
        command = _command(expression, name)
        assert isinstance(expression, List)
        if command in ("declare-const", "declare-fun"):
            letter, index = _declared_variable(expression, name)
            if len(declared[letter]) >= MAX_VARIABLES:
                raise syntax_error(
                    name, expression.line, f"more than {MAX_VARIABLES} variables", "use a smaller network"
                )
            declared[letter].append(index)
        elif command == "assert":
            if len(expression.items) != 2:
                raise syntax_error(name, expression.line, "assert requires one formula", "use (assert FORMULA)")
            assertions.append((expression.items[1], expression.line))
        elif command not in IGNORED_COMMANDS:
            raise syntax_error(
                name, expression.line, f"command {shorten_token(command)!r} is not supported",
                "use declare-const and assert",
            )  # fmt: skip
    for letter, indices in declared.items():
        if not indices:
            raise InputError(f"{name}: no variable {letter}_i is declared; use (declare-const {letter}_0 Real)")
        if sorted(indices) != list(range(len(indices))):
            raise InputError(
                f"{name}: {len(indices)} variables {letter}_i are declared, with gaps or repetitions; declare each of "
                f"{letter}_0, {letter}_1, ... once"
            )
    sizes = Variables(len(declared["X"]), len(declared["Y"]))
    return _build_property(assertions, sizes, name)


def _command(expression: Expression, name: str) -> str:
    """Return the name of a command."""
    if isinstance(expression, Atom):
        raise syntax_error(
            name, expression.line, f"{shorten_token(expression.text)!r} is not a command", "use (assert FORMULA)"
        )
    if not expression.items or not isinstance(expression.items[0], Atom):
        raise syntax_error(name, expression.line, "command without a name", "use (assert FORMULA)")
    return expression.items[0].text


def _declared_variable(expression: List, name: str) -> tuple[str, int]:
    """Return letter and index of the variable that a command declares."""
    texts = [item.text if isinstance(item, Atom) else "()" for item in expression.items[1:]]
    if len(texts) == 3 and texts[1] == "()" and expression.items[0] == ("declare-fun", expression.items[0].line):
        del texts[1]
    match = re.fullmatch(r"([XY])_(0|[1-9][0-9]{0,8})", texts[0]) if texts else None
    if len(texts) != 2 or match is None or texts[1] != "Real":
        raise syntax_error(
            name, expression.line, "declares something else than a real variable X_i or Y_j",
            "use (declare-const X_0 Real)",
        )  # fmt: skip
    return match[1], int(match[2])


def _build_property(assertions: Sequence[tuple[Expression, int]], sizes: Variables, name: str) -> Property:
    """Return the property of assertions; alternatives with the same box of inputs share a region."""
    lower, upper = ([edge] * sizes.inputs for edge in (-math.inf, math.inf))
    parts = [to_alternatives(formula, sizes, name) for formula, _ in assertions]
    common = [one for part in parts if len(part) == 1 for one in part[0]]
    choices = combine([part for part in parts if len(part) != 1], assertions[-1][1] if assertions else 1, name)
    outputs = _tighten(common, lower, upper)
    boxes: dict[tuple[tuple[float, ...], tuple[float, ...]], list[OutputSet]] = {}
    edges = tuple(lower), tuple(upper)
    for choice in choices:
        key, rows = edges, [*outputs, *choice]
        if any(isinstance(one, InputBound) for one in choice):
            low, high = list(lower), list(upper)
            rows = [*outputs, *_tighten(choice, low, high)]
            key = tuple(low), tuple(high)
        _check_bounded(*key, name)
        if key not in boxes and (len(boxes) + 1) * sizes.inputs > MAX_REGION_NUMBERS:
            raise InputError(f"{name}: has more than {len(boxes)} regions of inputs; use several files")
        if all(map(operator.le, *key)):
            boxes.setdefault(key, []).append(_output_set(rows, sizes.outputs))
    regions = [
        Region(torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64), tuple(sets))
        for (low, high), sets in boxes.items()
    ]
    return Property(tuple(regions), sizes.inputs, sizes.outputs)


def _tighten(inequalities: Conjunction, lower: list[float], upper: list[float]) -> list[OutputInequality]:
    """Apply bounds of inputs to a box in place, and return the inequalities of outputs."""
    outputs = []
    for one in inequalities:
        if isinstance(one, OutputInequality):
            outputs.append(one)
        elif one.is_upper:
            upper[one.variable] = min(upper[one.variable], one.bound)
        else:
            lower[one.variable] = max(lower[one.variable], one.bound)
    return outputs


def _check_bounded(lower: Sequence[float], upper: Sequence[float], name: str) -> None:
    """Check that every input has bounds that float32 represents.

    Raises:
        InputError: If a bound is missing or too large.
    """
    largest = torch.finfo(torch.float32).max
    for index, (low, high) in enumerate(zip(lower, upper, strict=True)):
        for bound, kind, comparison in ((low, "lower", ">="), (high, "upper", "<=")):
            if not abs(bound) <= largest:
                problem = "is missing" if math.isinf(bound) else f"{bound:g} is beyond float32"
                raise InputError(
                    f"{name}: the {kind} bound of X_{index} {problem}; use (assert ({comparison} X_{index} NUMBER))"
                )


def _output_set(rows: Sequence[OutputInequality | InputBound], outputs: int) -> OutputSet:
    """Return the set of outputs that satisfies all inequalities; without any, the set of all outputs."""
    inequalities = [row for row in rows if isinstance(row, OutputInequality)]
    coefficients = torch.zeros(max(1, len(inequalities)), outputs, dtype=torch.float64)
    offsets = torch.zeros(len(coefficients), dtype=torch.float64)
    strict = torch.zeros(len(coefficients), dtype=torch.bool)
    for number, row in enumerate(inequalities):
        coefficients[number, list(row.coefficients)] = torch.tensor([*row.coefficients.values()], dtype=torch.float64)
        offsets[number], strict[number] = row.offset, row.strict
    return OutputSet(coefficients, offsets, strict)


def format_robustness(box: Box, label: int, classes: int, comment: str) -> str:
    """Return the VNN-LIB text of the property that all images of a box have their true class.

    The bounds are written with all digits, so that reading them gives the same float32 numbers. Counterexamples include
    ties with the true class.

    Args:
        box: Lower and upper bounds of the image, (C, H, W).
        label: True class.
        classes: Number of classes.
        comment: First line of the file.
    """
    lower, upper = (bound.flatten().tolist() for bound in box)
    lines = [f"; {comment}", ""]
    lines += [f"(declare-const X_{index} Real)" for index in range(len(lower))]
    lines += [f"(declare-const Y_{index} Real)" for index in range(classes)]
    lines += ["", "; Pixel values"]
    for index, (low, high) in enumerate(zip(lower, upper, strict=True)):
        lines += [f"(assert (<= X_{index} {high!r}))", f"(assert (>= X_{index} {low!r}))"]
    lines += ["", f"; A class other than {label} has at least the logit of {label}", "(assert (or"]
    lines += [f"    (and (>= Y_{other} Y_{label}))" for other in range(classes) if other != label]
    return "\n".join([*lines, "))", ""])


def format_counterexample(inputs: Tensor, outputs: Tensor) -> str:
    """Return a counterexample in the format of VNN-COMP: the values of all inputs and outputs.

    Args:
        inputs: (D,) flattened inputs.
        outputs: (K,) outputs of the network.
    """
    values = [f"(X_{index} {value!r})" for index, value in enumerate(inputs.tolist())]
    values += [f"(Y_{index} {value!r})" for index, value in enumerate(outputs.tolist())]
    return "(" + "\n ".join(values) + ")\n"
