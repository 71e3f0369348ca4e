"""Error messages for missing packages of the extras in pyproject.toml."""

import importlib.metadata
import json
from collections.abc import Iterator
from contextlib import contextmanager

# Top-level modules that linflab imports, by the extra that installs them.
EXTRAS = {
    "platform": {
        "PIL", "matplotlib", "mlflow", "optuna", "packaging", "pandas", "psutil", "requests", "rich",
        "safetensors", "sklearn", "sqlalchemy", "tabulate", "torchvision", "typer",
    },
    "cluster": {"cmaes", "grpc", "ray"},
    "exchange": {"onnx"},
    "hub": {"huggingface_hub"},
}  # fmt: skip


def install_command(extra: str = "") -> str:
    """Return the pip command that installs linflab with an extra; of an editable installation, in its checkout."""
    packages = f"[{extra}]" if extra else ""
    try:
        origin = json.loads(importlib.metadata.distribution("linflab").read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        origin = {}
    if origin.get("dir_info", {}).get("editable"):
        return f"pip install -e '.{packages}'"
    return f"pip install --upgrade 'linflab{packages}'"


def missing_extra(error: ImportError) -> str | None:
    """Return a message with the command that installs the missing package; None if no extra installs it."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if isinstance(error, ModuleNotFoundError) and module in modules:
            return f"{module}: not installed; run `{install_command(extra)}`"
    return None


@contextmanager
def naming_extras() -> Iterator[None]:
    """Add the install command to import errors of missing extras, as a context manager or a decorator.

    Raises:
        ModuleNotFoundError: If an extra is missing; the message has the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (line := missing_extra(error)) is None:
            raise
        raise ModuleNotFoundError(line, name=error.name) from None
