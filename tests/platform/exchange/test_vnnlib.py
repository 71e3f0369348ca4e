"""Tests of VNN-LIB files: the properties that they describe, and errors with the line."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linflab.models.robustness.bounds import Box
from linflab.models.robustness.verification import robustness_region
from linflab.platform.errors import InputError
from linflab.platform.exchange.s_expressions import MAX_DEPTH
from linflab.platform.exchange.vnnlib import (
    Property,
    format_counterexample,
    format_robustness,
    parse_property,
    read_property,
)  # fmt: skip
from tests.conftest import assert_rejected
from tests.platform.exchange.models import box_assertions, format_property

UNIT = box_assertions([0.0, 0.0], [1.0, 1.0])


def is_counterexample(goal: Property, inputs: list[float], outputs: list[float]) -> bool:
    x, y = torch.tensor(inputs, dtype=torch.float64), torch.tensor([outputs], dtype=torch.float64)
    return any(
        bool(((region.lower <= x) & (x <= region.upper)).all()) and any(bool(one.contains(y)) for one in region.unsafe)
        for region in goal.regions
    )


def test_collision_avoidance_properties_are_read() -> None:
    """Properties like those of ACAS Xu: several regions of inputs, and several disjuncts of outputs."""
    text = """
    ; Unsafe if COC is not minimal
    (declare-const X_0 Real) (declare-const X_1 Real)
    (declare-const Y_0 Real)
    (declare-const Y_1 Real)
    (declare-const Y_2 Real)
    (assert (or
        (and (<= X_0 0.679857769) (>= X_0 0.6)  (<= X_1 0.5) (>= X_1 -0.5))
        (and (<= X_0 -3.5e-1) (>= X_0 -0.4) (<= X_1 0.5) (>= X_1 -0.5))
    ))
    (assert (or (and (<= Y_1 Y_0) (<= Y_1 Y_2)) (and (>= Y_0 3.9911256459))))
    """
    goal = parse_property(text, "prop.vnnlib")
    assert (goal.num_inputs, goal.num_outputs) == (2, 3)
    assert [region.lower.tolist() for region in goal.regions] == [[0.6, -0.5], [-0.4, -0.5]]
    assert [region.upper.tolist() for region in goal.regions] == [[0.679857769, 0.5], [-0.35, 0.5]]
    assert [len(region.unsafe) for region in goal.regions] == [2, 2]
    assert is_counterexample(goal, [0.65, 0.1], [1.0, 0.5, 0.7])
    assert is_counterexample(goal, [-0.37, 0.1], [4.0, 5.0, 0.7])
    assert not is_counterexample(goal, [0.0, 0.1], [1.0, 0.5, 0.7])
    assert not is_counterexample(goal, [0.65, 0.1], [1.0, 0.5, 0.4])


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 5), eps=st.floats(0, 0.5))
def test_robustness_properties_are_written_exactly(seed: int, classes: int, eps: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    image, label = torch.rand(2, 3, 2, generator=generator), seed % classes
    box = Box((image - eps).clamp_min(0), (image + eps).clamp_max(1))
    goal = parse_property(format_robustness(box, label, classes, "test"), "image.vnnlib")
    expected = robustness_region(box.lower.flatten(), box.upper.flatten(), label, classes)
    (region,) = goal.regions
    for bound, float32_bound in zip(region.outer_box(), box, strict=True):
        assert torch.equal(bound[0], float32_bound.flatten())
    assert torch.equal(region.lower, expected.lower) and torch.equal(region.upper, expected.upper)
    outputs = torch.randn(50, classes, generator=generator).round(decimals=1)
    unsafe = torch.stack([one.contains(outputs) for one in region.unsafe]).any(dim=0)
    others = outputs.clone()
    others[:, label] = -math.inf
    assert torch.equal(unsafe, others.amax(dim=1) >= outputs[:, label])


FORMULAS = {  # formula, and the same condition in Python
    "(<= Y_0 Y_1)": lambda x, y: y[0] <= y[1],
    "(< Y_0 Y_1)": lambda x, y: y[0] < y[1],
    "(>= (+ Y_0 (* 2.0 Y_1)) (- 0.5))": lambda x, y: y[0] + 2 * y[1] >= -0.5,
    "(> (- (* Y_0 2) Y_1 1.5) .5e0)": lambda x, y: 2 * y[0] - y[1] - 1.5 > 0.5,
    "(<= (- Y_0) +1.)": lambda x, y: -y[0] <= 1,
    "(or (<= Y_0 0.5) (and (>= Y_1 1) (or (<= X_0 0.25) (>= X_1 0.75))))": lambda x, y: (
        y[0] <= 0.5 or (y[1] >= 1 and (x[0] <= 0.25 or x[1] >= 0.75))
    ),
    "(and (or (<= Y_0 0) (<= Y_1 0)) (or (>= Y_0 -1) (>= Y_1 -1)))": lambda x, y: (
        (y[0] <= 0 or y[1] <= 0) and (y[0] >= -1 or y[1] >= -1)
    ),
    "(< (* 4 X_0) 1)": lambda x, y: 4 * x[0] < 1,
    "(>= 0.5 (- 1 X_1))": lambda x, y: 1 - x[1] <= 0.5,
    "(<= 1 2)": lambda x, y: True,
    "(<= 2 1)": lambda x, y: False,
    "(or (<= 2 1) (<= Y_0 0))": lambda x, y: y[0] <= 0,
    "(<= (- Y_0 Y_0) 0)": lambda x, y: True,
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_formulas_have_their_meaning(formula: str) -> None:
    goal = parse_property(format_property(2, 2, *UNIT, formula), "p.vnnlib")
    for point in itertools.product((0.0, 0.25, 0.5, 0.75, 1.0), (0.5, 0.75), (-1.5, 0.0, 0.5, 1.75), (-0.5, 0.0, 1.0)):
        assert is_counterexample(goal, [*point[:2]], [*point[2:]]) == FORMULAS[formula](point[:2], point[2:])


def test_several_assertions_are_combined() -> None:
    goal = parse_property(format_property(2, 2, *UNIT, *(list(FORMULAS)[k] for k in (0, 2, 5, 6))), "p.vnnlib")
    conditions = [FORMULAS[list(FORMULAS)[k]] for k in (0, 2, 5, 6)]
    for point in itertools.product((0.0, 0.5, 1.0), (0.5, 1.0), (-1.5, -0.5, 0.0, 0.5), (-2.0, -0.5, 0.0, 1.0)):
        expected = all(condition(point[:2], point[2:]) for condition in conditions)
        assert is_counterexample(goal, [*point[:2]], [*point[2:]]) == expected


REJECTED = {  # text, and words of the message
    "": "X_0",
    "(declare-const X_0 Real)": "Y_0",
    "(declare-const X_0 Real)\n(declare-const X_0 Real)\n(declare-const Y_0 Real)": "X_0",
    "(declare-const X_1 Real)\n(declare-const Y_0 Real)": "X_0",
    "(declare-const Z_0 Real)": "line 1",
    "(declare-const X_0 Int)": "line 1",
    "(declare-const X_00 Real)": "line 1",
    "\n(declare-fun f (Real) Real)": "line 2",
    "(assert": "line 1",
    "(assert))": "line 1",
    "\n\n)": "line 3",
    "assert": "line 1",
    "()": "line 1",
    "((assert))": "line 1",
    '(set-info :source "x")': "line 1",
    "(push 1)": "line 1",
    "(" * (MAX_DEPTH + 1): "line 1",
    "\n".join("(" * 100_000): f"line {MAX_DEPTH + 1}",
    format_property(1, 1, "(<= X_0 1)"): "X_0",
    format_property(1, 1, "(<= X_0 1e39)", "(>= X_0 0)"): "X_0",
    format_property(1, 1, "(<= X_0 1)", "(>= X_0 0)", "(<= Y_1 0)"): "line 5",
    format_property(2, 1, *UNIT, "(<= X_0 X_1)"): "line 8",
    format_property(2, 1, *UNIT, "(<= X_0 Y_0)"): "line 8",
    format_property(2, 1, *UNIT, "(<= (* Y_0 Y_0) 1)"): "line 8",
    format_property(2, 1, *UNIT, "(<= (/ Y_0 2) 1)"): "line 8",
    format_property(2, 1, *UNIT, "(<= Y_0 1 2)"): "line 8",
    format_property(2, 1, *UNIT, "(<= Y_0 nan)"): "nan",
    format_property(2, 1, *UNIT, "(<= Y_0 1_0)"): "1_0",
    format_property(2, 1, *UNIT, "(<= Y_0 1e999)"): "line 8",
    format_property(2, 1, *UNIT, "(not (<= Y_0 1))"): "not",
    format_property(2, 1, *UNIT, "(= Y_0 1)"): "line 8",
    format_property(2, 1, *UNIT, "(and)"): "line 8",
    format_property(2, 1, *UNIT, "Y_0"): "line 8",
    format_property(2, 1, *UNIT, "(<= Y_0 1) (<= Y_0 2)"): "line 8",
    format_property(2, 1, *UNIT, *["(or (<= Y_0 1) (<= Y_0 2))"] * 30): "p.vnnlib",
}


@pytest.mark.parametrize("text", REJECTED, ids=range(len(REJECTED)))
def test_malformed_files_are_rejected_with_the_line(text: str) -> None:
    with pytest.raises(InputError) as error:
        parse_property(text, "p.vnnlib")
    assert_rejected(error, "p.vnnlib", REJECTED[text])
    assert len(str(error.value)) < 300


BASE = format_property(2, 2, *UNIT, *FORMULAS)


@settings(max_examples=150)
@given(
    start=st.integers(0, len(BASE)),
    length=st.integers(0, 12),
    inserted=st.one_of(
        st.text("()<>=+-*XY_01. \n;", max_size=6),
        st.text(max_size=4),
        st.sampled_from(["(or ", "(and ", "1e999", "(" * 99]),
    ),
)
def test_mutated_files_parse_or_give_one_clear_error(start: int, length: int, inserted: str) -> None:
    text = BASE[:start] + inserted + BASE[start + length :]
    try:
        goal = parse_property(text, "p.vnnlib")
    except InputError as error:
        line = str(error)
        assert line.startswith("p.vnnlib: ") and line.isprintable() and len(line) < 300 and "; " in line
    else:
        assert all(len(region.lower) == goal.num_inputs for region in goal.regions)


def test_unreadable_files_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "latin.vnnlib").write_bytes(b"(assert \xff)")
    for path in (tmp_path, tmp_path / "none.vnnlib", tmp_path / "latin.vnnlib"):
        with pytest.raises(InputError) as error:
            read_property(path)
        assert_rejected(error, str(path))


def test_counterexamples_have_all_digits() -> None:
    inputs, outputs = torch.rand(3), torch.randn(2)
    text = format_counterexample(inputs, outputs)
    assert text.startswith("((X_0 ") and text.endswith("))\n")
    pairs = [line.strip(" ()").split() for line in text.splitlines()]
    assert [name for name, _ in pairs] == ["X_0", "X_1", "X_2", "Y_0", "Y_1"]
    assert torch.equal(torch.tensor([float(value) for _, value in pairs]), torch.cat([inputs, outputs]))
