"""Search: points independent of the order in which trials end, and successive halving with late results."""

import json
import random
import tracemalloc
from collections.abc import Mapping
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linflab.platform.config.overrides import load_config
from linflab.platform.errors import InputError
from linflab.platform.sweeps.plan import parse_search_options, plan_sweep
from linflab.platform.sweeps.search import PastTrial, Search, SearchConfig, TrialSpec
from linflab.reports import schema
from linflab.search_spaces.space import SearchSpace, load_space
from tests.conftest import assert_rejected

DEMO = load_space("demo")
Scores = dict[str, float]


def scores(value: float, clean: float = 0.9, flops: float = 1e6) -> Scores:
    return {schema.BEST_VALIDATION_CERTIFIED: value, schema.BEST_VALIDATION_CLEAN: clean, schema.FLOPS: flops}


def simulate_value(job: TrialSpec) -> float:
    """Return a random result for settings and rung; ranks can change from rung to rung."""
    return random.Random(f"{sorted(job.params.items())} {job.rung}").random()


def run_search(
    search: Search, order: random.Random, num_concurrent: int, failing: frozenset[str] = frozenset(), steps: int = 10**6
) -> list[TrialSpec]:
    """Run a search with `num_concurrent` trials that end in random order; return those still running."""
    running: list[TrialSpec] = []
    while not search.is_finished() and steps:
        while len(running) < num_concurrent and (job := search.ask()) is not None:
            running.append(job)
        assert running, "the search is not finished, but no trial runs and none can start"
        job = running.pop(order.randrange(len(running)))
        search.tell(job, None if job.label in failing else scores(simulate_value(job)))
        steps -= 1
    return running


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "cmaes"])
def test_search_tries_every_point_once(sampler: str) -> None:
    search = Search(DEMO, parse_search_options("15", sampler=sampler), seed=0)
    run_search(search, random.Random(0), num_concurrent=3)
    assert sorted(search.results) == sorted(map(str, range(1, 16)))
    assert len({tuple(point.items()) for point in search.points}) == 15


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([1, 3, 9]), st.sets(st.integers(1, 30), max_size=12))
def test_random_search_does_not_depend_on_timing(
    order: int, num_concurrent: int, halving: int, failing: set[int]
) -> None:
    """Timing changes neither the points nor which of them are promoted, best or replicated."""
    config = parse_search_options("20", sampler="random", halving=halving, seeds=3)
    failing_labels = frozenset(f"{number}" for number in failing)
    one, other = Search(DEMO, config, seed=4), Search(DEMO, config, seed=4)
    run_search(one, random.Random(order), num_concurrent, failing_labels)
    run_search(other, random.Random(0), 1, failing_labels)
    assert one.results == other.results and one.points == other.points


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 40), st.sampled_from(["random", "tpe"]))
def test_resumed_search_ends_like_an_uninterrupted_one(
    order: int, num_concurrent: int, num_steps: int, sampler: str
) -> None:
    config = parse_search_options("12", sampler=sampler, halving=3, seeds=2)
    first = Search(DEMO, config, seed=1)
    run_search(first, random.Random(order), num_concurrent, steps=num_steps)
    second = Search(DEMO, config, seed=1)
    ends = {label: 100.0 + when for when, label in enumerate(first.results)}
    second.restore(
        PastTrial(job, float(when), ends.get(job.label), first.results.get(job.label))
        for when, job in enumerate(first.started.values())
    )
    for job in first.started.values():
        if job.label not in second.results:
            second.tell(job, scores(simulate_value(job)))
    run_search(second, random.Random(0), num_concurrent)
    assert second.points[: len(first.points)] == first.points and len(second.points) == 12
    assert len(second.results) == 12 + 4 + 1
    if sampler == "random":
        uninterrupted = Search(DEMO, config, seed=1)
        run_search(uninterrupted, random.Random(0), 1)
        assert uninterrupted.results == second.results


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "cmaes"])
def test_resumed_search_suggests_the_same_points(sampler: str) -> None:
    """Trials end one by one; every point equals that of an uninterrupted search."""

    def continue_search(search: Search, until: int) -> list[PastTrial]:
        past = []
        while len(search.results) < until and (job := search.ask()) is not None:
            result = scores(-abs(float(job.params["objective.theta"]) - 0.21))
            search.tell(job, result)
            past.append(PastTrial(job, 2.0 * job.number, 2.0 * job.number + 1, result))
        return past

    config = parse_search_options("30", sampler=sampler)
    uninterrupted, interrupted, resumed = (Search(DEMO, config, seed=3) for _ in range(3))
    continue_search(uninterrupted, 30)
    resumed.restore(continue_search(interrupted, 17))
    continue_search(resumed, 30)
    assert resumed.points == uninterrupted.points


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "cmaes"])
def test_resumed_search_replays_concurrent_trials_in_order(sampler: str) -> None:
    """Three concurrent trials end in pairs: the order of ask and tell determines the sampler's state."""
    config = parse_search_options("40", sampler=sampler)

    def work_in_pairs(
        search: Search, until: int, running: list[TrialSpec], past: dict[str, PastTrial], clock: int
    ) -> int:
        while len(search.results) < until:
            while len(running) < 3 and (job := search.ask()) is not None:
                clock += 1
                running.append(job)
                past[job.label] = PastTrial(job, clock)
            for job in (running.pop(1), running.pop(0)) if len(running) > 1 else (running.pop(),):
                result = scores(-abs(float(job.params["objective.theta"]) - 0.21))
                search.tell(job, result)
                clock += 1
                past[job.label] = replace(past[job.label], tell_time=clock, scores=result)
        return clock

    uninterrupted, interrupted, resumed = (Search(DEMO, config, seed=3) for _ in range(3))
    work_in_pairs(uninterrupted, 40, [], {}, 0)
    past: dict[str, PastTrial] = {}
    running: list[TrialSpec] = []
    clock = work_in_pairs(interrupted, 20, running, past, 0)
    resumed.restore(past.values())
    work_in_pairs(resumed, 40, running, past, clock)
    assert resumed.points == uninterrupted.points


def test_trial_with_a_deleted_run_counts_as_failed() -> None:
    search = Search(DEMO, parse_search_options("5", sampler="random"), seed=0)
    run_search(search, random.Random(0), num_concurrent=1)
    past = [
        PastTrial(job, float(k), k + 0.5, search.results[label])
        for k, (label, job) in enumerate(search.started.items())
    ]
    resumed = Search(DEMO, parse_search_options("6", sampler="random"), seed=0)
    resumed.restore(trial for trial in past if trial.spec.number != 3)
    assert resumed.results["3"] is None and resumed.points == search.points
    assert resumed.ask().number == 6


@pytest.mark.parametrize(("retry_value", "rung_sizes"), [(0.0, [9, 3, 1]), (1.0, [9, 5, 2])])
def test_halving_retries_failed_trials(retry_value: float, rung_sizes: list[int]) -> None:
    """Promoted trials stay promoted; a retried trial that is now better is promoted as well."""
    config = parse_search_options("9", sampler="random", halving=9)
    search = Search(DEMO, config, seed=0)
    run_search(search, random.Random(0), num_concurrent=2, failing=frozenset({"2", "5", "3.2"}))
    past = [
        PastTrial(job, float(k), k + 0.5, search.results[label])
        for k, (label, job) in enumerate(search.started.items())
    ]
    resumed = Search(DEMO, config, seed=0)
    resumed.restore(
        replace(trial, tell_time=None) if search.results[trial.spec.label] is None else trial for trial in past
    )
    for job in list(resumed.started.values()):
        if job.label not in resumed.results:
            resumed.tell(job, scores(retry_value))
    run_search(resumed, random.Random(0), num_concurrent=2)
    assert [sum(job.rung == rung for job in resumed.started.values()) for rung in (1, 2, 3)] == rung_sizes


def test_best_trials_of_each_rung_are_promoted() -> None:
    search = Search(DEMO, parse_search_options("27", sampler="random", halving=9), seed=0)
    run_search(search, random.Random(0), num_concurrent=4)
    for rung, capacity in ((1, 9), (2, 3)):
        jobs = [job for job in search.started.values() if job.rung == rung]
        best = sorted(jobs, key=simulate_value, reverse=True)[:capacity]
        assert {job.number for job in best} == {
            other.number for other in search.started.values() if other.rung == rung + 1
        }
    best = search.best()
    assert best is not None and best.rung == 3
    assert simulate_value(best) == max(simulate_value(job) for job in search.started.values() if job.rung == 3)


def test_halving_ends_with_few_successful_trials() -> None:
    search = Search(DEMO, parse_search_options("27", halving=9, seeds=2), seed=0)
    run_search(search, random.Random(0), num_concurrent=4, failing=frozenset(str(number) for number in range(1, 26)))
    best = search.best()
    assert best is not None
    assert {label for label in search.results if "." in label} == {
        "26.2",
        "27.2",
        "26.3",
        "27.3",
        f"{best.label}-seed1",
    }


def test_halving_reduces_epochs_of_early_rungs() -> None:
    config = parse_search_options("27", halving=9)
    assert [config.epochs_at_rung(rung, 25) for rung in (1, 2, 3)] == [3, 8, 25]
    assert config.epochs_at_rung(1, 2) == 1


def test_tpe_finds_better_points_than_random_search() -> None:
    def error(point: Mapping[str, object]) -> float:
        return sum(
            abs(float(point[path]) - target) / size
            for path, target, size in (
                ("objective.theta", 0.21, 0.2),
                ("p_schedule.warmup_fraction", 0.05, 0.25),
                ("p_schedule.inf_fraction", 0.15, 0.18),
            )
        )

    def mean_best_error(sampler: str) -> float:
        errors = []
        for seed in range(3):
            search = Search(DEMO, parse_search_options("40", sampler=sampler), seed)
            while (job := search.ask()) is not None:
                search.tell(job, scores(-error(job.params)))
            errors.append(error(search.points[search.best().number - 1]))
        return sum(errors) / 3

    assert mean_best_error("tpe") < 0.7 * mean_best_error("random")


def test_search_optimizes_several_objectives() -> None:
    search = Search(DEMO, parse_search_options("30", sampler="tpe", objectives=["clean", "flops"]), seed=0)
    while (job := search.ask()) is not None:
        width = int(job.params["model.width"])
        search.tell(job, scores(0.5, clean=width / 1000, flops=width) if job.number % 7 else None)
    assert search.is_finished() and {trial.values[1] for trial in search.study.best_trials} == {64, 96, 128}
    assert search.points[search.best().number - 1]["model.width"] == 128


GRID = {
    "description": "a grid",
    "parameters": {
        "model.kind": {"distribution": "categorical", "choices": ["linf_dist_mlp", "sort_net"]},
        "model.q": {
            "distribution": "uniform",
            "low": 0.5,
            "high": 0.8,
            "step": 0.1,
            "when": {"model.kind": "sort_net"},
        },
        "model.depth": {"distribution": "integer", "low": 2, "high": 3},
        "model.width": {"distribution": "integer", "low": "model.depth", "high": 3},
    },
}


def test_grid_has_each_point_once_with_conditions_and_bounds() -> None:
    space = SearchSpace.model_validate(GRID)
    search = Search(space, parse_search_options("100", sampler="grid"), seed=0)
    run_search(search, random.Random(0), num_concurrent=3)
    assert search.total == len(search.points) == (1 + 4) * 3
    assert [p["model.q"] for p in search.points[3::3]] == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert search.points[:3] == [
        {"model.kind": "linf_dist_mlp", "model.depth": depth, "model.width": width}
        for depth, width in ((2, 2), (2, 3), (3, 3))
    ]


def test_halving_is_rejected_when_the_grid_is_too_small() -> None:
    with pytest.raises(InputError, match=r"halving=27\b.*\b15\b"):
        Search(SearchSpace.model_validate(GRID), parse_search_options("100", sampler="grid", halving=27), seed=0)


def test_infinite_grid_is_rejected() -> None:
    with pytest.raises(InputError, match=r"sampler=grid: p_schedule\.start\b"):
        Search(DEMO, parse_search_options("5", sampler="grid"), seed=0)


def test_search_adds_no_points_after_its_time_budget() -> None:
    search = Search(DEMO, parse_search_options("0.5h"), seed=0)
    jobs = [search.ask() for _ in range(3)]
    assert search.ask(allow_new=False) is None and not search.is_finished(allow_new=False) and search.total is None
    for job in jobs:
        search.tell(job, scores(0.5))
    assert search.is_finished(allow_new=False) and not search.is_finished()


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"budget": "many"}, "budget=many"),
        ({"budget": "0"}, "budget=0"),
        ({"budget": "-1h"}, "budget=-1h"),
        ({"budget": "nanh"}, "budget=nanh"),
        ({"budget": "20", "halving": 4}, "halving=4"),
        ({"budget": "20", "halving": 27}, "halving=27"),
        ({"budget": "2h", "halving": 3}, "halving=3"),
        ({"budget": "20", "objectives": ["speed"]}, "objectives=speed"),
        ({"budget": "20", "objectives": ["clean", "clean"]}, "objectives=clean,clean"),
        ({"budget": "20", "sampler": "cmaes", "objectives": ["clean", "flops"]}, "sampler=cmaes"),
        ({"budget": "20", "sampler": "best"}, "sampler=best"),
        ({"budget": "20", "seeds": 0}, "seeds=0"),
        ({"budget": "20", "verify_front": -1}, "verify-front=-1"),
        ({"budget": "20", "verify_front": 2, "objectives": ["clean", "certified"]}, "verify-front=2"),
        ({"budget": "20", "verify_images": 50}, "verify-images=50"),
    ],
)
def test_invalid_search_options_are_rejected(options: dict[str, object], setting: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_search_options(**options)  # type: ignore[arg-type]
    assert_rejected(caught, setting)


def test_the_best_trial_is_chosen_after_verification() -> None:
    """Seeds are replicated for the trial with the best verified accuracy, also after a resume."""
    config = parse_search_options("5", sampler="random", seeds=2, verify_front=2)
    search = Search(DEMO, config, seed=0)
    values = {"1": 0.5, "2": 0.7, "3": 0.6, "4": 0.8, "5": 0.4}
    for number in range(5):
        spec = search.ask()
        assert spec is not None and search.unverified() == []  # not all have ended
        search.tell(spec, scores(values[str(number + 1)]))
    assert search.is_finished() and search.ask() is None
    assert [spec.label for spec in search.unverified()] == ["4", "2"]
    search.tell_verified(search.unverified()[0], 0.81)
    resumed = Search(DEMO, config, seed=0)
    resumed.restore(
        PastTrial(spec, 2.0 * k, 2.0 * k + 1, search.results[label])
        for k, (label, spec) in enumerate(search.started.items())
    )
    for one in (search, resumed):
        assert [spec.label for spec in one.unverified()] == ["2"] and one.ask() is None
        one.tell_verified(one.unverified()[0], 0.83)
        best, replicate = one.best(), one.ask()
        assert best is not None and best.label == "2"
        assert replicate is not None and replicate.label == "2-seed1" and not one.is_finished()
        one.tell(replicate, scores(0.9))
        assert one.is_finished() and one.unverified() == []


def test_trial_labels_name_rung_and_seed() -> None:
    assert [TrialSpec(7, {}).label, TrialSpec(7, {}, 2).label, TrialSpec(7, {}, 3, 1).label] == [
        "7",
        "7.2",
        "7.3-seed1",
    ]
    assert SearchConfig(halving=9, trials=9).num_rungs == 3


def test_huge_grid_is_built_lazily() -> None:
    space = {"description": "seeds", "parameters": {"seed": {"distribution": "integer", "low": 0, "high": 2**31 - 1}}}
    tracemalloc.start()
    search = Search(SearchSpace.model_validate(space), parse_search_options("4", sampler="grid"), seed=0)
    run_search(search, random.Random(0), num_concurrent=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [point["seed"] for point in search.points] == [0, 1, 2, 3] and search.total == 4
    assert peak < 2**24
    timed = Search(SearchSpace.model_validate(space), parse_search_options("1h", sampler="grid"), seed=0)
    assert timed.ask() is not None and timed.total is None and not timed.is_finished()


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "cmaes", "grid"])
def test_null_and_list_choices_are_drawn_and_restored(sampler: str) -> None:
    choices = [None, 1.0, [0.9, 0.99]]
    space = SearchSpace.model_validate(
        {
            "description": "choices",
            "parameters": {
                "optimizer.betas": {"distribution": "categorical", "choices": choices},
                "seed": {"distribution": "integer", "low": 0, "high": 9},
            },
        }
    )
    config = parse_search_options("24", sampler=sampler)
    uninterrupted, resumed = Search(space, config, seed=0), Search(space, config, seed=0)
    past = []
    while len(uninterrupted.results) < 12 and (job := uninterrupted.ask()) is not None:
        uninterrupted.tell(job, scores(simulate_value(job)))
        stored = TrialSpec(**json.loads(json.dumps(asdict(job))))  # as in the tracking store
        past.append(PastTrial(stored, 2.0 * job.number, 2.0 * job.number + 1, scores(simulate_value(job))))
    resumed.restore(past)
    for search in (uninterrupted, resumed):
        run_search(search, random.Random(0), num_concurrent=1)
    assert uninterrupted.points == resumed.points
    assert all(choice in [point["optimizer.betas"] for point in uninterrupted.points] for choice in choices)


@pytest.mark.parametrize(
    ("space", "recipe"),
    [
        ("sabr", "cifar10_eps2_255_sabr"),
        ("expressive_loss", "cifar10_eps2_255_mtl_ibp"),
        ("expressive_loss", "mnist_eps0.3_exp_ibp"),
        ("taps", "mnist_eps0.3_taps"),
        ("staps", "cifar10_eps8_255_staps"),
        ("pvt", "digits_eps0.1_pvt"),
    ],
)
def test_spaces_of_certified_training_suit_the_published_recipes(space: str, recipe: str) -> None:
    plan_sweep(recipe, [], space, "one", parse_search_options("20"), None)
    settings, ranges = load_config(recipe, []).to_flat_dict(), load_space(space).parameters
    for path in settings.keys() & ranges.keys():  # published values lie inside the ranges
        value, distribution = settings[path], ranges[path]
        if hasattr(distribution, "low") and value:
            low, high = distribution.bounds({})
            assert low <= value <= high
