"""Labels that distinguish runs by the fewest settings in which they differ."""

from collections.abc import Mapping, Sequence

from linflab.reports.added_settings import ADDED_TEXTS
from linflab.reports.formatting import describe_settings
from linflab.reports.methods import KINDS

IGNORED_SETTINGS = ("training.checkpoint_interval", "evaluation.batch_size")  # do not affect results
TENSOR_CORES = "compute.tensor_cores"  # only setting of `compute` with effects beyond rounding
MAX_SETTINGS = 4  # per label

Settings = Mapping[str, object]


def differing_settings(rows: Sequence[Settings]) -> list[str]:
    """Return the settings that differ between rows, those in `KINDS` first.

    A missing setting counts as a value, or as the value with the behavior of versions that lack the setting. Settings
    that do not affect results are excluded. `method` is excluded, too, since other settings determine it.

    Args:
        rows: Settings of each row by dotted path.
    """
    paths = dict.fromkeys([*KINDS, *(path for row in rows for path in row)])
    return [path for path in paths if is_compared(path) and len({_compared_text(row, path) for row in rows}) > 1]


def distinguish(names: Sequence[str], rows: Sequence[Settings]) -> list[str]:
    """Return the names of rows; where names are equal, the distinguishing settings are added.

    Args:
        names: Name of each row.
        rows: Settings of each row by dotted path.
    """
    labels = list(names)
    for name in dict.fromkeys(names):
        indices = [index for index, other in enumerate(names) if other == name]
        paths = _select_distinguishing([rows[index] for index in indices])
        for index in indices:
            settings = {path: rows[index][path] for path in paths if _text(rows[index].get(path))}
            labels[index] = (
                f"{name} ({describe_settings(settings, [rows[one] for one in indices])})" if settings else name
            )
    return labels


def _select_distinguishing(rows: Sequence[Settings]) -> list[str]:
    """Select settings greedily until they distinguish as many rows as all settings would."""
    paths = differing_settings(rows)
    selected: list[str] = []
    groups = 1
    while paths and groups < len(rows) and len(selected) < MAX_SETTINGS:
        counts = {
            path: len({tuple(_compared_text(row, one) for one in [*selected, path]) for row in rows}) for path in paths
        }
        # Settings in `KINDS` are more informative than numbers.
        kinds = [path for path in paths if path in KINDS and counts[path] > groups]
        best = kinds[0] if kinds else max(paths, key=lambda path: counts[path])
        if counts[best] <= groups:
            break
        groups = counts[best]
        selected.append(best)
        paths.remove(best)
    return selected


def is_compared(path: str) -> bool:
    """Return whether a setting distinguishes methods or results."""
    return path != "method" and affects_results(path)


def affects_results(path: str) -> bool:
    """Return whether a setting can change results by more than rounding."""
    return path == TENSOR_CORES or (path not in IGNORED_SETTINGS and not path.startswith("compute."))


def _compared_text(row: Settings, path: str) -> str:
    return _text(row.get(path)) or ADDED_TEXTS.get(path, "")


def _text(value: object) -> str:
    return "" if value is None or value != value else str(value)
