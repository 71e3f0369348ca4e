"""Records as a file, to be kept beside a paper or in a repository: what tables are made of, without weights or curves.

JSON, one run a line, the oldest first, behind a line that says what it is. Read again, the runs are in a record as they
were, but for their ids (the tag `linflab.imported` has those), make the same tables, and are the same file when they
are written once more.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
from mlflow.entities import Metric, Param
from mlflow.entities import Run as MLflowRun
from mlflow.tracking import MlflowClient
from pydantic import BaseModel, ConfigDict, ValidationError

from linflab.platform.checkpoints import write_partial
from linflab.platform.errors import SettingError
from linflab.platform.storage import Storage
from linflab.platform.tracking import experiment_named
from linflab.reports import schema
from linflab.reports.comparison import run_of
from linflab.reports.records import TAGS, search_runs

HEAD = '{"format": "linflab records", "version": 1}'
MOST_PARAMETERS = 100  # that MLflow takes at once
PARENT = "mlflow.parentRunId"


class RecordedRun(BaseModel):
    """A run as it is written: its latest metrics alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    experiment: str  # MLflow's, by name
    status: Literal["FINISHED", "FAILED", "KILLED"]
    started: int  # milliseconds since 1970
    ended: int
    tags: dict[str, str]
    parameters: dict[str, str]
    metrics: dict[str, float]


def export_records(storage: Storage, names: Sequence[str], file: Path) -> tuple[int, int]:
    """Write runs, by id or the beginning of it, and sweeps, by name, to a file.

    Returns how many runs that are, and how many were left out for they, or their sweep, have not ended.

    Args:
        names: none: all that have ended, but for trials of sweeps that have not.

    Raises:
        SettingError: the file can't be written.
        LookupError: there is no such run or sweep that has ended, or there are several.
    """
    client = MlflowClient(storage.tracking_uri)
    ours = [run for run in search_runs(client, "") if schema.KIND in run.data.tags]
    runs = [run for run in ours if run.info.status != "RUNNING"]
    going_on = {_sweep(run) for run in ours if run.info.status == "RUNNING" and run.data.tags[schema.KIND] == "sweep"}
    ids = _named(ours, names) if names else {run.info.run_id for run in runs if _sweep(run) not in going_on}
    chosen = [run for run in ours if run.info.run_id in ids]
    for run in chosen:  # its trials would be without it elsewhere
        if (name := _sweep(run)) in going_on:
            raise LookupError(
                f"{name}: this sweep has not ended; `linflab sweep --resume {name}` ends one that was cut"
            )
        if run.info.status == "RUNNING":
            raise LookupError(f"{run.info.run_id}: this run has not ended; `--resume` ends one that was cut")
    experiments = {found.experiment_id: found.name for found in client.search_experiments()}
    originals = {run.info.run_id: _original(run) for run in ours}
    lines = [_line(run, experiments, originals) for run in chosen]
    lines.sort(key=lambda line: (line.started, line.run_id))
    content = "\n".join([HEAD, *(json.dumps(line.model_dump()) for line in lines), ""]).encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.replace(write_partial(file, lambda out: out.write(content)), file)
    except OSError as error:
        raise SettingError(f"file={file}: can't be written ({error})") from None
    return len(lines), 0 if names else len(ours) - len(chosen)


def _named(runs: Sequence[MLflowRun], names: Sequence[str]) -> set[str]:
    """The ids of the runs of sweeps of these names, and of those whose ids alone begin so."""
    of_sweeps = pd.DataFrame(
        {
            "run_id": [run.info.run_id for run in runs],
            schema.IMPORTED: [_original(run) for run in runs],
            schema.SWEEP: [_sweep(run) for run in runs],
        }
    )
    ids: set[str] = set()
    for name in names:
        trials = of_sweeps[of_sweeps[schema.SWEEP] == name]
        ids |= set((trials if len(trials) else run_of(of_sweeps, name))["run_id"])
    return ids


def _sweep(run: MLflowRun) -> str | None:
    name: str | None = run.data.tags.get(schema.SWEEP)
    return name


def _original(run: MLflowRun) -> str:
    """The id that a run had where it was made, however often it was imported since."""
    return str(run.data.tags.get(schema.IMPORTED, run.info.run_id))


def _line(run: MLflowRun, experiments: dict[str, str], originals: dict[str, str]) -> RecordedRun:
    tags = {name: text for name, text in sorted(run.data.tags.items()) if _belongs(name)}
    if PARENT in tags:
        tags[PARENT] = originals.get(tags[PARENT], tags[PARENT])
    return RecordedRun(
        run_id=_original(run),
        experiment=experiments[run.info.experiment_id],
        status=run.info.status,
        started=run.info.start_time,
        ended=run.info.end_time or run.info.start_time,
        tags=tags,
        parameters=dict(sorted(run.data.params.items())),
        metrics={name: value for name, value in sorted(run.data.metrics.items()) if _is_ours(name)},
    )


def _belongs(tag: str) -> bool:
    """Whether a tag is of the run, and not of where it was recorded."""
    return tag.startswith(TAGS) and tag not in (schema.IMPORTED, "mlflow.user", "mlflow.log-model.history")


def _is_ours(metric: str) -> bool:
    return "/" in metric and not metric.startswith("system/")


def import_records(storage: Storage, file: Path) -> tuple[int, int]:
    """Add the runs of a file to a record: how many were added, and how many had been there before.

    Read as a whole before any is added; what an import that was cut left half-written is done anew.

    Raises:
        SettingError: the file can't be read, or is not of this form; names the line.
    """
    records = read_file(file)
    client = MlflowClient(storage.tracking_uri)
    known: dict[str, str] = {}
    for run in search_runs(client, ""):
        if schema.IMPORTED in run.data.tags and run.info.status == "RUNNING":
            client.delete_run(run.info.run_id)
        else:
            known[_original(run)] = run.info.run_id
    added = 0
    # parents first, as their runs have new ids
    for record in sorted(records, key=lambda record: PARENT in record.tags):
        if record.run_id in known:
            continue
        tags = {**record.tags, schema.IMPORTED: record.run_id}
        if PARENT in tags:
            tags[PARENT] = known.get(tags[PARENT], tags[PARENT])
        experiment = experiment_named(client, storage, record.experiment)
        run = client.create_run(experiment, start_time=record.started, tags=tags)
        parameters = [Param(name, text) for name, text in record.parameters.items()]
        for start in range(0, len(parameters), MOST_PARAMETERS):
            client.log_batch(run.info.run_id, params=parameters[start : start + MOST_PARAMETERS], synchronous=True)
        metrics = [Metric(name, value, record.ended, 0) for name, value in record.metrics.items()]
        client.log_batch(run.info.run_id, metrics=metrics, synchronous=True)
        client.set_terminated(run.info.run_id, record.status, record.ended)
        known[record.run_id], added = run.info.run_id, added + 1
    return added, len(records) - added


def frame_of(records: Sequence[RecordedRun]) -> pd.DataFrame:
    """The trainings among records, as `linflab.reports.records.read_runs` has them."""
    trials = [record for record in records if record.tags.get(schema.KIND) == "trial"]
    return pd.DataFrame(
        {"run_id": trial.run_id, "status": trial.status, "started": trial.started}
        | trial.tags | trial.parameters | trial.metrics
        for trial in sorted(trials, key=lambda trial: (-trial.started, trial.run_id))
    )  # fmt: skip


def read_file(file: Path) -> list[RecordedRun]:
    """The runs of a file.

    Raises:
        SettingError: it can't be read, or is not of this form; names the line.
    """
    try:
        head, *lines = file.read_text(encoding="utf-8").splitlines() or [""]
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no path
        raise SettingError(f"file={file}: can't be read ({error})") from None
    if head != HEAD:
        raise SettingError(f"file={file}: was not written by `linflab records export`: its first line must be {HEAD}")
    records = []
    for number, line in enumerate(lines, start=2):
        try:
            records.append(RecordedRun.model_validate_json(line))
        except ValidationError as error:
            complaint = error.errors()[0]
            place = ".".join(str(part) for part in complaint["loc"])
            raise SettingError(
                f"file={file}: line {number}: {place} {complaint['msg'][0].lower()}{complaint['msg'][1:]}"
            ) from None
    return records
