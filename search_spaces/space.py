"""Search spaces: the settings that a sweep may vary, with their values.

A space is a YAML file, shipped next to this module or your own:

    description: one line
    include: [width, hinge_threshold]     # other spaces, whose parameters are added
    parameters:                           # dotted path of a setting: its distribution
      p_schedule.start: {distribution: log_uniform, low: 4, high: 16}
      p_schedule.end: {distribution: log_uniform, low: p_schedule.start, high: 2000}         # at least the start
      model.kind: {distribution: categorical, choices: [linf_dist_mlp, sort_net]}
      model.q: {distribution: uniform, low: 0.5, high: 0.9, when: {model.kind: sort_net}}    # only for SortNet
      model.width: {distribution: integer, low: 64, high: 512, step: 64}
    initial_points:                            # tried first; parameters that a point omits are drawn
      - {p_schedule.start: 8, p_schedule.end: 1000, model.kind: linf_dist_mlp}

Parameters are drawn in order, included ones first. Bounds and conditions can only refer to earlier parameters. An entry
of `parameters` replaces an included one with the same path. Fractions such as 8/255 are numbers. A choice can be null,
or a list of numbers, names and null.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import count, takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from linflab.search_spaces.strict_yaml import read_mapping

SPACES_DIR = Path(__file__).parent

MAX_CHOICES = 1000  # per parameter; each choice is validated with the recipe
_ABSENT = object()  # value of a parameter that is not drawn


def _parse_fraction(value: Any) -> Any:
    """Return the number of a fraction such as 8/255; return other values unchanged."""
    if not isinstance(value, str) or not (parts := re.fullmatch(r"(-?\d+(?:\.\d+)?)/(\d+)", value)):
        return value
    numerator, denominator = float(parts[1]), float(parts[2])
    if not denominator:
        raise ValueError("denominator must not be 0")
    if math.isinf(numerator) or math.isinf(denominator):
        raise ValueError("numerator and denominator must be below 1e308")
    return numerator / denominator


Scalar = Annotated[bool | int | float | str | None, BeforeValidator(_parse_fraction)]
Value = Scalar | list[Scalar]
Number = Annotated[float, Field(allow_inf_nan=False)]


class TrialLike(Protocol):
    """Protocol of the methods of `optuna.Trial` that a space uses."""

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> Any:
        """Draw a number from [low, high]."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> Any:
        """Draw an integer from [low, high]."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Draw one of the choices."""


class _Distribution(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    when: dict[str, Value] = Field({}, description="condition: required choices of earlier categorical parameters")

    def is_active(self, point: Mapping[str, Value]) -> bool:
        """Return True if the parameter is drawn, given the earlier values of a point."""
        return all(name in point and point[name] == choice for name, choice in self.when.items())

    @property
    def is_countable(self) -> bool:
        """True if the distribution has a finite set of values."""
        return True

    def values(self, point: Mapping[str, Value]) -> Iterable[Value]:
        """Return all values, given the earlier values of a point; none if they are not countable."""
        return ()

    def _condition_text(self) -> str:
        return "".join(f", if {name} is {choice}" for name, choice in self.when.items())


class _Range(_Distribution):
    low: Number | str = Field(description="lower bound: a number, or the dotted path of an earlier parameter")
    high: Number | str = Field(description="upper bound: a number, or the dotted path of an earlier parameter")

    @field_validator("low", "high", mode="before")
    @classmethod
    def _parse_number_text(cls, end: Any) -> Any:
        """Convert numbers that YAML 1.1 reads as text: 1e-4, which has no dot, and 8/255."""
        if isinstance(end, bool) or end is None:  # pydantic would accept true as 1
            raise ValueError("must be a number, or the dotted path of an earlier parameter")
        end = _parse_fraction(end)
        with suppress(ValueError):
            return float(end) if isinstance(end, str) else end
        return end

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not isinstance(self.low, str) and not isinstance(self.high, str) and self.low > self.high:
            raise ValueError(f"low={self.low:g} must be at most high={self.high:g}")
        if not isinstance(self.low, str) and not isinstance(self.high, str) and math.isinf(float(self.high - self.low)):
            raise ValueError(f"low={self.low:g} and high={self.high:g} are too far apart; use a narrower range")
        return self

    def bounds(self, point: Mapping[str, Value]) -> tuple[Any, Any]:
        """Return lower and upper bound, given the earlier values of a point."""
        low, high = (point[end] if isinstance(end, str) else end for end in (self.low, self.high))
        return low, high

    def _range_text(self) -> str:
        low, high = (end if isinstance(end, str) else f"{end:g}" for end in (self.low, self.high))
        return f"{low} to {high}"


class Uniform(_Range):
    """Uniform distribution from low to high: of all real numbers, or with `step`, of low + k * step."""

    distribution: Literal["uniform"]
    step: Annotated[float | None, BeforeValidator(_parse_fraction)] = Field(None, gt=0, allow_inf_nan=False)

    @property
    def is_countable(self) -> bool:
        """True if `step` is set."""
        return self.step is not None

    def suggest(self, trial: TrialLike, name: str, point: Mapping[str, Value]) -> Value:
        """Draw a value, given the earlier values of a point."""
        return trial.suggest_float(name, *self.bounds(point), step=self.step)

    def values(self, point: Mapping[str, Value]) -> Iterable[Value]:
        """Iterate over all values, given the earlier values of a point; requires `step`."""
        assert self.step is not None
        (low, high), step = self.bounds(point), self.step
        steps = takewhile(lambda k: k <= (high - low) / step + 1e-8, count())
        return (min(high, float(f"{low + k * step:.12g}")) for k in steps)  # 0.3 instead of 0.1 + 0.1 + 0.1

    def __str__(self) -> str:
        return self._range_text() + (f" in steps of {self.step:g}" if self.step else "") + self._condition_text()


class LogUniform(_Range):
    """Log-uniform distribution from low to high."""

    distribution: Literal["log_uniform"]
    low: Annotated[float, Field(gt=0, allow_inf_nan=False)] | str

    @property
    def is_countable(self) -> bool:
        """Always False."""
        return False

    def suggest(self, trial: TrialLike, name: str, point: Mapping[str, Value]) -> Value:
        """Draw a value, given the earlier values of a point."""
        return trial.suggest_float(name, *self.bounds(point), log=True)

    def __str__(self) -> str:
        return f"{self._range_text()}, log-uniform{self._condition_text()}"


class Integer(_Range):
    """Uniform distribution of the integers low + k * step up to high, with k = 0, 1, 2 and so on."""

    distribution: Literal["integer"]
    low: int | str
    high: int | str
    step: int = Field(1, ge=1)

    def suggest(self, trial: TrialLike, name: str, point: Mapping[str, Value]) -> Value:
        """Draw a value, given the earlier values of a point."""
        return trial.suggest_int(name, *self.bounds(point), step=self.step)

    def values(self, point: Mapping[str, Value]) -> Iterable[Value]:
        """Return all values, given the earlier values of a point."""
        low, high = self.bounds(point)
        return range(low, high + 1, self.step)

    def __str__(self) -> str:
        return self._range_text() + (f" in steps of {self.step}" if self.step > 1 else "") + self._condition_text()


class Categorical(_Distribution):
    """Uniform distribution of unordered choices."""

    distribution: Literal["categorical"]
    choices: tuple[Value, ...] = Field(min_length=1, max_length=MAX_CHOICES)

    @field_validator("choices")
    @classmethod
    def _check_unique(cls, choices: tuple[Value, ...]) -> tuple[Value, ...]:
        for index, choice in enumerate(choices):
            if choice in choices[:index]:  # in Python, True equals 1
                raise ValueError(f"{_text(choice)}: must be unique, but equals another choice; keep one")
        return choices

    def suggest(self, trial: TrialLike, name: str, point: Mapping[str, Value]) -> Value:
        """Draw a choice."""
        choices = {to_optuna_choice(choice): choice for choice in self.choices}
        return choices[trial.suggest_categorical(name, tuple(choices))]

    def values(self, point: Mapping[str, Value]) -> Iterable[Value]:
        """Return all choices."""
        return self.choices

    def __str__(self) -> str:
        return "one of " + ", ".join(map(_text, self.choices)) + self._condition_text()


def to_optuna_choice(choice: Value) -> Scalar:
    """Return a choice in a form that Optuna supports: JSON for a list, other choices unchanged."""
    return json.dumps(choice) if isinstance(choice, list) else choice


def _text(choice: Value) -> str:
    return "null" if choice is None else str(choice)


Distribution = Annotated[Uniform | LogUniform | Integer | Categorical, Field(discriminator="distribution")]


class SearchSpace(BaseModel):
    """Search space: distributions of settings by dotted path."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str
    include: tuple[str, ...] = ()
    parameters: dict[str, Distribution] = {}
    initial_points: tuple[dict[str, Value], ...] = Field((), description="points that are tried first")

    def suggest(self, trial: TrialLike) -> dict[str, Value]:
        """Draw one point of the space with an Optuna trial."""
        point: dict[str, Value] = {}
        for path, distribution in self.parameters.items():
            if distribution.is_active(point):
                point[path] = distribution.suggest(trial, path, point)
        return point

    def grid(self) -> Iterator[dict[str, Value]]:
        """Iterate lazily over all points of the space; the first parameter changes slowest.

        Raises:
            ValueError: If a parameter has infinitely many values; the message names it.
        """
        for path, distribution in self.parameters.items():
            if not distribution.is_countable:
                raise ValueError(
                    f"{path}: {distribution}: grid search requires a finite set of values; use integer, categorical, "
                    "or uniform with a step"
                )
        return self._points()

    def _points(self) -> Iterator[dict[str, Value]]:
        """Iterate over all combinations of values, like an odometer."""
        parameters = list(self.parameters.items())
        point: dict[str, Value] = {}
        remaining: list[Iterator[Any]] = []  # remaining values of the first parameters
        while True:
            if len(remaining) == len(parameters):
                yield dict(point)
            else:
                _, distribution = parameters[len(remaining)]
                remaining.append(iter(distribution.values(point) if distribution.is_active(point) else [_ABSENT]))
            while remaining:
                path, _ = parameters[len(remaining) - 1]
                point.pop(path, None)
                try:
                    value = next(remaining[-1])
                except StopIteration:
                    remaining.pop()
                    continue
                if value is not _ABSENT:
                    point[path] = value
                break
            else:
                return

    def corner_points(self) -> list[dict[str, Value]]:
        """Return points that cover every choice and both bounds of each parameter.

        In each point, the other parameters have their lowest value or first choice, as far as `when` conditions allow.
        """
        points = []
        for path, distribution in self.parameters.items():
            values: Iterable[Any] = distribution.choices if isinstance(distribution, Categorical) else (_ABSENT,)
            for value in values:
                choices = self._required_choices(path) | ({} if value is _ABSENT else {path: value})
                points.append(self.suggest(_CornerTrial(choices, highest_parameter="")))
            if not isinstance(distribution, Categorical):
                points.append(self.suggest(_CornerTrial(self._required_choices(path), highest_parameter=path)))
        return points

    def _required_choices(self, path: str) -> dict[str, Value]:
        """Return the choices of other parameters that a parameter requires to be drawn."""
        choices = dict(self.parameters[path].when)
        for name in self.parameters[path].when:
            choices |= self._required_choices(name)
        return choices

    def check_consistency(self) -> None:
        """Check that conditions, bounds and initial points refer to earlier parameters and can be satisfied.

        Raises:
            ValueError: If one of these checks fails; the message names the parameter and the fix.
        """
        earlier: dict[str, Any] = {}
        for path, distribution in self.parameters.items():
            for name, choice in distribution.when.items():
                if not isinstance(earlier.get(name), Categorical) or choice not in earlier[name].choices:
                    raise ValueError(
                        f"{path}: when {name} is {choice}: must be a choice of an earlier categorical parameter"
                    )
            if isinstance(distribution, _Range):
                for end in (distribution.low, distribution.high):
                    self._check_bound(path, end, earlier)
                highest_low, lowest_high = (
                    self._bound_range(distribution.low)[1],
                    self._bound_range(distribution.high)[0],
                )
                if highest_low > lowest_high:
                    raise ValueError(
                        f"{path}: low={distribution.low} can be {highest_low:g}, but must be at most "
                        f"high={distribution.high}, which can be {lowest_high:g}"
                    )
            earlier[path] = distribution
        for point in self.initial_points:
            self.check_point(point)

    def _check_bound(self, path: str, end: float | str, earlier: Mapping[str, Any]) -> None:
        if not isinstance(end, str):
            return
        bound, distribution = earlier.get(end), self.parameters[path]
        if not isinstance(bound, _Range) or (isinstance(distribution, Integer) and not isinstance(bound, Integer)):
            kind = "integer" if isinstance(distribution, Integer) else "range"
            raise ValueError(f"{path}: bound {end}: must be a number, or the path of an earlier {kind} parameter")
        if not bound.when.items() <= distribution.when.items():
            raise ValueError(f"{path}: the bound {end} is not always drawn; `when` must be as there")
        if isinstance(distribution, LogUniform) and self._bound_range(end)[0] <= 0:
            raise ValueError(
                f"{path}: the bound {end} can be {self._bound_range(end)[0]:g}; log_uniform needs one above 0"
            )

    def _bound_range(self, end: float | str) -> tuple[float, float]:
        """Return the smallest and the largest possible value of a bound."""
        if not isinstance(end, str):
            return end, end
        bound = self.parameters[end]
        assert isinstance(bound, _Range)
        return self._bound_range(bound.low)[0], self._bound_range(bound.high)[1]

    def check_point(self, point: Mapping[str, Value]) -> None:
        """Check that an initial point, which may omit parameters, belongs to the space.

        Raises:
            ValueError: If the point does not belong to the space; the message names the parameter and its valid values.
        """
        for path, value in point.items():
            if path not in self.parameters:
                raise ValueError(f"initial_points: {path}={value}: must be a parameter of the space; remove it")
            distribution = self.parameters[path]
            for name, choice in distribution.when.items():
                if point.get(name, choice) != choice:
                    raise ValueError(f"initial_points: {path}={value}: requires {name}={choice}")
            if isinstance(distribution, Categorical):
                is_valid, valid_values = value in distribution.choices, str(distribution)
            else:
                is_valid, valid_values = self._describe_range_fit(distribution, value, point)
            if not is_valid:
                raise ValueError(f"initial_points: {path}={value}: must be {valid_values}")

    def _describe_range_fit(self, distribution: "_Range", value: Value, point: Mapping[str, Value]) -> tuple[bool, str]:
        """Return whether a value is valid given the other values of a point, and the valid values as text."""
        low, high = (
            _as_float(point[end]) if isinstance(end, str) and end in point else self._bound_range(end)[index]
            for index, end in enumerate((distribution.low, distribution.high))
        )
        valid_values = f"from {low:g} to {high:g}"
        if isinstance(value, bool | str | list | None) or not low <= value <= high:
            return False, valid_values
        step = getattr(distribution, "step", None) or (1 if isinstance(distribution, Integer) else None)
        is_low_known = not isinstance(distribution.low, str) or distribution.low in point
        if step is None or not is_low_known:
            return True, valid_values
        steps = (value - low) / step
        return abs(steps - round(steps)) < 1e-6, f"{valid_values} in steps of {step:g}"


def _as_float(value: Value) -> float:
    """Return a bound as a float, or NaN if the bound is not a number: NaN fails all comparisons."""
    return float(value) if isinstance(value, int | float) else math.nan


class _CornerTrial:
    """Trial that returns given choices and the highest value of one parameter.

    Other parameters get their first choice or lowest value.
    """

    def __init__(self, choices: Mapping[str, Value], highest_parameter: str) -> None:
        self.chosen, self.highest = choices, highest_parameter

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        if name != self.highest:
            return low
        return high if step is None else low + int((high - low) / step + 1e-8) * step

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return low + (high - low) // step * step if name == self.highest else low

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return to_optuna_choice(self.chosen[name]) if name in self.chosen else choices[0]


def space_names() -> list[str]:
    """Return the names of the shipped spaces."""
    return sorted(path.stem for path in SPACES_DIR.glob("*.yaml"))


def load_space(name: str) -> SearchSpace:
    """Return a space with everything that it includes.

    Args:
        name: Name of a shipped space, or the path of a YAML file.

    Raises:
        ValueError: If the space does not exist or is invalid; the message names the entry.
    """
    return _load(name, Path(), ())


def _is_valid_point(space: SearchSpace, point: Mapping[str, Value]) -> bool:
    try:
        space.check_point(point)
    except ValueError:
        return False
    return True


def _load(name: str, folder: Path, including_files: tuple[Path, ...]) -> SearchSpace:
    is_file = name.endswith((".yaml", ".yml"))
    path = (folder / name if is_file else SPACES_DIR / f"{name}.yaml").resolve()
    if path in including_files:
        raise ValueError(
            f"space={name}: must not include itself ({' -> '.join(file.name for file in including_files)})"
        )
    try:
        tree = read_mapping(path)
    except FileNotFoundError:
        raise ValueError(
            f"space={name}: not found; use one of {', '.join(space_names())}, or the path of a YAML file"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"space={name}: must be YAML with description and parameters: {error}") from None
    if "try_first" in tree:
        raise ValueError(f"space={name}: try_first: was renamed; use initial_points")
    try:
        space = SearchSpace.model_validate(tree)
    except ValidationError as error:
        details = error.errors()[0]
        path_text = " / ".join(map(str, details["loc"]))
        input_text = str(details["input"])
        input_text = input_text if len(input_text) <= 80 else f"{input_text[:77]}..."
        raise ValueError(f"space={name}: {path_text}: {details['msg']} (got {input_text})") from None
    parameters: dict[str, Any] = {}
    initial_points: tuple[dict[str, Value], ...] = ()
    for file in space.include:
        included = _load(file, path.parent, (*including_files, path))
        parameters |= included.parameters
        initial_points += included.initial_points
    parameters |= space.parameters
    if not parameters:
        raise ValueError(f"space={name}: has no parameters; add at least one")
    space = space.model_copy(update={"parameters": parameters})
    # A file may narrow included distributions, so drop included points that are no longer valid.
    initial_points = tuple(point for point in initial_points if _is_valid_point(space, point))
    space = space.model_copy(update={"initial_points": (*initial_points, *space.initial_points)})
    try:
        space.check_consistency()
    except ValueError as error:
        raise ValueError(f"space={name}: {error}") from None
    return space
