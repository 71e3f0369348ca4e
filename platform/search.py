"""Which training a sweep does next: Optuna's samplers, a race on shortened schedules, and repetitions of the best.

It knows neither Ray nor MLflow, and keeps nothing: given what a sweep has done, it goes on from there. A point's number
and the sweep's seed alone seed what is drawn for it, so a random search comes to the same points whatever was cut
between, and in whatever order trials end.

**Racing.** Accuracy at p = inf says nothing while p is small, so trainings can't be compared half-way. All schedules
are functions of the share of training done; hence a training of fewer epochs goes through all of them, and ends at
p = inf, where its certified accuracy means what it means. With `race=9`, all points are trained for a ninth of the
epochs, the best third of them anew for a third, and the best third of these in full: successive halving (Jamieson and
Talwalkar, AISTATS 2016; factor 3), but every training whole. A point goes on as soon as nothing that is still to come
can displace it, so who goes on does not depend on timing. Only where failed trainings are tried again after others have
gone on in their place can there be more of these than a third.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import optuna
from optuna.trial import TrialState
from pydantic import BaseModel, ConfigDict, Field, model_validator

from linflab.platform.errors import SettingError
from linflab.reports import schema
from linflab.search_spaces.space import SearchSpace, Value

optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every study it makes

FACTOR = 3  # of lengths and of numbers of points from one round of a race to the next


class SearchConfig(BaseModel):
    """How a sweep searches its space."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampler: Literal["tpe", "random", "grid", "nsga2", "cmaes"] = "tpe"
    objectives: tuple[Literal["certified", "clean", "flops"], ...] = Field(("certified",), min_length=1)
    trials: int | None = Field(20, ge=1, description="points of the space; None: as many as the hours allow")
    hours: float | None = Field(None, gt=0, allow_inf_nan=False, description="no new point after so many hours")
    race: int = Field(1, ge=1, description="1: every point in full; 3, 9, ...: first for that part of the epochs")
    seeds: int = Field(1, ge=1, description="trainings of the best point, each with its own seed")

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.race != FACTOR ** (self.rounds - 1):
            raise ValueError(f"race={self.race}: must be a power of {FACTOR}: 1, {FACTOR}, {FACTOR**2} ...")
        if self.race > 1 and self.trials is None:
            raise ValueError(f"race={self.race}: needs a budget in trials; `--budget 27`, for example")
        if self.race > 1 and self.trials is not None and self.trials < self.race:
            raise ValueError(f"race={self.race}: needs at least {self.race} trials; there are {self.trials}")
        if (self.trials is None) == (self.hours is None):
            raise ValueError("budget: must be in trials, or else in hours")
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives={','.join(self.objectives)}: names one twice")
        if self.sampler == "cmaes" and len(self.objectives) > 1:
            raise ValueError("sampler=cmaes: takes one objective; tpe, nsga2, random and grid take several")
        return self

    @property
    def rounds(self) -> int:
        """Rounds of the race; 1 where there is none."""
        return 1 + round(math.log(self.race, FACTOR))

    def epochs_in(self, round_: int, epochs: int) -> int:
        """Epochs of a training in a round, where in full there are so many."""
        return max(1, round(epochs / FACTOR ** (self.rounds - round_)))


@dataclass(frozen=True)
class Job:
    """One training of a sweep.

    Attributes:
        number: of its point, from 1.
        point: settings by dotted path.
        round: of the race, from 1.
        repeat: 0 with the experiment's own seed, k with the k-th after it.
    """

    number: int
    point: Mapping[str, Value]
    round: int = 1
    repeat: int = 0

    @property
    def label(self) -> str:
        """Its name in the sweep: 7, 7.2 in the second round, 7-seed3 as the third repetition."""
        return f"{self.number}" + f".{self.round}" * (self.round > 1) + f"-seed{self.repeat}" * (self.repeat > 0)


Scores = Mapping[str, float]


@dataclass(frozen=True)
class Past:
    """A training of before: when the search proposed it and, if it was, was told of it, and what it came to."""

    job: Job
    asked: float
    told: float | None = None  # it is still to be
    scores: Scores | None = None  # None: it failed, if it ended


class Search:
    """Proposes a sweep's trainings one by one, and is told what they came to."""

    def __init__(self, space: SearchSpace, config: SearchConfig, seed: int) -> None:
        """Raises SettingError: a grid of a space that has values without end, or fewer points than its race needs."""
        self.space, self.config, self.seed = space, config, seed
        self.study = optuna.create_study(
            directions=["maximize" if schema.OBJECTIVE_METRICS[name][1] else "minimize" for name in config.objectives]
        )
        self.trials: list[optuna.Trial] = []
        self.points: list[dict[str, Value]] = []
        self.started: dict[str, Job] = {}
        self.ended: dict[str, Scores | None] = {}  # None: failed
        self.first = list(space.try_first)
        if config.sampler == "grid":
            try:
                self.first = space.grid()
            except ValueError as error:
                raise SettingError(f"sampler=grid: {error}") from None
        limit = len(self.first) if config.sampler == "grid" else math.inf
        self.limit = min(limit, math.inf if config.trials is None else config.trials)
        if self.limit < config.race:
            raise SettingError(f"race={config.race}: needs at least {config.race} points; the grid has {limit}")

    def recall(self, history: Iterable[Past]) -> None:
        """Take over what was done before, in the order in which it happened: samplers learn from that order.

        What has not ended is still to be told of. A point between others that is not there, since somebody has deleted
        its record, counts as failed.
        """
        past = list(history)
        self.started = {one.job.label: one.job for one in past}
        points = {one.job.number: one for one in past if one.job.round == 1 and one.job.repeat == 0}
        ends = sorted((one for one in past if one.told is not None), key=lambda one: one.told or 0, reverse=True)
        for number in range(1, max(points, default=0) + 1):
            if number not in points:
                job = self.started[str(number)] = Job(number, self._ask(None))
                self.tell(job, None)
                continue
            while ends and (ends[-1].told or 0) <= points[number].asked:
                if ends[-1].job.number >= number:  # records of before the order was kept, by clocks that were set back
                    break
                self._tell(ends.pop())
            self._ask(dict(points[number].job.point))
        while ends:
            self._tell(ends.pop())

    def _tell(self, past: Past) -> None:
        self.tell(past.job, past.scores)

    def next_job(self, in_time: bool = True) -> Job | None:
        """The next training, or None: there is none before others have ended, or none at all (see `finished`).

        Args:
            in_time: whether new points may still be tried.
        """
        job = self._next(in_time)
        if job is not None:
            self.started[job.label] = job
        return job

    def tell(self, job: Job, scores: Scores | None) -> None:
        """What a training came to, by the names of metrics; None: it failed."""
        self.ended[job.label] = scores
        if job.round > 1 or job.repeat > 0:
            return  # points are compared with one another at one length and with one seed
        trial = self.trials[job.number - 1]
        if scores is not None:
            self.study.tell(trial, [scores[schema.OBJECTIVE_METRICS[name][0]] for name in self.config.objectives])
        else:  # pruned ranks below all others, where there is one objective; several know no such state
            self.study.tell(trial, state=TrialState.PRUNED if len(self.config.objectives) == 1 else TrialState.FAIL)

    def finished(self, in_time: bool = True) -> bool:
        """Whether all has ended and nothing is left to start."""
        return len(self.ended) == len(self.started) and self._next(in_time, dry=True) is None

    @property
    def total(self) -> int | None:
        """How many trainings there will be, where that is known."""
        if self.limit == math.inf:
            return None
        return sum(map(self._places, range(1, self.config.rounds + 1))) + self.config.seeds - 1

    def best(self) -> Job | None:
        """The best of those that were trained in full: by the first objective, equals as in `rank`."""
        return max(self._in_round(self.config.rounds), key=self.rank, default=None)

    def rank(self, job: Job) -> tuple[float, float, float, int]:
        """Orders trainings of one round that have a result; never by the test set."""
        scores = self.ended[job.label]
        assert scores is not None
        metric, more = schema.OBJECTIVE_METRICS[self.config.objectives[0]]
        first = scores[metric] if more else -scores[metric]
        return first, scores[schema.BEST_VALIDATION_CERTIFIED], scores[schema.BEST_VALIDATION_CLEAN], -job.number

    def _next(self, in_time: bool, dry: bool = False) -> Job | None:
        for round_ in range(self.config.rounds, 1, -1):
            for job in self._going_on(round_ - 1):
                promoted = Job(job.number, job.point, round_)
                if promoted.label not in self.started:
                    return promoted
        if in_time and len(self.points) < self.limit:
            number = len(self.points) + 1
            if dry:
                return Job(number, {})
            return Job(number, self._ask(self.first[number - 1] if number <= len(self.first) else None))
        if len(self.ended) < len(self.started):
            return None  # the best is known when all of them have ended
        best = self.best()
        for repeat in range(1, self.config.seeds):
            if best is not None:
                job = Job(best.number, best.point, best.round, repeat)
                if job.label not in self.started:
                    return job
        return None

    def _in_round(self, round_: int) -> list[Job]:
        """The trainings of a round that have a result."""
        return [
            job
            for job in self.started.values()
            if job.round == round_ and job.repeat == 0 and self.ended.get(job.label) is not None
        ]

    def _going_on(self, round_: int) -> list[Job]:
        """The trainings of a round whose points are sure to be in the next."""
        to_come = max(0, self._expected(round_) - self._ended_in(round_))
        sure = max(0, self._places(round_ + 1) - to_come)
        return sorted(self._in_round(round_), key=self.rank, reverse=True)[:sure]

    def _places(self, round_: int) -> int:
        """How many points can be in a round of a race."""
        return int(self.limit) // FACTOR ** (round_ - 1)

    def _expected(self, round_: int) -> int:
        """How many points will be in a round, as far as is known."""
        if round_ == 1 or self._ended_in(round_ - 1) < self._expected(round_ - 1):
            return self._places(round_)
        return min(self._places(round_), len(self._in_round(round_ - 1)))

    def _ended_in(self, round_: int) -> int:
        """How many trainings of a round have ended, failed ones too."""
        jobs = (self.started[label] for label in self.ended)
        return sum(job.round == round_ and job.repeat == 0 for job in jobs)

    def _ask(self, point: dict[str, Value] | None) -> dict[str, Value]:
        """A new point: drawn, or this one; what it leaves out is drawn."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = self._sampler(len(self.points) + 1)
            self.study.sampler = _Given(sampler, point) if point else sampler
            trial = self.study.ask()
            drawn = self.space.suggest(trial)
        self.trials.append(trial)
        self.points.append(drawn)
        return drawn

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


class _Given(optuna.samplers.BaseSampler):
    """A sampler whose values give place to those of a point, and whose state is as if it had drawn them.

    Optuna's enqueued trials don't do the latter: a generation of NSGA-II or CMA-ES would not count them.
    """

    def __init__(self, sampler: optuna.samplers.BaseSampler, point: Mapping[str, Value]) -> None:
        self.sampler, self.point = sampler, point

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return self.sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        drawn = self.sampler.sample_relative(study, trial, search_space)
        return {name: self.point.get(name, value) for name, value in drawn.items()}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        if param_name in self.point:
            return self.point[param_name]
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Any, trial: Any) -> None:
        self.sampler.before_trial(study, trial)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        self.sampler.after_trial(study, trial, state, values)
