"""Which of the settings that a sweep searched mattered most."""

import json
import warnings

import optuna
import pandas as pd

from linflab.reports import schema

optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every study it makes

ENOUGH = 12  # trials
MOST = 1000  # evenly spread over those that there are
DEPTH = 6  # of the forest's trees: its time grows with the square of their leaves


def importances(trials: pd.DataFrame, metric: str) -> dict[str, float]:
    """Importance of each setting for a metric, relative to one another (their sum is 1), the largest first.

    Of the variance between trials, as a random forest models it, the part that the setting explains alone; noise looks
    like differences too, so it needs many trials. {} for fewer than `ENOUGH`.

    Trials of one length and one seed are compared: those of a race's first round. Settings that only some trials have
    are left out. Functional ANOVA (Hutter et al., ICML 2014), as in Optuna.

    Args:
        trials: what `read_trials` returns.
        metric: a column of it.
    """
    if metric not in trials or schema.JOB not in trials:
        return {}
    found = [(json.loads(job), value) for job, value in zip(trials[schema.JOB], trials[metric], strict=True)]
    points = [(job["point"], value) for job, value in found if job["round"] == 1 and not job["repeat"]]
    points = [(point, value) for point, value in points if not pd.isna(value)]
    points = points[:: -(-len(points) // MOST)] if points else []
    if len(points) < ENOUGH:
        return {}
    table = pd.DataFrame([point for point, _ in points])
    distributions = {str(path): _distribution(column) for path, column in table.items() if column.notna().all()}
    distributions = {path: found for path, found in distributions.items() if not found.single()}
    if not distributions or len({value for _, value in points}) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    for point, value in points:
        own = {path: point[path] for path in distributions}
        study.add_trial(optuna.create_trial(params=own, distributions=distributions, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(
            optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.FanovaImportanceEvaluator(max_depth=DEPTH, seed=0)
            )
        )


def _distribution(column: pd.Series) -> optuna.distributions.BaseDistribution:
    """A distribution that has all values of a setting."""
    values = column.tolist()
    if any(isinstance(value, str | bool) for value in values):
        return optuna.distributions.CategoricalDistribution(sorted(set(values), key=str))
    low, high = min(values), max(values)
    return optuna.distributions.FloatDistribution(low, high, log=low > 0 and high / low > 10)
