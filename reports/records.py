"""The records of MLflow as a tidy DataFrame: one row a trained network."""

from datetime import datetime

import pandas as pd
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from linflab.reports import schema


def read_trials(tracking_uri: str, sweep: str) -> pd.DataFrame:
    """All trials of a sweep, one row each.

    Columns: `run_id`, `status` (FINISHED, FAILED, KILLED, RUNNING), and every tag, parameter and metric by the name
    it has in the record (`linflab.reports.schema`). Parameters are strings, as MLflow keeps
    them; what a run lacks is NaN.

    Raises:
        LookupError: there is no sweep of this name; names those that there are.
    """
    client = MlflowClient(tracking_uri)
    names = sweep_names(client)
    if sweep not in names:  # compared here, since a name with a quote would end the query below
        raise LookupError(f"sweep={sweep}: there is no such sweep; there are: {', '.join(names) or 'none yet'}")
    runs = search_runs(client, f"tags.`{schema.SWEEP}` = '{sweep}' AND tags.`{schema.KIND}` = 'trial'")
    return pd.DataFrame([_row(run) for run in runs])


def read_sweeps(tracking_uri: str) -> pd.DataFrame:
    """All sweeps, the latest first, one row each.

    Columns: `sweep`, `recipe`, `started` (in local time), `state` (finished, failed, killed, running), `budget` (what
    was asked for), `finished`, `failed` (trials that ended so), and `best`: the best certified accuracy on validation,
    a share, or NaN.
    """
    client = MlflowClient(tracking_uri)
    parents = search_runs(client, f"tags.`{schema.KIND}` = 'sweep'")
    trials = pd.DataFrame([_row(run) for run in search_runs(client, f"tags.`{schema.KIND}` = 'trial'")])
    trials = trials.reindex(columns=trials.columns.union([schema.SWEEP, "status", schema.BEST_VALIDATION_CERTIFIED]))
    rows = []
    for parent in parents:
        tags, mine = parent.data.tags, trials[trials[schema.SWEEP] == parent.data.tags[schema.SWEEP]]
        best = parent.data.metrics.get(schema.BEST_VALIDATION_CERTIFIED)  # of those in full, where there was a race
        rows.append(
            {
                "sweep": tags[schema.SWEEP],
                "recipe": tags.get(schema.RECIPE, ""),
                "started": datetime.fromtimestamp(parent.info.start_time / 1000).strftime("%Y-%m-%d %H:%M"),
                "state": parent.info.status.lower(),
                "budget": tags.get(schema.BUDGET, ""),
                "finished": int((mine["status"] == "FINISHED").sum()),
                "failed": int((mine["status"] == "FAILED").sum()),
                "best": float(mine[schema.BEST_VALIDATION_CERTIFIED].max()) if best is None else best,
            }
        )
    columns = ["sweep", "recipe", "started", "state", "budget", "finished", "failed", "best"]
    return pd.DataFrame(rows, columns=columns)


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


def _row(run: Run) -> dict[str, str | float]:
    return {
        "run_id": run.info.run_id,
        "status": run.info.status,
        **run.data.tags,
        **run.data.params,
        **run.data.metrics,
    }
