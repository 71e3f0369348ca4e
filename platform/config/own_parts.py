"""Modules that register a user's own networks, objectives, certifiers, attacks or bound rules.

The environment variable LINFLAB_IMPORT names them. They are imported before a config is parsed, in every process of a
training, sweep or job. Runs and weights files record their names, and nothing imports a module only because a file
names it.
"""

import os
import shutil
import site
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
from linflab.platform.source import IMPORT_VAR

if TYPE_CHECKING:
    from linflab.platform.config.experiment import ExperimentConfig

NOT_OWN = ("linflab", "__main__")  # first parts of names of modules that do not belong to the user


def own_modules() -> list[str]:
    """Return the names of modules in LINFLAB_IMPORT.

    Raises:
        InputError: If a name is not that of a module, or the module belongs to linflab.
    """
    value = os.environ.get(IMPORT_VAR, "")
    names = [name for part in value.split(",") if (name := part.strip())]
    for name in names:
        if not is_module_name(name):
            raise InputError(
                f"{IMPORT_VAR}={value}: {name} must be the name of a module, as in my_parts or my_package.parts; "
                "rename the file if necessary, and leave out .py"
            )
        if name.partition(".")[0] in NOT_OWN:
            raise InputError(f"{IMPORT_VAR}={value}: {name} must be a module outside linflab; leave it out")
    return names


def is_module_name(name: object) -> bool:
    """Return True if an import statement accepts a name, which excludes some names of files, such as my-parts."""
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))


def import_own_parts() -> None:
    """Import the modules of LINFLAB_IMPORT, which register their parts; modules are imported once.

    They are found on Python's path and in the current directory, which is on the path only during the import.

    Raises:
        InputError: If a name is not valid, or a module cannot be imported.
    """
    for name in own_modules():
        if name in sys.modules:
            continue
        folder = str(Path.cwd())
        is_added = folder not in sys.path and "" not in sys.path
        if is_added:
            sys.path.append(folder)
        try:
            import_module(name)
        except Exception as error:  # the module's own code can raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(
                f"{IMPORT_VAR}={os.environ[IMPORT_VAR]}: module {name} cannot be imported ({reason}); use a module in "
                "the current directory, in a folder of PYTHONPATH, or installed, or unset the variable"
            ) from error
        finally:
            if is_added and folder in sys.path:
                sys.path.remove(folder)


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
        if module.partition(".")[0] not in NOT_OWN and not is_named:
            modules.append(module)
    return modules


def _classes(value: object) -> Iterator[type[BaseModel]]:
    """Yield the classes of a config and of all configs in it, such as those of an ensemble's members."""
    if isinstance(value, BaseModel):
        yield type(value)
        value = [part for _, part in value]
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _classes(part)


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
        InputError: If a module cannot be imported, or is not a file or folder.
    """
    import_own_parts()
    installed = _installation_dirs()
    for name in dict.fromkeys(one.partition(".")[0] for one in own_modules()):
        module = sys.modules[name]
        places = [*getattr(module, "__path__", ()), getattr(module, "__file__", None) or ""]
        path = Path(places[0])
        if not places[0] or not path.exists() or len(getattr(module, "__path__", ())) > 1:
            raise InputError(
                f"{IMPORT_VAR}={os.environ[IMPORT_VAR]}: {name} has no single file or folder that can be copied to the "
                "cluster; use a module in one file or folder"
            )
        if not installed.isdisjoint(path.resolve().parents):
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(path, folder / path.name)


def _installation_dirs() -> set[Path]:
    """Return the directories of installed packages, also of the user and of the operating system."""
    paths = [sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")]
    return {Path(path).resolve() for path in (*paths, *site.getsitepackages(), site.getusersitepackages())}


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
