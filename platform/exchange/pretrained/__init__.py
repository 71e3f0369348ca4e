"""Small certified networks that are shipped with linflab, as exported by `linflab export --format safetensors`."""

from pathlib import Path

from linflab.platform.errors import InputError
from linflab.platform.exchange.manifest import WEIGHTS_FILE

PREFIX = "pretrained:"
PRETRAINED_DIR = Path(__file__).parent


def pretrained_names() -> list[str]:
    """Return the names of the shipped networks."""
    return sorted(path.parent.name for path in PRETRAINED_DIR.glob(f"*/{WEIGHTS_FILE}"))


def pretrained_weights(source: str) -> Path:
    """Return the weights file of a shipped network.

    Args:
        source: `pretrained:NAME`.

    Raises:
        InputError: If there is no such network.
    """
    name, names = source.removeprefix(PREFIX), pretrained_names()
    if name not in names:
        raise InputError(f"{source}: not found; use {', '.join(PREFIX + one for one in names)}")
    return PRETRAINED_DIR / name / WEIGHTS_FILE
