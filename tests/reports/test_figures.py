"""Figures: what they show, and what they leave out."""

import pandas as pd
import pytest

from linflab.reports import schema
from linflab.reports.figures import learning_curves, slice_figure


def test_learning_curves_leave_out_what_is_missing() -> None:
    """Networks without distances have no p, and trainings on all images no validation."""
    history = {
        schema.VALIDATION_CLEAN: {1: 0.5, 2: 0.7},
        schema.TRAIN_LOSS: {1: 1.0, 2: 0.5},
        schema.P: {1: 8.0},
        schema.LEARNING_RATE: {1: 0.1, 2: 0.05},
    }
    shown = {schema.P: "p (log)", schema.VALIDATION_CLEAN: "accuracy on validation (%)"}
    for left_out, panel in [("", ""), *shown.items()]:
        figure = learning_curves({name: curve for name, curve in history.items() if name != left_out}, "IBP")
        labels = [axes.get_ylabel() for axes in figure.axes]
        assert len(labels) == 4 - bool(left_out) and panel not in labels


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([0.01, 0.1, 1.0, 10.0, 100.0], "log"),  # drawn by ratios
        ([2.86e-5, 0.05, 0.1, 0.15, 0.2, 0.25], "linear"),  # evenly drawn, one of them near 0
        ([64.0, 96.0, 128.0], "linear"),
        ([0.0, 1.0, 100.0], "linear"),
    ],
)
def test_a_setting_has_the_axis_on_which_it_is_spread(values: list[float], scale: str) -> None:
    trials = pd.DataFrame({"optimizer.learning_rate": map(str, values), "val": 0.5})
    figure = slice_figure(trials, ["optimizer.learning_rate"], "val", "certified accuracy")
    assert [axes.get_xscale() for axes in figure.axes] == [scale]
