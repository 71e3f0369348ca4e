"""The records of MLflow as a tidy DataFrame: one row a run.

A database is asked directly, by MLflow's own definitions of its tables: making objects of MLflow for 10,000 runs takes
more than ten times as long. A server is asked by MLflow's client.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

import pandas as pd
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlParam, SqlRun, SqlTag
from mlflow.tracking import MlflowClient
from sqlalchemy import ColumnElement, Engine, create_engine, inspect, select
from sqlalchemy.exc import SQLAlchemyError

from linflab.reports import schema

TAGS = ("linflab.", "mlflow.")  # what their names begin with


def read_trials(tracking_uri: str, sweep: str) -> pd.DataFrame:
    """All trials of a sweep, one row each, as `read_runs` has them.

    Raises:
        LookupError: there is no sweep of this name; names those that there are.
    """
    trials = read_runs(tracking_uri, {schema.KIND: "trial", schema.SWEEP: sweep})
    if trials.empty:
        names = read_runs(tracking_uri, {schema.KIND: "sweep"}).get(schema.SWEEP, pd.Series(dtype=object)).tolist()
        if sweep not in names:
            raise LookupError(f"sweep={sweep}: there is no such sweep; there are: {', '.join(names) or 'none yet'}")
    return trials


def read_runs(tracking_uri: str, tags: Mapping[str, str]) -> pd.DataFrame:
    """All runs that have these tags, but for deleted ones, the latest first, one row each.

    Columns: `run_id`, `status` (FINISHED, FAILED, KILLED, RUNNING), `started` (milliseconds since 1970), and every
    parameter, and every tag and metric of ours or MLflow's, by the name it has in the record
    (`linflab.reports.schema`); those that users add are left out. Parameters are strings, as MLflow keeps them; what a
    run lacks is NaN.

    Raises:
        sqlalchemy.exc.SQLAlchemyError, mlflow.exceptions.MlflowException: the store can't be read.
    """
    rows = _from_server(tracking_uri, tags) if tracking_uri.startswith("http") else _from_database(tracking_uri, tags)
    return pd.DataFrame(rows)


def _from_database(uri: str, tags: Mapping[str, str]) -> list[dict[str, object]]:
    engine = create_engine(uri)
    try:
        if not inspect(engine).has_table(SqlRun.__tablename__):  # made, and nothing recorded yet
            return []
        return _query(engine, tags)
    finally:
        engine.dispose()


def _query(engine: Engine, tags: Mapping[str, str]) -> list[dict[str, object]]:
    chosen: list[ColumnElement[bool]] = [SqlRun.lifecycle_stage == "active"]
    for key, value in tags.items():
        having: Any = select(SqlTag.run_uuid).where(SqlTag.key == key, SqlTag.value == value)
        chosen.append(SqlRun.run_uuid.in_(having))
    order = (SqlRun.start_time.desc(), SqlRun.run_uuid)
    with engine.connect() as connection:
        runs = connection.execute(
            select(SqlRun.run_uuid, SqlRun.status, SqlRun.start_time).where(*chosen).order_by(*order)
        )
        rows: dict[str, dict[str, object]] = {
            run_id: {"run_id": run_id, "status": status, "started": started} for run_id, status, started in runs
        }

        def of_chosen(run_id: Any, *columns: Any) -> Iterator[Any]:
            of_runs = select(run_id, *columns).join(SqlRun, SqlRun.run_uuid == run_id).where(*chosen)
            return iter(connection.execute(of_runs))

        names: dict[str, str] = {}  # each once in memory, however many runs have it
        metric = SqlLatestMetric
        # a run that starts in between is in what follows, but not in rows
        for run_id, key, text in of_chosen(SqlTag.run_uuid, SqlTag.key, SqlTag.value):
            if run_id in rows and key.startswith(TAGS):
                rows[run_id][names.setdefault(key, key)] = names.setdefault(text, text)
        for run_id, key, text in of_chosen(SqlParam.run_uuid, SqlParam.key, SqlParam.value):
            if run_id in rows:
                rows[run_id][names.setdefault(key, key)] = names.setdefault(text, text)
        for run_id, key, value, is_nan in of_chosen(metric.run_uuid, metric.key, metric.value, metric.is_nan):
            if run_id in rows and "/" in key:
                rows[run_id][names.setdefault(key, key)] = float("nan") if is_nan else value
    return list(rows.values())


def _from_server(uri: str, tags: Mapping[str, str]) -> list[dict[str, object]]:
    client = MlflowClient(uri)
    query = " AND ".join(f"tags.`{key}` = {_quoted(value)}" for key, value in tags.items())
    return [
        {
            "run_id": run.info.run_id,
            "status": run.info.status,
            "started": run.info.start_time,
            **{name: value for name, value in run.data.tags.items() if name.startswith(TAGS)},
            **run.data.params,
            **{name: value for name, value in run.data.metrics.items() if "/" in name},
        }
        for run in search_runs(client, query)
    ]


def _quoted(text: str) -> str:
    return f'"{text}"' if "'" in text else f"'{text}'"


def read_history(client: MlflowClient, run_id: str) -> dict[str, dict[int, float]]:
    """The metrics of an epoch (`linflab.reports.schema`) that a run has, each by epoch."""
    names = (
        schema.P, schema.LEARNING_RATE, schema.TRAIN_LOSS, schema.VALIDATION_CLEAN, schema.VALIDATION_CERTIFIED
    )  # fmt: skip
    there = client.get_run(run_id).data.metrics
    return {
        name: {metric.step: metric.value for metric in client.get_metric_history(run_id, name)}
        for name in names
        if name in there
    }


def parameters(runs: pd.DataFrame) -> list[str]:
    """Those columns of `read_runs` that are settings of the experiment."""
    own = ("run_id", "status", "started")
    return [name for name in runs.columns if "/" not in name and name not in own and not name.startswith(TAGS)]


def read_experiments(tracking_uri: str) -> dict[str, str]:
    """The ids of MLflow's experiments by name, but for the one that is always there."""
    with suppress(SQLAlchemyError, MlflowException):
        found = MlflowClient(tracking_uri).search_experiments(order_by=["name"])
        return {each.name: each.experiment_id for each in found if each.name != "Default"}
    return {}


def read_sweeps(tracking_uri: str) -> pd.DataFrame:
    """All sweeps, the latest first, one row each.

    Columns: `sweep`, `recipe`, `started` (in local time), `state` (finished, failed, killed, running), `budget` (what
    was asked for), `finished`, `failed` (trials that ended so), and `best`: the best certified accuracy on validation,
    a share, or NaN.
    """
    needed = [schema.SWEEP, schema.RECIPE, schema.BUDGET, "status", "started", schema.BEST_VALIDATION_CERTIFIED]
    parents = read_runs(tracking_uri, {schema.KIND: "sweep"}).reindex(columns=needed)
    trials = read_runs(tracking_uri, {schema.KIND: "trial"}).reindex(columns=needed)
    columns = ["sweep", "recipe", "started", "state", "budget", "finished", "failed", "best"]
    if parents.empty:
        return pd.DataFrame(columns=columns)
    mine = trials.groupby(schema.SWEEP)
    finished = mine["status"].agg(lambda of: int((of == "FINISHED").sum()))
    failed = mine["status"].agg(lambda of: int((of == "FAILED").sum()))
    best = mine[schema.BEST_VALIDATION_CERTIFIED].max()
    names = parents[schema.SWEEP]
    return pd.DataFrame(
        {
            "sweep": names,
            "recipe": parents[schema.RECIPE].fillna(""),
            "started": parents["started"].map(_local_time),
            "state": parents["status"].str.lower(),
            "budget": parents[schema.BUDGET].fillna(""),
            "finished": names.map(finished).fillna(0).astype(int),
            "failed": names.map(failed).fillna(0).astype(int),
            # its own is of those in full, where there was a race
            "best": parents[schema.BEST_VALIDATION_CERTIFIED].fillna(names.map(best)).astype(float),
        },
        columns=columns,
    )


def list_runs(tracking_uri: str) -> pd.DataFrame:
    """All trainings, the latest first, one row each.

    Columns: `run` (its id), `dataset`, `eps`, `method`, `sweep` and `trial` (empty where there are none), `started` (in
    local time), `state` (finished, failed, killed, running), and `validation` and `test`: certified accuracies, shares,
    or NaN.
    """
    columns = {
        "run_id": "run", "dataset": "dataset", "eps": "eps", "method": "method", schema.SWEEP: "sweep",
        schema.TRIAL: "trial", "started": "started", "status": "state",
        schema.BEST_VALIDATION_CERTIFIED: "validation", schema.TEST_CERTIFIED: "test",
    }  # fmt: skip
    found = read_runs(tracking_uri, {schema.KIND: "trial"}).reindex(columns=list(columns)).rename(columns=columns)
    for name in ("dataset", "eps", "method", "sweep", "trial"):
        found[name] = found[name].fillna("")
    found["started"] = found["started"].map(_local_time)
    found["state"] = found["state"].str.lower() if len(found) else found["state"]
    return found


def _local_time(milliseconds: float) -> str:
    return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M")


def sweep_names(client: MlflowClient) -> list[str]:
    """All sweeps, the latest first."""
    return [run.data.tags[schema.SWEEP] for run in search_runs(client, f"tags.`{schema.KIND}` = 'sweep'")]


def search_runs(client: MlflowClient, query: str) -> list[Run]:
    """All runs that match, over all of MLflow's experiments and pages, the latest first."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(experiments, query, max_results=1000, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs
