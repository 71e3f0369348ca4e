"""A sweep from start to end: start Ray, train the proposed trials, and log the best one."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

import torch

from linflab.platform import signals
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.data.datasets import load_dataset
from linflab.platform.distributed.judge import max_judges
from linflab.platform.distributed.train import max_concurrent_trials, start_ray, wait_for_nodes, worker_resources
from linflab.platform.distributed.watch import watch_ray
from linflab.platform.errors import InputError
from linflab.platform.locks import file_lock
from linflab.platform.sweeps.observer import SweepObserver
from linflab.platform.sweeps.plan import SweepPlan, plan_file
from linflab.platform.sweeps.search import Search
from linflab.platform.sweeps.store import SweepStore
from linflab.platform.sweeps.tune import Proposals, TrainFunction, build_tuner
from linflab.platform.tracking.runs import terminate_open_runs
from linflab.platform.tracking.storage import Storage
from linflab.platform.trial import run_trial
from linflab.reports import schema

VerifyFunction = Callable[[str, int], float]  # of a run id and a number of Ray workers


def run_sweep(
    plan: SweepPlan,
    storage: Storage,
    retry_failed: bool = False,
    train: TrainFunction = run_trial,
    hint: str = "",
    view: SweepObserver | None = None,
    verify: VerifyFunction | None = None,
) -> int:
    """Run or resume a sweep, logging each trial as a child run of one parent run.

    Args:
        plan: Validated settings of the sweep.
        storage: Storage of the sweep.
        retry_failed: Whether to train failed trials again, from their checkpoints.
        train: Function that trains a trial with one worker.
        hint: Text that follows the error message if the process has to exit. It explains what is kept and how to
            resume.
        view: Progress view of the trials; shows nothing by default.
        verify: Function that certifies validation images for a run, logs the accuracy, and returns it; required for a
            sweep with `verify_front`.

    Returns:
        Number of trials without a result.

    Raises:
        InputError: If the cluster is too small for a trial, or another process runs the sweep.
        KeyboardInterrupt: If the user interrupts the sweep.
    """
    view = view or SweepObserver()
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # epochs are logged to MLflow only
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "1000000000"  # the state of the sweep is in MLflow only
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = "1000000"  # `Proposals` limits concurrent trials
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # only the older output honors `verbose=0`
    with file_lock(storage.sweeps / plan.name / "lock", timeout=5) as has_lock:
        if not has_lock:
            raise InputError(f"sweep={plan.name}: must not run twice, but another process runs it; wait or stop it")
        is_new = not plan_file(storage, plan.name).exists()
        if is_new:
            plan.save(storage)  # from here on, the sweep can be resumed
        try:
            start_ray()
            wait_for_nodes(plan.base, view.show_message)
            resources = worker_resources(plan.base)  # rejects trials too large for the cluster, before logging
        except InputError:
            if is_new:
                plan_file(storage, plan.name).unlink()
            raise
        plan.save(storage)
        view.show_message(f"Running sweep {plan.name} in {storage.root}.")
        with watch_ray(hint):
            return _search(SweepStore.open(plan, storage), retry_failed, train, resources, view, verify)


def _search(
    store: SweepStore,
    retry_failed: bool,
    train: TrainFunction,
    resources: dict[str, float],
    view: SweepObserver,
    verify: VerifyFunction | None,
) -> int:
    """Run the remaining trials of a sweep, and return the number of trials without a result."""
    plan, storage = store.plan, store.storage
    with store.parent as parent:
        search = store.search(retry_failed)
        if search.is_finished():  # Ray's files remain if the sweep was killed after its last trial
            shutil.rmtree(storage.ray / plan.name, ignore_errors=True)
        else:
            pending = [spec.label for spec in store.pending]
            view.expect(list(plan.space.parameters), search.total, len(search.results), pending)
            _train_trials(search, store, train, resources, view)
        if trials := search.unverified():
            assert verify is not None
            for spec in trials:
                view.show_message(
                    f"Verifying trial {spec.label} on {plan.search.num_verify_images} validation images: {len(trials)} "
                    "trials in all."
                )
                search.tell_verified(spec, verify(store.run_ids[spec.label], max_judges(plan.base)))
                store.log_elapsed_time()
            if not search.is_finished():  # seeds of the best trial
                _train_trials(search, store, train, resources, view)
        best = search.best()
        scores = None if best is None else search.results[best.label]
        if best is not None and scores is not None:
            metrics = (schema.BEST_VALIDATION_CERTIFIED, schema.BEST_VALIDATION_CLEAN, schema.TEST_CERTIFIED)
            best_metrics = {name: scores[name] for name in metrics if name in scores}
            parent.log_metrics(
                {name: value for name, value in best_metrics.items() if parent.metrics.get(name) != value}
            )
            constant = _constant_accuracy(plan.base)
            if scores.get(schema.BEST_VALIDATION_CLEAN, 1.0) <= constant:
                view.show_message(
                    f"Best trial {best.label} is not more accurate than a constant prediction "
                    f"({100 * constant:.1f}% on the validation split); use a smaller learning rate, or more epochs."
                )
    return sum(scores is None and label not in store.deleted_labels for label, scores in search.results.items())


def _train_trials(
    search: Search, store: SweepStore, train: TrainFunction, resources: dict[str, float], view: SweepObserver
) -> None:
    """Train all trials that the search proposes.

    Raises:
        KeyboardInterrupt: If a signal ended Tune.
    """
    plan, storage = store.plan, store.storage
    proposals = Proposals(search, store, view, partial(max_concurrent_trials, plan.base.compute.workers, resources))
    try:
        with _stop_on_signals():
            build_tuner(plan, storage, proposals, view, train, resources).fit()
    finally:
        store.log_elapsed_time()
        terminate_open_runs(storage, store.invocation, except_run=store.parent.id)
        shutil.rmtree(storage.ray / plan.name, ignore_errors=True)
    if not proposals.is_finished or signals.was_interrupted():
        raise KeyboardInterrupt  # Tune handled the signal and stopped


@contextmanager
def _stop_on_signals() -> Iterator[None]:
    """Make Tune stop on SIGTERM as on Ctrl-C, and restore the signal handlers at the end.

    Cloud providers send SIGTERM before they take a machine away. Tune sets a SIGINT handler, and never restores the
    previous handler.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)

    previous_handlers = {number: signal.getsignal(number) for number in signals.WATCHED}
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def _constant_accuracy(experiment: ExperimentConfig) -> float:
    """Return the validation accuracy of always predicting the most frequent class."""
    validation = load_dataset(experiment.dataset, experiment.augmentation).validation
    counts = torch.bincount(validation.labels[validation.indices].long())
    return float(counts.max()) / len(validation)
