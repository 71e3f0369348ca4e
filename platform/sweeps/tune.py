"""Ray Tune integration: search algorithm, error callback, tuner and trainable.

A trial whose process or node dies is proposed again. An error of the run itself, such as a loss that is not finite,
would occur again after a restart. Such a trial fails, and the reason is logged in its run.
"""

import dataclasses
import gc
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ray import cloudpickle, tune
from ray.exceptions import RayActorError
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search import Searcher

from linflab.models.robustness.inputs import is_out_of_memory
from linflab.platform.config.own_parts import import_own_parts
from linflab.platform.distributed.train import to_ray_metrics, train_distributed
from linflab.platform.errors import RunLockedError, WorkerLostError
from linflab.platform.source import verify_source_hash
from linflab.platform.sweeps.observer import SweepObserver
from linflab.platform.sweeps.plan import SweepPlan
from linflab.platform.sweeps.search import Scores, Search, TrialSpec
from linflab.platform.sweeps.store import SweepStore
from linflab.platform.tracking.mlflow import STORE_ERRORS
from linflab.platform.tracking.runs import Run
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.loop import EpochMetrics
from linflab.platform.trial import Report, TrialRequest, TrialResult
from linflab.reports import schema

MAX_FAILURES = 3  # worker failures without progress before a trial fails
MAX_RESTARTS = 100  # per trial and invocation, for processes that cannot even start
OOM_RETRY_DELAY_S = 5.0  # time for other trials to free memory
FAILURE_KEY = "failure"  # metric with which a trial reports the reason of its failure to Tune
TrainFunction = Callable[..., TrialResult | None]  # signature of `run_trial`


class Proposals(Searcher):
    """A Ray Tune searcher that proposes trials of a `Search` and logs their results.

    Args:
        search: Search of the sweep.
        store: MLflow runs of the sweep.
        view: Progress view.
        max_concurrent: Function that returns the maximum number of concurrent trials.
    """

    def __init__(
        self, search: Search, store: SweepStore, view: SweepObserver, max_concurrent: Callable[[], int]
    ) -> None:
        super().__init__()
        self.search, self.store, self.view, self.max_concurrent = search, store, view, max_concurrent
        self.specs: dict[str, TrialSpec] = {}  # by Tune's trial id
        self.num_failures: Counter[str] = Counter()
        self.is_finished = False

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles searchers; linflab never reads the file

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the Tune config of the next trial, or None if none can start now; called by Ray Tune."""
        hours = self.store.plan.search.hours
        # A trial that is proposed only to wait would be drawn without the results of running trials.
        if len(self.specs) >= self.max_concurrent():
            return None
        while True:
            allow_new = hours is None or self.store.hours < hours
            spec = self.store.pending.pop(0) if self.store.pending else self.search.ask(allow_new)
            if spec is None:
                self.is_finished = self.search.is_finished(allow_new)
                return Searcher.FINISHED if self.is_finished else None
            run_id, failure = self.store.begin(spec)
            if not failure:
                break
            self._end(spec, None, failure)
        self.specs[trial_id] = spec
        return {"trial": spec.label, "run_id": run_id, "job": json.dumps(dataclasses.asdict(spec))}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Log the elapsed time of the sweep after an epoch; called by Ray Tune."""
        with suppress(*STORE_ERRORS):
            self.store.log_elapsed_time(min_interval=60)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Log the result or failure of a trial; called by Ray Tune."""
        scores = result or {}
        failure = scores.get(FAILURE_KEY)
        if not error and (failure is not None or schema.TRAIN_SECONDS in scores):  # otherwise, trial was interrupted
            self._end(self.specs.pop(trial_id), None if failure is not None else _numeric_items(scores), failure)

    def on_error(self, trial_id: str, error: Exception | None) -> None:
        """Propose a trial again after a worker failure; end it as failed after any other error.

        Args:
            trial_id: Tune's id of the trial.
            error: Error that Tune caught, or None if it is not known.
        """
        spec = self.specs.pop(trial_id)
        cause = getattr(error, "cause", None) or error
        self.num_failures[spec.label] += 1
        is_worker_loss = cause is None or isinstance(
            cause, (RayActorError, WorkerLostError, RunLockedError, *STORE_ERRORS)
        )
        if is_worker_loss and self.num_failures[spec.label] < MAX_RESTARTS:
            self.store.pending.append(spec)
            self.view.show_restart(spec.label)
        else:
            reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}"
            failures = f"worker process failed {self.num_failures[spec.label]} times; last error: "
            self._end(spec, None, f"{failures}{reason}" if is_worker_loss else reason)

    def _end(self, spec: TrialSpec, scores: Scores | None, failure: str | None) -> None:
        self.search.tell(spec, scores)
        self.view.show_end(spec.label, spec.params, dict(scores or {}), failure)
        with suppress(*STORE_ERRORS):  # Tune would attribute store errors to the trial
            self.store.log_end(spec, failure)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Do nothing: the state is in MLflow."""


class _TrialErrorCallback(Callback):
    """A callback that passes the error of a trial to `Proposals`, since Tune itself does not pass it."""

    def __init__(self, proposals: Proposals) -> None:
        self.proposals = proposals

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        error = None
        with suppress(Exception):  # unpickling an arbitrary error may raise anything
            error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
        self.proposals.on_error(trial.trial_id, error)


def _numeric_items(result: Mapping[str, Any]) -> Scores:
    return {name: value for name, value in result.items() if isinstance(value, int | float)}


def build_tuner(
    plan: SweepPlan,
    storage: Storage,
    proposals: Proposals,
    view: SweepObserver,
    train: TrainFunction,
    resources: Mapping[str, float],
) -> tune.Tuner:
    """Build the tuner that trains the proposed trials.

    Args:
        plan: Settings of the sweep.
        storage: Storage of the sweep.
        proposals: Searcher that proposes the trials.
        view: Progress view.
        train: Function that trains a trial with one worker.
        resources: Ray resources of one worker, by name.
    """
    for name in ("ray.tune.execution.tune_controller", "ray.tune.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the view reports worker failures
    has_workers = plan.base.compute.workers > 1  # if True, the trial's process only waits for the workers
    trainable = tune.with_resources(
        partial(
            _trial,
            plan=plan,
            storage=storage,
            train=partial(train_distributed, resources=resources) if has_workers else train,
        ),
        # A CPU for the waiting process would be missing for the workers, so it requests one byte of memory instead.
        {"memory": 1} if has_workers else dict(resources),
    )
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(search_alg=proposals, num_samples=-1, reuse_actors=not has_workers),
        run_config=tune.RunConfig(
            name=plan.name,
            storage_path=str(storage.ray),
            verbose=0,
            callbacks=[view, _TrialErrorCallback(proposals)],
        ),
    )


def _trial(config: dict[str, Any], plan: SweepPlan, storage: Storage, train: TrainFunction) -> None:
    verify_source_hash()
    import_own_parts()
    spec = TrialSpec(**json.loads(config["job"]))
    experiment = plan.experiment(spec)
    has_workers = experiment.compute.workers > 1
    is_last_rung = spec.rung == plan.search.num_rungs
    request = TrialRequest(
        experiment, storage, resume_run_id=config["run_id"], max_failures=MAX_FAILURES, evaluate_test=is_last_rung
    )
    # A run can finish just before its process dies. With several workers, only the first worker would detect that, so
    # check it here.
    metrics: Mapping[str, Any] | None = Run.metrics_if_finished(storage, config["run_id"]) if has_workers else None
    may_retry = True
    while metrics is None:
        reporting: dict[str, Any] = {"callbacks": [TuneReportCallback()]} if has_workers else {"on_report": _report}
        try:
            result = train(request, **reporting)
            assert result is not None  # only workers other than the first return None
            metrics = result.metrics
        except (WorkerLostError, RunLockedError, *STORE_ERRORS):
            raise  # not an error of the run itself: the trial is restarted
        except Exception as error:
            if "CUDA error" in str(error):  # the process cannot use CUDA any more
                raise WorkerLostError(f"{type(error).__name__}: {error}") from None
            if not may_retry or not is_out_of_memory(error):
                metrics = {FAILURE_KEY: f"{type(error).__name__}: {error}"}
        if metrics is None:  # other trials may have used the memory: retry once from the checkpoint
            may_retry = False
            gc.collect()
            torch.cuda.empty_cache()
            time.sleep(OOM_RETRY_DELAY_S)
    tune.report({"epoch": experiment.training.epochs, **metrics})


def _report(report: Report) -> None:
    if isinstance(report, EpochMetrics):
        tune.report(to_ray_metrics(report))
