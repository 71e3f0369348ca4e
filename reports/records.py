"""MLflow runs as a tidy DataFrame with one row per run.

Databases are queried directly, through MLflow's table definitions, since creating MLflow objects for 10,000 runs would
take more than ten times as long. Servers are queried through MLflow's client.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

import pandas as pd
from mlflow.entities import Metric, Param, Run, RunData, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlParam, SqlRun, SqlTag
from mlflow.tracking import MlflowClient
from sqlalchemy import ColumnElement, Engine, create_engine, inspect, select
from sqlalchemy.exc import SQLAlchemyError

from linflab.reports import schema
from linflab.reports.added_settings import ADDED_TEXTS
from linflab.reports.formatting import describe_status
from linflab.reports.labels import is_compared
from linflab.reports.literature import parse_eps, parse_number
from linflab.reports.methods import KINDS, describe_method
from linflab.reports.renames import current_metrics, current_settings, current_tags

TAG_PREFIXES = ("linflab.", "mlflow.")
_RECORDED = {"true": "True", "false": "False", "null": "None"}  # YAML value: value in MLflow


def read_trials(tracking_uri: str, sweep: str) -> pd.DataFrame:
    """Return all trials of a sweep, one row each, with the columns of `read_runs`.

    Raises:
        LookupError: If there is no sweep of this name; the message lists the existing sweeps.
    """
    trials = read_runs(tracking_uri, {schema.KIND: "trial", schema.SWEEP: sweep})
    if trials.empty:
        names = read_runs(tracking_uri, {schema.KIND: "sweep"}).get(schema.SWEEP, pd.Series(dtype=object)).tolist()
        if sweep not in names:
            raise LookupError(
                f"sweep={sweep}: not found; "
                + (f"use one of {', '.join(names)}" if names else "there are no sweeps yet")
            )
    return trials


def read_runs(tracking_uri: str, tags: Mapping[str, str]) -> pd.DataFrame:
    """Return all runs that have these tags, except deleted ones, latest first, one row each.

    Args:
        tracking_uri: URI of a database or an MLflow server.
        tags: Required values by tag.

    Returns:
        Columns `run_id`, `status` (FINISHED, FAILED, KILLED, RUNNING), `start_time` (milliseconds since 1970), all
        parameters as strings, and all tags and metrics of linflab and MLflow by name (`linflab.reports.schema`). Tags
        and metrics that users add are excluded. Missing values are NaN.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: If the database cannot be read.
        mlflow.exceptions.MlflowException: If the server cannot be read.
    """
    rows = _from_server(tracking_uri, tags) if tracking_uri.startswith("http") else _from_database(tracking_uri, tags)
    return pd.DataFrame(rows)


def _from_database(uri: str, tags: Mapping[str, str]) -> list[dict[str, object]]:
    engine = create_engine(uri)
    try:
        if not inspect(engine).has_table(SqlRun.__tablename__):  # the database is new and has no tables
            return []
        return _query(engine, tags)
    finally:
        engine.dispose()


def _query(engine: Engine, tags: Mapping[str, str]) -> list[dict[str, object]]:
    conditions: list[ColumnElement[bool]] = [SqlRun.lifecycle_stage == "active"]
    for key, value in tags.items():
        tagged_runs: Any = select(SqlTag.run_uuid).where(SqlTag.key == key, SqlTag.value == value)
        conditions.append(SqlRun.run_uuid.in_(tagged_runs))
    order = (SqlRun.start_time.desc(), SqlRun.run_uuid)
    with engine.connect() as connection:
        runs = connection.execute(
            select(SqlRun.run_uuid, SqlRun.status, SqlRun.start_time).where(*conditions).order_by(*order)
        )
        rows: dict[str, dict[str, object]] = {
            run_id: {"run_id": run_id, "status": status, "start_time": start_time}
            for run_id, status, start_time in runs
        }

        def select_rows(run_id: Any, *columns: Any) -> Iterator[Any]:
            query = select(run_id, *columns).join(SqlRun, SqlRun.run_uuid == run_id).where(*conditions)
            return iter(connection.execute(query))

        names: dict[str, str] = {}  # shares equal strings between runs
        metric = SqlLatestMetric
        # Runs that start during the queries are not in `rows`.
        tags_by_run: dict[str, dict[str, str]] = {}
        for run_id, key, text in select_rows(SqlTag.run_uuid, SqlTag.key, SqlTag.value):
            if run_id in rows and key.startswith(TAG_PREFIXES):
                tags_by_run.setdefault(run_id, {})[key] = text
        for run_id, own_tags in tags_by_run.items():
            for name, current in current_tags(own_tags).items():
                rows[run_id][names.setdefault(name, name)] = names.setdefault(current, current)
        for run_id, key, text in select_rows(SqlParam.run_uuid, SqlParam.key, SqlParam.value):
            if run_id in rows:
                for name, current in current_settings({key: text}).items():
                    rows[run_id][names.setdefault(name, name)] = names.setdefault(current, current)
        for run_id, key, value, is_nan in select_rows(metric.run_uuid, metric.key, metric.value, metric.is_nan):
            if run_id in rows and "/" in key:
                (name,) = current_metrics({key: value})
                rows[run_id][names.setdefault(name, name)] = float("nan") if is_nan else value
    return list(rows.values())


def _from_server(uri: str, tags: Mapping[str, str]) -> list[dict[str, object]]:
    client = MlflowClient(uri)
    query = " AND ".join(f"tags.`{key}` = {_quote(value)}" for key, value in tags.items())
    return [
        {
            "run_id": run.info.run_id,
            "status": run.info.status,
            "start_time": run.info.start_time,
            **{name: value for name, value in run.data.tags.items() if name.startswith(TAG_PREFIXES)},
            **run.data.params,
            **{name: value for name, value in run.data.metrics.items() if "/" in name},
        }
        for run in search_runs(client, query)
    ]


def _quote(text: str) -> str:
    return f'"{text}"' if "'" in text else f"'{text}'"


def read_metric_history(client: MlflowClient, run_id: str) -> dict[str, dict[int, float]]:
    """Return the per-epoch metrics of a run (`linflab.reports.schema`), each by epoch."""
    names = (
        schema.P, schema.LEARNING_RATE, schema.TRAIN_LOSS, schema.VALIDATION_CLEAN, schema.VALIDATION_CERTIFIED
    )  # fmt: skip
    metrics = client.get_run(run_id).data.metrics
    return {
        name: {metric.step: metric.value for metric in client.get_metric_history(run_id, name)}
        for name in names
        if name in metrics
    }


def param_columns(runs: pd.DataFrame) -> list[str]:
    """Return the columns of `read_runs` that are settings."""
    other_columns = ("run_id", "status", "start_time")
    return [
        name
        for name in runs.columns
        if "/" not in name and name not in other_columns and not name.startswith(TAG_PREFIXES)
    ]


def read_experiments(tracking_uri: str) -> dict[str, str]:
    """Return the ids of MLflow's experiments by name, except MLflow's default one."""
    with suppress(SQLAlchemyError, MlflowException):
        experiments = MlflowClient(tracking_uri).search_experiments(order_by=["name"])
        return {experiment.name: experiment.experiment_id for experiment in experiments if experiment.name != "Default"}
    return {}


def read_sweeps(tracking_uri: str) -> pd.DataFrame:
    """Return all sweeps, latest first, one row each.

    Args:
        tracking_uri: URI of a database or an MLflow server.

    Returns:
        Columns `sweep`, `recipe`, `start_time` (local time), `status` (finished, failed, interrupted, running),
        `budget` (as requested), `finished` and `failed` (numbers of trials), and `best_val_certified` (best certified
        accuracy on validation images, in [0, 1], or NaN).
    """
    parent_columns = [
        schema.SWEEP,
        schema.RECIPE,
        schema.BUDGET,
        "status",
        "start_time",
        schema.BEST_VALIDATION_CERTIFIED,
    ]
    parents = read_runs(tracking_uri, {schema.KIND: "sweep"}).reindex(columns=parent_columns)
    parents = parents[parents[schema.SWEEP].notna()].reset_index(drop=True)  # runs of other tools lack it
    trials = read_runs(tracking_uri, {schema.KIND: "trial"}).reindex(columns=parent_columns)
    columns = ["sweep", "recipe", "start_time", "status", "budget", "finished", "failed", "best_val_certified"]
    if parents.empty:
        return pd.DataFrame(columns=columns)
    sweep_trials = trials.groupby(schema.SWEEP)
    num_finished = sweep_trials["status"].agg(lambda statuses: int((statuses == "FINISHED").sum()))
    num_failed = sweep_trials["status"].agg(lambda statuses: int((statuses == "FAILED").sum()))
    best = sweep_trials[schema.BEST_VALIDATION_CERTIFIED].max()
    names = parents[schema.SWEEP]
    return pd.DataFrame(
        {
            "sweep": names,
            "recipe": parents[schema.RECIPE].fillna(""),
            "start_time": parents["start_time"].map(_local_time),
            "status": parents["status"].map(describe_status),
            "budget": parents[schema.BUDGET].fillna(""),
            "finished": names.map(num_finished).fillna(0).astype(int),
            "failed": names.map(num_failed).fillna(0).astype(int),
            # In successive halving, the parent run has the best value of the trials with the full budget.
            "best_val_certified": parents[schema.BEST_VALIDATION_CERTIFIED].fillna(names.map(best)).astype(float),
        },
        columns=columns,
    )


def list_runs(
    tracking_uri: str, where: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Return all training runs, latest first, one row each.

    Args:
        tracking_uri: URI of a database or an MLflow server.
        where: Required values by column or by dotted path of a setting.
        tags: Required values by user tag.

    Returns:
        Columns `run` (id), `name`, `dataset`, `eps`, `method`, `settings` (a dictionary by dotted path, with the
        settings that differ between runs of the same sweep, method, dataset and eps), `sweep` and `trial` (empty for
        runs outside of sweeps), `tags` (dictionary of user tags), `start_time` (local time), `status` (finished,
        failed, interrupted, running), and the accuracies `val_certified`, `clean`, `robust` and `test_certified` in
        [0, 1] or NaN.

    Raises:
        LookupError: If no run has a column or setting of `where`.
    """
    runs = read_runs(tracking_uri, {schema.KIND: "trial"})
    paths = param_columns(runs) if len(runs) else []
    columns = {
        "run_id": "run", schema.NAME: "name", "dataset": "dataset", "eps": "eps", "method": "method",
        "settings": "settings", schema.SWEEP: "sweep", schema.TRIAL: "trial", "tags": "tags",
        "start_time": "start_time", "status": "status", schema.BEST_VALIDATION_CERTIFIED: "val_certified",
        schema.TEST_CLEAN: "clean",
        schema.TEST_ROBUST: "robust", schema.TEST_CERTIFIED: "test_certified",
    }  # fmt: skip
    table = runs.reindex(columns=[*dict.fromkeys([*runs.columns, *columns])])
    texts = ["dataset", "eps", "method", schema.NAME, schema.SWEEP, schema.TRIAL]
    table[texts] = table[texts].fillna("").astype(str)
    if len(table):
        table["method"] = [
            describe_method({str(path): value for path, value in run.items()}, run["method"])
            for run in table.reindex(columns=[*KINDS, "method"]).to_dict("records")
        ]
    table["status"] = table["status"].map(describe_status)
    table["settings"] = pd.Series(_differences(table, paths), index=table.index, dtype=object)
    for key, value in (tags or {}).items():
        table = table[table.reindex(columns=[schema.USER_TAG + key])[schema.USER_TAG + key].eq(value)]
    for name, value in (where or {}).items():
        if (current := current_settings({name: value})) != {name: value}:
            ((path, current_value),) = current.items()
            raise LookupError(f"where={name}={value}: was renamed; use {path}={current_value}")
        column = {title: column for column, title in columns.items()}.get(name, name)
        if len(table) and (not has_values(table, column) or column in ("settings", "tags")):
            raise LookupError(
                f"where={name}: not found in any run; use a column such as status, or a setting such as seed"
            )
        table = table[[is_value(one, value) for one in logged_values(table, column, runs)]] if len(table) else table
    tag_columns = [column for column in table.columns if str(column).startswith(schema.USER_TAG)]
    user_tags = [
        {str(name).removeprefix(schema.USER_TAG): text for name, text in run.items() if text == text}
        for run in table[tag_columns].to_dict("records")
    ]
    table["tags"] = pd.Series(user_tags, index=table.index, dtype=object)
    result = table[list(columns)].rename(columns=columns).reset_index(drop=True)
    result["start_time"] = result["start_time"].map(_local_time)
    return result


def _differences(runs: pd.DataFrame, paths: Sequence[str]) -> list[dict[str, str]]:
    """Return for each run the settings that differ between runs of its sweep, method, dataset and eps."""
    compared_paths = [path for path in paths if is_compared(path)]
    missing_texts = {path: {"": ADDED_TEXTS[path]} for path in compared_paths if path in ADDED_TEXTS}
    differences: dict[object, dict[str, str]] = {}
    for _, group in runs.groupby(["dataset", "eps", "method", schema.SWEEP], sort=False):
        settings = group[compared_paths].fillna("").astype(str)
        differ = settings.loc[:, settings.replace(missing_texts).nunique() > 1]
        for index, run in differ.to_dict("index").items():
            differences[index] = {str(path): text for path, text in run.items() if text}
    return [differences.get(index, {}) for index in runs.index]


def has_values(runs: pd.DataFrame, path: str) -> bool:
    """Return whether any run has a value of a column, by `logged_values`."""
    return path in runs or (path in ADDED_TEXTS and not path.startswith("model."))


def logged_values(runs: pd.DataFrame, path: str, all_runs: pd.DataFrame) -> list[object]:
    """Return the value of a column for each run; None if it is missing.

    Runs of earlier versions get the value of a setting that these did not have. If it is a setting of the network, only
    those with the same kind of network as a run that has it do.

    Args:
        runs: Trials, as returned by `read_runs`.
        path: Column, such as a setting by dotted path.
        all_runs: Runs that show which kinds of networks have the setting.
    """
    values: list[object] = [None] * len(runs)
    if path in runs:
        values = [None if value != value else value for value in runs[path]]
    if path not in ADDED_TEXTS:
        return values
    if path.startswith("model."):
        has_path = all_runs["model.kind"][all_runs[path].notna()] if path in all_runs else ()
        is_applicable = runs.get("model.kind", pd.Series(index=runs.index, dtype=object)).isin(set(has_path)).tolist()
    else:
        is_applicable = [True] * len(runs)
    return [
        ADDED_TEXTS[path] if value is None and applicable else value
        for value, applicable in zip(values, is_applicable, strict=True)
    ]


def is_value(logged_value: object, text: str) -> bool:
    """Return whether a recorded value equals the value that `text` gives as YAML or as a fraction."""
    if str(logged_value) in (text, _RECORDED.get(text)):
        return True
    try:
        return float(str(logged_value)) == parse_number(text)
    except ValueError:
        return False


def _local_time(milliseconds: float) -> str:
    """Format a time given in milliseconds since 1970; empty if it is not valid."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError, TypeError):  # the time is missing, or in another unit
        return ""


def drop_incomplete_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that linflab logged completely; runs of other tools may have the same tags.

    Args:
        runs: Trials, as returned by `read_runs`.
    """
    is_complete = [_is_complete(run) for run in runs.to_dict("records")]
    return runs[pd.Series(is_complete, index=runs.index, dtype=bool)]


def _is_complete(run: Mapping[Hashable, Any]) -> bool:
    def has_texts(*names: str) -> bool:
        return all(isinstance(run.get(name), str) for name in names)

    if has_texts(schema.SWEEP) and not has_texts(schema.TRIAL):
        return False
    objectives = run.get(schema.OBJECTIVES)
    if isinstance(objectives, str) and not set(objectives.split(",")) <= schema.OBJECTIVE_METRICS.keys():
        return False
    if run["status"] != "FINISHED":  # the run may have just started
        return True
    counts = ("compute.workers", "compute.cpus_per_worker")
    return (
        has_texts(schema.METHOD, "dataset", "eps", *counts)
        and all(run[name].isdecimal() for name in counts)
        and _is_radius(run["eps"])
    )


def _is_radius(text: str) -> bool:
    try:
        parse_eps(text)
    except ValueError:
        return False
    return True


def sweep_names(client: MlflowClient) -> list[str]:
    """Return the names of all sweeps, latest first."""
    return [run.data.tags[schema.SWEEP] for run in search_runs(client, f"tags.`{schema.KIND}` = 'sweep'")]


def read_run(client: MlflowClient, run_id: str) -> Run:
    """Return a run with the current names of tags, parameters and metrics."""
    return _current(client.get_run(run_id))


def _current(run: Run) -> Run:
    tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
    data = RunData(
        [Metric(name, value, 0, 0) for name, value in current_metrics(metrics).items()],
        [Param(name, text) for name, text in current_settings(params).items()],
        [RunTag(name, text) for name, text in current_tags(tags).items()],
    )
    return Run(run.info, data)


def search_runs(client: MlflowClient, query: str, deleted: bool = False) -> list[Run]:
    """Return the runs of all MLflow experiments that match a query, latest first.

    The returned runs have the current names of tags, parameters and metrics.

    Args:
        client: A client of the tracking store.
        query: MLflow filter, with names of tags, parameters and metrics as stored.
        deleted: Return deleted runs instead of active ones.
    """
    stage = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(experiments, query, run_view_type=stage, max_results=1000, page_token=token)
        runs += map(_current, page)
        token = page.token
        if not token:
            return runs
