"""What a user sees while it works: a bar for one training, a table of trials for a sweep."""

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from ray.tune import Callback
from ray.tune.experiment import Trial
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from linflab.platform.training import EpochReport, StepReport
from linflab.reports import schema
from linflab.reports.tables import describe_settings


class TrainingBar:
    """A bar with epoch, p, loss, validation accuracies and time left; a line an epoch where there is no terminal."""

    def __init__(self, console: Console, epochs: int) -> None:
        self.console = console
        self.epochs = epochs
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
        state = f"p {_p(report.p)}  {self.last}"
        self.progress.update(self.task, completed=report.step, total=report.steps, state=state)

    def on_epoch(self, report: EpochReport) -> None:
        self.last = f"loss {report.train_loss:.4f}"
        if report.validation is not None:
            scores = f"val {100 * report.validation.clean:.1f}% certified {100 * report.validation.certified:.1f}%"
            self.last = f"{self.last}  {scores}"
        if not self.console.is_terminal:
            self.console.print(
                f"epoch {report.epoch}/{self.epochs}  p {_p(report.at.p)}  {self.last}  {report.seconds:.1f} s",
                highlight=False,
            )
        if report.epoch == self.epochs:
            self.last = "scoring the network on the test images, under attack too ..."
            self.progress.update(self.task, state=self.last)
            if not self.console.is_terminal:
                self.console.print(self.last, highlight=False)


class SweepView(Callback):
    """A live table of the trials of a sweep; a line for each start and end where there is no terminal."""

    def __init__(self, console: Console, searched: Sequence[str], total: int) -> None:
        self.console = console
        self.searched = searched
        self.total = total
        self.began = time.monotonic()
        self.rows: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {}  # trial id: settings, result, state
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=2, transient=True)

    def __getstate__(self) -> dict[str, Any]:
        # Ray pickles callbacks with the state of the sweep; a terminal can't be, and is of no use to another process
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(Console(quiet=True), (), 0)  # type: ignore[misc]

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
        self._update(trial, {}, "running")
        self._say(trial, f"started: {self._settings(trial.config)}")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        self._update(trial, result, "running")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._update(trial, {}, "done")
        result = self.rows[trial.trial_id][1]
        self._say(trial, f"done: {_percent(result.get(schema.BEST_VALIDATION_CERTIFIED))} certified on validation")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._update(trial, {}, "failed")
        self._say(trial, "failed; the record has the reason")

    def _update(self, trial: Trial, result: dict[str, Any], state: str) -> None:
        before = self.rows.get(trial.trial_id, ({}, {}, ""))
        self.rows[trial.trial_id] = (trial.config, {**before[1], **result}, state)

    def _say(self, trial: Trial, text: str) -> None:
        if not self.console.is_terminal:
            self.console.print(f"trial {trial.config['trial']}/{self.total} {text}", highlight=False)

    def _settings(self, config: dict[str, Any]) -> str:
        return describe_settings({path: config[path] for path in self.searched if path in config})

    def _render(self) -> Group:
        table = Table(expand=True, box=SIMPLE_HEAD)
        for name in ("#", "Setting", "Epoch", "p", "Loss", "Val. certified", "Best", "State"):
            text = name in ("Setting", "State")
            table.add_column(name.replace(" ", "\n"), justify="left" if text else "right", no_wrap=name != "Setting")
        # running ones first, then the best: where the screen ends, the worst are left out
        ended = sum(state != "running" for _, _, state in list(self.rows.values()))
        for config, result, state in sorted(list(self.rows.values()), key=self._place):
            table.add_row(
                str(config["trial"]),
                self._settings(config),
                str(result.get("epoch", "")),
                _p(result[schema.P]) if schema.P in result else "",
                f"{result[schema.TRAIN_LOSS]:.4f}" if schema.TRAIN_LOSS in result else "",
                _percent(result.get(schema.VALIDATION_CERTIFIED)),
                _percent(result.get(schema.BEST_VALIDATION_CERTIFIED)),
                state,
            )
        seconds = time.monotonic() - self.began
        return Group(f"{ended} of {self.total} trials ended, {seconds:.0f} s", table)

    @staticmethod
    def _place(row: tuple[dict[str, Any], dict[str, Any], str]) -> tuple[bool, float, int]:
        config, result, state = row
        best = 0.0 if state == "running" else result.get(schema.BEST_VALIDATION_CERTIFIED, 0.0)
        return state != "running", -best, config["trial"]


def _p(p: float) -> str:
    return "inf" if math.isinf(p) else f"{p:.3g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"
