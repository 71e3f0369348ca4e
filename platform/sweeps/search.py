"""Selection of the next trial of a sweep: Optuna samplers, successive halving, and seed replicates.

The search uses neither Ray nor MLflow and stores no state: `restore` rebuilds the state from past trials. The random
draws of a configuration depend only on its number and the sweep's seed. A random search therefore proposes the same
configurations after an interruption, and in whatever order results arrive.

**Successive halving** (Jamieson and Talwalkar, AISTATS 2016; reduction factor 3). The p of distance layers grows during
training. While p is small, accuracy at p = inf is not informative, so runs that stop early cannot be compared. All
schedules are functions of the fraction of training, so a run with fewer epochs completes them and ends at p = inf,
where its certified accuracy is meaningful. With `halving=9`, all configurations are trained for 1/9 of the epochs. The
best third is trained from scratch for 1/3 of the epochs, and the best third of these for all epochs. A configuration is
promoted once no trial that has not ended can displace it, so promotion does not depend on timing. More than a third can
be promoted only if failed trials are retried after others were promoted in their place.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Self

import optuna
from optuna.trial import TrialState
from pydantic import BaseModel, ConfigDict, Field, model_validator

from linflab.platform.errors import InputError
from linflab.reports import schema
from linflab.search_spaces.space import SearchSpace, Value, to_optuna_choice

MAX_COUNTED_POINTS = 100_000  # grid points; counting stops here
REDUCTION_FACTOR = 3  # factor per rung: more epochs, fewer configurations


class SearchConfig(BaseModel):
    """Search options of a sweep."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampler: Literal["tpe", "random", "grid", "nsga2", "cmaes"] = "tpe"
    objectives: tuple[Literal["certified", "clean", "flops"], ...] = Field(("certified",), min_length=1)
    trials: int | None = Field(20, ge=1, description="Number of configurations; None for no limit except hours")
    hours: float | None = Field(None, gt=0, allow_inf_nan=False, description="Hours during which new trials may start")
    halving: int = Field(1, ge=1, description="Train first for 1/N of the epochs (N = 3, 9, ...); 1 for no halving")
    seeds: int = Field(1, ge=1, description="Number of seeds to train the best configuration with")
    verify_front: int = Field(
        0, ge=0, description="Certify validation images by the cascade for the N best trials, before the best is chosen"
    )
    verify_images: int = Field(1000, ge=1, description="Number of these images, a fixed random sample")

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if self.halving != REDUCTION_FACTOR ** (self.num_rungs - 1):
            raise ValueError(
                f"halving={self.halving}: must be a power of {REDUCTION_FACTOR}; "
                f"use 1, {REDUCTION_FACTOR}, {REDUCTION_FACTOR**2} ..."
            )
        if self.halving > 1 and self.trials is None:
            raise ValueError(f"halving={self.halving}: requires a budget in trials; use --budget 27, for example")
        if self.halving > 1 and self.trials is not None and self.trials < self.halving:
            raise ValueError(
                f"halving={self.halving}: requires at least {self.halving} trials, but the budget is {self.trials}; "
                "use a larger --budget"
            )
        if (self.trials is None) == (self.hours is None):
            raise ValueError("budget: must be either trials or hours; use one of them")
        if self.verify_front and self.objectives[0] != "certified":
            raise ValueError(
                f"verify-front={self.verify_front}: requires certified as the first objective, not "
                f"{self.objectives[0]}; use --objectives certified, or leave it out"
            )
        if "verify_images" in self.model_fields_set and not self.verify_front:
            raise ValueError(
                f"verify-images={self.verify_images}: requires --verify-front; add that option, or leave it out"
            )
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives={','.join(self.objectives)}: must be unique; use each one once")
        if self.sampler == "cmaes" and len(self.objectives) > 1:
            raise ValueError(
                f"sampler=cmaes: is not supported with several objectives, {','.join(self.objectives)}; use tpe, "
                "nsga2, random or grid"
            )
        return self

    @property
    def num_rungs(self) -> int:
        """Number of rungs of successive halving; 1 if there is no halving."""
        return 1 + round(math.log(self.halving, REDUCTION_FACTOR))

    def epochs_at_rung(self, round_: int, epochs: int) -> int:
        """Return the epochs of a trial at a rung (from 1), if the last rung trains for `epochs`."""
        return max(1, round(epochs / REDUCTION_FACTOR ** (self.num_rungs - round_)))


@dataclass(frozen=True)
class TrialSpec:
    """A trial of a sweep.

    Attributes:
        number: Number of its configuration, from 1.
        params: Searched settings by dotted path.
        rung: Rung of successive halving, from 1.
        seed_index: 0 for the config's seed, k for the k-th seed after it.
    """

    number: int
    params: Mapping[str, Value]
    rung: int = 1
    seed_index: int = 0

    @property
    def label(self) -> str:
        """Label in the sweep, such as 7, 7.2 (second rung) or 7-seed3 (third seed replicate)."""
        return f"{self.number}" + f".{self.rung}" * (self.rung > 1) + f"-seed{self.seed_index}" * (self.seed_index > 0)


Scores = Mapping[str, float]


@dataclass(frozen=True)
class PastTrial:
    """A trial of an earlier invocation.

    Attributes:
        spec: Spec of the trial.
        ask_time: Time when the search proposed it.
        tell_time: Time when the search received its result; None if the trial has not ended.
        scores: Metrics by name; None if the trial failed or has not ended.
    """

    spec: TrialSpec
    ask_time: float
    tell_time: float | None = None
    scores: Scores | None = None


class Search:
    """An ask-and-tell search that proposes the trials of a sweep one by one.

    Args:
        space: Search space.
        config: Search options.
        seed: Seed of the sweep.

    Raises:
        InputError: If a grid has infinitely many points, or fewer points than `halving`.
    """

    def __init__(self, space: SearchSpace, config: SearchConfig, seed: int) -> None:
        self.space, self.config, self.seed = space, config, seed
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # Optuna logs each new study
        self.study = optuna.create_study(
            directions=["maximize" if schema.OBJECTIVE_METRICS[name][1] else "minimize" for name in config.objectives]
        )
        self.trials: list[optuna.Trial] = []
        self.points: list[dict[str, Value]] = []
        self.started: dict[str, TrialSpec] = {}
        self.results: dict[str, Scores | None] = {}  # None for failed trials
        self.limit: float = math.inf if config.trials is None else config.trials
        self.grid: Iterator[dict[str, Value]] | None = None
        self.num_grid_points_used = 0  # grid points used so far
        if config.sampler == "grid":
            try:
                self.grid, grid_copy = space.grid(), space.grid()
            except ValueError as error:
                raise InputError(f"sampler=grid: {error}") from None
            size = sum(1 for _ in islice(grid_copy, int(min(self.limit, MAX_COUNTED_POINTS)) + 1))
            if size <= MAX_COUNTED_POINTS:  # no sweep completes a larger grid
                self.limit = min(size, self.limit)
        if self.limit < config.halving:
            raise InputError(
                f"halving={config.halving}: requires at least {config.halving} grid points, not {self.limit}; "
                "use a larger grid or a smaller --halving"
            )

    def restore(self, history: Iterable[PastTrial]) -> None:
        """Replay past trials in their original order, on which samplers depend.

        The results of trials that have not ended can be passed to `tell` later. If the number of a configuration is
        missing because its run was deleted, the configuration counts as failed.

        Args:
            history: Past trials, in any order.
        """
        past_trials = list(history)
        self.started = {one.spec.label: one.spec for one in past_trials}
        points = {one.spec.number: one for one in past_trials if one.spec.rung == 1 and one.spec.seed_index == 0}
        ends = sorted(
            (one for one in past_trials if one.tell_time is not None), key=lambda one: one.tell_time or 0, reverse=True
        )
        for number in range(1, max(points, default=0) + 1):
            if number not in points:
                spec = self.started[str(number)] = TrialSpec(number, self._ask(None))
                self.tell(spec, None)
                continue
            while ends and (ends[-1].tell_time or 0) <= points[number].ask_time:
                if ends[-1].spec.number >= number:  # inconsistent times: old run, or the clock was set back
                    break
                self._tell(ends.pop())
            self._ask(dict(points[number].spec.params))
        while ends:
            self._tell(ends.pop())

    def _tell(self, past_trial: PastTrial) -> None:
        self.tell(past_trial.spec, past_trial.scores)

    def ask(self, allow_new: bool = True) -> TrialSpec | None:
        """Return the next trial, or None if other trials have to end first or the search has finished.

        Args:
            allow_new: Whether new configurations may be proposed.
        """
        spec = self._next(allow_new)
        if spec is not None:
            self.started[spec.label] = spec
        return spec

    def tell(self, spec: TrialSpec, scores: Scores | None) -> None:
        """Record the metrics of a trial by name, or None if it failed."""
        self.results[spec.label] = scores
        if spec.rung > 1 or spec.seed_index > 0:
            return  # the sampler gets only trials of equal epochs and seed
        trial = self.trials[spec.number - 1]
        if scores is not None:
            self.study.tell(trial, [scores[schema.OBJECTIVE_METRICS[name][0]] for name in self.config.objectives])
        else:  # PRUNED ranks lowest, but Optuna rejects it for several objectives
            self.study.tell(trial, state=TrialState.PRUNED if len(self.config.objectives) == 1 else TrialState.FAIL)

    def is_finished(self, allow_new: bool = True) -> bool:
        """Return whether all trials have ended and none is left to start."""
        return len(self.results) == len(self.started) and self._next(allow_new, dry=True) is None

    @property
    def total(self) -> int | None:
        """Number of trials of the sweep, or None if it is unknown."""
        if self.limit == math.inf:
            return None
        return sum(map(self._rung_capacity, range(1, self.config.num_rungs + 1))) + self.config.seeds - 1

    def best(self) -> TrialSpec | None:
        """Return the best trial of the last rung, or None if none has a result.

        Verified trials come first, by verified accuracy; `rank` decides ties, and between other trials.
        """

        def key(spec: TrialSpec) -> tuple[float, ...]:
            return self._verified(spec), *self.rank(spec)

        return max(self._trials_at_rung(self.config.num_rungs), key=key, default=None)

    def unverified(self) -> list[TrialSpec]:
        """Return the trials to verify before the best one is known; empty until all trials have ended."""
        if len(self.results) < len(self.started):
            return []
        trials = sorted(self._trials_at_rung(self.config.num_rungs), key=self.rank, reverse=True)
        return [spec for spec in trials[: self.config.verify_front] if self._verified(spec) < 0]

    def tell_verified(self, spec: TrialSpec, accuracy: float) -> None:
        """Record the verified accuracy of a trial."""
        self.results[spec.label] = {**(self.results[spec.label] or {}), schema.VERIFIED_VALIDATION: accuracy}

    def _verified(self, spec: TrialSpec) -> float:
        """Return the verified accuracy of a trial, or -1."""
        return (self.results[spec.label] or {}).get(schema.VERIFIED_VALIDATION, -1.0)

    def rank(self, spec: TrialSpec) -> tuple[float, float, float, int]:
        """Return the sort key of a trial that has a result; the best trial of a rung has the largest key.

        The first objective decides. Ties are broken on the validation split, by certified accuracy and then by clean
        accuracy. The lower trial number decides last. Test accuracy never breaks a tie.
        """
        scores = self.results[spec.label]
        assert scores is not None
        metric, is_maximized = schema.OBJECTIVE_METRICS[self.config.objectives[0]]
        first = scores[metric] if is_maximized else -scores[metric]
        return first, scores[schema.BEST_VALIDATION_CERTIFIED], scores[schema.BEST_VALIDATION_CLEAN], -spec.number

    def _next(self, allow_new: bool, dry: bool = False) -> TrialSpec | None:
        for round_ in range(self.config.num_rungs, 1, -1):
            for spec in self._promotable_trials(round_ - 1):
                promoted = TrialSpec(spec.number, spec.params, round_)
                if promoted.label not in self.started:
                    return promoted
        if allow_new and len(self.points) < self.limit:
            number = len(self.points) + 1
            if dry:
                return TrialSpec(number, {})
            return TrialSpec(number, self._ask(self._fixed_point(number)))
        if len(self.results) < len(self.started) or self.unverified():
            return None  # the best trial is unknown until all trials have ended and the front is verified
        best = self.best()
        for seed_index in range(1, self.config.seeds):
            if best is not None:
                spec = TrialSpec(best.number, best.params, best.rung, seed_index)
                if spec.label not in self.started:
                    return spec
        return None

    def _trials_at_rung(self, round_: int) -> list[TrialSpec]:
        """Return the trials of a rung that have a result."""
        return [
            spec
            for spec in self.started.values()
            if spec.rung == round_ and spec.seed_index == 0 and self.results.get(spec.label) is not None
        ]

    def _promotable_trials(self, round_: int) -> list[TrialSpec]:
        """Return the trials of a rung that no outstanding trial can displace from the next rung."""
        num_outstanding = max(0, self._expected_trials(round_) - self._num_ended(round_))
        num_promotable = max(0, self._rung_capacity(round_ + 1) - num_outstanding)
        return sorted(self._trials_at_rung(round_), key=self.rank, reverse=True)[:num_promotable]

    def _rung_capacity(self, round_: int) -> int:
        """Return the maximum number of configurations at a rung."""
        return int(self.limit) // REDUCTION_FACTOR ** (round_ - 1)

    def _expected_trials(self, round_: int) -> int:
        """Return the number of configurations that will reach a rung, or the maximum if the number is unknown."""
        if round_ == 1 or self._num_ended(round_ - 1) < self._expected_trials(round_ - 1):
            return self._rung_capacity(round_)
        return min(self._rung_capacity(round_), len(self._trials_at_rung(round_ - 1)))

    def _num_ended(self, round_: int) -> int:
        """Return the number of trials of a rung that have ended, including failed ones."""
        specs = (self.started[label] for label in self.results)
        return sum(spec.rung == round_ and spec.seed_index == 0 for spec in specs)

    def _fixed_point(self, number: int) -> dict[str, Value] | None:
        """Return the grid point or initial point of this number, or None if the sampler draws the point."""
        if self.grid is None:
            return self.space.initial_points[number - 1] if number <= len(self.space.initial_points) else None
        point = next(islice(self.grid, number - 1 - self.num_grid_points_used, None), None)
        self.num_grid_points_used = number
        return point

    def _ask(self, point: dict[str, Value] | None) -> dict[str, Value]:
        """Return a new configuration; the sampler draws the settings that `point` does not contain."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.simplefilter("ignore", UserWarning)  # Optuna warns if a range is not a multiple of its step
            sampler = self._sampler(len(self.points) + 1)
            self.study.sampler = _FixedParamsSampler(sampler, point) if point else sampler
            trial = self.study.ask()
            params = self.space.suggest(trial)
        self.trials.append(trial)
        self.points.append(params)
        return params

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed = (self.seed * 1_000_003 + number) % 2**32
        if self.config.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed)
        if self.config.sampler == "nsga2":
            population = 50 if self.config.trials is None else min(50, max(4, self.config.trials // 5))
            return optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
        if self.config.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        return optuna.samplers.RandomSampler(seed=seed)


class _FixedParamsSampler(optuna.samplers.BaseSampler):
    """A sampler that fixes some parameters, and updates its state as if it had drawn their values.

    Optuna can also enqueue trials with fixed values. Such trials do not update the state of the sampler: NSGA-II and
    CMA-ES would not count them in a generation.
    """

    def __init__(self, sampler: optuna.samplers.BaseSampler, point: Mapping[str, Value]) -> None:
        self.sampler, self.point = sampler, {name: to_optuna_choice(value) for name, value in point.items()}

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return self.sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        params = self.sampler.sample_relative(study, trial, search_space)
        return {name: self.point.get(name, value) for name, value in params.items()}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        if param_name in self.point:
            return self.point[param_name]
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Any, trial: Any) -> None:
        self.sampler.before_trial(study, trial)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        self.sampler.after_trial(study, trial, state, values)
