"""Sweep plans: the validated settings of a sweep, saved so that the sweep can be resumed."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ValidationError

from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import build_config, parse_override, read_recipe
from linflab.platform.data.datasets import Dataset
from linflab.platform.errors import InputError
from linflab.platform.sweeps.search import Search, SearchConfig, TrialSpec
from linflab.platform.tracking.mlflow import client_of
from linflab.platform.tracking.storage import SWEEP_NAME, Storage
from linflab.platform.training.trainer import check_dataset_compatibility
from linflab.platform.trial import train_command
from linflab.reports.outputs import write_whole
from linflab.reports.plain import shorten
from linflab.reports.records import sweep_names
from linflab.reports.renames import current_fields, current_override, current_space, current_tree
from linflab.search_spaces.space import SearchSpace, Value, load_space
from linflab.search_spaces.strict_yaml import read_mapping

UNSEARCHABLE_SETTINGS = (
    "dataset",
    "eps",
    "evaluation",
    "compute",
    "training.include_validation",
)


@dataclass(frozen=True)
class SweepPlan:
    """The validated settings of a sweep.

    Attributes:
        name: Name, unique in the storage.
        recipe: Recipe as typed.
        overrides: Overrides as typed, applied to every trial.
        raw_config: Settings of the recipe.
        base: Config built from the recipe and the overrides.
        space: Search space.
        search: Search options.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    raw_config: Mapping[str, Any]
    base: ExperimentConfig
    space: SearchSpace
    search: SearchConfig

    def experiment(self, spec: TrialSpec) -> ExperimentConfig:
        """Return the config of a trial.

        Raises:
            InputError: If the trial's settings are not valid together.
        """
        overrides, trial_settings = self._settings(spec)
        return build_config(self.raw_config, {**dict(map(parse_override, overrides)), **trial_settings})

    def command(self, spec: TrialSpec) -> str:
        """Return the command that reproduces a trial."""
        overrides, trial_settings = self._settings(spec)
        return train_command(
            self.recipe,
            [*overrides, *(f"{path}={_format_override_value(value)}" for path, value in trial_settings.items())],
        )

    def with_budget(self, budget: str | None, seeds: int | None) -> Self:
        """Return the plan with a new budget or number of seeds; None keeps the current value.

        Raises:
            InputError: If the new value is not valid.
        """
        search = self.search.model_dump()
        if budget is not None and self.search.halving > 1:
            raise InputError(
                f"budget={budget}: is not supported for a sweep with halving={self.search.halving}, whose number of "
                "trials is fixed; start another sweep"
            )
        if seeds is not None:
            search["seeds"] = seeds
        if budget is None:
            budget = f"{search['hours']}h" if search["hours"] is not None else str(search["trials"])
        rest = {name: value for name, value in search.items() if name not in ("trials", "hours")}
        return dataclasses.replace(self, search=parse_search_options(budget, **rest))

    def _settings(self, spec: TrialSpec) -> tuple[list[str], dict[str, Any]]:
        """Return the overrides that the trial does not replace, and the trial's own settings."""
        trial_settings: dict[str, Any] = dict(spec.params)
        if spec.rung < self.search.num_rungs:
            epochs = trial_settings.get("training.epochs", self.base.training.epochs)
            trial_settings["training.epochs"] = self.search.epochs_at_rung(spec.rung, epochs)
        if spec.seed_index:
            trial_settings["seed"] = (trial_settings.get("seed", self.base.seed) + spec.seed_index) % 2**63
        return [
            override for override in self.overrides if parse_override(override)[0] not in trial_settings
        ], trial_settings

    def save(self, storage: Storage) -> None:
        """Write the plan to the storage, so that later edits of recipe or space do not affect the sweep."""
        path = plan_file(storage, self.name)
        content = {
            "recipe": self.recipe,
            "overrides": list(self.overrides),
            "settings": self.raw_config,
            "space": self.space.model_dump(mode="json"),
            "search": self.search.model_dump(mode="json"),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(content, sort_keys=False)
        write_whole(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, storage: Storage, name: str) -> Self:
        """Read the plan of a sweep that was started in this storage.

        Raises:
            InputError: If no sweep has this name, or its plan is not readable.
        """
        path = plan_file(storage, name)
        if not re.fullmatch(SWEEP_NAME, name) or not path.is_file():
            names = [path.parent.name for path in sorted(storage.sweeps.glob("*/sweep.yaml"))]
            raise InputError(
                f"resume={name}: not found among the sweeps started in {storage.root} (imported ones cannot be "
                f"resumed); available sweeps: {', '.join(names) or 'none'}"
            )
        try:
            content = read_mapping(path, limited=False)
            raw_config = current_tree(content["settings"])
            overrides = tuple(current_override(str(override)) for override in content["overrides"])
            space = SearchSpace.model_validate(current_space(content["space"]))
            search = SearchConfig.model_validate(current_fields("search", content["search"]))
        except (OSError, TypeError, KeyError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"resume={name}: {path} cannot be read ({reason}); restore the file") from None
        base = build_config(raw_config, dict(map(parse_override, overrides)))
        return cls(name, str(content.get("recipe")), overrides, raw_config, base, space, search)


def _format_override_value(value: Value) -> str:
    """Return a value in the syntax of overrides."""
    return json.dumps(value) if value is None or isinstance(value, list) else str(value)


def plan_file(storage: Storage, name: str) -> Path:
    """Return the path of a sweep's saved plan."""
    return storage.sweeps / name / "sweep.yaml"


def parse_search_options(budget: str, **settings: Any) -> SearchConfig:
    """Return search options from typed values.

    Args:
        budget: Number of trials, such as 20, or hours, such as 1.5h.
        **settings: Other fields of `SearchConfig`.

    Raises:
        InputError: If a value is not valid.
    """
    hours = budget.endswith("h")
    try:
        limits = {"trials": None, "hours": float(budget[:-1])} if hours else {"trials": int(budget), "hours": None}
        return SearchConfig(**{**limits, **settings})
    except ValidationError as error:
        details = error.errors()[0]
        if details["type"] == "value_error":
            raise InputError(str(details["ctx"]["error"])) from None
        name = str(details["loc"][0]).replace("_", "-")
        message = details["msg"][0].lower() + details["msg"][1:]
        if name in limits:
            name, details["input"] = "budget", budget
        raise InputError(f"{name}={shorten(details['input'])}: {message}") from None
    except ValueError:
        raise InputError(f"budget={budget}: must be a number of trials or hours; use 20 or 1.5h, for example") from None


def plan_sweep(
    recipe: str,
    overrides: Sequence[str],
    space_name: str,
    name: str,
    search: SearchConfig,
    dataset: Dataset | None,
) -> SweepPlan:
    """Validate the settings of a sweep before it starts.

    Args:
        recipe: Recipe name, or path of a YAML file.
        overrides: Overrides as `key.path=value`, applied to every trial.
        space_name: Search space name, or path of a YAML file.
        name: Name of the sweep.
        search: Search options.
        dataset: Dataset of the recipe. None if only a cluster has the dataset; the cluster then checks that config and
            dataset are compatible.

    Raises:
        InputError: If recipe, overrides, space, name or search options are not valid.
    """
    if not re.fullmatch(SWEEP_NAME, name):
        raise InputError(
            f"name={name}: must be letters, digits, dots, dashes and underscores; use p-schedule_1, for example"
        )
    tree = read_recipe(recipe)
    base = build_config(tree, dict(map(parse_override, overrides)))
    try:
        space = load_space(space_name)
    except ValueError as error:
        raise InputError(str(error)) from None
    if base.training.include_validation:
        raise InputError(
            "training.include_validation=true: is not supported in a sweep, which ranks trials on the validation "
            "split; use false"
        )
    plan = SweepPlan(name, recipe, tuple(overrides), tree, base, space, search)
    if dataset is not None:
        check_dataset_compatibility(base, dataset)
    if base.training.epochs < search.halving:
        raise InputError(
            f"halving={search.halving}: requires training.epochs of at least {search.halving}, but it is "
            f"{base.training.epochs}; use more epochs or a smaller --halving"
        )
    for path in space.parameters:
        if any(path == fixed or path.startswith(f"{fixed}.") for fixed in UNSEARCHABLE_SETTINGS):
            raise InputError(
                f"space={space_name}: {path} is not supported, since all trials of a table share "
                f"{', '.join(UNSEARCHABLE_SETTINGS)}; remove it from the space"
            )
    for path, _ in map(parse_override, overrides):
        if path in space.parameters:
            raise InputError(f"{path}: must not be overridden, since the space {space_name} varies it; leave it out")
    Search(space, search, base.seed)  # rejects infinite grids
    # Only the lowest and highest values and each choice are checked here. If another combination of values is invalid,
    # its trial fails and the sweep continues.
    for point in space.corner_points():
        try:
            experiment = plan.experiment(TrialSpec(1, point))
            if dataset is not None:
                check_dataset_compatibility(experiment, dataset)
        except InputError as error:
            raise InputError(f"space={space_name}: {error}") from None
    return plan


def check_name_available(plan: SweepPlan, storage: Storage) -> None:
    """Check that no sweep of this name exists in the storage.

    Raises:
        InputError: If a sweep of this name exists.
    """
    if plan_file(storage, plan.name).exists() or plan.name in sweep_names(client_of(storage)):
        raise InputError(
            f"name={plan.name}: already used by a sweep in {storage.root}; use another name, or resume that sweep with "
            f"`linflab sweep --resume {plan.name}`"
        )
