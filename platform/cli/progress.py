"""Progress of a training run: one live line on a terminal, one log line per epoch elsewhere."""

import math
import time
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.training.evaluation import ScoringReport
from linflab.platform.training.loop import EpochMetrics, StepMetrics

SCORING = "stage=evaluation"
MIN_BAR, MAX_BAR = 10, 40  # width of the bar, in columns


def fit_line(required: Sequence[str], optional: Sequence[str], fraction: float | None, width: int) -> str:
    """Return one line of progress that fits a terminal.

    Args:
        required: Fields that are always shown.
        optional: Fields that are added if they fit, the most important one first.
        fraction: Fraction of the work done, in [0, 1], shown as a bar in the remaining width; None for no bar.
        width: Columns of the terminal.
    """
    parts = list(required)
    for part in optional:
        if len(" ".join([*parts, part])) > width:
            break
        parts.append(part)
    bar_width = min(width - len(" ".join(parts)) - 2, MAX_BAR)
    if fraction is not None and bar_width >= MIN_BAR:
        parts.insert(1, ("━" * round(fraction * bar_width)).ljust(bar_width, "·"))
    return " ".join(parts)[:width]


class _Line(ProgressColumn):
    """Progress as one line that fits the terminal; field `parts` of the task has name and optional fields."""

    max_refresh = None

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def render(self, task: Task) -> Text:
        name, optional = task.fields["parts"]
        if not task.total:
            return Text(fit_line([name, f"time={format_clock(task.elapsed)}"], optional, None, self.console.width))
        count = f"{task.fields['unit']}={task.completed:.0f}/{task.total:.0f}"
        required = [name, count, f"time={format_clock(task.elapsed)}", f"left={format_clock(self._seconds_left(task))}"]
        return Text(fit_line(required, optional, task.completed / task.total, self.console.width))

    def _seconds_left(self, task: Task) -> float | None:
        """Return the seconds left at the mean speed since the first report.

        The first report of a resumed run already has some of the work done.
        """
        first = task.fields["first"]
        if first is None or task.total is None or task.completed <= first[1]:
            return None
        seconds = (task.fields["last_time"] - first[0]) / (task.completed - first[1])
        seconds_since_report = time.monotonic() - task.fields["last_time"]
        return max(0.0, seconds * (task.total - task.completed) - seconds_since_report)


class ProgressLine:
    """A live line with the work done, elapsed time and time left; without a terminal, nothing is shown.

    Args:
        console: Console to draw on.
        name: First field of the line.
        unit: Unit of the work, as a field name.
    """

    def __init__(self, console: Console, name: str, unit: str) -> None:
        self.console = console
        self.progress = Progress(
            _Line(console),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.progress.add_task("", total=None, parts=(name, ()), unit=unit, first=None, last_time=0.0)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def restart(self, name: str, unit: str) -> None:
        """Start another task, whose total is not known yet."""
        self.progress.reset(self.task, total=None, parts=(name, ()), unit=unit, first=None, last_time=0.0)

    def update(self, done: float, total: float, name: str | None = None, optional: Sequence[str] = ()) -> None:
        """Show the work done.

        Args:
            done: Work done, in the line's unit.
            total: Total work, in the line's unit.
            name: New first field; None keeps the last one.
            optional: Fields that are shown if they fit.
        """
        (task,) = self.progress.tasks
        now = time.monotonic()
        self.progress.update(
            self.task,
            completed=done,
            total=total,
            parts=(name or task.fields["parts"][0], tuple(optional)),
            first=task.fields["first"] or (now, done),
            last_time=now,
        )


class TrainingProgress:
    """Progress of a training run: a live line on a terminal, otherwise one log line per epoch.

    The log line has `key=value` fields. The live line has epoch, step, elapsed time and time left. If they fit, it also
    has p, loss and validation accuracies.

    Args:
        console: Console to draw on.
        experiment: Config of the run.
    """

    def __init__(self, console: Console, experiment: ExperimentConfig) -> None:
        self.console = console
        self.epochs = experiment.training.epochs
        self.has_distances = experiment.model.has_distances
        self.line = ProgressLine(console, f"epoch=1/{self.epochs}", "step")
        self.last: tuple[str, ...] = ()  # loss and accuracies of the previous epoch
        self.evaluating = False

    def __enter__(self) -> Self:
        self.line.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.line.__exit__()

    def on_report(self, report: EpochMetrics | StepMetrics | ScoringReport) -> None:
        """Show a report of any kind."""
        if isinstance(report, StepMetrics):
            self.on_step(report)
        elif isinstance(report, EpochMetrics):
            self.on_epoch(report)
        else:
            self.on_score(report)

    def on_step(self, report: StepMetrics) -> None:
        """Show a training step."""
        if self.evaluating:  # a late report from another process
            return
        epoch = min(self.epochs, 1 + (report.step - 1) * self.epochs // report.steps)
        parts = (f"p={format_p(report.p)}",) if self.has_distances else ()
        self.line.update(report.step, report.steps, f"epoch={epoch}/{self.epochs}", (*parts, *self.last))

    def on_epoch(self, report: EpochMetrics) -> None:
        """Show the metrics of an epoch."""
        self.last = (f"train_loss={report.train_loss:.4f}",)
        if report.validation is not None:
            clean, certified = 100 * report.validation.clean, 100 * report.validation.certified
            self.last = (*self.last, f"val_clean={clean:.1f}% val_certified={certified:.1f}%")
        if not self.console.is_terminal:
            parts = (f"p={format_p(report.at.p)}",) if self.has_distances else ()
            line = " ".join((f"epoch={report.epoch}/{self.epochs}", *parts, *self.last, f"time={report.seconds:.1f}s"))
            self.console.print(line, highlight=False)

    def on_score(self, report: ScoringReport) -> None:
        """Show the number of test images evaluated."""
        if not self.evaluating:
            self.evaluating = True
            self.line.restart(SCORING, "images")
            if not self.console.is_terminal:
                self.console.print(f"{SCORING} split=test images={report.total}", highlight=False)
        self.line.update(report.done, report.total)


def format_p(p: float) -> str:
    """Return p with three digits, or `inf`."""
    return "inf" if math.isinf(p) else f"{p:.3g}"


def format_percent(fraction: float | None) -> str:
    """Return a fraction in percent, or an empty string for None."""
    return "" if fraction is None else f"{100 * fraction:.1f}%"


def format_clock(seconds: float | None) -> str:
    """Return seconds as 1:02:03, or dashes for None."""
    if seconds is None:
        return "-:--:--"
    total = int(seconds)
    return f"{total // 3600}:{total // 60 % 60:02}:{total % 60:02}"
