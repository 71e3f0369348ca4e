"""Search spaces: which settings a sweep may vary, and over what values.

A space is a YAML file, shipped beside this module or the user's own:

    description: one line
    include: [width, hinge_threshold]     # other spaces, whose parameters it takes over
    parameters:                           # dotted path of a setting: its distribution
      p_schedule.start: {distribution: log_uniform, low: 4, high: 16}
      p_schedule.end: {distribution: log_uniform, low: p_schedule.start, high: 2000}         # above what was drawn
      model.kind: {distribution: categorical, choices: [linf_dist_mlp, sort_net]}
      model.q: {distribution: uniform, low: 0.5, high: 0.9, when: {model.kind: sort_net}}    # under a choice only
      model.width: {distribution: integer, low: 64, high: 512, step: 64}
    try_first:                            # points before those that are drawn; what one leaves out is drawn
      - {p_schedule.start: 8, p_schedule.end: 1000, model.kind: linf_dist_mlp}

Parameters are drawn in their order, included ones first; what a bound or condition names must come before. Parameters
given under `parameters` replace included ones of the same path.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

FOLDER = Path(__file__).parent

Value = bool | int | float | str
Number = Annotated[float, Field(allow_inf_nan=False)]


class Suggester(Protocol):
    """What a space needs of an `optuna.Trial`."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> Any: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


class _Distribution(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    when: dict[str, Value] = Field({}, description="choices of categorical parameters under which alone this is drawn")

    def applies(self, point: Mapping[str, Value]) -> bool:
        """Whether this is drawn, after what the point holds."""
        return all(name in point and point[name] == choice for name, choice in self.when.items())

    def values(self, name: str, point: Mapping[str, Value]) -> Sequence[Value]:
        """All values, after what the point holds."""
        raise ValueError(f"{name}: {self} has values without end; integer, categorical, or uniform with a step will do")

    def _under(self) -> str:
        return "".join(f", if {name} is {choice}" for name, choice in self.when.items())


class _Range(_Distribution):
    low: Number | str = Field(description="a number, or the dotted path of a parameter before this one")
    high: Number | str = Field(description="a number, or the dotted path of a parameter before this one")

    @field_validator("low", "high", mode="before")
    @classmethod
    def _numbers_as_yaml_reads_them(cls, end: Any) -> Any:
        """1e-4 is a text to YAML 1.1, for want of a dot."""
        with suppress(ValueError):
            return float(end) if isinstance(end, str) else end
        return end

    @model_validator(mode="after")
    def _low_before_high(self) -> Self:
        if not isinstance(self.low, str) and not isinstance(self.high, str) and self.low > self.high:
            raise ValueError(f"low={self.low:g} is above high={self.high:g}")
        return self

    def bounds(self, point: Mapping[str, Value]) -> tuple[Any, Any]:
        """Low and high, after what the point holds."""
        low, high = (point[end] if isinstance(end, str) else end for end in (self.low, self.high))
        return low, high

    def _to(self) -> str:
        low, high = (end if isinstance(end, str) else f"{end:g}" for end in (self.low, self.high))
        return f"{low} to {high}"


class Uniform(_Range):
    """Every real number between low and high alike; with `step`, low, low + step, ..."""

    distribution: Literal["uniform"]
    step: float | None = Field(None, gt=0, allow_inf_nan=False)

    def suggest(self, trial: Suggester, name: str, point: Mapping[str, Value]) -> Value:
        return trial.suggest_float(name, *self.bounds(point), step=self.step)

    def values(self, name: str, point: Mapping[str, Value]) -> Sequence[Value]:
        low, high = self.bounds(point)
        if self.step is None:
            return super().values(name, point)
        count = int((high - low) / self.step + 1e-8) + 1
        return [min(high, float(f"{low + k * self.step:.12g}")) for k in range(count)]  # 0.3, not 0.1 + 0.1 + 0.1

    def __str__(self) -> str:
        return self._to() + (f" in steps of {self.step:g}" if self.step else "") + self._under()


class LogUniform(_Range):
    """Every order of magnitude between low and high alike."""

    distribution: Literal["log_uniform"]
    low: Annotated[float, Field(gt=0, allow_inf_nan=False)] | str

    def suggest(self, trial: Suggester, name: str, point: Mapping[str, Value]) -> Value:
        return trial.suggest_float(name, *self.bounds(point), log=True)

    def __str__(self) -> str:
        return f"{self._to()}, log-uniform{self._under()}"


class Integer(_Range):
    """low, low + step, ... up to high."""

    distribution: Literal["integer"]
    low: int | str
    high: int | str
    step: int = Field(1, ge=1)

    def suggest(self, trial: Suggester, name: str, point: Mapping[str, Value]) -> Value:
        return trial.suggest_int(name, *self.bounds(point), step=self.step)

    def values(self, name: str, point: Mapping[str, Value]) -> Sequence[Value]:
        low, high = self.bounds(point)
        return range(low, high + 1, self.step)

    def __str__(self) -> str:
        return self._to() + (f" in steps of {self.step}" if self.step > 1 else "") + self._under()


class Categorical(_Distribution):
    """One of some values, none nearer to another."""

    distribution: Literal["categorical"]
    choices: tuple[Value, ...] = Field(min_length=1)

    def suggest(self, trial: Suggester, name: str, point: Mapping[str, Value]) -> Value:
        return trial.suggest_categorical(name, self.choices)

    def values(self, name: str, point: Mapping[str, Value]) -> Sequence[Value]:
        return self.choices

    def __str__(self) -> str:
        return "one of " + ", ".join(map(str, self.choices)) + self._under()


Distribution = Annotated[Uniform | LogUniform | Integer | Categorical, Field(discriminator="distribution")]


class SearchSpace(BaseModel):
    """Distributions of settings by dotted path."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str
    include: tuple[str, ...] = ()
    parameters: dict[str, Distribution] = {}
    try_first: tuple[dict[str, Value], ...] = Field((), description="points that are tried before those drawn")

    def suggest(self, trial: Suggester) -> dict[str, Value]:
        """One point of the space, drawn by Optuna's trial."""
        point: dict[str, Value] = {}
        for path, distribution in self.parameters.items():
            if distribution.applies(point):
                point[path] = distribution.suggest(trial, path, point)
        return point

    def grid(self) -> list[dict[str, Value]]:
        """Every point of the space, the first parameter changing slowest.

        Raises:
            ValueError: a parameter has values without end; names it.
        """
        points: list[dict[str, Value]] = [{}]
        for path, distribution in self.parameters.items():
            points = [
                {**point, **({} if value is None else {path: value})}
                for point in points
                for value in (distribution.values(path, point) if distribution.applies(point) else [None])
            ]
        return points

    def probes(self) -> list[dict[str, Value]]:
        """Points at the ends: for each parameter one with every choice, or the lowest and highest value.

        Everything else is at its lowest, or first, value, as far as conditions allow.
        """
        points = []
        for path, distribution in self.parameters.items():
            values = distribution.choices if isinstance(distribution, Categorical) else (None,)
            for value in values:
                chosen = self._chosen_for(path) | ({} if value is None else {path: value})
                points.append(self.suggest(_Ends(chosen, highest="")))
            if not isinstance(distribution, Categorical):
                points.append(self.suggest(_Ends(self._chosen_for(path), highest=path)))
        return points

    def _chosen_for(self, path: str) -> dict[str, Value]:
        """The choices under which a parameter is drawn."""
        chosen = dict(self.parameters[path].when)
        for name in self.parameters[path].when:
            chosen |= self._chosen_for(name)
        return chosen

    def check(self) -> None:
        """That conditions, bounds and points to try first name what there is, and can be met.

        Raises:
            ValueError: they don't; names the parameter and what would do.
        """
        before: dict[str, Any] = {}
        for path, distribution in self.parameters.items():
            for name, choice in distribution.when.items():
                if not isinstance(before.get(name), Categorical) or choice not in before[name].choices:
                    raise ValueError(f"{path}: when {name} is {choice}: must be a choice of a categorical before it")
            if isinstance(distribution, _Range):
                for end in (distribution.low, distribution.high):
                    self._check_end(path, end, before)
                highest_low, lowest_high = self._ends(distribution.low)[1], self._ends(distribution.high)[0]
                if highest_low > lowest_high:
                    raise ValueError(
                        f"{path}: low={distribution.low} can be {highest_low:g}, above high={distribution.high}, "
                        f"which can be {lowest_high:g}"
                    )
            before[path] = distribution
        for point in self.try_first:
            self.check_point(point)

    def _check_end(self, path: str, end: float | str, before: Mapping[str, Any]) -> None:
        if not isinstance(end, str):
            return
        named, distribution = before.get(end), self.parameters[path]
        if not isinstance(named, _Range) or (isinstance(distribution, Integer) and not isinstance(named, Integer)):
            kind = "integer" if isinstance(distribution, Integer) else "range"
            raise ValueError(f"{path}: the bound {end} must be a number or the path of a {kind} before it")
        if not named.when.items() <= distribution.when.items():
            raise ValueError(f"{path}: the bound {end} is not always drawn; `when` must be as there")
        if isinstance(distribution, LogUniform) and self._ends(end)[0] <= 0:
            raise ValueError(f"{path}: the bound {end} can be {self._ends(end)[0]:g}; log_uniform needs one above 0")

    def _ends(self, end: float | str) -> tuple[float, float]:
        """The least and the largest value that a bound can have."""
        if not isinstance(end, str):
            return end, end
        named = self.parameters[end]
        assert isinstance(named, _Range)
        return self._ends(named.low)[0], self._ends(named.high)[1]

    def check_point(self, point: Mapping[str, Value]) -> None:
        """That a point to try first could have been drawn; what it leaves out is drawn.

        Raises:
            ValueError: it could not; names the parameter and what would do.
        """
        for path, value in point.items():
            if path not in self.parameters:
                raise ValueError(f"try_first: {path}={value}: is no parameter of the space")
            distribution = self.parameters[path]
            for name, choice in distribution.when.items():
                if point.get(name, choice) != choice:
                    raise ValueError(f"try_first: {path}={value}: is drawn only if {name} is {choice}")
            if isinstance(distribution, Categorical):
                fits, what = value in distribution.choices, str(distribution)
            else:
                fits, what = self._in_range(distribution, value, point)
            if not fits:
                raise ValueError(f"try_first: {path}={value}: must be {what}")

    def _in_range(self, distribution: "_Range", value: Value, point: Mapping[str, Value]) -> tuple[bool, str]:
        """Whether a value can be drawn beside the others of a point, and what can."""
        low, high = (
            float(point[end]) if isinstance(end, str) and end in point else self._ends(end)[place]
            for place, end in enumerate((distribution.low, distribution.high))
        )
        what = f"from {low:g} to {high:g}"
        if isinstance(value, bool | str) or not low <= value <= high:
            return False, what
        step = getattr(distribution, "step", None) or (1 if isinstance(distribution, Integer) else None)
        known = not isinstance(distribution.low, str) or distribution.low in point
        if step is None or not known:
            return True, what
        steps = (value - low) / step
        return abs(steps - round(steps)) < 1e-6, f"{what} in steps of {step:g}"


class _Ends:
    """A suggester of chosen values, else of first or lowest ones, but for one parameter, the highest."""

    def __init__(self, chosen: Mapping[str, Value], highest: str) -> None:
        self.chosen, self.highest = chosen, highest

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        if name != self.highest:
            return low
        return high if step is None else low + int((high - low) / step + 1e-8) * step

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return low + (high - low) // step * step if name == self.highest else low

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.chosen.get(name, choices[0])


def space_names() -> list[str]:
    """The shipped spaces, by name."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_space(name: str) -> SearchSpace:
    """A shipped space by name, or one's own by the path of its YAML file, with what it includes.

    Raises:
        ValueError: no such space, or what is in the file is not one; says which entry is wrong.
    """
    return _load(name, Path(), ())


def _fits(space: SearchSpace, point: Mapping[str, Value]) -> bool:
    try:
        space.check_point(point)
    except ValueError:
        return False
    return True


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
    try_first: tuple[dict[str, Value], ...] = ()
    for other in space.include:
        included = _load(other, path.parent, (*including, path))
        parameters |= included.parameters
        try_first += included.try_first
    parameters |= space.parameters
    if not parameters:
        raise ValueError(f"space={name}: has no parameters, so there is nothing to search")
    space = space.model_copy(update={"parameters": parameters})
    try_first = tuple(point for point in try_first if _fits(space, point))  # a file may narrow what it includes
    space = space.model_copy(update={"try_first": (*try_first, *space.try_first)})
    try:
        space.check()
    except ValueError as error:
        raise ValueError(f"space={name}: {error}") from None
    return space
