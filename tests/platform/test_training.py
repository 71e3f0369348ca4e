"""The training loop: what it learns, that it repeats bit for bit, and how it stops when something is wrong."""

import math

import pytest
import torch

from linflab.platform.config import load_experiment
from linflab.platform.datasets import load_dataset
from linflab.platform.errors import SettingError, TrainingError
from linflab.platform.evaluation import evaluate
from linflab.platform.training import EpochReport, StepReport, fit
from tests.conftest import QUICK, RECIPE, TrainedOnDigits


def test_learns_digits(digits_net: TrainedOnDigits) -> None:
    accuracy = evaluate(digits_net.trained.network, digits_net.dataset.test, 0.1, 100)
    assert accuracy.clean > 0.85 and accuracy.certified > 0.7  # 20 of the recipe's 50 epochs


@pytest.mark.parametrize("kind", ["clipped_hinge_cross_entropy", "hinge"])
def test_same_seed_same_bits(kind: str) -> None:
    overrides = [*QUICK, f"objective.kind={kind}", "objective.theta=0.2"]
    nets = []
    for seed in (3, 3, 4):
        experiment = load_experiment(RECIPE, [*overrides, f"seed={seed}"])
        nets.append(fit(experiment, load_dataset("digits")).network.state_dict())
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    assert not all(torch.equal(nets[0][name], nets[2][name]) for name in nets[0])


def test_reports_follow_the_schedules() -> None:
    epochs: list[EpochReport] = []
    steps: list[StepReport] = []
    overrides = ["training.epochs=4", "p_schedule.warmup_share=0.25", "p_schedule.infinity_share=0.25"]
    experiment = load_experiment(RECIPE, overrides)
    trained = fit(experiment, load_dataset("digits"), epochs.append, steps.append)
    assert [step.step for step in steps] == list(range(1, 4 * 37 + 1))  # 1200 images in batches of 32
    assert {step.p for step in steps[:37]} == {8.0}
    assert {step.p for step in steps[-37:]} == {math.inf}
    assert [report.p for report in epochs] == [steps[37 * epoch - 1].p for epoch in (1, 2, 3, 4)]
    assert epochs[0].cross_entropy_weight == experiment.objective.lambda_start
    assert epochs[-1].cross_entropy_weight == pytest.approx(experiment.objective.lambda_end)
    assert epochs[-1].learning_rate < epochs[0].learning_rate
    # the network kept is the latest of those that certify most validation images
    best = max(epochs, key=lambda report: (report.validation.certified, report.epoch))
    assert trained.epoch == best.epoch and trained.validation == best.validation
    assert evaluate(trained.network, load_dataset("digits").validation, 0.1, 1000) == best.validation


def test_loss_that_is_not_finite_is_named() -> None:
    experiment = load_experiment(RECIPE, [*QUICK, "optimizer.learning_rate=1e30"])
    with pytest.raises(TrainingError, match=r"epoch 1 of 3.*learning_rate"):
        fit(experiment, load_dataset("digits"))


def test_batch_larger_than_the_data() -> None:
    with pytest.raises(SettingError, match=r"training\.batch_size=2000.*1200"):
        fit(load_experiment(RECIPE, ["training.batch_size=2000"]), load_dataset("digits"))
