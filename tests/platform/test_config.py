"""Experiments from recipes and overrides, and one clear line for everything that is wrong with them."""

from pathlib import Path

import pytest
import yaml

from linflab.platform.config import build_experiment, load_experiment, read_recipe, recipe_names
from linflab.platform.errors import SettingError
from tests.conftest import RECIPE


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_valid_and_survive_yaml(name: str) -> None:
    experiment = load_experiment(name)
    assert build_experiment(yaml.safe_load(experiment.to_yaml()), {}) == experiment
    assert name.startswith(f"{experiment.dataset}_eps")


def test_overrides() -> None:
    experiment = load_experiment(RECIPE, ["model.width=128", "eps=0.2", "optimizer.learning_rate=1e-3"])
    assert (experiment.model.width, experiment.eps, experiment.optimizer.learning_rate) == (128, 0.2, 1e-3)
    assert experiment.settings()["model.width"] == 128
    assert experiment.settings()["evaluation.attack.steps"] == 100


def test_eps_as_a_fraction() -> None:
    assert load_experiment(RECIPE, ["eps=8/255"]).eps == 8 / 255
    with pytest.raises(SettingError, match="eps=8/0"):
        load_experiment(RECIPE, ["eps=8/0"])


def test_another_kind_keeps_the_settings_that_it_has_too() -> None:
    objective = load_experiment(RECIPE, ["objective.theta=0.3", "objective.kind=hinge"]).objective
    assert (objective.kind, objective.theta) == ("hinge", 0.3)
    assert load_experiment(RECIPE, ["objective.kind=hinge"]).objective.theta == 0.2  # the recipe's
    plain, sorted_net = load_experiment(RECIPE).model, load_experiment(RECIPE, ["model.kind=sort_net"]).model
    assert (sorted_net.depth, sorted_net.width) == (plain.depth, plain.width)


def test_kinds_within_kinds_in_any_order() -> None:
    overrides = ["model.net.kind=sort_net", "model.kind=linf_dist_hybrid", "objective.kind=worst_case_hinge"]
    for order in (overrides, overrides[::-1]):
        assert load_experiment(RECIPE, [*order, "objective.eps_train=0.1"]).model.net.kind == "sort_net"


def test_recipe_by_path(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**read_recipe(RECIPE), "eps": 0.05}))
    assert load_experiment(str(path)).eps == 0.05


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.widht=3", ["model.widht=3", "unknown", "did you mean width?", "depth"]),
        ("colour=red", ["colour=red", "unknown", "dataset"]),
        ("objective.lamda_start=1", ["objective.lamda_start=1", "did you mean lambda_start?"]),
        ("model.width=wide", ["model.width=wide", "integer"]),
        ("model.width=12.5", ["model.width=12.5", "integer"]),
        ("model.width=0", ["model.width=0", "greater than or equal to 1"]),
        ("model.width.x=1", ["model.width is a single setting"]),
        ("eps=-0.1", ["eps=-0.1", "greater than or equal to 0"]),
        ("eps=nan", ["eps=nan"]),
        ("p_schedule.start=2000", ["p_schedule", "start=2000", "end=1000"]),
        ("p_schedule.end=inf", ["p_schedule.end=inf", "finite"]),
        ("p_schedule.infinity_share=0.95", ["p_schedule", "0.95", "at most 1"]),
        ("objective.kind=squared", ["objective.kind=squared", "hinge"]),
        ("objective.kind=worst_case_hinge", ["objective.eps_train", "missing"]),
        ("model.kind=linf_dist_hybrid", ["objective.kind=clipped_hinge_cross_entropy", "worst_case_hinge"]),
        ("compute.workers=3", ["training.batch_size=32", "compute.workers=3"]),
        ("model.width", ["model.width", "key=value"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate=-1", "greater than 0"]),
        ("model.width=true", ["model.width=true", "true or false"]),
        ("eps=yes", ["eps=true"]),
        ("training=5", ["training=5"]),
        ("model=3", ["model=3"]),
        ("seed=abc", ["seed=abc", "integer"]),
    ],
)
def test_wrong_settings(override: str, says: list[str]) -> None:
    with pytest.raises(SettingError) as caught:
        load_experiment(RECIPE, [override])
    message = str(caught.value)
    assert "\n" not in message
    for words in says:
        assert words in message


IBP = ["model.kind=cnn7", "objective.kind=worst_case_cross_entropy", "objective.eps_train=0.1"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.kind=cnn7"], ["objective.kind=clipped_hinge_cross_entropy", "model.kind=cnn7", "cross_entropy"]),
        ([*IBP, "objective.bound=tight"], ["objective.bound=tight", "crown_ibp_fused", "dual"]),
        ([*IBP, "model.kind=group_sort", "objective.bound=dual"], ["objective.bound=dual", "interval will do"]),
        (
            [*IBP, "model.kind=linf_dist_mlp", "objective.bound=crown_ibp"],
            ["objective.bound=crown_ibp", "linf_dist_mlp"],
        ),
        ([*IBP, "evaluation.certifier=lipschitz"], ["evaluation.certifier=lipschitz", "cnn7", "interval will do"]),
        ([*IBP, "eps_ramp.warmup_share=0.6", "eps_ramp.share=0.5"], ["eps_ramp", "0.6", "at most 1"]),
        ([*IBP, "optimizer.largest_gradient=0"], ["optimizer.largest_gradient=0", "greater than 0"]),
        ([*IBP, "objective.eps_train=1.5"], ["objective.eps_train=1.5", "less than or equal to 1"]),
        ([*IBP, "objective.crown_share_end=0.5"], ["crown_share_end=0.5", "bound=interval"]),
        ([*IBP, "optimizer.lp_weight_decay=0.005"], ["optimizer.lp_weight_decay=0.005", "cnn7"]),
        ([*IBP, "model.kind=linf_dist_mlp", "objective.penalty=0.5"], ["objective.penalty=0.5", "linf_dist_mlp"]),
        ([*IBP, "model.kind=conv_net", "model.batch_norm=true", "training.batch_size=1"], ["training.batch_size=1"]),
        (["model.kind=group_sort", "evaluation.sound=true"], ["evaluation.sound=true", "certifier=interval"]),
        (["model.kind=group_sort", "model.width=63"], ["model", "group=2 does not divide width=63", "64"]),
        (
            ["model.kind=sort_net", "objective.kind=adversarial_cross_entropy", "objective.eps_train=0.1"],
            ["objective.kind=adversarial_cross_entropy", "SortNet"],
        ),
    ],
)
def test_settings_that_do_not_go_together(overrides: list[str], says: list[str]) -> None:
    with pytest.raises(SettingError) as caught:
        load_experiment(RECIPE, overrides)
    for words in says:
        assert words in str(caught.value)


def test_unknown_recipe() -> None:
    with pytest.raises(SettingError, match=r"recipe=mine\.yaml: there is no such file"):
        load_experiment("mine.yaml")
    with pytest.raises(SettingError, match=f"did you mean {RECIPE}"):
        load_experiment(RECIPE.replace("linf", "lin"))


@pytest.mark.parametrize("text", ["- a list\n", "a: [\n", "\0", "eps: 2020-13-45\n", "a: &a [*a]\nb: &b {c: *b}\n"])
def test_recipe_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(SettingError, match="YAML"):
        load_experiment(str(tmp_path / "own.yaml"))
