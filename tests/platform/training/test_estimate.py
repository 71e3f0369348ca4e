"""Dry runs take bounded time for any recipe, and extrapolate closely to whole batches."""

import time

import pytest

from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import Dataset, load_dataset
from linflab.platform.training import estimate as estimating
from linflab.platform.training.estimate import StepTime, estimate_cost
from linflab.platform.training.trainer import Trainer
from tests.conftest import RECIPE

pytestmark = pytest.mark.integration


def measure_batch_seconds(experiment: ExperimentConfig, dataset: Dataset) -> float:
    """Return CPU seconds of a step in the middle of the schedule, the minimum of three."""
    trainer = Trainer(experiment, dataset)
    order, draws = trainer.epoch_order(1)
    seconds = []
    for _ in range(4):
        start = time.process_time()
        trainer.step(trainer.steps // 2, order, draws)
        seconds.append(time.process_time() - start)
    return min(seconds[1:])


def test_estimate_extrapolates_to_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that is used up at once allows only parts of a batch to be timed."""
    settings = ["model.width=1024", "training.batch_size=512", "evaluation.attack.steps=5", "compute.cpus_per_worker=1"]
    experiment, dataset = load_config(RECIPE, settings), load_dataset("digits")
    expected = measure_batch_seconds(experiment, dataset)
    monkeypatch.setattr(estimating, "STEPS_S", 0.4 * expected)
    seen: list[StepTime] = []
    found = estimate_cost(experiment, dataset, seen.append)
    assert found.timed_images < found.batch_images == 512
    assert seen == found.steps and found.memory > 2**20
    # Within 30% on an idle machine; other processes may share this one.
    assert expected / 3 < found.steps[len(found.steps) // 2].seconds < 3 * expected


def test_estimate_times_whole_batches_when_they_are_fast() -> None:
    experiment = load_config(RECIPE, ["evaluation.attack.steps=5", "compute.cpus_per_worker=1"])
    found = estimate_cost(experiment, load_dataset("digits"))
    assert found.timed_images == found.batch_images == 32 and len(found.steps) == estimating.NUM_TIMED_STEPS
    mean = sum(step.seconds for step in found.steps) / len(found.steps)
    assert found.training_hours == pytest.approx(mean * 50 * 37 / 3600)


def test_one_slow_step_does_not_change_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_config(RECIPE, ["evaluation.attack.steps=5", "compute.cpus_per_worker=1"])
    step, calls = Trainer.step, []

    def step_with_delays(self: Trainer, *arguments: object) -> object:
        calls.append(1)
        if len(calls) % 12 == 0:
            deadline = time.process_time() + 0.3
            while time.process_time() < deadline:
                pass
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "step", step_with_delays)
    found = estimate_cost(experiment, load_dataset("digits"))
    assert max(timed.seconds for timed in found.steps) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        "cifar10_eps8_255_linf_dist_net",
        "cifar10_eps8_255_cap",
    ],
)
def test_dry_run_of_published_recipe_is_bounded(recipe: str) -> None:
    try:
        dataset = load_dataset("cifar10")
    except ValueError:
        pytest.skip("requires CIFAR-10 in the directory LINFLAB_DATA")
    start = time.process_time()
    found = estimate_cost(load_config(recipe, []), dataset)
    assert time.process_time() - start < 90  # CPU time of up to two threads
    assert found.training_hours > 1
