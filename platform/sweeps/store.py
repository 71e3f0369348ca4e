"""The MLflow runs of a sweep, which have all of its results: a parent run, and one child run per trial.

The driver is the process that runs the sweep. It creates the run of a trial, with the configuration, before the trial
starts. The process of the trial ends the run. Each trial is logged exactly once, even if a process dies. `--resume`
needs only these runs: it replays finished trials to the search, resumes interrupted ones from their checkpoints, and
proposes the rest.
"""

import dataclasses
import json
import time
import uuid
from typing import Any, Self

from mlflow.entities import Run as MlflowRun

from linflab.platform.errors import InputError
from linflab.platform.sweeps.plan import SweepPlan
from linflab.platform.sweeps.search import PastTrial, Search, TrialSpec
from linflab.platform.tracking.mlflow import get_or_create_config_experiment, retrying_client
from linflab.platform.tracking.runs import Run
from linflab.platform.tracking.storage import Storage
from linflab.platform.trial import checkpoint_store
from linflab.reports import schema
from linflab.reports.records import read_run, search_runs
from linflab.reports.rendering import markdown_text


def _trial_filter(sweep: str) -> str:
    """Return the MLflow filter for the trial runs of a sweep."""
    return f"tags.`{schema.SWEEP}` = '{sweep}' AND tags.`{schema.KIND}` = 'trial'"


class SweepStore:
    """The parent run of a sweep and the runs of its trials.

    Args:
        plan: Settings of the sweep.
        storage: Storage of the sweep.
        parent: Parent run.
        invocation: Id of this invocation of the command.
    """

    def __init__(self, plan: SweepPlan, storage: Storage, parent: Run, invocation: str) -> None:
        self.plan, self.storage, self.parent, self.invocation = plan, storage, parent, invocation
        self.client = retrying_client(storage)
        self.run_ids: dict[str, str] = {}
        self.pending: list[TrialSpec] = []  # interrupted trials to resume
        self.started_labels: set[str] = set()  # labels of trials that this invocation started
        self.deleted_labels: set[str] = set()  # labels of trials whose runs the user deleted
        self.last_timestamp = 0
        self.last_log_time = time.monotonic()
        self.start_time = time.monotonic() - parent.metrics.get(schema.SWEEP_SECONDS, 0.0)

    @classmethod
    def open(cls, plan: SweepPlan, storage: Storage) -> Self:
        """Open the runs of a sweep, creating the parent run if there is none.

        Args:
            plan: Settings of the sweep.
            storage: Storage of the sweep.
        """
        client, invocation, search = retrying_client(storage), uuid.uuid4().hex, plan.search
        budget = f"{search.hours:g} hours" if search.hours is not None else f"{search.trials} trials"
        tags = {
            schema.INVOCATION_ID: invocation,
            schema.SEARCHED_SETTINGS: ",".join(plan.space.parameters),
            schema.BUDGET: budget,
            schema.SAMPLER: search.sampler,
            schema.OBJECTIVES: ",".join(search.objectives),
            schema.DESCRIPTION: markdown_text(f"{budget} over: {plan.space.description}"),
        }
        # A deleted MLflow experiment is restored first: `search_runs` finds no runs of deleted experiments.
        get_or_create_config_experiment(client, storage, plan.base)
        sweep_filter = f"tags.`{schema.SWEEP}` = '{plan.name}' AND tags.`{schema.KIND}` = 'sweep'"
        parents = search_runs(client, sweep_filter) or search_runs(client, sweep_filter, deleted=True)
        if parents:
            if parents[0].info.lifecycle_stage == "deleted":  # `--resume` restores the whole sweep
                for run in [parents[0], *search_runs(client, _trial_filter(plan.name), deleted=True)]:
                    client.restore_run(run.info.run_id)
            parent = Run.resume(storage, parents[0].info.run_id, reopen_finished=True)
            if not parent.has_config:  # the previous process died before it logged the config
                parent.log_config(plan.base)
            parent.log_tags(tags)
        else:
            fixed = {schema.KIND: "sweep", schema.SWEEP: plan.name, schema.RECIPE: plan.recipe}
            parent = Run.start(storage, plan.base, plan.name, {**fixed, **tags})
        return cls(plan, storage, parent, invocation)

    def search(self, retry_failed: bool) -> Search:
        """Return the search, restored from the logged runs.

        Args:
            retry_failed: Whether failed trials count as interrupted, so that they are trained again.
        """
        search = Search(self.plan.space, self.plan.search, self.plan.base.seed)
        runs: dict[str, MlflowRun] = {}
        for run in search_runs(self.client, _trial_filter(self.plan.name)):  # newest first
            if schema.ORIGINAL_RUN_ID in run.data.tags:
                continue
            if run.data.tags.get("mlflow.parentRunId") != self.parent.id:  # its parent run is gone
                self.client.set_tag(run.info.run_id, "mlflow.parentRunId", self.parent.id)
            label = run.data.tags[schema.TRIAL]
            if label in runs:  # duplicate: created twice because the server's response was lost
                extra = runs[label] if run.info.status == "FINISHED" else run
                self.client.delete_run(extra.info.run_id)
                if extra is run:
                    continue
            runs[label] = run
        for run in search_runs(self.client, _trial_filter(self.plan.name), deleted=True):
            if (label := run.data.tags[schema.TRIAL]) not in runs:  # otherwise, the deleted run is a duplicate
                runs[label] = run
                self.deleted_labels.add(label)
        self.run_ids = {label: run.info.run_id for label, run in runs.items()}
        times = [
            int(run.data.tags.get(name, 0)) for run in runs.values() for name in (schema.ASK_TIME, schema.TELL_TIME)
        ]
        self.last_timestamp = max(times, default=0)
        past_trials = []
        for run in runs.values():
            spec = TrialSpec(**json.loads(run.data.tags[schema.TRIAL_SPEC]))
            has_failed = run.info.status == "FAILED" and schema.FAILURE in run.data.tags and not retry_failed
            if spec.label in self.deleted_labels:  # the run stays deleted, but counts toward the budget
                ask_time = int(run.data.tags.get(schema.ASK_TIME, run.info.start_time))
                past_trials.append(PastTrial(spec, ask_time, int(run.data.tags.get(schema.TELL_TIME, ask_time)), None))
                continue
            has_ended = run.info.status == "FINISHED" or has_failed
            past_trials.append(
                PastTrial(spec, *self._ask_and_tell_times(run, has_ended), None if has_failed else run.data.metrics)
            )
            if not has_ended:
                self.pending.append(spec)
                if run.info.status == "RUNNING":  # its process is gone
                    self.client.set_terminated(run.info.run_id, "KILLED")
            elif not has_failed:
                checkpoint_store(self.storage, run.info.run_id).remove()
        search.restore(past_trials)
        self.pending.sort(key=lambda spec: (spec.rung, spec.number))
        return search

    def _ask_and_tell_times(self, run: MlflowRun, has_ended: bool) -> tuple[int, int | None]:
        """Return the time when the search proposed a trial, and when it received the result, if it did."""
        tags = run.data.tags
        if schema.ASK_TIME not in tags:  # logged by an earlier version without these tags
            return run.info.start_time, run.info.end_time if has_ended else None
        if has_ended and schema.TELL_TIME not in tags:  # the driver died before it received the result
            self.client.set_tag(run.info.run_id, schema.TELL_TIME, str(self._timestamp_ms()))
            return int(tags[schema.ASK_TIME]), self.last_timestamp
        return int(tags[schema.ASK_TIME]), int(tags[schema.TELL_TIME]) if has_ended else None

    def _timestamp_ms(self) -> int:
        """Return milliseconds since 1970, strictly increasing even if the clock is set back."""
        self.last_timestamp = max(int(1000 * time.time()), self.last_timestamp + 1)
        return self.last_timestamp

    def log_elapsed_time(self, min_interval: float = 0.0) -> None:
        """Log the elapsed time of the sweep, unless it was logged within the last `min_interval` seconds."""
        if time.monotonic() - self.last_log_time >= min_interval:
            self.last_log_time = time.monotonic()
            self.parent.log_metrics({schema.SWEEP_SECONDS: 3600 * self.hours}, step=int(3600 * self.hours))

    @property
    def hours(self) -> float:
        """Hours spent on the sweep, over all invocations."""
        return (time.monotonic() - self.start_time) / 3600

    def begin(self, spec: TrialSpec) -> tuple[str, str]:
        """Create or resume the run of a trial that is about to start.

        A trial whose settings are not valid together fails immediately.

        Returns:
            Run id, and the reason why the trial failed, or an empty string if it did not fail.
        """
        plan = self.plan
        tags = {
            "mlflow.parentRunId": self.parent.id,
            schema.INVOCATION_ID: self.invocation,
            schema.KIND: "trial",
            schema.SWEEP: plan.name,
            schema.TRIAL: spec.label,
            schema.TRIAL_SPEC: json.dumps(dataclasses.asdict(spec)),
            schema.RECIPE: plan.recipe,
            schema.COMMAND: plan.command(spec),
            schema.SEARCHED_SETTINGS: ",".join(spec.params),
            schema.OBJECTIVES: ",".join(plan.search.objectives),
            schema.ASK_TIME: str(self._timestamp_ms()),
        }
        settings: dict[str, Any] | None = None
        failure = ""
        try:
            experiment = plan.experiment(spec)
        except InputError as error:
            # The run of an invalid configuration logs its settings, to show what failed.
            experiment, settings = plan.base, {**plan.base.to_flat_dict(), **spec.params}
            failure = f"InputError: {error}"
        if (run_id := self.run_ids.get(spec.label)) is None:
            run = Run.start(self.storage, experiment, f"{plan.name}-{spec.label}", tags, settings)
            self.run_ids[spec.label] = run.id
        else:
            run = Run(self.client, run_id)
            if spec.label not in self.started_labels:
                run.log_config(experiment, settings)  # a driver that died may not have logged it
                # In this tag, "|" separates the epochs of earlier invocations from those of this one.
                starts = read_run(self.client, run_id).data.tags.get(schema.START_EPOCHS)
                run.log_tags(
                    {schema.INVOCATION_ID: self.invocation, **({schema.START_EPOCHS: f"{starts}|"} if starts else {})}
                )
        self.started_labels.add(spec.label)
        if failure:
            run.fail(failure)
        return run.id, failure

    def log_end(self, spec: TrialSpec, failure: str | None) -> None:
        """Log the time of a trial's result; if the trial failed and left its run open, mark it as failed."""
        run_id = self.run_ids[spec.label]
        self.client.set_tag(run_id, schema.TELL_TIME, str(self._timestamp_ms()))
        if failure is not None and self.client.get_run(run_id).info.status not in ("FINISHED", "FAILED"):
            Run(self.client, run_id).fail(failure)
        self.log_elapsed_time()
