"""Base class of sweep progress views."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ray.tune import Callback


class SweepObserver(Callback):
    """A progress view that shows nothing.

    Ray Tune reports the starts and epochs of trials to the view; `Proposals` reports the ends of trials.
    """

    searched_settings: Sequence[str] = ()
    total: int | None = None
    num_ended_before = 0
    resumed: frozenset[str] = frozenset()

    def expect(
        self,
        searched_settings: Sequence[str],
        total: int | None,
        num_ended_before: int = 0,
        resumed: Collection[str] = (),
    ) -> None:
        """Prepare for the trials, just before the first one starts.

        Args:
            searched_settings: Dotted paths of the settings that the sweep varies.
            total: Number of trials, or None if unknown.
            num_ended_before: Number of trials that ended in earlier invocations.
            resumed: Labels of trials that started in earlier invocations and have not ended.
        """
        self.resumed = frozenset(resumed)
        self.searched_settings, self.total, self.num_ended_before = searched_settings, total, num_ended_before

    def show_message(self, line: str) -> None:
        """Show a message about the sweep."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune pickles callbacks; linflab never reads the file

    def show_end(self, label: str, point: Mapping[str, Any], result: dict[str, Any], failure: str | None) -> None:
        """Show the end of a trial.

        Args:
            label: Label of the trial.
            point: Searched settings by dotted path.
            result: Metrics by name.
            failure: Reason of the failure, or None.
        """

    def show_restart(self, label: str) -> None:
        """Show that a trial lost its worker process and will resume from its checkpoint."""
