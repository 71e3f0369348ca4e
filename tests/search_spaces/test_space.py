"""Search spaces: shipped spaces, drawn points, and rejected definitions."""

import tracemalloc
from itertools import islice
from pathlib import Path

import optuna
import pytest

from linflab.search_spaces.space import SearchSpace, load_space, space_names
from tests.conftest import assert_rejected

ONE = "description: one\nparameters:\n  model.width: {distribution: integer, low: 8, high: 64, step: 8}\n"

BRANCHES = """
description: a branch, in it another, and ends that are drawn
parameters:
  kind: {distribution: categorical, choices: [net, sort]}
  start: {distribution: log_uniform, low: 4, high: 16}
  end: {distribution: log_uniform, low: start, high: 100}
  q: {distribution: uniform, low: 0.5, high: 0.9, when: {kind: sort}}
  law: {distribution: categorical, choices: [whole, cut], when: {kind: sort}}
  half: {distribution: uniform, low: 0.25, high: q, when: {kind: sort, law: cut}}
initial_points:
  - {kind: net, start: 8, end: 16}
  - {kind: sort, q: 0.6}
"""


def test_demo_joins_the_other_spaces() -> None:
    assert {"p_schedule", "width", "hinge_threshold", "demo"} <= set(space_names())
    parts = {path for name in ("p_schedule", "width", "hinge_threshold") for path in load_space(name).parameters}
    assert set(load_space("demo").parameters) == parts


@pytest.mark.parametrize("name", space_names())
def test_drawn_points_lie_in_the_space(name: str) -> None:
    space = load_space(name)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [space.suggest(study.ask()) for _ in range(50)]
    for path, distribution in space.parameters.items():
        values = [point[path] for point in points]
        assert len(set(values)) > 1
        for point in points if hasattr(distribution, "low") else []:
            low, high = distribution.bounds(point)
            assert low <= point[path] <= high


@pytest.mark.parametrize("sampler", [optuna.samplers.TPESampler, optuna.samplers.RandomSampler])
def test_points_satisfy_conditions_and_drawn_bounds(tmp_path: Path, sampler: type[optuna.samplers.BaseSampler]) -> None:
    (tmp_path / "own.yaml").write_text(BRANCHES)
    space = load_space(str(tmp_path / "own.yaml"))
    study = optuna.create_study(sampler=sampler(seed=1))
    for point in space.initial_points:
        study.enqueue_trial(point)
    points = []
    for k in range(60):
        trial = study.ask()
        points.append(space.suggest(trial))
        study.tell(trial, k % 7)
    assert points[0] == {"kind": "net", "start": 8.0, "end": 16.0}
    assert points[1]["kind"] == "sort" and points[1]["q"] == 0.6
    assert {point["kind"] for point in points} == {"net", "sort"}
    for point in points:
        assert 4 <= point["start"] <= 16 and point["start"] <= point["end"] <= 100
        assert ("q" in point) == (point["kind"] == "sort")
        assert ("half" in point) == (point.get("law") == "cut")
        assert "half" not in point or 0.25 <= point["half"] <= point["q"]


def test_corner_points_reach_every_choice_and_both_ends(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(BRANCHES)
    space = load_space(str(tmp_path / "own.yaml"))
    points = space.corner_points()
    reached = {(path, value) for point in points for path, value in point.items()}
    assert {("kind", "net"), ("kind", "sort"), ("law", "cut"), ("law", "whole"), ("q", 0.5), ("q", 0.9)} <= reached
    assert {("start", 4.0), ("start", 16.0), ("end", 4.0), ("end", 100.0), ("half", 0.25), ("half", 0.5)} <= reached
    for point in points:
        assert ("q" in point) == (point["kind"] == "sort") and ("half" in point) == (point.get("law") == "cut")


def test_space_overrides_included_spaces(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(ONE.replace("parameters", "include: [demo]\nparameters"))
    space = load_space(str(tmp_path / "own.yaml"))
    assert space.parameters["model.width"].high == 64  # type: ignore[union-attr]
    assert "objective.theta" in space.parameters


def test_included_points_outside_the_space_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "wide.yaml").write_text(ONE + "initial_points: [{model.width: 8}, {model.width: 64}]\n")
    (tmp_path / "own.yaml").write_text(
        ONE.replace("low: 8", "low: 16") + "include: [wide.yaml]\ninitial_points: [{model.width: 24}]\n"
    )
    assert load_space(str(tmp_path / "own.yaml")).initial_points == ({"model.width": 64}, {"model.width": 24})


def test_exponents_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    rate = "optimizer.learning_rate: {distribution: log_uniform, low: 1e-4, high: 1e-1}"
    (tmp_path / "own.yaml").write_text(f"description: rates\nparameters: {{{rate}}}")
    assert load_space(str(tmp_path / "own.yaml")).parameters["optimizer.learning_rate"].low == 1e-4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (text, parts)
        for text, *parts in (
            (ONE.replace("low: 8", "low: 128"), "low=128"),
            (ONE.replace("integer", "gaussian"), "gaussian"),
            (ONE.replace("integer", "log_uniform").replace("low: 8", "low: 0").replace(", step: 8", ""), "low", "0"),
            (ONE.replace("step", "stride"), "stride"),
            (ONE.replace("low: 8", "low: true"), "low"),
            (ONE.replace("low: 8", "low: null"), "low"),
            (ONE.replace("low: 8", "low: 8\n   , low: 9"), "low"),
            (ONE.replace("integer, low: 8", "uniform, low: 1/0"), "low"),
            (ONE.replace("integer, low: 8", f"uniform, low: 1/{'1' * 400}"), "low"),
            (ONE.replace("integer, low: 8", f"uniform, low: {'1' * 400}/3"), "low"),
            (ONE.replace("integer, low: 8", "uniform, low: -1.0e+308").replace("64", "1.0e+308"), "1e+308"),
            (ONE.replace("integer, low: 8, high: 64, step: 8", "categorical, choices: [1, 2, 1]"), "choices"),
            (ONE.replace("integer, low: 8, high: 64, step: 8", "categorical, choices: [1, true]"), "choices"),
            (ONE.replace("integer, low: 8, high: 64, step: 8", "categorical, choices: [{a: 1}, 2]"), "choices"),
            (ONE.replace("integer, low: 8, high: 64, step: 8", "categorical, choices: []"), "choices"),
            (ONE.replace("integer, low: 8, high: 64, step: 8", "categorical, choices: null"), "choices"),
            (ONE + "initial_points: [{model.width: null}]\n", "model.width"),
            (ONE + "initial_points: [{model.width: [8]}]\n", "model.width"),
            ("description: none\n", "parameters"),
            ("- a\n", "mapping"),
            ("a: [", "line 1"),
            (BRANCHES.replace("low: start", "low: later"), "end", "later"),
            (BRANCHES.replace("low: start", "low: kind"), "end", "kind"),
            (BRANCHES.replace("high: 100}", "high: 10}"), "low=start", "16", "high=10.0"),
            (BRANCHES.replace("when: {kind: sort}}\n  law", "when: {kind: magic}}\n  law"), "kind", "magic"),
            (BRANCHES.replace("when: {kind: sort, law: cut}", "when: {law: cut}"), "half", "q"),
            (BRANCHES.replace("low: start, high", "low: start, when: {half: 1}, high"), "half", "1"),
            (BRANCHES.replace("q: 0.6", "q: 0.4"), "q=0.4", "0.5", "0.9"),
            (BRANCHES.replace("q: 0.6", "q: 0.6, half: 0.7, law: cut"), "half=0.7", "0.25", "0.6"),
            (BRANCHES.replace("q: 0.6", "q: 0.6, half: 0.3, law: whole"), "half=0.3", "law", "cut"),
            (ONE + "initial_points: [{model.width: 20}]\n", "model.width=20", "8", "64"),
            (BRANCHES.replace("kind: net, start", "kind: cnn, start"), "kind=cnn", "net", "sort"),
            (BRANCHES.replace("{kind: sort, q: 0.6}", "{nothing: 1}"), "nothing=1"),
            ("description: self\ninclude: [own.yaml]\n", "own.yaml"),
        )
    ],
)
def test_invalid_spaces_are_rejected(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"space=\S*own\.yaml") as caught:
        load_space(str(path))
    assert_rejected(caught, *parts)


def test_unknown_space_error_names_shipped_spaces() -> None:
    with pytest.raises(ValueError, match="hinge_threshold"):
        load_space("no_such_space")


def make_space(tmp_path: Path, parameters: str, more: str = "") -> SearchSpace:
    (tmp_path / "own.yaml").write_text(f"description: own\nparameters: {{{parameters}}}\n{more}")
    return load_space(str(tmp_path / "own.yaml"))


def test_fractions_are_numbers(tmp_path: Path) -> None:
    space = make_space(
        tmp_path,
        "a: {distribution: log_uniform, low: 1/255, high: 16/255}, "
        "b: {distribution: uniform, low: 0, high: 8/255, step: 1/255}, "
        "c: {distribution: categorical, choices: [2/255, 0.5, 8/255]}, "
        "d: {distribution: uniform, low: a, high: 0.5, when: {c: 8/255}}",
        "initial_points: [{a: 2/255, c: 8/255}]",
    )
    bounds = space.parameters["a"]
    assert (bounds.low, bounds.high) == (1 / 255, 16 / 255)  # type: ignore[union-attr]
    assert space.parameters["b"].step == 1 / 255  # type: ignore[union-attr]
    assert space.parameters["c"].choices == (2 / 255, 0.5, 8 / 255)  # type: ignore[union-attr]
    assert space.parameters["d"].when == {"c": 8 / 255}
    assert space.initial_points == ({"a": 2 / 255, "c": 8 / 255},)


def test_choices_can_be_null_and_lists(tmp_path: Path) -> None:
    space = make_space(
        tmp_path,
        "a: {distribution: categorical, choices: [null, 1, [0.9, 0.99]]}, "
        "b: {distribution: integer, low: 1, high: 2, when: {a: null}}, "
        "c: {distribution: integer, low: 3, high: 3, when: {a: [0.9, 0.99]}}",
        "initial_points: [{a: null, b: 2}, {a: [0.9, 0.99]}]",
    )
    expected = [{"a": None, "b": 1}, {"a": None, "b": 2}, {"a": 1}, {"a": [0.9, 0.99], "c": 3}]
    assert list(space.grid()) == expected
    assert {"a": None, "b": 1} in space.corner_points() and {"a": [0.9, 0.99], "c": 3} in space.corner_points()
    assert "null" in str(space.parameters["a"])
    assert SearchSpace.model_validate(space.model_dump(mode="json")) == space


def test_grid_is_built_lazily(tmp_path: Path) -> None:
    space = make_space(
        tmp_path,
        "a: {distribution: integer, low: 0, high: 2147483647}, "
        "b: {distribution: uniform, low: 0, high: 1, step: 1.0e-9}, c: {distribution: categorical, choices: [x, y]}",
    )
    tracemalloc.start()
    points = list(islice(space.grid(), 5))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert points == [
        {"a": 0, "b": b, "c": c} for b, c in [(0.0, "x"), (0.0, "y"), (1e-9, "x"), (1e-9, "y"), (2e-9, "x")]
    ]
    assert peak < 2**20
