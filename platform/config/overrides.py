"""Configs from recipes and dotted overrides, merged and validated.

A recipe is a YAML file in `recipes/`, given by its stem, or any other YAML file, given by its path. Overrides such as
`model.width=128` replace single settings. The error message for an
invalid setting is one line that names the setting.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from linflab.models.numbers import read_fraction
from linflab.models.registry import KindConfig, OtherKinds
from linflab.models.robustness.attacks.suite import DISTANCE_NET_ATTACKS, OTHER_NET_ATTACKS
from linflab.models.robustness.objectives import ObjectiveConfig
from linflab.platform.config.compatibility import check_compatibility
from linflab.platform.config.experiment import ExperimentConfig, flatten
from linflab.platform.config.own_parts import UnknownObjectiveConfig, import_own_parts
from linflab.platform.config.recipes import recipe_files
from linflab.platform.errors import InputError
from linflab.platform.source import IMPORT_VAR
from linflab.reports.methods import KINDS, kind_values, method_name
from linflab.reports.plain import shorten
from linflab.reports.renames import current_settings
from linflab.search_spaces import strict_yaml

MAX_PATH_LENGTH = 400  # characters of a path in a message


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return list(recipe_files())


def load_config(recipe: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Return the validated config of a recipe with overrides.

    An override of a section's `kind` keeps the settings of the recipe that the new kind also has, and drops all others.

    Args:
        recipe: Name of a shipped recipe, or the path of a YAML file.
        overrides: Settings to replace, as `key.path=value`.

    Raises:
        InputError: If the recipe does not exist, or a setting is unknown, missing or invalid.
    """
    return build_config(read_recipe(recipe), dict(map(parse_override, overrides)))


def radius_note(recipe: str, overrides: Sequence[str], searched_settings: Collection[str] = ()) -> str | None:
    """Return a warning if eps and the target radius of training are inconsistent, else None.

    Settings are never adjusted automatically, so that the logged config is the one that the user has set.

    Args:
        recipe: Name of a shipped recipe, or the path of a YAML file.
        overrides: Settings to replace, as `key.path=value`.
        searched_settings: Settings that a search varies.

    Raises:
        InputError: If the recipe does not exist, or a setting is unknown, missing or invalid.
    """
    tree, changes = read_recipe(recipe), dict(map(parse_override, overrides))
    experiment = build_config(tree, changes)
    name = next((name for name in ("theta", "eps_train") if hasattr(experiment.objective, name)), None)
    if name is None or f"objective.{name}" in searched_settings:
        return None
    setting, radius, eps = f"objective.{name}", getattr(experiment.objective, name), experiment.eps
    if "eps" in changes and not {setting, "objective"} & changes.keys():
        previous_eps = build_config(tree, {key: value for key, value in changes.items() if key != "eps"}).eps
        if previous_eps not in (0, eps) and eps > 0:
            return (
                f"eps={eps:.6g} replaces {previous_eps:.6g}, but the target radius of training, "
                f"{setting}={radius:.6g}, is unchanged; add {setting}={min(1.0, radius * eps / previous_eps):.6g} to "
                "scale it too"
            )
    if radius < eps:
        return f"{setting}={radius:.6g}, the target radius of training, is below the evaluation radius eps={eps:.6g}"
    return None


def read_recipe(recipe: str) -> dict[str, Any]:
    """Return the settings in a recipe, without validation.

    Raises:
        InputError: If the recipe does not exist or is not a YAML mapping.
    """
    short_name = shorten(recipe, MAX_PATH_LENGTH)
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else recipe_files().get(recipe)
    if path is None:
        raise InputError(
            f"recipe={short_name}: not found{_suggest(recipe, recipe_names())}; run `linflab recipes` for all names, "
            "or use the path of a YAML file"
        )
    try:
        return strict_yaml.read_mapping(path)
    except FileNotFoundError:
        raise InputError(
            f"recipe={short_name}: file not found; use an existing file, or a name from `linflab recipes`"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"recipe={short_name}: must be a YAML mapping of settings: {error}") from None


def parse_override(text: str) -> tuple[str, Any]:
    """Return key and value of an override, such as ("model.width", 128) for `model.width=128`.

    The value is parsed as YAML or as a fraction such as 8/255.

    Raises:
        InputError: If the key or `=` is missing.
    """
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise InputError(f"override={shorten(text)}: must be key=value; use model.width=128, for example")
    try:
        return path, read_fraction(strict_yaml.parse(value))
    except ValueError:
        return path, value


def build_config(
    tree: Mapping[str, Any], overrides: Mapping[str, Any], for_evaluation: bool = False
) -> ExperimentConfig:
    """Return the validated config of nested settings with overrides.

    Args:
        tree: Nested settings, as in a recipe.
        overrides: Values that replace settings, by dotted path.
        for_evaluation: Accept an objective of an unknown kind, whose settings are kept as they are.

    Raises:
        InputError: If a setting is unknown, missing or invalid, or settings are incompatible.
    """
    import_own_parts()
    if not isinstance(tree, Mapping):
        raise InputError(f"settings={shorten(tree)}: must be a mapping of names to values")
    _reject_earlier_names({**tree, **overrides})
    settings_tree = _copy(tree)
    original_kinds = _kinds(settings_tree)
    # Apply overrides of kinds first, outer sections before inner ones, since a kind determines which settings exist.
    for path, value in sorted(overrides.items(), key=lambda item: (not item[0].endswith(".kind"), item[0].count("."))):
        *sections, name = path.split(".")
        node = settings_tree
        for depth, section in enumerate(sections):
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                parent = ".".join(sections[: depth + 1])
                raise InputError(
                    f"{shorten(path)}={shorten(value)}: {shorten(parent)} is a setting, not a section; use "
                    f"{shorten(parent)}=VALUE"
                )
        previous_value = node.get(name)
        node[name] = value
        if name == "kind" and previous_value not in (None, value):
            _drop_unknown_settings(node, sections, settings_tree)
    try:
        unknown_objective = _take_unknown_objective(settings_tree) if for_evaluation else None
        experiment = _with_default_attacks(ExperimentConfig.model_validate(settings_tree))
    except ValidationError as error:
        raise InputError(_format_validation_error(error, settings_tree)) from None
    if unknown_objective is not None:
        experiment = experiment.model_copy(update={"objective": unknown_objective})
    settings = experiment.to_flat_dict()
    # The method name in a recipe describes the recipe's kinds, not kinds set by overrides.
    if not experiment.method or (
        "method" not in overrides and original_kinds is not None and original_kinds != _kinds(settings)
    ):
        experiment = experiment.model_copy(update={"method": method_name(settings)})
    for path, value in flatten(settings_tree):
        if isinstance(value, bool) and not isinstance(settings.get(path), bool):  # pydantic accepts true as 1
            raise InputError(f"{path}={str(value).lower()}: must be a number or a name, not true or false")
    check_compatibility(experiment)
    return experiment


def _take_unknown_objective(tree: dict[str, Any]) -> UnknownObjectiveConfig | None:
    """Replace an objective of unknown kind in a tree of settings, and return it; None if there is none."""
    section = tree.get("objective")
    kind = section.get("kind") if isinstance(section, Mapping) else None
    if not isinstance(kind, str) or kind in ObjectiveConfig.kinds():
        return None
    tree["objective"] = {"kind": "cross_entropy"}
    return UnknownObjectiveConfig.model_validate(section)


def _reject_earlier_names(settings: Mapping[str, Any]) -> None:
    """Raise InputError with the new name if a setting has a name or value of an earlier version.

    `settings` are nested sections, as in a recipe, or settings by dotted path.
    """
    for path, value in flatten(settings):
        ((name, current),) = current_settings({path: value}).items()
        if name != path:
            raise InputError(f"{shorten(path)}={shorten(value)}: was renamed; use {name}={shorten(current)}")
        if current != value and isinstance(current, str):
            raise InputError(f"{path}={shorten(value)}: was renamed; use {path}={current}")


def _with_default_attacks(experiment: ExperimentConfig) -> ExperimentConfig:
    """Return the config with default attacks named if none are set, so that the run logs their names."""
    evaluation = experiment.evaluation
    if evaluation.attack.methods is not None:
        return experiment
    kinds = DISTANCE_NET_ATTACKS if any(part.has_distances for part in experiment.model.parts) else OTHER_NET_ATTACKS
    attack = evaluation.attack.model_copy(update={"methods": kinds})
    return experiment.model_copy(update={"evaluation": evaluation.model_copy(update={"attack": attack})})


def _kinds(tree: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the kinds of network, objective and bound, including defaults.

    `tree` has nested sections, as in a recipe, or settings by dotted path. The result is None if `tree` lacks the kind
    of the network or objective.
    """
    settings = dict(flatten(tree))
    kinds = {path: settings.get(path) for path in KINDS}
    if not isinstance(kinds["model.kind"], str) or not isinstance(kinds["objective.kind"], str):
        return None
    for path in [path for path in KINDS if kinds[path] is None]:
        outer, name, *inner = path.split(".")
        default: Any = _section([outer], {outer: {"kind": kinds[f"{outer}.kind"]}}).model_fields.get(name)
        for part in ["default", *inner]:
            default = getattr(default, part, None)
        kinds[path] = default
    return kind_values(kinds)


def _drop_unknown_settings(node: dict[str, Any], path: Sequence[str], tree: Mapping[str, Any]) -> None:
    """Delete the settings of a section that its new kind does not have."""
    try:
        fields = _section(path, tree).model_fields
    except (KeyError, AttributeError, IndexError):  # validation rejects the section later
        fields = {}
    for key in [key for key in node if key not in fields and key != "kind"]:
        del node[key]


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _format_validation_error(error: ValidationError, tree: Mapping[str, Any]) -> str:
    """Return the first error, or preferably one about an unknown setting, as one line with path and value."""
    errors = error.errors()
    details = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    path: list[str] = []
    node: Any = tree
    for part in details["loc"]:
        # Pydantic's location includes the kind that selects a section's class; the kind is not part of the path.
        if isinstance(node, Mapping) and part not in node and part is not details["loc"][-1]:
            continue
        if isinstance(node, list) and isinstance(part, int) and part >= len(node):
            count = sum(one["type"] == "missing" and one["loc"][:-1] == details["loc"][:-1] for one in errors)
            setting = f"{shorten('.'.join(path))}={shorten(node)}"
            return f"{setting}: too few values; use {len(node) + count}"
        path.append(str(part))
        if isinstance(node, list) and isinstance(part, int):
            node = node[part]
        else:
            node = node.get(part) if isinstance(node, Mapping) else None
    name = shorten(".".join(path))
    if details["type"] == "extra_forbidden":
        fields = list(_section(path[:-1], tree).model_fields)
        return f"{name}={shorten(node)}: unknown setting{_suggest(path[-1], fields)}; use one of {', '.join(fields)}"
    if details["type"] == "missing":
        return f"{name}: missing; set it, since it has no default"
    if details["type"] == "too_long":
        return f"{name}={shorten(node)}: too many values; use at most {details['ctx']['max_length']}"
    if details["type"] == "value_error":  # from our validators, which name the settings
        return f"{name}: {details['ctx']['error']}"
    if details["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kind = details["input"].get("kind") if isinstance(details["input"], Mapping) else details["input"]
        *outer, setting = path[:-1] if path[-1].isdigit() else path  # sections in a list accept the same kinds
        kinds = [model.model_fields["kind"].default for model in _models(_section(outer, tree), setting)]
        problem = "missing" if kind is None else "unknown"
        advice = f"use one of {', '.join(kinds)}" + (
            "" if kind is None else f", or set {IMPORT_VAR} to the module that defines it"
        )
        return f"{name}.kind={shorten(kind)}: {problem}; {advice}".replace("=None", "")
    message = details["msg"].replace("Input should be", "must be")
    message = message[0].lower() + message[1:]
    if path[-1] in ("eps", "eps_train") and details["type"] == "less_than_equal":
        value = details["input"]
        fraction = f"{value:g}/255" if isinstance(value, int | float) and value <= 255 else "a fraction such as 8/255"
        message += f", for pixel values in [0, 1]; use {fraction}"
    return f"{name}={shorten(details['input'])}: {message}"


def _section(path: Sequence[str], tree: Mapping[str, Any]) -> type[BaseModel]:
    """Return the config class of the section at a path, as determined by the kinds in the tree."""
    section: type[BaseModel] = ExperimentConfig
    node: Any = tree
    models: list[type[BaseModel]] = []
    for part in path:
        if isinstance(node, list):
            node = node[int(part)]
        else:
            node, models = node[part], _models(section, part)
        if isinstance(node, list):  # the next part is a position
            continue
        kind = node.get("kind")
        section = next(
            (m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == kind), models[0]
        )
    return section


def _models(section: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """Return the config classes that a section accepts, one for each kind."""
    annotation = section.model_fields[name].annotation
    if isinstance(annotation, type) and issubclass(annotation, KindConfig):
        return list(annotation.kinds().values())
    for element in get_args(annotation):
        for metadata in getattr(element, "__metadata__", ()):
            if isinstance(metadata, OtherKinds):  # a list of sections
                return list(metadata.classes())
    options = [annotation, *getattr(annotation, "__args__", ())]
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def _suggest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
