"""What a user sees while it works: a bar for one training, a table of trials for a sweep."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest
from types import TracebackType
from typing import Any, Self

from ray.tune import Callback
from ray.tune.experiment import Trial
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from linflab.platform.config import DISTANCE_NETS, Experiment
from linflab.platform.training import EpochReport, StepReport
from linflab.reports import schema
from linflab.reports.wording import describe_settings


class TrainingBar:
    """A bar with p of nets of distances, loss, validation accuracies and time left.

    A line an epoch where there is no terminal.
    """

    def __init__(self, console: Console, experiment: Experiment) -> None:
        self.console = console
        self.epochs = experiment.training.epochs
        self.has_distances = experiment.model.kind in DISTANCE_NETS
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("steps", total=None, state="")
        self.last = "first epoch"

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def on_step(self, report: StepReport) -> None:
        state = self._shown_p(report.p) + self.last
        self.progress.update(self.task, completed=report.step, total=report.steps, state=state)

    def on_epoch(self, report: EpochReport) -> None:
        self.last = f"loss {report.train_loss:.4f}"
        if report.validation is not None:
            scores = f"val {100 * report.validation.clean:.1f}% certified {100 * report.validation.certified:.1f}%"
            self.last = f"{self.last}  {scores}"
        if not self.console.is_terminal:
            self.console.print(
                f"epoch {report.epoch}/{self.epochs}  {self._shown_p(report.at.p)}{self.last}  {report.seconds:.1f} s",
                highlight=False,
            )
        if report.epoch == self.epochs:
            self.last = "scoring the network on the test images, under attack too ..."
            self.progress.update(self.task, state=self.last)
            if not self.console.is_terminal:
                self.console.print(self.last, highlight=False)

    def _shown_p(self, p: float) -> str:
        return f"p {_p(p)}  " if self.has_distances else ""


@dataclass(frozen=True)
class _Row:
    """A trial as the live table shows it."""

    label: str
    setting: str
    result: dict[str, Any]
    state: str

    def place(self) -> tuple[bool, float]:
        best = 0.0 if self.state == "running" else self.result.get(schema.BEST_VALIDATION_CERTIFIED, 0.0)
        return self.state != "running", -best


class SweepView(Callback):
    """A live table of the trials of a sweep; a line for each start and end where there is no terminal."""

    def __init__(self, console: Console, searched: Sequence[str], total: int | None, before: int = 0) -> None:
        self.console = console
        self.searched = searched
        self.total = total
        self.before = before  # trials that earlier launches ended
        self.began = time.monotonic()
        self.rows: dict[str, _Row] = {}  # by the trial's name
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=2, transient=True)

    def __getstate__(self) -> dict[str, Any]:
        # Ray pickles callbacks with the state of the sweep; a terminal can't be, and is of no use to another process
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(Console(quiet=True), (), None)  # type: ignore[misc]

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._update(trial, {})
        label = trial.config["trial"]
        self._say(label, f"started: {self.rows[label].setting}")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        self._update(trial, result)

    def ended(self, label: str, point: Mapping[str, Any], result: dict[str, Any], failure: str | None) -> None:
        """A trial has come to its end."""
        before = self.rows.get(label, _Row(label, self._setting(point), {}, ""))  # one that was refused never started
        state = "done" if failure is None else "failed"
        self.rows[label] = replace(before, result={**before.result, **result}, state=state)
        best = _percent(result.get(schema.BEST_VALIDATION_CERTIFIED))
        self._say(label, f"done: {best} certified on validation" if failure is None else f"failed: {failure}")

    def lost(self, label: str) -> None:
        """A trial's process has died."""
        before = self.rows.get(label, _Row(label, "", {}, ""))  # one that could not even start
        self.rows[label] = replace(before, state="lost")
        self._say(label, "lost its process; it goes on from its checkpoint")

    def _update(self, trial: Trial, result: dict[str, Any]) -> None:
        label = trial.config["trial"]
        if label not in self.rows:
            self.rows[label] = _Row(label, self._setting(json.loads(trial.config["job"])["point"]), {}, "")
        self.rows[label] = replace(self.rows[label], result={**self.rows[label].result, **result}, state="running")

    def _setting(self, point: Mapping[str, Any]) -> str:
        return describe_settings({path: point[path] for path in self.searched if path in point})

    def _say(self, label: str, text: str) -> None:
        if not self.console.is_terminal:
            of = "" if self.total is None else f" of {self.total}"
            self.console.print(f"trial {label}{of} {text}", highlight=False)

    def _render(self) -> Group:
        table = Table(expand=True, box=SIMPLE_HEAD)
        rows = list(self.rows.values())
        with_p = any(schema.P in row.result for row in rows)  # not of networks without distances
        for name in ("#", "Setting", "Epoch", *(["p"] * with_p), "Loss", "Val. certified", "Best", "State"):
            text = name in ("Setting", "State")
            table.add_column(name.replace(" ", "\n"), justify="left" if text else "right", no_wrap=name != "Setting")
        ended = self.before + sum(row.state in ("done", "failed") for row in rows)
        # running ones first, then the best: where the screen ends, the worst are left out
        for row in nsmallest(self.console.height, rows, key=_Row.place):
            table.add_row(
                row.label,
                row.setting,
                str(row.result.get("epoch", "")),
                *([_p(row.result[schema.P]) if schema.P in row.result else ""] * with_p),
                f"{row.result[schema.TRAIN_LOSS]:.4f}" if schema.TRAIN_LOSS in row.result else "",
                _percent(row.result.get(schema.VALIDATION_CERTIFIED)),
                _percent(row.result.get(schema.BEST_VALIDATION_CERTIFIED)),
                row.state,
            )
        seconds = time.monotonic() - self.began
        of = "" if self.total is None else f" of {self.total}"
        return Group(f"{ended}{of} trials ended, {seconds:.0f} s", table)


def _p(p: float) -> str:
    return "inf" if math.isinf(p) else f"{p:.3g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"
