"""Search spaces: what is shipped, what is drawn from them, what is refused."""

from pathlib import Path

import optuna
import pytest

from linflab.search_spaces.space import load_space, space_names

ONE = "description: one\nparameters:\n  model.width: {distribution: integer, low: 8, high: 64, step: 8}\n"


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
        if hasattr(distribution, "low"):
            assert all(distribution.low <= value <= distribution.high for value in values)


def test_own_space_overrides_what_it_includes(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(ONE.replace("parameters", "include: [demo]\nparameters"))
    space = load_space(str(tmp_path / "own.yaml"))
    assert space.parameters["model.width"].high == 64  # type: ignore[union-attr]
    assert "objective.theta" in space.parameters


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
