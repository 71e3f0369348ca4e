"""Figures: what they show, and what they leave out."""

from linflab.reports import schema
from linflab.reports.figures import learning_curves


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
