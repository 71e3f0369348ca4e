"""Progress of a sweep: a live table of its trials on a terminal, log lines elsewhere."""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest
from types import TracebackType
from typing import Any, Self

from ray.tune.experiment import Trial
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from linflab.platform.cli.progress import format_p, format_percent
from linflab.platform.sweeps.observer import SweepObserver
from linflab.reports import schema
from linflab.reports.formatting import describe_settings


@dataclass(frozen=True)
class _Row:
    """A trial's row in the live table."""

    label: str
    setting: str
    result: dict[str, Any]
    state: str

    def sort_key(self) -> tuple[bool, float]:
        best = 0.0 if self.state == "running" else self.result.get(schema.BEST_VALIDATION_CERTIFIED, 0.0)
        return self.state != "running", -best


class SweepProgress(SweepObserver):
    """A live table of the trials of a sweep, shown from the call of `expect` to the end of the context.

    Without a terminal, one log line of `key=value` fields is printed at the start and at the end of each trial.

    Args:
        console: Console to draw on.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.start_time = time.monotonic()
        self.rows: dict[str, _Row] = {}  # by trial label
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=2, transient=True)

    def show_message(self, line: str) -> None:
        """Print a message about the sweep."""
        self.console.print(line)

    def __enter__(self) -> Self:
        return self

    def expect(
        self,
        searched_settings: Sequence[str],
        total: int | None,
        num_ended_before: int = 0,
        resumed: Collection[str] = (),
    ) -> None:
        """Start the live table; see `SweepObserver.expect`."""
        super().expect(searched_settings, total, num_ended_before, resumed)
        self.start_time = time.monotonic()
        if self.console.is_terminal:
            self.live.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.live.stop()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Show a trial that starts; called by Ray Tune."""
        label = trial.config["trial"]
        status = "resumed" if label in self.resumed or label in self.rows else "started"
        self._update(trial, {})
        self._tell(label, f'status={status} params="{self.rows[label].setting}"')

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Show the metrics of a trial's epoch; called by Ray Tune."""
        self._update(trial, result)

    def show_end(self, label: str, point: Mapping[str, Any], result: dict[str, Any], failure: str | None) -> None:
        """Show the result or the failure of a trial."""
        row = self.rows.get(label, _Row(label, self._setting(point), {}, ""))  # invalid trials never start
        state = "done" if failure is None else "failed"
        self.rows[label] = replace(row, result={**row.result, **result}, state=state)
        best = format_percent(result.get(schema.BEST_VALIDATION_CERTIFIED))
        outcome = f"best_val_certified={best}" if failure is None else f'reason="{failure}"'
        self._tell(label, f"status={state} {outcome}")

    def show_restart(self, label: str) -> None:
        """Show a trial that lost its worker process."""
        row = self.rows.get(label, _Row(label, "", {}, ""))  # its process may have failed to start
        self.rows[label] = replace(row, state="lost")
        self._tell(label, "status=restarting reason=worker_lost (resumes from its checkpoint)")

    def _update(self, trial: Trial, result: dict[str, Any]) -> None:
        label = trial.config["trial"]
        if label not in self.rows:
            self.rows[label] = _Row(label, self._setting(json.loads(trial.config["job"])["params"]), {}, "")
        self.rows[label] = replace(self.rows[label], result={**self.rows[label].result, **result}, state="running")

    def _setting(self, point: Mapping[str, Any]) -> str:
        return describe_settings({path: point[path] for path in self.searched_settings if path in point})

    def _tell(self, label: str, text: str) -> None:
        if not self.console.is_terminal:
            total = "" if self.total is None else f" total={self.total}"
            self.console.print(f"trial={label}{total} {text}", highlight=False)

    def _render(self) -> Group:
        table = Table(expand=True, box=SIMPLE_HEAD)
        rows = list(self.rows.values())
        with_p = any(schema.P in row.result for row in rows)  # only networks with distance layers have p
        for name in ("#", "Setting", "Epoch", *(["p"] * with_p), "Loss", "Val. certified", "Best", "State"):
            text = name in ("Setting", "State")
            table.add_column(name.replace(" ", "\n"), justify="left" if text else "right", no_wrap=name != "Setting")
        num_ended = self.num_ended_before + sum(row.state in ("done", "failed") for row in rows)
        # Running trials come first, then the best of the others. If the screen is too small, the worst are omitted.
        for row in nsmallest(self.console.height, rows, key=_Row.sort_key):
            table.add_row(
                row.label,
                row.setting,
                str(row.result.get("epoch", "")),
                *([format_p(row.result[schema.P]) if schema.P in row.result else ""] * with_p),
                f"{row.result[schema.TRAIN_LOSS]:.4f}" if schema.TRAIN_LOSS in row.result else "",
                format_percent(row.result.get(schema.VALIDATION_CERTIFIED)),
                format_percent(row.result.get(schema.BEST_VALIDATION_CERTIFIED)),
                row.state,
            )
        seconds = time.monotonic() - self.start_time
        total = "" if self.total is None else f"/{self.total}"
        return Group(f"trials={num_ended}{total} time={seconds:.0f}s", table)
