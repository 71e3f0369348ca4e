"""Current names of renamed settings, tags, metrics and fields of files.

Code that reads stored runs, weights, sweep plans or exported runs passes the content through the functions below. In
recipes, overrides, search spaces and tables, old names are rejected with an error message that has the new name.
"""

import json
import math
import re
import shlex
from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

SETTINGS = {  # renaming a section also renames the settings in it
    "augmentation.crop": "augmentation.crop_size",
    "augmentation.flip": "augmentation.horizontal_flip",
    "eps_ramp": "eps_schedule",
    "eps_ramp.share": "eps_schedule.rampup_fraction",
    "eps_ramp.warmup_share": "eps_schedule.warmup_fraction",
    "evaluation.attack.kinds": "evaluation.attack.methods",
    "evaluation.attack.step_size": "evaluation.attack.rel_step_size",
    "evaluation.attack.targets": "evaluation.attack.target_classes",
    "evaluation.mean_images": "evaluation.calibration_images",
    "model.dense_width": "model.hidden_size",
    "model.group": "model.group_size",
    "model.hidden": "model.hidden_size",
    "model.interval_initialization": "model.ibp_initialization",
    "model.net": "model.backbone",
    "model.net.dense_width": "model.backbone.hidden_size",
    "model.widen": "model.widen_factor",
    "objective.crown_share_end": "objective.crown_weight_end",
    "objective.crown_share_start": "objective.crown_weight_start",
    "objective.penalty": "objective.warmup_reg_weight",
    "objective.step_size": "objective.rel_step_size",
    "optimizer.epsilon": "optimizer.adam_epsilon",
    "optimizer.hold_share": "optimizer.constant_lr_fraction",
    "optimizer.largest_gradient": "optimizer.max_grad_norm",
    "optimizer.objective_rate_ratio": "optimizer.objective_lr_scale",
    "p_schedule.cheap_exponents": "p_schedule.fast_exponents",
    "p_schedule.infinity_share": "p_schedule.inf_fraction",
    "p_schedule.warmup_share": "p_schedule.warmup_fraction",
    "training.checkpoint_epochs": "training.checkpoint_interval",
}

VALUES = {  # by current name of the setting
    "evaluation.certifier": {"interval": "ibp"},
    "objective.bound": {"interval": "ibp"},
}

CONFIG_HASH = "linflab.experiment"  # old tag; its hash covers the old names of settings

TAGS = {
    "linflab.asked": "linflab.ask_time_ms",
    "linflab.attack": "linflab.attacks",
    CONFIG_HASH: "linflab.config_hash",
    "linflab.failure": "linflab.failure_reason",
    "linflab.host": "linflab.hostname",
    "linflab.imported": "linflab.original_run_id",
    "linflab.job": "linflab.trial_spec",
    "linflab.launch": "linflab.invocation_id",
    "linflab.searched": "linflab.searched_settings",
    "linflab.selection": "linflab.model_selection",
    "linflab.starts": "linflab.start_epochs",
    "linflab.told": "linflab.tell_time_ms",
}

TAG_VALUES = {"linflab.certifier": {"interval": "ibp", "interval-sound": "ibp-sound"}}

METRICS = {
    "test/certified_accuracy_in_exact_arithmetic": "test/certified_accuracy_real_arithmetic",
    "test/certified_but_broken": "test/certificate_violations",
}

FIELDS = {  # by kind of object
    "accuracies": {"certified_exact": "certified_real", "certified_but_broken": "certificate_violations"},
    "exported run": {"started": "start_time", "ended": "end_time", "parameters": "params"},
    "search": {"race": "halving"},
    "space": {"try_first": "initial_points"},
    "table": {"by": "group_by", "where": "filters", "seeds": "min_seeds", "records": "runs_file"},
    "trial spec": {"point": "params", "round": "rung", "repeat": "seed_index"},
}


@cache
def current_setting(path: str) -> str:
    """Return the current name of a setting or section by its dotted path."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        if (new := SETTINGS.get(".".join(parts[:count]))) is not None:
            return ".".join([new, *parts[count:]])
    return path


def current_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted path under their current names, with their current values."""
    current = {}
    for path, value in settings.items():
        name = current_setting(path)
        new_values = VALUES.get(name, {})
        current[name] = new_values.get(value, value) if isinstance(value, str) else value
    return current


def current_tree(tree: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Return nested settings, as in a recipe, under their current names, with their current values.

    Args:
        tree: Settings and sections by name.
        section: Dotted path of the enclosing section in old names, with a final dot.
    """
    current_names: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{section}{key}"
        if isinstance(value, Mapping):
            current_names[current_setting(path).rpartition(".")[2]] = current_tree(value, f"{path}.")
        else:
            ((name, current),) = current_settings({path: value}).items()
            current_names[name.rpartition(".")[2]] = current
    return current_names


def current_override(text: str) -> str:
    """Return an override `key.path=value` under the current name of its setting."""
    path, equals, value = text.partition("=")
    if not equals:
        return text
    name = current_setting(path)
    try:
        old_value = yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError):  # invalid values are rejected elsewhere
        return f"{name}={value}"
    if isinstance(old_value, Mapping):
        current: Any = current_tree(old_value, f"{path}.")
    else:
        ((_, current),) = current_settings({path: old_value}).items()
    if current == old_value:
        return f"{name}={value}"
    new_text = yaml.safe_dump(current, default_flow_style=True, width=math.inf).strip()
    return f"{name}={new_text.removesuffix('...').strip()}"


def current_tag(name: str) -> str:
    """Return the current name of a tag."""
    return TAGS.get(name, name)


def current_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tags of a run under current names; settings in their values also get current names."""
    current = {}
    for key, text in tags.items():
        name = current_tag(key)
        if not isinstance(text, str):  # tags of damaged files are rejected elsewhere
            current[name] = text
            continue
        if key == "linflab.searched":
            text = ",".join(map(current_setting, text.split(",")))
        elif key == "linflab.job":
            text = _current_trial_spec(text)
        elif key == "linflab.command":
            text = _current_command(text)
        if name == key or name not in tags:  # a run resumed by this version has both tags
            current[name] = TAG_VALUES.get(name, {}).get(text, text)
    return current


def current_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of a run under their current names."""
    return {METRICS.get(name, name): value for name, value in metrics.items()}


def current_space(space: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored search space under the current names of its fields and settings.

    Args:
        space: A `linflab.search_spaces.space.SearchSpace` as plain data.
    """
    fields = current_fields("space", space)
    parameters = {}
    for path, distribution in fields["parameters"].items():
        name = current_setting(path)
        new_values = VALUES.get(name, {})
        current: dict[str, Any] = {
            key: current_setting(end) if isinstance(end, str) else end for key, end in distribution.items()
        }
        if "choices" in current:
            choices = current["choices"]
            current["choices"] = [new_values.get(one, one) if isinstance(one, str) else one for one in choices]
        parameters[name] = {**current, "when": current_settings(current.get("when", {}))}
    points = [current_settings(point) for point in fields.get("initial_points", ())]
    return {**fields, "parameters": parameters, "initial_points": points}


def current_fields(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a stored object under their current names.

    Args:
        kind: A key of `FIELDS`.
        fields: Values by name.
    """
    return {FIELDS[kind].get(name, name): value for name, value in fields.items()}


def _current_command(text: str) -> str:
    try:
        arguments = shlex.split(text)
    except ValueError:  # not written by linflab
        return text
    current = [
        current_override(argument) if re.match(r"[a-z][\w.]*=", argument) else argument for argument in arguments
    ]
    return text if current == arguments else shlex.join(current)


def _current_trial_spec(text: str) -> str:
    try:
        spec = current_fields("trial spec", json.loads(text))
        return json.dumps({**spec, "params": current_settings(spec["params"])})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # another tool uses the same tag
        return text
