"""Configs from recipes and overrides, and one line for each of their errors."""

from pathlib import Path

import pytest
import yaml

from linflab.platform.config.overrides import build_config, load_config, radius_note, read_recipe, recipe_names
from linflab.platform.errors import InputError
from tests.conftest import RECIPE, assert_rejected


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_valid_and_survive_yaml(name: str) -> None:
    experiment = load_config(name)
    assert build_config(yaml.safe_load(experiment.to_yaml()), {}) == experiment
    assert name.startswith(f"{experiment.dataset}_eps")


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("digits_eps0.1_linf_dist_net", "e2a8ebfb5c3d6b7089d0ba69a10be818"),
        ("digits_eps0.1_ibp", "d75d8113745ac8e275ee9675dba2cbe7"),
        ("tiny_imagenet_eps1_255_crown_ibp_fused_cnn7", "c7f8ec7f6e28a23bae639ec3a8eec7e2"),
        ("mnist_eps0.3_linf_dist_hybrid", "84f79ae274cde4ace2e4fbde13674b05"),
        ("cifar10_eps8_255_ibp", "a8bfea7404ab338edd814822672403bd"),
    ],
)
def test_hashes_are_those_of_earlier_versions(name: str, digest: str) -> None:
    """The hashes were computed before settings were added, so that runs of that version can be found and resumed."""
    assert load_config(name).config_hash() == digest


def test_added_settings_change_the_hash_unless_they_keep_the_behavior() -> None:
    old = load_config(RECIPE)
    assert load_config(RECIPE, ["optimizer.momentum=0.9", "optimizer.milestones=[]"]).config_hash() == old.config_hash()
    changed = ["optimizer.algorithm=radam", "optimizer.l1_weight=1e-6", "optimizer.milestones=[0.5]"]
    assert len({old.config_hash(), *(load_config(RECIPE, [one]).config_hash() for one in changed)}) == 4


def test_overrides_change_settings() -> None:
    experiment = load_config(RECIPE, ["model.width=128", "eps=0.2", "optimizer.learning_rate=1e-3"])
    assert (experiment.model.width, experiment.eps, experiment.optimizer.learning_rate) == (128, 0.2, 1e-3)
    assert experiment.to_flat_dict()["model.width"] == 128
    assert experiment.to_flat_dict()["evaluation.attack.steps"] == 100


def test_default_attacks_follow_the_kind_of_network() -> None:
    def attacks(*overrides: str) -> tuple[str, ...] | None:
        return load_config(RECIPE, overrides).evaluation.attack.methods

    assert attacks() == ("pgd", "surrogate_pgd")
    assert attacks("model.kind=group_sort") == ("pgd", "targeted_apgd")
    assert attacks("model.kind=group_sort", "evaluation.attack.methods=[fab]") == ("fab",)
    experiment = load_config("digits_eps0.1_ibp")
    assert experiment.evaluation.attack.methods == ("pgd", "targeted_apgd")
    assert experiment.to_flat_dict()["evaluation.attack.methods"] == ["pgd", "targeted_apgd"]


@pytest.mark.parametrize("text", ["8/255", "8 / 255", "'8/255'", "8.0/255", "80/2550"])
def test_fractions_are_read_in_recipes_and_overrides(tmp_path: Path, text: str) -> None:
    recipe = yaml.safe_dump({**read_recipe(RECIPE), "eps": "EPS"}).replace("EPS", text)
    (tmp_path / "own.yaml").write_text(recipe)
    from_recipe, from_override = load_config(str(tmp_path / "own.yaml")), load_config(RECIPE, [f"eps={text}"])
    decimal = load_config(RECIPE, ["eps=0.03137254901960784"])
    assert from_recipe == from_override == decimal and from_recipe.eps == 8 / 255
    assert from_recipe.to_yaml() == decimal.to_yaml() and from_recipe.config_hash() == decimal.config_hash()


@pytest.mark.parametrize("setting", ["objective.theta", "p_schedule.inf_fraction", "optimizer.learning_rate"])
def test_fractions_are_read_in_all_sections(tmp_path: Path, setting: str) -> None:
    section, name = setting.split(".")
    tree = read_recipe(RECIPE)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**tree, section: {**tree.get(section, {}), name: "1/3"}}))
    assert load_config(str(tmp_path / "own.yaml")).to_flat_dict()[setting] == 1 / 3
    assert load_config(RECIPE, [f"{setting}=1/3"]).to_flat_dict()[setting] == 1 / 3


def test_eps_train_can_be_a_fraction() -> None:
    overrides = ["model.kind=cnn7", "objective.kind=worst_case_cross_entropy", "objective.eps_train=8/255"]
    assert load_config(RECIPE, overrides).objective.eps_train == 8 / 255


@pytest.mark.parametrize("text", ["8/0", "8/0.0", "255/8", "-8/255", "1/2/3", "8/", f"{'9' * 400}/1", "0/0", "inf/inf"])
def test_invalid_fractions_are_rejected(text: str) -> None:
    with pytest.raises(InputError, match="eps="):
        load_config(RECIPE, [f"eps={text}"])


IBP = ["model.kind=cnn7", "objective.kind=worst_case_cross_entropy", "objective.eps_train=0.1"]


def test_changed_eps_is_noted_with_the_scaled_radius() -> None:
    note = radius_note(RECIPE, ["eps=0.3"])
    assert note is not None and "eps=0.3" in note and "objective.theta=0.6" in note
    assert load_config(RECIPE, ["eps=0.3"]).objective.theta == load_config(RECIPE).objective.theta == 0.2
    note = radius_note("cifar10_eps8_255_ibp", ["eps=2/255"])
    assert note is not None and f"objective.eps_train={2 / 255:.6g}" in note


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["eps=0.1"],
        ["eps=0.3", "objective.theta=0.6"],
        ["eps=0.3", "objective.theta=0.4"],
        [*IBP, "objective.eps_train=0.1"],
        ["eps=0.3", "model.kind=cnn7", "objective.kind=cross_entropy"],
        ["model.width=8", "seed=3"],
    ],
)
def test_consistent_radii_are_not_noted(overrides: list[str]) -> None:
    assert radius_note(RECIPE, overrides) is None


def test_searched_radii_are_not_noted() -> None:
    assert radius_note(RECIPE, ["eps=0.3"], {"objective.theta": None}) is None


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_have_consistent_radii(name: str) -> None:
    assert radius_note(name, []) is None


def test_training_radius_below_eps_is_noted() -> None:
    note = radius_note(RECIPE, ["eps=0.3", "objective.theta=0.2"])
    assert note is not None and "objective.theta=0.2" in note and "eps=0.3" in note


def test_changed_kind_keeps_shared_settings() -> None:
    objective = load_config(RECIPE, ["objective.theta=0.3", "objective.kind=hinge"]).objective
    assert (objective.kind, objective.theta) == ("hinge", 0.3)
    assert load_config(RECIPE, ["objective.kind=hinge"]).objective.theta == 0.2  # from the recipe
    plain, sorted_net = load_config(RECIPE).model, load_config(RECIPE, ["model.kind=sort_net"]).model
    assert (sorted_net.depth, sorted_net.width) == (plain.depth, plain.width)


def test_nested_kinds_are_set_in_any_order() -> None:
    overrides = ["model.backbone.kind=sort_net", "model.kind=linf_dist_hybrid", "objective.kind=worst_case_hinge"]
    for order in (overrides, overrides[::-1]):
        assert load_config(RECIPE, [*order, "objective.eps_train=0.1"]).model.backbone.kind == "sort_net"


def test_recipe_is_loaded_by_path(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**read_recipe(RECIPE), "eps": 0.05}))
    assert load_config(str(path)).eps == 0.05


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.widht=3", ["model.widht=3", "width", "depth"]),
        ("colour=red", ["colour=red", "dataset"]),
        ("objective.lamda_start=1", ["objective.lamda_start=1", "lambda_start"]),
        ("model.width=wide", ["model.width=wide"]),
        ("model.width=12.5", ["model.width=12.5"]),
        ("model.width=0", ["model.width=0"]),
        ("model.width.x=1", ["model.width.x=1", "model.width"]),
        ("eps=-0.1", ["eps=-0.1"]),
        ("eps=nan", ["eps=nan"]),
        ("p_schedule.start=2000", ["p_schedule", "start=2000", "end=1000"]),
        ("p_schedule.end=inf", ["p_schedule.end=inf"]),
        ("p_schedule.inf_fraction=0.95", ["p_schedule", "0.95"]),
        ("objective.kind=squared", ["objective.kind=squared", "hinge"]),
        ("objective.kind=worst_case_hinge", ["objective.eps_train"]),
        ("model.kind=linf_dist_hybrid", ["objective.kind=clipped_hinge_cross_entropy", "worst_case_hinge"]),
        ("compute.workers=3", ["training.batch_size=32", "compute.workers=3"]),
        ("model.width", ["model.width", "key=value"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate=-1"]),
        ("optimizer.betas=[]", ["optimizer.betas=[]", "use 2"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas=[0.9]", "use 2"]),
        ("optimizer.betas=[0.9,0.99,0.999]", ["optimizer.betas=[0.9, 0.99, 0.999]", "use at most 2"]),
        ("model.width=true", ["model.width=true"]),
        ("eps=yes", ["eps=true"]),
        ("training=5", ["training=5"]),
        ("model=3", ["model=3"]),
        ("seed=abc", ["seed=abc"]),
    ],
)
def test_invalid_settings_are_rejected(override: str, expected: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_config(RECIPE, [override])
    assert_rejected(caught, *expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.kind=cnn7"], ["objective.kind=clipped_hinge_cross_entropy", "model.kind=cnn7", "cross_entropy"]),
        ([*IBP, "objective.bound=tight"], ["objective.bound=tight", "crown_ibp_fused", "dual"]),
        ([*IBP, "model.kind=group_sort", "objective.bound=dual"], ["objective.bound=dual", "ibp"]),
        (
            [*IBP, "model.kind=linf_dist_mlp", "objective.bound=crown_ibp"],
            ["objective.bound=crown_ibp", "linf_dist_mlp"],
        ),
        ([*IBP, "evaluation.certifier=lipschitz"], ["evaluation.certifier=lipschitz", "cnn7", "ibp"]),
        (
            [*IBP, "eps_schedule.warmup_fraction=0.6", "eps_schedule.rampup_fraction=0.5"],
            ["eps_schedule", "0.6", "0.5"],
        ),
        ([*IBP, "optimizer.max_grad_norm=0"], ["optimizer.max_grad_norm=0"]),
        ([*IBP, "optimizer.l1_weight=-1"], ["optimizer.l1_weight=-1"]),
        ([*IBP, "optimizer.milestones=[0.75,0.5]"], ["optimizer", "milestones=[0.75, 0.5]"]),
        ([*IBP, "optimizer.milestones=[1.5]"], ["optimizer.milestones.0=1.5"]),
        ([*IBP, "optimizer.milestones=[1/2]", "optimizer.constant_lr_fraction=0.5"], ["constant_lr_fraction=0.5"]),
        ([*IBP, "objective.eps_train=1.5"], ["objective.eps_train=1.5"]),
        ([*IBP, "objective.crown_weight_end=0.5"], ["crown_weight_end=0.5", "bound=ibp"]),
        ([*IBP, "optimizer.lp_weight_decay=0.005"], ["optimizer.lp_weight_decay=0.005", "cnn7"]),
        (
            [*IBP, "model.kind=linf_dist_mlp", "objective.warmup_reg_weight=0.5"],
            ["objective.warmup_reg_weight=0.5", "linf_dist_mlp"],
        ),
        ([*IBP, "model.kind=conv_net", "model.batch_norm=true", "training.batch_size=1"], ["training.batch_size=1"]),
        ([*IBP, "model.variant=cifar", "training.batch_size=1"], ["training.batch_size=1"]),
        (["model.kind=group_sort", "model.width=63"], ["model", "group_size=2", "width=63", "64"]),
        (
            ["model.kind=sort_net", "objective.kind=sabr", "objective.eps_train=0.1", "objective.relu_shrink=0.8"],
            ["objective.relu_shrink=0.8", "model.kind=sort_net"],
        ),
    ],
)
def test_inconsistent_settings_are_rejected(overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_config(RECIPE, overrides)
    assert_rejected(caught, *expected)


def test_certificates_are_sound_by_default() -> None:
    """This holds for every kind of network, also for GroupSort's Lipschitz certificates."""
    for kind in ("linf_dist_mlp", "group_sort", "conv_net"):
        objective = ["objective.kind=worst_case_cross_entropy", "objective.eps_train=0.1"]
        assert load_config(RECIPE, [f"model.kind={kind}", *objective]).evaluation.sound


def test_unknown_recipe_is_rejected() -> None:
    with pytest.raises(InputError, match=r"recipe=mine\.yaml"):
        load_config("mine.yaml")
    with pytest.raises(InputError, match=rf"\b{RECIPE}\b"):
        load_config(RECIPE.replace("linf", "lin"))


@pytest.mark.parametrize("text", ["- a list\n", "a: [\n", "\0", "eps: 2020-13-45\n", "a: &a [*a]\nb: &b {c: *b}\n"])
def test_recipe_without_a_mapping_is_rejected(tmp_path: Path, text: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(str(tmp_path / "own.yaml"))
    assert_rejected(caught, f"recipe={tmp_path / 'own.yaml'}")


def test_misspelled_setting_is_named_before_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("dataset: digits\nepss: 0.1\n")
    with pytest.raises(InputError, match=r"^epss=0\.1\b.*\beps\b"):
        load_config(str(tmp_path / "own.yaml"))


def test_eps_above_one_suggests_a_fraction_of_255() -> None:
    for text in ("1e999", "'1e999'", "300"):
        with pytest.raises(InputError, match=rf"^eps={text.strip(chr(39))}: .*8/255"):
            load_config(RECIPE, [f"eps={text}"])
    with pytest.raises(InputError, match=r"^eps=8: .*8/255"):
        load_config(RECIPE, ["eps=8"])
