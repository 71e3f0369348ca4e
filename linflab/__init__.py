"""Train, certify and compare image classifiers that are provably robust to l_inf perturbations."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linflab.platform.api import (
        AttackResult,
        Certificates,
        FitResult,
        TrainingResult,
        attack,
        certify,
        fit,
        load,
        records,
        train,
    )

__version__ = "0.1.0"  # of the package, the changelog and the citation; `pyproject.toml` reads it here

__all__ = [
    "AttackResult",
    "Certificates",
    "FitResult",
    "TrainingResult",
    "__version__",
    "attack",
    "certify",
    "fit",
    "load",
    "records",
    "train",
]

# In a checkout, the subpackages are next to this folder; in an installed package, they are inside it.
_CHECKOUT = Path(__file__).resolve().parent.parent
if not (Path(__file__).parent / "models").exists() and (_CHECKOUT / "pyproject.toml").exists():
    __path__.append(str(_CHECKOUT))


def __getattr__(name: str) -> Any:
    """Import public names on first use, since PyTorch is slow to import."""
    if name in __all__:
        return getattr(import_module("linflab.platform.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
