"""Export of runs to a JSONL file and import into a storage, without weights and learning curves.

The first line names the format. Each further line is a run, oldest first. An imported run gets a new id and keeps
everything else; the tag `linflab.original_run_id` has its original id. Imported runs yield the same tables as the
original runs, and the same file when they are exported again.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import pandas as pd
from mlflow.entities import Metric, Param
from mlflow.entities import Run as MLflowRun
from mlflow.utils.validation import (
    MAX_ENTITY_KEY_LENGTH,
    MAX_EXPERIMENT_NAME_LENGTH,
    MAX_PARAM_VAL_LENGTH,
    MAX_TAG_VAL_LENGTH,
    path_not_unique,
    validate_param_and_metric_name,
)
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from linflab.platform.errors import InputError
from linflab.platform.files import read_text
from linflab.platform.tracking.mlflow import client_of, get_or_create_experiment
from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from linflab.reports.comparison import find_run
from linflab.reports.literature import parse_eps
from linflab.reports.outputs import write_whole
from linflab.reports.plain import shorten
from linflab.reports.records import TAG_PREFIXES, search_runs
from linflab.reports.renames import current_fields, current_metrics, current_settings, current_tags

NONNEGATIVE_METRICS = (
    schema.FLOPS, schema.PARAMETERS, schema.TRAIN_SECONDS, schema.EPOCH_SECONDS, schema.SWEEP_SECONDS,
    schema.BEST_EPOCH, schema.TEST_VIOLATIONS,
)  # fmt: skip
MAX_FILE_BYTES = 2**30
METRIC_GROUPS = ("train", "val", "best", "test", "model", "sweep")  # of linflab's metrics; users may log others
HEADER = '{"format": "linflab runs", "version": 2}'
HEAD_OF_VERSION_1 = '{"format": "linflab records", "version": 1}'  # has old names; is still readable
MAX_PARAMS_PER_BATCH = 100  # limit of MLflow
PARENT = "mlflow.parentRunId"


MAX_TIME_MS = 253_402_300_799_000  # the end of the year 9999, in milliseconds since 1970
MAX_SECONDS = 3e9  # a century of training
MAX_METRIC = 1e300  # MLflow's databases store larger values as infinity


class ExportedRun(BaseModel):
    """A run in an exported file, with its latest metrics.

    Validation rejects times that are not in milliseconds since 1970, accuracies outside [0, 1], negative counts and
    durations, and numbers that are not finite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    experiment: str  # name of the MLflow experiment
    status: Literal["FINISHED", "FAILED", "KILLED"]
    start_time: Annotated[int, Field(ge=0, strict=True)]  # milliseconds since 1970
    end_time: Annotated[int, Field(ge=0, strict=True)]
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]

    @model_validator(mode="before")
    @classmethod
    def _rename_old_names(cls, fields: Any, info: ValidationInfo) -> Any:
        if not isinstance(fields, dict) or (info.context or {}).get("version") != 1:
            return fields
        renamed_fields = current_fields("exported run", fields)
        current: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]
        current = {"tags": current_tags, "params": current_settings, "metrics": current_metrics}
        for name, rename in current.items():
            if isinstance(renamed_fields.get(name), dict):
                renamed_fields[name] = rename(renamed_fields[name])
        return renamed_fields

    @field_validator("start_time", "end_time")
    @classmethod
    def _check_time(cls, time: int) -> int:
        if time > MAX_TIME_MS:
            raise ValueError("must be in milliseconds since 1970, but is after the year 9999; check for nanoseconds")
        return time

    @field_validator("experiment")
    @classmethod
    def _check_experiment_name(cls, name: str) -> str:
        if not 0 < len(name) <= MAX_EXPERIMENT_NAME_LENGTH:
            raise ValueError(f"={shorten(name)}: must have from 1 to {MAX_EXPERIMENT_NAME_LENGTH} characters")
        return name

    @field_validator("tags", "params", "metrics")
    @classmethod
    def _check_names(cls, items: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        max_length = MAX_TAG_VAL_LENGTH if info.field_name == "tags" else MAX_PARAM_VAL_LENGTH
        for name, value in items.items():
            if not validate_param_and_metric_name(name) or path_not_unique(name) or len(name) > MAX_ENTITY_KEY_LENGTH:
                raise ValueError(
                    f"{shorten(name)!r}: must be a name of at most {MAX_ENTITY_KEY_LENGTH} letters, digits, spaces "
                    "and _-.:/ that is not an absolute path and has no empty or .. part"
                )
            if isinstance(value, str) and len(value) > max_length:
                raise ValueError(f"{name}={shorten(value)}: must have at most {max_length} characters")
        return items

    @field_validator("metrics")
    @classmethod
    def _check_metrics(cls, metrics: dict[str, float]) -> dict[str, float]:
        for name, value in metrics.items():
            if not abs(value) <= MAX_METRIC:
                raise ValueError(f"{name}={value}: must be a finite number; omit missing metrics")
            if "accuracy" in name and not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: must be a fraction in [0, 1]")
            if name in NONNEGATIVE_METRICS and value < 0:
                raise ValueError(f"{name}={value}: must not be negative")
            if name.endswith("seconds") and value > MAX_SECONDS:
                raise ValueError(f"{name}={value}: must be in seconds, but is more than a century")
        return metrics

    @model_validator(mode="after")
    def _check_run(self) -> Self:
        if self.end_time < self.start_time:
            raise ValueError(f"end_time={self.end_time}: must not be before start_time={self.start_time}")
        if self.tags.get(schema.KIND) == "trial" and "eps" in self.params:
            parse_eps(self.params["eps"])
        if self.tags.get(schema.KIND) == "trial" and self.status == "FINISHED":
            for name in ("dataset", "eps", "seed"):
                if name not in self.params:
                    raise ValueError(f"params.{name}: required for a finished trial, but missing")
        return self


def export_runs(storage: Storage, names: Sequence[str], file: Path) -> tuple[int, int]:
    """Write runs and sweeps to a file.

    Args:
        storage: The storage.
        names: Names of sweeps, run ids, and prefixes of run ids. If empty, all runs that have ended are exported,
            except trials of running sweeps.
        file: Output path.

    Returns:
        The number of exported runs, and the number of runs excluded because they or their sweep are running.

    Raises:
        InputError: If the file cannot be written, or a run cannot be exported.
        LookupError: If a run or sweep is not found or is still running, or if several runs match one name.
    """
    client = client_of(storage)
    logged_runs = [run for run in search_runs(client, "") if schema.KIND in run.data.tags]
    runs = [run for run in logged_runs if run.info.status != "RUNNING"]
    running_sweeps = {
        _sweep(run) for run in logged_runs if run.info.status == "RUNNING" and run.data.tags[schema.KIND] == "sweep"
    }
    ids = (
        _select_run_ids(logged_runs, names)
        if names
        else {run.info.run_id for run in runs if _sweep(run) not in running_sweeps}
    )
    selected_runs = [run for run in logged_runs if run.info.run_id in ids]
    for run in selected_runs:  # trials need their parent run, which must have ended
        if (name := _sweep(run)) in running_sweeps:
            raise LookupError(
                f"{name}: this sweep is not finished; finish an interrupted sweep with `linflab sweep --resume {name}`"
            )
        if run.info.status == "RUNNING":
            raise LookupError(f"{run.info.run_id}: this run is not finished; finish an interrupted run with `--resume`")
    experiments = {experiment.experiment_id: experiment.name for experiment in client.search_experiments()}
    original_ids = {run.info.run_id: _original(run) for run in logged_runs}
    lines = []
    for run in selected_runs:
        try:
            lines.append(_line(run, experiments, original_ids))
        except ValidationError as error:  # another tool uses the same tags
            raise InputError(f"run={run.info.run_id}: cannot be exported: {_format_validation_error(error)}") from None
    lines.sort(key=lambda line: (line.start_time, line.run_id))
    content = "\n".join([HEADER, *(json.dumps(line.model_dump()) for line in lines), ""]).encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda out: out.write(content))
    except OSError as error:
        raise InputError(f"file={file}: cannot be written ({error}); use another path") from None
    return len(lines), 0 if names else len(logged_runs) - len(selected_runs)


def _select_run_ids(runs: Sequence[MLflowRun], names: Sequence[str]) -> set[str]:
    """Return the ids of the runs whose sweep has one of these names, or whose id begins with one."""
    table = pd.DataFrame(
        {
            "run_id": [run.info.run_id for run in runs],
            schema.ORIGINAL_RUN_ID: [_original(run) for run in runs],
            schema.SWEEP: [_sweep(run) for run in runs],
        }
    )
    ids: set[str] = set()
    for name in names:
        trials = table[table[schema.SWEEP] == name]
        ids |= set((trials if len(trials) else find_run(table, name))["run_id"])
    return ids


def _sweep(run: MLflowRun) -> str | None:
    name: str | None = run.data.tags.get(schema.SWEEP)
    return name


def _original(run: MLflowRun) -> str:
    """Return the original id of a run, even if the run was imported several times since."""
    return str(run.data.tags.get(schema.ORIGINAL_RUN_ID, run.info.run_id))


def _line(run: MLflowRun, experiments: dict[str, str], originals: dict[str, str]) -> ExportedRun:
    tags = {name: text for name, text in sorted(run.data.tags.items()) if _belongs(name)}
    if PARENT in tags:
        tags[PARENT] = originals.get(tags[PARENT], tags[PARENT])
    return ExportedRun(
        run_id=_original(run),
        experiment=experiments[run.info.experiment_id],
        status=run.info.status,
        start_time=run.info.start_time,
        end_time=max(run.info.end_time or 0, run.info.start_time),  # the clock may have been set back
        tags=tags,
        params=dict(sorted(run.data.params.items())),
        metrics=_metrics(run),
    )


def _metrics(run: MLflowRun) -> dict[str, float]:
    """Return linflab's metrics of a run that are finite numbers."""
    metrics = sorted(run.data.metrics.items())
    return {name: value for name, value in metrics if _is_ours(name) and abs(value) <= MAX_METRIC}


def _belongs(tag: str) -> bool:
    """Return whether a tag describes the run, not the storage or user."""
    return tag.startswith(TAG_PREFIXES) and tag not in (
        schema.ORIGINAL_RUN_ID,
        "mlflow.user",
        "mlflow.log-model.history",
    )


def _is_ours(metric: str) -> bool:
    return metric.partition("/")[0] in METRIC_GROUPS and "/" in metric


class ImportCounts(NamedTuple):
    """Numbers of runs in an imported file."""

    imported: int
    present: int  # already in the storage, hence not imported
    outdated: int  # of these, earlier imports with other metrics than in the file


def import_runs(storage: Storage, file: Path) -> ImportCounts:
    """Import the runs of a file into a storage.

    The whole file is validated before any run is imported. Runs that an interrupted import left incomplete are imported
    again.

    Args:
        storage: The storage.
        file: Exported runs.

    Raises:
        InputError: If the file cannot be read or is not valid; the message names the line.
    """
    records = read_exported_runs(file)
    client = client_of(storage)
    run_ids: dict[str, str] = {}
    present: dict[str, MLflowRun] = {}
    for run in search_runs(client, ""):
        if schema.ORIGINAL_RUN_ID in run.data.tags and run.info.status == "RUNNING":
            client.delete_run(run.info.run_id)
        else:
            run_ids[_original(run)], present[_original(run)] = run.info.run_id, run
    num_imported = num_outdated = 0
    # Import parent runs first, since their trials refer to their new ids.
    for record in sorted(records, key=lambda record: PARENT in record.tags):
        if record.run_id in present:
            run = present[record.run_id]
            num_outdated += schema.ORIGINAL_RUN_ID in run.data.tags and _metrics(run) != record.metrics
            continue
        tags = {**record.tags, schema.ORIGINAL_RUN_ID: record.run_id}
        if PARENT in tags:
            tags[PARENT] = run_ids.get(tags[PARENT], tags[PARENT])
        experiment = get_or_create_experiment(client, storage, record.experiment)
        run = client.create_run(experiment, start_time=record.start_time, tags=tags)
        parameters = [Param(name, text) for name, text in record.params.items()]
        for start in range(0, len(parameters), MAX_PARAMS_PER_BATCH):
            client.log_batch(run.info.run_id, params=parameters[start : start + MAX_PARAMS_PER_BATCH], synchronous=True)
        metrics = [Metric(name, value, record.end_time, 0) for name, value in record.metrics.items()]
        client.log_batch(run.info.run_id, metrics=metrics, synchronous=True)
        client.set_terminated(run.info.run_id, record.status, record.end_time)
        run_ids[record.run_id], num_imported = run.info.run_id, num_imported + 1
    return ImportCounts(num_imported, len(records) - num_imported, num_outdated)


def to_dataframe(records: Sequence[ExportedRun]) -> pd.DataFrame:
    """Return the trials among exported runs, with the columns of `linflab.reports.records.read_runs`."""
    trials = [record for record in records if record.tags.get(schema.KIND) == "trial"]
    return pd.DataFrame(
        {"run_id": trial.run_id, "status": trial.status, "start_time": trial.start_time}
        | trial.tags | trial.params | trial.metrics
        for trial in sorted(trials, key=lambda trial: (-trial.start_time, trial.run_id))
    )  # fmt: skip


def read_exported_runs(file: Path) -> list[ExportedRun]:
    """Return the runs of an exported JSONL file.

    Raises:
        InputError: If the file cannot be read or is not valid; the message names the line.
    """
    try:
        head, *lines = read_text(file, MAX_FILE_BYTES).removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or invalid path
        raise InputError(
            f"file={file}: cannot be read ({error}); use a file written by `linflab runs export`"
        ) from None
    if head not in (HEADER, HEAD_OF_VERSION_1):
        raise InputError(f"file={file}: the first line must be {HEADER}; use a file written by `linflab runs export`")
    records = []
    for number, line in enumerate(lines, start=2):
        try:
            records.append(ExportedRun.model_validate_json(line, context={"version": 2 if head == HEADER else 1}))
        except ValidationError as error:
            raise InputError(f"file={file}: line {number}: {_format_validation_error(error)}") from None
    return records


def _format_validation_error(error: ValidationError) -> str:
    """Return the first validation error as one line, with its field."""
    details = error.errors()[0]
    path = ".".join(str(part) for part in details["loc"])
    cause = details.get("ctx", {}).get("error")
    message = str(cause) if isinstance(cause, ValueError) else details["msg"][0].lower() + details["msg"][1:]
    return f"{path} {message}".strip()
