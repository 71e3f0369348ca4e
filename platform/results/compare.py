"""Plan of a comparison: the runs of several recipes over several seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import load_config, parse_override
from linflab.platform.errors import InputError
from linflab.reports.labels import is_compared
from linflab.reports.plain import shorten
from linflab.reports.tables import format_eps

SHARED_SETTINGS = ("dataset", "eps", "training.include_validation")  # without these, results are not comparable


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        recipe: Recipe as typed.
        overrides: Overrides of the run, including its seed.
        experiment: All settings.
    """

    recipe: str
    overrides: tuple[str, ...]
    experiment: ExperimentConfig


def plan_runs(recipes: Sequence[str], overrides: Sequence[str], seeds: int) -> list[list[PlannedRun]]:
    """Return the runs of each recipe, one for each seed, beginning with the seed of its config.

    Args:
        recipes: Recipe names or paths of YAML files.
        overrides: Overrides for all recipes.
        seeds: Number of seeds.

    Raises:
        InputError: If a recipe or override is not valid, recipes have different datasets or eps, or two recipes differ
            in nothing that affects results but the seed.
    """
    rows: list[list[PlannedRun]] = []
    names_by_settings: dict[str, str] = {}
    for recipe in recipes:
        if "=" in recipe and not Path(recipe).exists():
            raise InputError(f"{shorten(recipe)}: must be a recipe; use --set {shorten(recipe)} to override a setting")
        try:
            base = load_config(recipe, overrides)
        except InputError as error:
            reason = str(error)
            raise InputError(reason if reason.startswith("recipe=") else f"recipe={recipe}: {reason}") from None
        # Some objectives use the means of each worker's part of the batch.
        settings = {
            path: value
            for path, value in base.to_flat_dict().items()
            if path != "seed" and (is_compared(path) or path == "compute.workers")
        }
        other = names_by_settings.setdefault(repr(sorted(settings.items())), recipe)
        if len(names_by_settings) == len(rows):
            raise InputError(
                f"recipe={recipe}: must differ from {other} in a setting that affects results, other than the seed; "
                "leave one of them out"
            )
        kept = [override for override in overrides if parse_override(override)[0] != "seed"]
        runs = []
        for index in range(seeds):
            seed = (base.seed + index) % 2**63
            runs.append(PlannedRun(recipe, (*kept, f"seed={seed}"), base.model_copy(update={"seed": seed})))
        rows.append(runs)
    _check_comparable([runs[0] for runs in rows])
    return rows


def _check_comparable(runs: Sequence[PlannedRun]) -> None:
    first = runs[0]
    expected = first.experiment.to_flat_dict()
    for run in runs[1:]:
        settings = run.experiment.to_flat_dict()
        for name in SHARED_SETTINGS:
            if settings[name] != expected[name]:
                value, other = (format_eps(one[name]) if name == "eps" else one[name] for one in (settings, expected))
                raise InputError(
                    f"{name}={value}: must be the same in all recipes, but {run.recipe} differs from {first.recipe} "
                    f"({other}); use recipes of one dataset and eps"
                )


def comparison_name(recipes: Sequence[str], overrides: Sequence[str]) -> str:
    """Return a name for the files of a comparison: its recipes, without repeated beginnings, and overrides."""
    stems = [Path(recipe).stem if "/" in recipe else recipe for recipe in recipes]
    words = [stem.split("_") for stem in stems]
    columns = zip(*(one[:-1] for one in words), strict=False)
    num_shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    names = [stems[0], *("_".join(one[num_shared:]) for one in words[1:])]
    return "_".join(["_vs_".join(names), *(override.replace("=", "-") for override in overrides)])
