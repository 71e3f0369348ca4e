"""What a sweep does next: the same points in whatever order trials end, races that nothing late can overturn."""

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linflab.platform.errors import SettingError
from linflab.platform.search import Job, Past, Search, SearchConfig
from linflab.platform.sweep import search_config
from linflab.reports import schema
from linflab.search_spaces.space import SearchSpace, load_space

DEMO = load_space("demo")
Scores = dict[str, float]


def scores(value: float, clean: float = 0.9, flops: float = 1e6) -> Scores:
    return {schema.BEST_VALIDATION_CERTIFIED: value, schema.BEST_VALIDATION_CLEAN: clean, schema.FLOPS: flops}


def value_of(job: Job) -> float:
    """What a trial comes to: of its settings, and of its round, in which the order can change."""
    return random.Random(f"{sorted(job.point.items())} {job.round}").random()


def work(
    search: Search, order: random.Random, at_once: int, failing: frozenset[str] = frozenset(), steps: int = 10**6
) -> list[Job]:
    """Work off a search, so many at once, which end in random order; returns those that have not ended."""
    live: list[Job] = []
    while not search.finished() and steps:
        while len(live) < at_once and (job := search.next_job()) is not None:
            live.append(job)
        assert live, "nothing runs, nothing can start, and yet it is not finished"
        job = live.pop(order.randrange(len(live)))
        search.tell(job, None if job.label in failing else scores(value_of(job)))
        steps -= 1
    return live


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "cmaes"])
def test_every_point_once(sampler: str) -> None:
    search = Search(DEMO, search_config("15", sampler=sampler), seed=0)
    work(search, random.Random(0), at_once=3)
    assert sorted(search.ended) == sorted(map(str, range(1, 16)))
    assert len({tuple(point.items()) for point in search.points}) == 15


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([1, 3, 9]), st.sets(st.integers(1, 30), max_size=12))
def test_a_random_search_does_not_depend_on_timing(order: int, at_once: int, race: int, failing: set[int]) -> None:
    """Neither which points there are, nor which go on, nor which is the best and is repeated."""
    config = search_config("20", sampler="random", race=race, seeds=3)
    lost = frozenset(f"{number}" for number in failing)
    one, other = Search(DEMO, config, seed=4), Search(DEMO, config, seed=4)
    work(one, random.Random(order), at_once, lost)
    work(other, random.Random(0), 1, lost)
    assert one.ended == other.ended and one.points == other.points


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 40), st.sampled_from(["random", "tpe"]))
def test_a_search_that_was_cut_goes_on_to_the_same_end(order: int, at_once: int, cut: int, sampler: str) -> None:
    config = search_config("12", sampler=sampler, race=3, seeds=2)
    first = Search(DEMO, config, seed=1)
    work(first, random.Random(order), at_once, steps=cut)
    second = Search(DEMO, config, seed=1)
    ends = {label: 100.0 + when for when, label in enumerate(first.ended)}
    second.recall(
        Past(job, float(when), ends.get(job.label), first.ended.get(job.label))
        for when, job in enumerate(first.started.values())
    )
    for job in first.started.values():
        if job.label not in second.ended:
            second.tell(job, scores(value_of(job)))
    work(second, random.Random(0), at_once)
    assert second.points[: len(first.points)] == first.points and len(second.points) == 12
    assert len(second.ended) == 12 + 4 + 1
    if sampler == "random":
        whole = Search(DEMO, config, seed=1)
        work(whole, random.Random(0), 1)
        assert whole.ended == second.ended


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "cmaes"])
def test_a_search_that_is_resumed_knows_what_it_had_learned(sampler: str) -> None:
    """Point for point what it would have tried without the cut, where trials end one by one."""

    def go_on(search: Search, until: int) -> list[Past]:
        past = []
        while len(search.ended) < until and (job := search.next_job()) is not None:
            found = scores(-abs(float(job.point["objective.theta"]) - 0.21))
            search.tell(job, found)
            past.append(Past(job, 2.0 * job.number, 2.0 * job.number + 1, found))
        return past

    config = search_config("30", sampler=sampler)
    whole, cut, resumed = (Search(DEMO, config, seed=3) for _ in range(3))
    go_on(whole, 30)
    resumed.recall(go_on(cut, 17))
    go_on(resumed, 30)
    assert resumed.points == whole.points


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "cmaes"])
def test_what_was_under_way_side_by_side_is_replayed_in_its_order(sampler: str) -> None:
    """Three at once, which end in pairs: what the search was asked and told, in turn, is the state of its sampler."""
    config = search_config("40", sampler=sampler)

    def work_in_pairs(search: Search, until: int, open_: list[Job], past: dict[str, Past], clock: int) -> int:
        while len(search.ended) < until:
            while len(open_) < 3 and (job := search.next_job()) is not None:
                clock += 1
                open_.append(job)
                past[job.label] = Past(job, clock)
            for job in (open_.pop(1), open_.pop(0)) if len(open_) > 1 else (open_.pop(),):
                found = scores(-abs(float(job.point["objective.theta"]) - 0.21))
                search.tell(job, found)
                clock += 1
                past[job.label] = replace(past[job.label], told=clock, scores=found)
        return clock

    whole, cut, resumed = (Search(DEMO, config, seed=3) for _ in range(3))
    work_in_pairs(whole, 40, [], {}, 0)
    past: dict[str, Past] = {}
    open_: list[Job] = []
    clock = work_in_pairs(cut, 20, open_, past, 0)
    resumed.recall(past.values())
    work_in_pairs(resumed, 40, open_, past, clock)
    assert resumed.points == whole.points


def test_a_point_whose_record_was_deleted_counts_as_failed() -> None:
    search = Search(DEMO, search_config("5", sampler="random"), seed=0)
    work(search, random.Random(0), at_once=1)
    past = [Past(job, float(k), k + 0.5, search.ended[label]) for k, (label, job) in enumerate(search.started.items())]
    again = Search(DEMO, search_config("6", sampler="random"), seed=0)
    again.recall(one for one in past if one.job.number != 3)
    assert again.ended["3"] is None and again.points == search.points
    assert again.next_job().number == 6


@pytest.mark.parametrize(("again_worth", "in_rounds"), [(0.0, [9, 3, 1]), (1.0, [9, 5, 2])])
def test_a_race_whose_failed_trials_are_tried_again(again_worth: float, in_rounds: list[int]) -> None:
    """Those that have gone on stay; one that now turns out better goes on as well."""
    config = search_config("9", sampler="random", race=9)
    search = Search(DEMO, config, seed=0)
    work(search, random.Random(0), at_once=2, failing=frozenset({"2", "5", "3.2"}))
    past = [Past(job, float(k), k + 0.5, search.ended[label]) for k, (label, job) in enumerate(search.started.items())]
    again = Search(DEMO, config, seed=0)
    again.recall(replace(one, told=None) if search.ended[one.job.label] is None else one for one in past)
    for job in list(again.started.values()):
        if job.label not in again.ended:
            again.tell(job, scores(again_worth))
    work(again, random.Random(0), at_once=2)
    assert [sum(job.round == round_ for job in again.started.values()) for round_ in (1, 2, 3)] == in_rounds


def test_the_best_of_each_round_go_on() -> None:
    search = Search(DEMO, search_config("27", sampler="random", race=9), seed=0)
    work(search, random.Random(0), at_once=4)
    for round_, places in ((1, 9), (2, 3)):
        jobs = [job for job in search.started.values() if job.round == round_]
        best = sorted(jobs, key=value_of, reverse=True)[:places]
        assert {job.number for job in best} == {j.number for j in search.started.values() if j.round == round_ + 1}
    best = search.best()
    assert best is not None and best.round == 3
    assert value_of(best) == max(value_of(job) for job in search.started.values() if job.round == 3)


def test_few_survivors_of_a_race_still_end_it() -> None:
    search = Search(DEMO, search_config("27", race=9, seeds=2), seed=0)
    work(search, random.Random(0), at_once=4, failing=frozenset(str(number) for number in range(1, 26)))
    best = search.best()
    assert best is not None
    assert {label for label in search.ended if "." in label} == {"26.2", "27.2", "26.3", "27.3", f"{best.label}-seed1"}


def test_lengths_of_a_race() -> None:
    config = search_config("27", race=9)
    assert [config.epochs_in(round_, 25) for round_ in (1, 2, 3)] == [3, 8, 25]
    assert config.epochs_in(1, 2) == 1


def test_tpe_learns_and_random_does_not() -> None:
    def miss(point: Mapping[str, object]) -> float:
        return sum(
            abs(float(point[path]) - at) / size
            for path, at, size in (
                ("objective.theta", 0.21, 0.2),
                ("p_schedule.warmup_share", 0.05, 0.25),
                ("p_schedule.infinity_share", 0.15, 0.18),
            )
        )

    def best(sampler: str) -> float:
        found = []
        for seed in range(3):
            search = Search(DEMO, search_config("40", sampler=sampler), seed)
            while (job := search.next_job()) is not None:
                search.tell(job, scores(-miss(job.point)))
            found.append(miss(search.points[search.best().number - 1]))
        return sum(found) / 3

    assert best("tpe") < 0.7 * best("random")


def test_several_objectives() -> None:
    search = Search(DEMO, search_config("30", sampler="tpe", objectives=["clean", "flops"]), seed=0)
    while (job := search.next_job()) is not None:
        width = int(job.point["model.width"])
        search.tell(job, scores(0.5, clean=width / 1000, flops=width) if job.number % 7 else None)
    assert search.finished() and {trial.values[1] for trial in search.study.best_trials} == {64, 96, 128}
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


def test_a_grid_has_every_point_once_under_conditions_and_drawn_bounds() -> None:
    space = SearchSpace.model_validate(GRID)
    search = Search(space, search_config("100", sampler="grid"), seed=0)
    work(search, random.Random(0), at_once=3)
    assert search.total == len(search.points) == (1 + 4) * 3
    assert [p["model.q"] for p in search.points[3::3]] == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert search.points[:3] == [
        {"model.kind": "linf_dist_mlp", "model.depth": depth, "model.width": width}
        for depth, width in ((2, 2), (2, 3), (3, 3))
    ]


def test_a_grid_smaller_than_its_race_is_refused() -> None:
    with pytest.raises(SettingError, match="race=27: needs at least 27 points; the grid has 15"):
        Search(SearchSpace.model_validate(GRID), search_config("100", sampler="grid", race=27), seed=0)


def test_a_grid_without_end_is_refused() -> None:
    with pytest.raises(SettingError, match=r"sampler=grid: p_schedule\.start: .*without end"):
        Search(DEMO, search_config("5", sampler="grid"), seed=0)


def test_no_new_points_when_the_hours_are_spent() -> None:
    search = Search(DEMO, search_config("0.5h"), seed=0)
    jobs = [search.next_job() for _ in range(3)]
    assert search.next_job(in_time=False) is None and not search.finished(in_time=False) and search.total is None
    for job in jobs:
        search.tell(job, scores(0.5))
    assert search.finished(in_time=False) and not search.finished()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"budget": "many"}, "budget=many: must be a number of trials, as in 20, or of hours, as in 1.5h"),
        ({"budget": "0"}, "budget=0: "),
        ({"budget": "-1h"}, "budget=-1h: "),
        ({"budget": "nanh"}, "budget=nanh: "),
        ({"budget": "20", "race": 4}, "race=4: must be a power of 3"),
        ({"budget": "20", "race": 27}, "race=27: needs at least 27 trials"),
        ({"budget": "2h", "race": 3}, "race=3: needs a budget in trials"),
        ({"budget": "20", "objectives": ["speed"]}, "objectives=speed"),
        ({"budget": "20", "objectives": ["clean", "clean"]}, "names one twice"),
        ({"budget": "20", "sampler": "cmaes", "objectives": ["clean", "flops"]}, "sampler=cmaes: takes one objective"),
        ({"budget": "20", "sampler": "best"}, "sampler=best"),
        ({"budget": "20", "seeds": 0}, "seeds=0"),
    ],
)
def test_wrong_searches_are_named(asked: dict[str, object], words: str) -> None:
    with pytest.raises(SettingError, match=words.replace(".", r"\.")):
        search_config(**asked)  # type: ignore[arg-type]


def test_labels() -> None:
    assert [Job(7, {}).label, Job(7, {}, 2).label, Job(7, {}, 3, 1).label] == ["7", "7.2", "7.3-seed1"]
    assert SearchConfig(race=9, trials=9).rounds == 3
