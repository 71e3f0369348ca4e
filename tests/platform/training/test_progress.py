"""The live view of a training fits every terminal; without one, each epoch prints a line."""

import io
import math

import pytest
import torch
from rich.console import Console

from linflab.platform.cli.progress import TrainingProgress, fit_line
from linflab.platform.config.overrides import load_config
from linflab.platform.training.evaluation import Accuracies, ScoringReport
from linflab.platform.training.loop import EpochMetrics, StepMetrics
from linflab.platform.training.trainer import ScheduledValues
from tests.conftest import RECIPE


def render_line(bar: TrainingProgress) -> str:
    """Return the line that the bar shows."""
    console = Console(file=io.StringIO(), width=bar.console.width, force_terminal=True)
    console.print(bar.line.progress.get_renderable())
    (line,) = [line for line in console.file.getvalue().splitlines() if line.strip()]  # type: ignore[attr-defined]
    return line.rstrip()


@pytest.mark.parametrize("width", [60, 80, 100, 130])
def test_live_view_shows_epoch_step_and_times_at_every_width(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    bar = TrainingProgress(console, load_config(RECIPE, ["training.epochs=800"]))
    loss = torch.tensor(0.5)
    bar.on_step(StepMetrics(step=1, steps=312000, p=8.0, loss=loss))
    values = ScheduledValues(p=8.0, learning_rate=0.1, cross_entropy_weight=0.1, eps=0.0)
    bar.on_epoch(EpochMetrics(1, values, 0.5, Accuracies(clean=0.9, certified=0.8), 0.8, 1.0))
    bar.on_step(StepMetrics(step=311999, steps=312000, p=999.0, loss=loss))
    line = render_line(bar)
    assert len(line) <= width
    for part in ("epoch=800/800", "step=311999/312000", "time=0:00:00", "left=0:00:00"):
        assert part in line
    assert ("val_certified=80.0%" in line) == (width >= 130)
    bar.on_score(ScoringReport(0, 10000))
    bar.on_score(ScoringReport(3000, 10000))
    line = render_line(bar)
    assert len(line) <= width and "3000/10000" in line and "left=0:00:00" in line
    bar.on_step(StepMetrics(step=312000, steps=312000, p=999.0, loss=loss))  # a late report
    assert render_line(bar).startswith(line.split()[0])


def test_line_drops_optional_parts_that_do_not_fit() -> None:
    needed, optional = ["epoch=1/2", "step=1/4"], ["p=8", "train_loss=0.5000"]
    assert fit_line(needed, optional, 0.5, 26) == "epoch=1/2 step=1/4 p=8"
    assert fit_line(needed, optional, 0.5, 52) == f"epoch=1/2 {'━' * 5 + '·' * 5} step=1/4 p=8 train_loss=0.5000"
    assert len(fit_line(needed, optional, 0.5, 10)) == 10
    assert fit_line(needed, [], None, 80) == "epoch=1/2 step=1/4"


@pytest.mark.parametrize(("recipe", "is_shown"), [("digits_eps0.1_ibp", False), (RECIPE, True)])
def test_p_is_shown_for_distance_networks_only(recipe: str, is_shown: bool) -> None:
    text = io.StringIO()
    bar = TrainingProgress(Console(file=text), load_config(recipe))
    bar.on_epoch(
        EpochMetrics(1, ScheduledValues(math.inf, 0.1, 0.0, 0.1), 0.5, Accuracies(clean=0.9, certified=0.8), 0.8, 1.0)
    )
    assert (" p=inf " in text.getvalue()) == is_shown
    assert "train_loss=0.5000 val_clean=90.0% val_certified=80.0% time=1.0s" in text.getvalue()
