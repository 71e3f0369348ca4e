"""Ray Tune and Optuna around the training loop: a search over settings, every trial recorded."""

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna
import ray
from mlflow.tracking import MlflowClient
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console

from linflab.platform.config import Experiment, build_experiment, parse_override, read_recipe
from linflab.platform.datasets import load_dataset
from linflab.platform.errors import SettingError
from linflab.platform.progress import SweepView
from linflab.platform.storage import Storage
from linflab.platform.tracking import Run, end_open_runs
from linflab.platform.training import check_fits
from linflab.platform.trial import run_trial, train_command
from linflab.platform.workers import start_ray, summary, train_on_workers, worker_resources
from linflab.reports import schema
from linflab.reports.records import sweep_names
from linflab.search_spaces.space import SearchSpace, load_space

METRIC = schema.BEST_VALIDATION_CERTIFIED
FIXED = ("dataset", "eps", "evaluation", "compute", "training.include_validation")  # what a sweep can't vary


@dataclass(frozen=True)
class SweepPlan:
    """A sweep, checked, before anything starts.

    Attributes:
        name: the sweep's, unique in its storage.
        recipe, overrides: as they were typed; every trial begins with them.
        tree: the settings of the recipe.
        base: the experiment of recipe and overrides.
        space: what varies.
        trials: how many points of the space are tried.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    tree: Mapping[str, Any]
    base: Experiment
    space: SearchSpace
    trials: int

    def experiment(self, point: Mapping[str, Any]) -> Experiment:
        """The experiment at a point of the space: settings by dotted path."""
        return build_experiment(self.tree, {**dict(map(parse_override, self._kept(point))), **point})

    def command(self, point: Mapping[str, Any]) -> str:
        """What repeats the trial at a point."""
        return train_command(self.recipe, [*self._kept(point), *(f"{path}={value}" for path, value in point.items())])

    def _kept(self, point: Mapping[str, Any]) -> list[str]:
        """The overrides but for those that the point replaces; the point's come after them."""
        return [override for override in self.overrides if parse_override(override)[0] not in point]


def plan_sweep(
    recipe: str, overrides: Sequence[str], space_name: str, name: str, trials: int, storage: Storage
) -> SweepPlan:
    """Check all that can be known to be wrong before the sweep starts.

    Raises:
        SettingError: recipe, override, space, name or number of trials won't do, or the data set is missing.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise SettingError(f"name={name}: must be letters, digits, dots, dashes and underscores, as in p-schedule_1")
    if trials < 1:
        raise SettingError(f"trials={trials}: must be at least 1")
    tree = read_recipe(recipe)
    base = build_experiment(tree, dict(map(parse_override, overrides)))
    try:
        space = load_space(space_name)
    except ValueError as error:
        raise SettingError(str(error)) from None
    if base.training.include_validation:
        raise SettingError("training.include_validation=true: a sweep chooses its best by validation images")
    plan = SweepPlan(name, recipe, tuple(overrides), tree, base, space, trials)
    dataset = load_dataset(base.dataset, base.augmentation)
    check_fits(base, dataset)
    for path in space.parameters:
        if any(path == fixed or path.startswith(f"{fixed}.") for fixed in FIXED):
            raise SettingError(
                f"space={space_name}: {path} can't be searched, since all trials of a table share {', '.join(FIXED)}"
            )
    # a trial may still meet a combination that is refused: it fails, and the sweep goes on
    for point in space.probes():
        try:
            check_fits(plan.experiment(point), dataset)
        except SettingError as error:
            raise SettingError(f"space={space_name}: {error}") from None
    if (storage.ray / name).exists() or name in sweep_names(MlflowClient(storage.tracking_uri)):
        raise SettingError(f"name={name}: this sweep is already in {storage.root}; choose another name")
    return plan


def run_sweep(plan: SweepPlan, storage: Storage, console: Console) -> int:
    """Search; records every trial under one parent run. Returns the number of trials that have a result.

    Raises:
        SettingError: the cluster is too small for a trial.
        KeyboardInterrupt: the user ended the sweep; what had ended by then is recorded.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # MLflow records; no second log of every epoch
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the older output can be silent, as `verbose=0` asks
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start_ray()
    resources = worker_resources(plan.base)
    launch = uuid.uuid4().hex
    tags = {
        schema.KIND: "sweep",
        schema.SWEEP: plan.name,
        schema.LAUNCH: launch,
        schema.RECIPE: plan.recipe,
        schema.SEARCHED: ",".join(plan.space.parameters),
        schema.TRIALS: str(plan.trials),
        "mlflow.note.content": f"{plan.trials} trials over: {plan.space.description}",
    }
    with Run.start(storage, plan.base, plan.name, tags) as parent:
        view = SweepView(console, list(plan.space.parameters), plan.trials)
        common = {"mlflow.parentRunId": parent.id, schema.LAUNCH: launch}
        try:
            with view:
                results = list(_tuner(plan, storage, common, resources, view).fit())
        finally:
            end_open_runs(storage, launch, but=parent.id)
        scored = [result for result in results if not result.error and schema.TEST_CERTIFIED in (result.metrics or {})]
        if len(scored) + sum(result.error is not None for result in results) < plan.trials:
            raise KeyboardInterrupt  # which Tune had taken, to stop
        if scored:
            best = max(scored, key=_place).metrics
            parent.log_metrics({name: best[name] for name in (METRIC, schema.TEST_CERTIFIED)})
    return len(scored)


def _place(result: tune.Result) -> tuple[float, float, int]:
    """Orders trials as the table does."""
    return result.metrics[METRIC], result.metrics[schema.BEST_VALIDATION_CLEAN], -result.config["trial"]


def _tuner(
    plan: SweepPlan, storage: Storage, tags: Mapping[str, str], resources: Mapping[str, float], view: SweepView
) -> tune.Tuner:
    workers = plan.base.compute.workers
    several = workers > 1  # their workers take the resources; the trial itself only waits for them
    there = ray.cluster_resources()
    at_once = int(min(there[name] // (workers * needed) for name, needed in resources.items()))
    trainable = tune.with_resources(
        partial(_trial, plan=plan, storage=storage, common=dict(tags)),
        # whole CPUs would leave too few for the workers; one byte of memory is the least that Tune accepts
        {"memory": 1} if several else dict(resources),
    )
    search = OptunaSearch(
        partial(_suggest, plan.space),
        metric=METRIC,
        mode="max",
        points_to_evaluate=list(plan.space.try_first),
        seed=plan.base.seed % 2**32,
    )
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=search, num_samples=plan.trials, max_concurrent_trials=at_once, reuse_actors=not several
        ),
        run_config=tune.RunConfig(name=plan.name, storage_path=str(storage.ray), verbose=0, callbacks=[view]),
    )


def _suggest(space: SearchSpace, trial: Any) -> dict[str, Any]:
    """A point of the space as Tune's configuration of a trial, with the trial's number."""
    return {**space.suggest(trial), "trial": trial.number + 1}


def _trial(config: dict[str, Any], plan: SweepPlan, storage: Storage, common: Mapping[str, str]) -> None:
    number = config["trial"]
    point = {path: value for path, value in config.items() if path != "trial"}
    name = f"{plan.name}-{number}"
    tags = {
        **common,
        schema.KIND: "trial",
        schema.SWEEP: plan.name,
        schema.TRIAL: str(number),
        schema.RECIPE: plan.recipe,
        schema.COMMAND: plan.command(point),
        schema.SEARCHED: ",".join(point),
    }
    try:
        experiment = plan.experiment(point)
    except SettingError:
        with Run.start(storage, plan.base, name, tags, {**plan.base.settings(), **point}):
            raise
    if experiment.compute.workers > 1:
        metrics = train_on_workers(experiment, storage, name, tags, callbacks=[TuneReportCallback()])
    else:
        metrics = run_trial(experiment, storage, name, tags, on_epoch=lambda report: tune.report(summary(report)))
    tune.report({"epoch": experiment.training.epochs, **metrics})
