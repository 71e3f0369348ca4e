"""Search spaces: what is shipped, what is drawn from them, what is refused."""

from pathlib import Path

import optuna
import pytest

from linflab.search_spaces.space import load_space, space_names

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
try_first:
  - {kind: net, start: 8, end: 16}
  - {kind: sort, q: 0.6}
"""


def test_demo_joins_the_three() -> None:
    assert {"p_schedule", "width", "hinge_threshold", "demo"} <= set(space_names())
    parts = {path for name in ("p_schedule", "width", "hinge_threshold") for path in load_space(name).parameters}
    assert set(load_space("demo").parameters) == parts


@pytest.mark.parametrize("name", space_names())
def test_points_lie_in_the_space(name: str) -> None:
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
def test_conditions_and_bounds_that_are_drawn(tmp_path: Path, sampler: type[optuna.samplers.BaseSampler]) -> None:
    (tmp_path / "own.yaml").write_text(BRANCHES)
    space = load_space(str(tmp_path / "own.yaml"))
    study = optuna.create_study(sampler=sampler(seed=1))
    for first in space.try_first:
        study.enqueue_trial(first)
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


def test_probes_reach_every_choice_and_both_ends(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(BRANCHES)
    space = load_space(str(tmp_path / "own.yaml"))
    probes = space.probes()
    reached = {(path, value) for point in probes for path, value in point.items()}
    assert {("kind", "net"), ("kind", "sort"), ("law", "cut"), ("law", "whole"), ("q", 0.5), ("q", 0.9)} <= reached
    assert {("start", 4.0), ("start", 16.0), ("end", 4.0), ("end", 100.0), ("half", 0.25), ("half", 0.5)} <= reached
    for point in probes:
        assert ("q" in point) == (point["kind"] == "sort") and ("half" in point) == (point.get("law") == "cut")


def test_own_space_overrides_what_it_includes(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(ONE.replace("parameters", "include: [demo]\nparameters"))
    space = load_space(str(tmp_path / "own.yaml"))
    assert space.parameters["model.width"].high == 64  # type: ignore[union-attr]
    assert "objective.theta" in space.parameters


def test_points_of_an_included_space_that_no_longer_fit_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "wide.yaml").write_text(ONE + "try_first: [{model.width: 8}, {model.width: 64}]\n")
    (tmp_path / "own.yaml").write_text(
        ONE.replace("low: 8", "low: 16") + "include: [wide.yaml]\ntry_first: [{model.width: 24}]\n"
    )
    assert load_space(str(tmp_path / "own.yaml")).try_first == ({"model.width": 64}, {"model.width": 24})


def test_numbers_that_yaml_takes_for_words(tmp_path: Path) -> None:
    rate = "optimizer.learning_rate: {distribution: log_uniform, low: 1e-4, high: 1e-1}"
    (tmp_path / "own.yaml").write_text(f"description: rates\nparameters: {{{rate}}}")
    assert load_space(str(tmp_path / "own.yaml")).parameters["optimizer.learning_rate"].low == 1e-4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ONE.replace("low: 8", "low: 128"), "low=128"),
        (ONE.replace("integer", "gaussian"), "gaussian"),
        (ONE.replace("integer", "log_uniform").replace("low: 8", "low: 0").replace(", step: 8", ""), "greater than 0"),
        (ONE.replace("step", "stride"), "stride"),
        ("description: none\n", "no parameters"),
        ("- a\n", "mapping"),
        ("a: [", "YAML"),
        (BRANCHES.replace("low: start", "low: later"), "end: the bound later must be"),
        (BRANCHES.replace("low: start", "low: kind"), "end: the bound kind must be"),
        (BRANCHES.replace("high: 100}", "high: 10}"), "low=start can be 16, above high=10.0"),
        (BRANCHES.replace("when: {kind: sort}}\n  law", "when: {kind: magic}}\n  law"), "when kind is magic"),
        (BRANCHES.replace("when: {kind: sort, law: cut}", "when: {law: cut}"), "not always drawn"),
        (BRANCHES.replace("low: start, high", "low: start, when: {half: 1}, high"), "when half is 1"),
        (BRANCHES.replace("q: 0.6", "q: 0.4"), "q=0.4: must be from 0.5 to 0.9"),
        (BRANCHES.replace("q: 0.6", "q: 0.6, half: 0.7, law: cut"), "half=0.7: must be from 0.25 to 0.6"),
        (BRANCHES.replace("q: 0.6", "q: 0.6, half: 0.3, law: whole"), "half=0.3: is drawn only if law is cut"),
        (ONE + "try_first: [{model.width: 20}]\n", "model.width=20: must be from 8 to 64 in steps of 8"),
        (BRANCHES.replace("kind: net, start", "kind: cnn, start"), "kind=cnn: must be one of net, sort"),
        (BRANCHES.replace("{kind: sort, q: 0.6}", "{nothing: 1}"), "nothing=1: is no parameter"),
        ("description: self\ninclude: [own.yaml]\n", "includes itself"),
    ],
)
def test_wrong_spaces(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="space=") as caught:
        load_space(str(path))
    assert says in str(caught.value)


def test_unknown_space_names_the_known() -> None:
    with pytest.raises(ValueError, match="hinge_threshold"):
        load_space("no_such_space")
