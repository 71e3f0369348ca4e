"""Modules that register a user's own networks, objectives, certifiers, attacks or bound rules.

The environment variable LINFLAB_IMPORT names them. They are imported before a config is parsed, in every process of a
training, sweep or job. Runs and weights files record their names, and nothing imports a module only because a file
names it.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema

from linflab.models.robustness.attacks import AttackMethod
from linflab.models.robustness.certification import Certifier
from linflab.models.robustness.objectives import Objective, ObjectiveConfig
from linflab.platform.errors import InputError

if TYPE_CHECKING:
    from linflab.platform.config.experiment import ExperimentConfig

IMPORT_VAR = "LINFLAB_IMPORT"


def own_modules() -> list[str]:
    """Return the names of modules in LINFLAB_IMPORT."""
    return [name for part in os.environ.get(IMPORT_VAR, "").split(",") if (name := part.strip())]


def import_own_parts() -> None:
    """Import the modules of LINFLAB_IMPORT, which register their parts; modules are imported once.

    They are found on Python's path and in the current directory.

    Raises:
        InputError: If a module cannot be imported.
    """
    for name in own_modules():
        if name in sys.modules:
            continue
        folder = str(Path.cwd())
        if folder not in sys.path and "" not in sys.path:
            sys.path.append(folder)
        try:
            import_module(name)
        except Exception as error:  # the module's own code can raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(
                f"{IMPORT_VAR}={os.environ[IMPORT_VAR]}: module {name} cannot be imported ({reason}); use a module in "
                "the current directory, in a folder of PYTHONPATH, or installed, or unset the variable"
            ) from error


def used_modules(experiment: "ExperimentConfig") -> list[str]:
    """Return the modules outside linflab that a run depends on: those of LINFLAB_IMPORT and of the config's parts.

    Parts that are defined in a script or notebook have no module that can be imported, and are left out.
    """
    modules = own_modules()
    kinds = (Certifier.registry.get(experiment.evaluation.certifier),)
    attacks = (AttackMethod.registry.get(kind) for kind in experiment.evaluation.attack.methods or ())
    for part in (*_classes(experiment), *filter(None, (*kinds, *attacks))):
        module = part.__module__
        is_named = any(module == name or module.startswith(f"{name}.") for name in modules)
        if module.partition(".")[0] not in ("linflab", "__main__") and not is_named:
            modules.append(module)
    return modules


def _classes(config: BaseModel) -> Iterator[type[BaseModel]]:
    for _, value in config:
        if isinstance(value, BaseModel):
            yield type(value)
            yield from _classes(value)


def missing_modules_hint(modules: Sequence[str]) -> str:
    """Return an addition to an error message that names recorded modules which are not imported, or an empty text."""
    missing = [name for name in modules if name not in sys.modules]
    if not missing:
        return ""
    plural = "s" if len(missing) > 1 else ""
    return (
        f"; the network was trained with parts of the module{plural} {', '.join(missing)}: set "
        f"{IMPORT_VAR}={','.join(modules)}, if you trust {'them' if plural else 'it'}"
    )


def copy_own_modules(folder: Path) -> None:
    """Copy the modules and packages of LINFLAB_IMPORT that are not installed into the folder of a cluster job.

    Modules that they import are copied only if LINFLAB_IMPORT names them too.

    Raises:
        InputError: If a module cannot be imported.
    """
    import_own_parts()
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")}
    for name in dict.fromkeys(one.partition(".")[0] for one in own_modules()):
        module = sys.modules[name]
        path = Path(module.__path__[0]) if hasattr(module, "__path__") else Path(str(module.__file__))
        if not installed.isdisjoint(path.resolve().parents):
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(path, folder / path.name)


class UnknownObjectiveConfig(ObjectiveConfig):
    """Settings of an objective whose kind is not registered, as read; evaluation does not need the objective."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler(source)

    def build(self, lipschitz_constant: float) -> Objective:
        """Raise an error, since the objective is unknown.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"objective.kind={self.kind}: unknown, so the network can be evaluated but not trained; set {IMPORT_VAR} "
            "to the module that defines it"
        )
