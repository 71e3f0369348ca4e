"""Search spaces: which settings a sweep may vary, and over what values.

A space is a YAML file, shipped beside this module or the user's own:

    description: one line
    include: [width, hinge_threshold]     # other spaces, whose parameters it takes over
    parameters:                           # dotted path of a setting: its distribution
      p_schedule.start: {distribution: log_uniform, low: 4, high: 16}
      model.width: {distribution: integer, low: 64, high: 512, step: 64}
      model.initialization: {distribution: categorical, choices: [normal, identity]}

Parameters given under `parameters` replace included ones of the same path.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FOLDER = Path(__file__).parent

Value = bool | int | float | str


class Suggester(Protocol):
    """What a space needs of an `optuna.Trial`."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> Any: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


class _Distribution(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Range(_Distribution):
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)

    @model_validator(mode="after")
    def _low_before_high(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low={self.low:g} is above high={self.high:g}")
        return self

    def extremes(self) -> tuple[Value, ...]:
        return self.low, self.high


class Uniform(_Range):
    """Every real number between low and high alike; with `step`, low, low + step, ..."""

    distribution: Literal["uniform"]
    step: float | None = Field(None, gt=0, allow_inf_nan=False)

    def suggest(self, trial: Suggester, name: str) -> Value:
        return trial.suggest_float(name, self.low, self.high, step=self.step)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}" + (f" in steps of {self.step:g}" if self.step else "")


class LogUniform(_Range):
    """Every order of magnitude between low and high alike."""

    distribution: Literal["log_uniform"]
    low: float = Field(gt=0, allow_inf_nan=False)

    def suggest(self, trial: Suggester, name: str) -> Value:
        return trial.suggest_float(name, self.low, self.high, log=True)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}, log-uniform"


class Integer(_Range):
    """low, low + step, ... up to high."""

    distribution: Literal["integer"]
    low: int
    high: int
    step: int = Field(1, ge=1)

    def suggest(self, trial: Suggester, name: str) -> Value:
        return trial.suggest_int(name, self.low, self.high, step=self.step)

    def __str__(self) -> str:
        return f"{self.low} to {self.high}" + (f" in steps of {self.step}" if self.step > 1 else "")


class Categorical(_Distribution):
    """One of some values, none nearer to another."""

    distribution: Literal["categorical"]
    choices: tuple[Value, ...] = Field(min_length=1)

    def suggest(self, trial: Suggester, name: str) -> Value:
        return trial.suggest_categorical(name, self.choices)

    def extremes(self) -> tuple[Value, ...]:
        return self.choices

    def __str__(self) -> str:
        return "one of " + ", ".join(map(str, self.choices))


Distribution = Annotated[Uniform | LogUniform | Integer | Categorical, Field(discriminator="distribution")]


class SearchSpace(BaseModel):
    """Distributions of settings by dotted path."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str
    include: tuple[str, ...] = ()
    parameters: dict[str, Distribution] = {}

    def suggest(self, trial: Suggester) -> dict[str, Value]:
        """One point of the space, drawn by Optuna's trial."""
        return {path: distribution.suggest(trial, path) for path, distribution in self.parameters.items()}


def space_names() -> list[str]:
    """The shipped spaces, by name."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_space(name: str) -> SearchSpace:
    """A shipped space by name, or one's own by the path of its YAML file, with what it includes.

    Raises:
        ValueError: no such space, or what is in the file is not one; says which entry is wrong.
    """
    return _load(name, Path(), ())


def _load(name: str, folder: Path, including: tuple[Path, ...]) -> SearchSpace:
    own = name.endswith((".yaml", ".yml"))
    path = (folder / name if own else FOLDER / f"{name}.yaml").resolve()
    if path in including:
        raise ValueError(f"space={name}: includes itself by way of {' -> '.join(other.name for other in including)}")
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"space={name}: unknown; must be one of {', '.join(space_names())}, or the path of a YAML file"
        ) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"space={name}: can't be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, Mapping):
        raise ValueError(f"space={name}: must be a YAML mapping with description and parameters")
    try:
        space = SearchSpace.model_validate(tree)
    except ValidationError as error:
        complaint = error.errors()[0]
        place = " / ".join(map(str, complaint["loc"]))
        raise ValueError(f"space={name}: {place}: {complaint['msg']} (got {complaint['input']})") from None
    parameters: dict[str, Any] = {}
    for other in space.include:
        parameters |= _load(other, path.parent, (*including, path)).parameters
    parameters |= space.parameters
    if not parameters:
        raise ValueError(f"space={name}: has no parameters, so there is nothing to search")
    return SearchSpace(description=space.description, include=space.include, parameters=parameters)
