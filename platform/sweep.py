"""Ray Tune around the training loop: a search over settings, every trial recorded, and nothing lost if it is cut.

MLflow's record is the only state of a sweep. The driver creates a trial's run, with its point, before the trial starts;
the trial ends it. So whatever dies, a trial is known exactly once, and `--resume` goes on from the record alone: what
has ended is told to the search again, what has not goes on from its checkpoint, and the rest is still to come. Ray Tune
schedules; the trial of a process or machine that dies is proposed to it again. What training itself says is wrong,
such as a loss that is not finite, would be so again: that trial has failed, with its reason in the record.
"""

import dataclasses
import gc
import json
import logging
import os
import re
import shutil
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
import yaml
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient
from pydantic import ValidationError
from ray import cloudpickle, tune
from ray.exceptions import RayActorError
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search import Searcher
from rich.console import Console

from linflab.platform.checkpoints import exclusive_lock, write_partial
from linflab.platform.config import Experiment, build_experiment, parse_override, read_recipe
from linflab.platform.datasets import Dataset
from linflab.platform.errors import Busy, SettingError, WorkerDied
from linflab.platform.progress import SweepView
from linflab.platform.search import Job, Past, Scores, Search, SearchConfig
from linflab.platform.shipping import check_code
from linflab.platform.storage import Storage
from linflab.platform.tracking import STORE_ERRORS, Run, checkpoints_of, end_open_runs, patient_client
from linflab.platform.training import EpochReport, check_fits
from linflab.platform.trial import run_trial, train_command
from linflab.platform.workers import (
    at_once,
    start_ray,
    summary,
    train_on_workers,
    wait_for_machines,
    worker_resources,
)
from linflab.reports import schema
from linflab.reports.records import search_runs, sweep_names
from linflab.search_spaces.space import SearchSpace, load_space

for _name in ("ray.tune.execution.tune_controller", "ray.tune.tune"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)  # what becomes of a trial that dies, we say

FIXED = ("dataset", "eps", "evaluation", "compute", "training.include_validation")  # what a sweep can't vary
DEATHS = 3  # how often a trial's process may die without that it comes further
RESTARTS = 100  # of a trial in one launch; where its process can't even start
SECONDS_TO_FREE = 5.0  # that neighbours have to let go of memory, before a trial that found none tries again
FAILURE = "failure"  # what a trial reports to Tune where it has no result: why
TrainFunction = Callable[..., dict[str, float]]  # as `run_trial`


@dataclass(frozen=True)
class SweepPlan:
    """A sweep, checked, before anything starts.

    Attributes:
        name: the sweep's, unique in its storage.
        recipe, overrides: as they were typed; every trial begins with them.
        tree: the settings of the recipe.
        base: the experiment of recipe and overrides.
        space: what varies.
        search: how it is searched.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    tree: Mapping[str, Any]
    base: Experiment
    space: SearchSpace
    search: SearchConfig

    def experiment(self, job: Job) -> Experiment:
        """The experiment of a trial.

        Raises:
            SettingError: settings of the point are refused together.
        """
        kept, own = self._settings(job)
        return build_experiment(self.tree, {**dict(map(parse_override, kept)), **own})

    def command(self, job: Job) -> str:
        """What repeats a trial."""
        kept, own = self._settings(job)
        return train_command(self.recipe, [*kept, *(f"{path}={value}" for path, value in own.items())])

    def extended(self, budget: str | None, seeds: int | None) -> Self:
        """The same sweep with another budget or number of seeds, where they are given.

        Raises:
            SettingError: they won't do.
        """
        search = self.search.model_dump()
        if budget is not None and self.search.race > 1:
            raise SettingError(f"budget={budget}: how many points take part is fixed in a race; start another sweep")
        if seeds is not None:
            search["seeds"] = seeds
        if budget is None:
            budget = f"{search['hours']}h" if search["hours"] is not None else str(search["trials"])
        rest = {name: value for name, value in search.items() if name not in ("trials", "hours")}
        return dataclasses.replace(self, search=search_config(budget, **rest))

    def _settings(self, job: Job) -> tuple[list[str], dict[str, Any]]:
        """The overrides but for those that the trial replaces; and its own settings, which come after them."""
        own: dict[str, Any] = dict(job.point)
        if job.round < self.search.rounds:
            epochs = own.get("training.epochs", self.base.training.epochs)
            own["training.epochs"] = self.search.epochs_in(job.round, epochs)
        if job.repeat:
            own["seed"] = (own.get("seed", self.base.seed) + job.repeat) % 2**63
        return [override for override in self.overrides if parse_override(override)[0] not in own], own

    def save(self, storage: Storage) -> None:
        """Keep what was asked for, so that the sweep can be resumed whatever becomes of recipe and space."""
        path = _plan_file(storage, self.name)
        content = {
            "recipe": self.recipe,
            "overrides": list(self.overrides),
            "settings": self.tree,
            "space": self.space.model_dump(mode="json"),
            "search": self.search.model_dump(mode="json"),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(content, sort_keys=False)
        os.replace(write_partial(path, lambda file: file.write(text.encode())), path)

    @classmethod
    def load(cls, storage: Storage, name: str) -> Self:
        """The plan of a sweep that was started.

        Raises:
            SettingError: there is none of this name.
        """
        try:
            content = yaml.safe_load(_plan_file(storage, name).read_text())
        except yaml.YAMLError:
            content = None
        except OSError:
            known = [path.parent.name for path in sorted(storage.sweeps.glob("*/sweep.yaml"))]
            raise SettingError(
                f"resume={name}: there is no such sweep in {storage.root} that was started there (imported ones can't "
                f"be resumed); there are: {', '.join(known) or 'none yet'}"
            ) from None
        try:
            tree, overrides = content["settings"], tuple(content["overrides"])
            space = SearchSpace.model_validate(content["space"])
            search = SearchConfig.model_validate(content["search"])
        except (TypeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise SettingError(f"resume={name}: {_plan_file(storage, name)} can't be read ({reason})") from None
        base = build_experiment(tree, dict(map(parse_override, overrides)))
        return cls(name, content["recipe"], overrides, tree, base, space, search)


def _plan_file(storage: Storage, name: str) -> Path:
    return storage.sweeps / name / "sweep.yaml"


def search_config(budget: str, **settings: Any) -> SearchConfig:
    """How to search, from what was typed; `budget` is a number of trials, or of hours as in 1.5h.

    Raises:
        SettingError: a setting won't do; names it.
    """
    hours = budget.endswith("h")
    try:
        limits = {"trials": None, "hours": float(budget[:-1])} if hours else {"trials": int(budget), "hours": None}
        return SearchConfig(**{**limits, **settings})
    except ValidationError as error:
        complaint = error.errors()[0]
        if complaint["type"] == "value_error":
            raise SettingError(str(complaint["ctx"]["error"])) from None
        name = str(complaint["loc"][0])
        message = complaint["msg"][0].lower() + complaint["msg"][1:]
        if name in limits:
            name, complaint["input"] = "budget", budget
        raise SettingError(f"{name}={complaint['input']}: {message}") from None
    except ValueError:
        raise SettingError(f"budget={budget}: must be a number of trials, as in 20, or of hours, as in 1.5h") from None


def plan_sweep(
    recipe: str,
    overrides: Sequence[str],
    space_name: str,
    name: str,
    search: SearchConfig,
    dataset: Dataset | None,
) -> SweepPlan:
    """Check all that can be known to be wrong before the sweep starts.

    Args:
        dataset: the recipe's; None where it is not on this machine, as for a cluster, and what is asked of it is
            checked there.

    Raises:
        SettingError: recipe, override, space, name or search won't do.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise SettingError(f"name={name}: must be letters, digits, dots, dashes and underscores, as in p-schedule_1")
    tree = read_recipe(recipe)
    base = build_experiment(tree, dict(map(parse_override, overrides)))
    try:
        space = load_space(space_name)
    except ValueError as error:
        raise SettingError(str(error)) from None
    if base.training.include_validation:
        raise SettingError("training.include_validation=true: a sweep chooses its best by validation images")
    plan = SweepPlan(name, recipe, tuple(overrides), tree, base, space, search)
    if dataset is not None:
        check_fits(base, dataset)
    if base.training.epochs < search.race:
        raise SettingError(
            f"race={search.race}: needs at least so many training.epochs; there are {base.training.epochs}"
        )
    for path in space.parameters:
        if any(path == fixed or path.startswith(f"{fixed}.") for fixed in FIXED):
            raise SettingError(
                f"space={space_name}: {path} can't be searched, since all trials of a table share {', '.join(FIXED)}"
            )
    for path, _ in map(parse_override, overrides):
        if path in space.parameters:
            raise SettingError(f"{path}: the space {space_name} varies it; leave it out, or vary something else")
    Search(space, search, base.seed)  # refuses a grid without end
    # a trial may still meet a combination that is refused: it fails, and the sweep goes on
    for point in space.probes():
        try:
            experiment = plan.experiment(Job(1, point))
            if dataset is not None:
                check_fits(experiment, dataset)
        except SettingError as error:
            raise SettingError(f"space={space_name}: {error}") from None
    return plan


def check_new(plan: SweepPlan, storage: Storage) -> None:
    """Check that no sweep of this name has been started.

    Raises:
        SettingError: one has.
    """
    if _plan_file(storage, plan.name).exists() or plan.name in sweep_names(MlflowClient(storage.tracking_uri)):
        raise SettingError(
            f"name={plan.name}: this sweep is already in {storage.root}; choose another name, or go on with it by "
            f"`linflab sweep --resume {plan.name}`"
        )


def run_sweep(
    plan: SweepPlan, storage: Storage, console: Console, retry_failed: bool = False, train: TrainFunction = run_trial
) -> int:
    """Search; records every trial under one parent run. Goes on with what the record holds of the sweep.

    Args:
        retry_failed: train again, from their checkpoints, those that failed before.
        train: what trains a trial of one worker.

    Returns:
        The number of trials that have no result.

    Raises:
        SettingError: the cluster is too small for a trial, or another process runs the sweep.
        KeyboardInterrupt: the user ended the sweep.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # MLflow records; no second log of every epoch
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "1000000000"  # nor a second state of the sweep
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = "1000000"  # how many go on at once, `_Proposals` says
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the older output can be silent, as `verbose=0` asks
    with exclusive_lock(storage.sweeps / plan.name / "lock", patience=5) as held:
        if not held:
            raise SettingError(f"sweep={plan.name}: another process runs it; wait for it, or stop it first")
        start_ray()
        wait_for_machines(plan.base, console.print)
        resources = worker_resources(plan.base)  # refuses what is too large, before anything is written
        plan.save(storage)
        console.print(f"Sweep {plan.name}, in {storage.root}.")
        record = _Record.open(plan, storage)
        with record.parent as parent:
            search = record.search(retry_failed)
            if not search.finished():
                view = SweepView(console, list(plan.space.parameters), search.total, len(search.ended))
                room = partial(at_once, plan.base.compute.workers, resources)
                proposals = _Proposals(search, record, view, room)
                try:
                    with view, _terminated_as_interrupted():
                        _tuner(plan, storage, proposals, view, train, resources).fit()
                finally:
                    record.save_hours()
                    end_open_runs(storage, record.launch, but=parent.id)
                    shutil.rmtree(storage.ray / plan.name, ignore_errors=True)
                if not proposals.finished:
                    raise KeyboardInterrupt  # which Tune had taken, to stop
            best = search.best()
            scores = None if best is None else search.ended[best.label]
            if best is not None and scores is not None:
                metrics = (schema.BEST_VALIDATION_CERTIFIED, schema.BEST_VALIDATION_CLEAN, schema.TEST_CERTIFIED)
                parent.log_metrics({name: scores[name] for name in metrics if name in scores})
        return sum(scores is None for scores in search.ended.values())


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, by which machines that are taken away say so, ends a sweep as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Record:
    """A sweep in MLflow: its parent run, and a run for each trial."""

    def __init__(self, plan: SweepPlan, storage: Storage, parent: Run, launch: str) -> None:
        self.plan, self.storage, self.parent, self.launch = plan, storage, parent, launch
        self.client = patient_client(storage)
        self.run_ids: dict[str, str] = {}
        self.pending: list[Job] = []  # that had started, and are to go on
        self.begun: set[str] = set()  # by this launch
        self.last_moment = 0
        self.saved = time.monotonic()
        self.began = time.monotonic() - parent.metrics.get(schema.SWEEP_SECONDS, 0.0)

    @classmethod
    def open(cls, plan: SweepPlan, storage: Storage) -> Self:
        """The record of the sweep, begun where there is none."""
        client, launch, search = patient_client(storage), uuid.uuid4().hex, plan.search
        budget = f"{search.hours:g} hours" if search.hours is not None else f"{search.trials} trials"
        tags = {
            schema.LAUNCH: launch,
            schema.SEARCHED: ",".join(plan.space.parameters),
            schema.BUDGET: budget,
            schema.SAMPLER: search.sampler,
            schema.OBJECTIVES: ",".join(search.objectives),
            schema.NOTE: f"{budget} over: {plan.space.description}",
        }
        mine = f"tags.`{schema.SWEEP}` = '{plan.name}' AND tags.`{schema.KIND}` = 'sweep'"
        found = search_runs(client, mine)
        if found:
            parent = Run.resume(storage, found[0].info.run_id, again=True)
            parent.log_tags(tags)
        else:
            fixed = {schema.KIND: "sweep", schema.SWEEP: plan.name, schema.RECIPE: plan.recipe}
            parent = Run.start(storage, plan.base, plan.name, {**fixed, **tags})
        return cls(plan, storage, parent, launch)

    def search(self, retry_failed: bool) -> Search:
        """The search, as far as the record goes."""
        search = Search(self.plan.space, self.plan.search, self.plan.base.seed)
        runs: dict[str, MlflowRun] = {}
        for run in search_runs(self.client, f"tags.`mlflow.parentRunId` = '{self.parent.id}'"):  # the latest first
            label = run.data.tags[schema.TRIAL]
            if label in runs:  # made once more, since the store's answer was lost on the way
                extra = runs[label] if run.info.status == "FINISHED" else run
                self.client.delete_run(extra.info.run_id)
                if extra is run:
                    continue
            runs[label] = run
        self.run_ids = {label: run.info.run_id for label, run in runs.items()}
        told = [int(run.data.tags.get(name, 0)) for run in runs.values() for name in (schema.ASKED, schema.TOLD)]
        self.last_moment = max(told, default=0)
        past = []
        for run in runs.values():
            job = Job(**json.loads(run.data.tags[schema.JOB]))
            failed = run.info.status == "FAILED" and schema.FAILURE in run.data.tags and not retry_failed
            ended = run.info.status == "FINISHED" or failed
            past.append(Past(job, *self._moments(run, ended), None if failed else run.data.metrics))
            if not ended:
                self.pending.append(job)
                if run.info.status == "RUNNING":  # by the record of a process that is gone
                    self.client.set_terminated(run.info.run_id, "KILLED")
            elif not failed:
                checkpoints_of(self.storage, run.info.run_id).remove()
        search.recall(past)
        self.pending.sort(key=lambda job: (job.round, job.number))
        return search

    def _moments(self, run: MlflowRun, ended: bool) -> tuple[int, int | None]:
        """When the search proposed a trial, and was told of its end."""
        tags = run.data.tags
        if schema.ASKED not in tags:  # recorded before these were
            return run.info.start_time, run.info.end_time if ended else None
        if ended and schema.TOLD not in tags:  # the driver died before it heard of it
            self.client.set_tag(run.info.run_id, schema.TOLD, str(self._moment()))
            return int(tags[schema.ASKED]), self.last_moment
        return int(tags[schema.ASKED]), int(tags[schema.TOLD]) if ended else None

    def _moment(self) -> int:
        """Milliseconds since 1970, later than any before, whatever becomes of clocks."""
        self.last_moment = max(int(1000 * time.time()), self.last_moment + 1)
        return self.last_moment

    def save_hours(self, seconds_since: float = 0.0) -> None:
        """Record what has been spent, if that was not done within so many seconds."""
        if time.monotonic() - self.saved >= seconds_since:
            self.saved = time.monotonic()
            self.parent.log_metrics({schema.SWEEP_SECONDS: 3600 * self.hours}, step=int(3600 * self.hours))

    @property
    def hours(self) -> float:
        """Spent on the sweep so far, over all launches."""
        return (time.monotonic() - self.began) / 3600

    def begin(self, job: Job) -> tuple[str, str]:
        """The run of a trial that is about to start, and why its settings are refused, if so: then it has failed."""
        plan = self.plan
        tags = {
            "mlflow.parentRunId": self.parent.id,
            schema.LAUNCH: self.launch,
            schema.KIND: "trial",
            schema.SWEEP: plan.name,
            schema.TRIAL: job.label,
            schema.JOB: json.dumps(dataclasses.asdict(job)),
            schema.RECIPE: plan.recipe,
            schema.COMMAND: plan.command(job),
            schema.SEARCHED: ",".join(job.point),
            schema.OBJECTIVES: ",".join(plan.search.objectives),
            schema.ASKED: str(self._moment()),
        }
        settings: dict[str, Any] | None = None
        refusal = ""
        try:
            experiment = plan.experiment(job)
        except SettingError as error:
            experiment, settings = plan.base, {**plan.base.settings(), **job.point}
            refusal = f"SettingError: {error}"
        if (known := self.run_ids.get(job.label)) is None:
            run = Run.start(self.storage, experiment, f"{plan.name}-{job.label}", tags, settings)
            self.run_ids[job.label] = run.id
        else:
            run = Run(self.client, known)
            if job.label not in self.begun:
                run.describe(experiment, settings)  # the driver of before may have died before it did
                starts = self.client.get_run(known).data.tags.get(schema.STARTS)
                run.log_tags({schema.LAUNCH: self.launch, **({schema.STARTS: f"{starts}|"} if starts else {})})
        self.begun.add(job.label)
        if refusal:
            run.fail(refusal)
        return run.id, refusal

    def ended(self, job: Job, failure: str | None) -> None:
        """Note that the search was told of a trial's end; where it could not say so itself, its run ends as failed."""
        run_id = self.run_ids[job.label]
        self.client.set_tag(run_id, schema.TOLD, str(self._moment()))
        if failure is not None and self.client.get_run(run_id).info.status not in ("FINISHED", "FAILED"):
            Run(self.client, run_id).fail(failure)
        self.save_hours()


class _Proposals(Searcher):
    """The search and its record as Ray Tune asks for them: what to train next, and what came of it."""

    def __init__(self, search: Search, record: _Record, view: SweepView, room: Callable[[], int]) -> None:
        super().__init__()
        self.search, self.record, self.view, self.room = search, record, view, room
        self.jobs: dict[str, Job] = {}  # by Tune's name of the trial
        self.deaths: Counter[str] = Counter()
        self.finished = False

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it with its own state, which nobody reads: the record is in MLflow

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        hours = self.record.plan.search.hours
        if len(self.jobs) >= self.room():  # more would only wait, drawn without what these will teach
            return None
        while True:
            in_time = hours is None or self.record.hours < hours
            job = self.record.pending.pop(0) if self.record.pending else self.search.next_job(in_time)
            if job is None:
                self.finished = self.search.finished(in_time)
                return Searcher.FINISHED if self.finished else None
            run_id, refusal = self.record.begin(job)
            if not refusal:
                break
            self._end(job, None, refusal)
        self.jobs[trial_id] = job
        return {"trial": job.label, "run_id": run_id, "job": json.dumps(dataclasses.asdict(job))}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        with suppress(*STORE_ERRORS):
            self.record.save_hours(seconds_since=60)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        scores = result or {}
        failure = scores.get(FAILURE)
        if not error and (failure is not None or schema.TRAIN_SECONDS in scores):  # else it was stopped, as by Ctrl-C
            self._end(self.jobs.pop(trial_id), None if failure is not None else _numbers(scores), failure)

    def on_error(self, trial_id: str, error: Exception | None) -> None:
        """A trial's process has died, or could not start: it goes on elsewhere, unless that would be in vain."""
        job = self.jobs.pop(trial_id)
        cause = getattr(error, "cause", None) or error
        self.deaths[job.label] += 1
        lost = cause is None or isinstance(cause, (RayActorError, WorkerDied, Busy, *STORE_ERRORS))
        if lost and self.deaths[job.label] < RESTARTS:
            self.record.pending.append(job)
            self.view.lost(job.label)
        else:
            reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}"
            self._end(job, None, f"its process died {self.deaths[job.label]} times: {reason}" if lost else reason)

    def _end(self, job: Job, scores: Scores | None, failure: str | None) -> None:
        self.search.tell(job, scores)
        self.view.ended(job.label, job.point, dict(scores or {}), failure)
        with suppress(*STORE_ERRORS):  # Tune would take them for the trial's own
            self.record.ended(job, failure)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: see `__getstate__`."""


class _Errors(Callback):
    """Tells the search why Tune gave a trial up, which Tune itself does not."""

    def __init__(self, proposals: _Proposals) -> None:
        self.proposals = proposals

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        error = None
        with suppress(Exception):  # nearly anything can happen as errors of others are unpickled
            error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
        self.proposals.on_error(trial.trial_id, error)


def _numbers(result: Mapping[str, Any]) -> Scores:
    return {name: value for name, value in result.items() if isinstance(value, int | float)}


def _tuner(
    plan: SweepPlan,
    storage: Storage,
    proposals: _Proposals,
    view: SweepView,
    train: TrainFunction,
    resources: Mapping[str, float],
) -> tune.Tuner:
    several = plan.base.compute.workers > 1  # the workers take the resources; the trial itself only waits for them
    trainable = tune.with_resources(
        partial(
            _trial,
            plan=plan,
            storage=storage,
            train=partial(train_on_workers, resources=resources) if several else train,
        ),
        # whole CPUs would leave too few for the workers; one byte of memory is the least that Tune accepts
        {"memory": 1} if several else dict(resources),
    )
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(search_alg=proposals, num_samples=-1, reuse_actors=not several),
        run_config=tune.RunConfig(
            name=plan.name,
            storage_path=str(storage.ray),
            verbose=0,
            callbacks=[view, _Errors(proposals)],
        ),
    )


def _trial(config: dict[str, Any], plan: SweepPlan, storage: Storage, train: TrainFunction) -> None:
    check_code()
    job = Job(**json.loads(config["job"]))
    experiment = plan.experiment(job)
    several = experiment.compute.workers > 1
    # of several workers the first alone would know that the run had finished before its process died
    metrics: Mapping[str, Any] | None = Run.metrics_if_finished(storage, config["run_id"]) if several else None
    again = True
    while metrics is None:
        reporting: dict[str, Any] = {"callbacks": [TuneReportCallback()]} if several else {"on_epoch": _report}
        try:
            metrics = train(
                experiment,
                storage,
                "",
                {},
                checkpointed=True,
                resume=config["run_id"],
                deaths=DEATHS,
                scored=job.round == plan.search.rounds,
                **reporting,
            )
        except (WorkerDied, Busy, *STORE_ERRORS):
            raise  # says nothing of the training: the trial is started again
        except Exception as error:
            if "CUDA error" in str(error):  # nothing will work in this process any more, for this trial or others
                raise WorkerDied(f"{type(error).__name__}: {error}") from None
            if not again or not _out_of_memory(error):
                metrics = {FAILURE: f"{type(error).__name__}: {error}"}
        if metrics is None:  # neighbours may have taken the memory: once more, from the checkpoint
            again = False
            gc.collect()
            torch.cuda.empty_cache()
            time.sleep(SECONDS_TO_FREE)
    tune.report({"epoch": experiment.training.epochs, **metrics})


def _report(report: EpochReport) -> None:
    tune.report(summary(report))


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
