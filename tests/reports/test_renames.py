"""Names of earlier versions: read from stored data, rejected in user input."""

import json
import shlex
from pathlib import Path

import pytest

from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import build_config, load_config
from linflab.platform.errors import InputError
from linflab.reports import schema
from linflab.reports.comparison import load_definition
from linflab.reports.renames import (
    METRICS,
    SETTINGS,
    TAGS,
    current_metrics,
    current_override,
    current_setting,
    current_settings,
    current_space,
    current_tags,
    current_tree,
)
from linflab.search_spaces.space import SearchSpace, load_space
from linflab.search_spaces.strict_yaml import read_mapping

NET, RELU = "digits_eps0.1_linf_dist_net", "digits_eps0.1_ibp"


def list_setting_paths() -> set[str]:
    """Return dotted paths of all settings and sections, for every kind of network and objective."""
    found = set()

    def add(node: dict[str, object], path: str, definitions: dict[str, dict[str, object]]) -> None:
        reference = node.get("$ref")
        if isinstance(reference, str):
            add(definitions[reference.rsplit("/", 1)[1]], path, definitions)
        for choice in [*node.get("oneOf", []), *node.get("anyOf", []), *node.get("allOf", [])]:  # type: ignore[misc]
            add(choice, path, definitions)
        for name, inner in node.get("properties", {}).items():  # type: ignore[attr-defined]
            found.add(f"{path}{name}")
            add(inner, f"{path}{name}.", definitions)

    schema_of_all = ExperimentConfig.model_json_schema()
    add(schema_of_all, "", schema_of_all["$defs"])
    return found


def test_new_names_are_settings_and_old_ones_are_not() -> None:
    known = list_setting_paths()
    assert set(SETTINGS.values()) <= known
    assert not SETTINGS.keys() & known


def test_new_tags_and_metrics_are_in_the_schema() -> None:
    names = {value for name, value in vars(schema).items() if name.isupper() and isinstance(value, str)}
    assert {*TAGS.values(), *METRICS.values()} <= names
    assert not {*TAGS, *METRICS} & names


@pytest.mark.parametrize(("old", "new"), SETTINGS.items())
def test_old_override_is_rejected_with_the_new_name(old: str, new: str) -> None:
    with pytest.raises(InputError, match=rf"{old}(\.x)?=1: .*use {new}(\.x)?=1"):
        load_config(NET, [f"{old}.x=1" if old in ("eps_ramp", "model.net") else f"{old}=1"])


def test_old_value_is_rejected_with_the_new_one() -> None:
    with pytest.raises(InputError, match=r"evaluation\.certifier=interval: .*use evaluation\.certifier=ibp"):
        load_config(NET, ["evaluation.certifier=interval"])


def test_old_recipe_is_rejected_with_the_new_name(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optimizer:\n  hold_share: 0.1\n")
    with pytest.raises(InputError, match=r"optimizer\.hold_share=0\.1: .*use optimizer\.constant_lr_fraction=0\.1"):
        load_config(str(recipe))


def test_old_space_and_table_fields_are_rejected_with_new_names(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("description: x\ntry_first: []\nparameters:\n  seed: {distribution: integer, low: 0, high: 9}\n")
    with pytest.raises(ValueError, match=r"try_first: .*initial_points"):
        load_space(str(space))
    table = tmp_path / "table.yaml"
    for old, new in (("by: [method]", "group_by"), ("where: {seed: 1}", "filters"), ("seeds: 3", "min_seeds")):
        table.write_text(f"title: Mine\ngroups: [{{dataset: mnist, eps: 0.3}}]\nmeasured: {{{old}}}\n")
        with pytest.raises(ValueError, match=rf"measured.{old.split(':')[0]}: .*use {new}"):
            load_definition(str(table), read_mapping)
    for field in ("group_by: [model.net.width]", "filters: {model.net.width: 1}"):
        table.write_text(f"title: Mine\ngroups: [{{dataset: mnist, eps: 0.3}}]\nmeasured: {{{field}}}\n")
        with pytest.raises(ValueError, match=r"model\.net\.width: .*use model\.backbone\.width"):
            load_definition(str(table), read_mapping)


def test_stored_settings_are_read_under_their_new_names() -> None:
    tree = {
        "eps_ramp": {"share": 0.5, "shape": "smooth"},
        "model": {"kind": "linf_dist_hybrid", "net": {"kind": "linf_dist_conv_net", "dense_width": 8}, "hidden": 4},
        "objective": {"kind": "worst_case_cross_entropy", "bound": "interval", "penalty": 0.5},
    }
    assert current_tree(tree) == {
        "eps_schedule": {"rampup_fraction": 0.5, "shape": "smooth"},
        "model": {
            "kind": "linf_dist_hybrid",
            "backbone": {"kind": "linf_dist_conv_net", "hidden_size": 8},
            "hidden_size": 4,
        },
        "objective": {"kind": "worst_case_cross_entropy", "bound": "ibp", "warmup_reg_weight": 0.5},
    }
    assert current_setting("model.net.width") == "model.backbone.width"
    assert current_override("evaluation.certifier=interval") == "evaluation.certifier=ibp"
    assert current_settings({"optimizer.epsilon": "1e-08"}) == {"optimizer.adam_epsilon": "1e-08"}


@pytest.mark.parametrize("recipe", [NET, RELU])
def test_current_settings_are_unchanged(recipe: str) -> None:
    experiment = load_config(recipe)
    tree = experiment.model_dump(mode="json")
    assert current_tree(tree) == tree
    assert build_config(current_tree(tree), {}) == experiment
    space = load_space("demo").model_dump(mode="json")
    assert SearchSpace.model_validate(current_space(space)) == SearchSpace.model_validate(space)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("evaluation.attack={kinds: [pgd], steps: 3}", "evaluation.attack={methods: [pgd], steps: 3}"),
        ("objective.bound='interval'", "objective.bound=ibp"),
        ("evaluation.attack.kinds=[pgd,square]", "evaluation.attack.methods=[pgd,square]"),
        ("model={net: {kind: linf_dist_mlp}}", "model={backbone: {kind: linf_dist_mlp}}"),
        ("eps=8/255", "eps=8/255"),
    ],
)
def test_stored_overrides_are_read_under_their_new_names(old: str, new: str) -> None:
    assert current_override(old) == new
    command = shlex.join(["linflab", "train", NET, old])
    assert shlex.split(current_tags({"linflab.command": command})["linflab.command"])[-1] == new


def test_values_of_damaged_tags_are_unchanged() -> None:
    for text in ("[" * 7000, "{", "3"):
        assert current_tags({"linflab.job": text}) == {"linflab.trial_spec": text}
    assert current_tags({"linflab.command": "linflab 'train"}) == {"linflab.command": "linflab 'train"}


def test_current_tag_takes_precedence_over_its_old_name() -> None:
    assert current_tags({"linflab.failure_reason": "new", "linflab.failure": "old"}) == {
        "linflab.failure_reason": "new"
    }


def test_stored_tags_are_read_under_their_new_names() -> None:
    job = {"number": 3, "point": {"p_schedule.warmup_share": 0.1}, "round": 2, "repeat": 1}
    tags = {
        "linflab.job": json.dumps(job),
        "linflab.searched": "p_schedule.warmup_share,model.width",
        "linflab.command": "linflab train mine.yaml eps_ramp.share=0.5 objective.bound=interval",
        "linflab.certifier": "interval-sound",
        "linflab.kind": "trial",
    }
    assert current_tags(tags) == {
        "linflab.trial_spec": json.dumps(
            {"number": 3, "params": {"p_schedule.warmup_fraction": 0.1}, "rung": 2, "seed_index": 1}
        ),
        "linflab.searched_settings": "p_schedule.warmup_fraction,model.width",
        "linflab.command": "linflab train mine.yaml eps_schedule.rampup_fraction=0.5 objective.bound=ibp",
        "linflab.certifier": "ibp-sound",
        "linflab.kind": "trial",
    }
    assert current_tags(current_tags(tags)) == current_tags(tags)
    assert current_metrics({"test/certified_but_broken": 1.0}) == {"test/certificate_violations": 1.0}
