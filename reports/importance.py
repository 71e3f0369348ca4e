"""Importance of the searched settings of a sweep."""

import json
import warnings

import optuna
import pandas as pd

from linflab.reports import schema

MIN_TRIALS = 12
MAX_TRIALS = 1000  # number of trials used, spread evenly over all
MAX_TREE_DEPTH = 6  # time grows with the square of the number of leaves


def param_importances(trials: pd.DataFrame, metric: str) -> dict[str, float]:
    """Return the relative importance of each setting for a metric, largest first; the sum is 1.

    The importance is the fraction of variance between trials that a setting explains by itself in a random forest
    (functional ANOVA of Optuna; Hutter et al., ICML 2014). Noise also adds variance, so the estimate needs many trials.
    Only trials of the first rung are used, since they have equal budget and seed. Settings that some trials lack are
    excluded.

    Args:
        trials: Trials, as returned by `read_trials`.
        metric: A column of `trials`.

    Returns:
        Importance by dotted path; empty for fewer than `MIN_TRIALS` trials.
    """
    if metric not in trials or schema.TRIAL_SPEC not in trials:
        return {}
    trial_values = [
        (json.loads(job), value) for job, value in zip(trials[schema.TRIAL_SPEC], trials[metric], strict=True)
    ]
    points = [(job["params"], value) for job, value in trial_values if job["rung"] == 1 and not job["seed_index"]]
    points = [(point, value) for point, value in points if not pd.isna(value)]
    points = points[:: -(-len(points) // MAX_TRIALS)] if points else []
    if len(points) < MIN_TRIALS:
        return {}
    table = pd.DataFrame([point for point, _ in points])
    distributions = {str(path): _distribution(column) for path, column in table.items() if column.notna().all()}
    distributions = {path: distribution for path, distribution in distributions.items() if not distribution.single()}
    if not distributions or len({value for _, value in points}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # Optuna logs every new study
    study = optuna.create_study(direction="maximize")
    for point, value in points:
        params = {path: point[path] for path in distributions}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(
            optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.FanovaImportanceEvaluator(max_depth=MAX_TREE_DEPTH, seed=0)
            )
        )


def _distribution(column: pd.Series) -> optuna.distributions.BaseDistribution:
    """Return a distribution that covers all values of a setting."""
    values = column.tolist()
    if any(isinstance(value, str | bool) for value in values):
        return optuna.distributions.CategoricalDistribution(sorted(set(values), key=str))
    low, high = min(values), max(values)
    return optuna.distributions.FloatDistribution(low, high, log=low > 0 and high / low > 10)
