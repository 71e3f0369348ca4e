"""Optimizers against their published updates in float64, learning-rate milestones, and the l_1 penalty."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.errors import InputError, RunInterrupted
from linflab.platform.training.checkpoints import CheckpointStore
from linflab.platform.training.fit import fit
from linflab.platform.training.trainer import Trainer
from tests.conftest import RECIPE

RELU_NET = [
    "model.kind=conv_net",
    "model.size=strided",
    "model.batch_norm=true",
    "objective.kind=cross_entropy",
    "optimizer.betas=[0.9,0.95]",
    "optimizer.adam_epsilon=1e-6",
    "optimizer.momentum=0.8",
    "training.batch_size=200",
    "training.epochs=4",
]
RATE, EPSILON, DECAY = 0.01, 1e-6, 0.05
BETAS = 0.9, 0.95
Updates = Iterator[np.ndarray]


def make_trainer(*settings: str) -> Trainer:
    return Trainer(load_config(RECIPE, [*RELU_NET, *settings]), load_dataset("digits"), dtype=torch.float64)


def take_steps(trainer: Trainer, count: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Return for each step and network parameter its value before the step, and its gradient."""
    order_and_draws, steps = trainer.epoch_order(1), []
    for step in range(count):
        before = [parameter.detach().clone() for parameter in trainer.network.parameters()]
        trainer.step(step, *order_and_draws)
        gradients = [parameter.grad for parameter in trainer.network.parameters()]
        steps.append([(value.numpy(), grad.numpy().copy()) for value, grad in zip(before, gradients, strict=True)])
    return steps


def adam(weights: list[np.ndarray], gradients: list[np.ndarray], decoupled: bool) -> Updates:
    """Kingma & Ba, ICLR 2015, Algorithm 1; decoupled: Loshchilov & Hutter, ICLR 2019, Algorithm 2."""
    m = v = 0.0
    for t, (w, g) in enumerate(zip(weights, gradients, strict=True), start=1):
        g = g if decoupled else g + DECAY * w
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
        scaled = m / (1 - BETAS[0] ** t) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPSILON)
        yield w - RATE * (scaled + (DECAY * w if decoupled else 0))


def radam(weights: list[np.ndarray], gradients: list[np.ndarray]) -> Updates:
    """Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020, Algorithm 2."""
    m = v = 0.0
    limit = 2 / (1 - BETAS[1]) - 1
    for t, (w, g) in enumerate(zip(weights, gradients, strict=True), start=1):
        g = g + DECAY * w
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
        mean, length = m / (1 - BETAS[0] ** t), limit - 2 * t * BETAS[1] ** t / (1 - BETAS[1] ** t)
        if length > 5:
            variance = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
            mean = mean * np.sqrt(variance) * np.sqrt(1 - BETAS[1] ** t) / (np.sqrt(v) + EPSILON)
        yield w - RATE * mean


def sgd(weights: list[np.ndarray], gradients: list[np.ndarray]) -> Updates:
    """Heavy-ball momentum: velocities are sums of gradients, decayed by the momentum."""
    velocity = 0.0
    for w, g in zip(weights, gradients, strict=True):
        velocity = 0.8 * velocity + g + DECAY * w
        yield w - RATE * velocity


REFERENCES = {
    "adamw": lambda weights, gradients: adam(weights, gradients, decoupled=True),
    "adam": lambda weights, gradients: adam(weights, gradients, decoupled=False),
    "radam": radam,
    "sgd": sgd,
}


@pytest.mark.parametrize("algorithm", REFERENCES)
def test_steps_are_those_of_the_published_algorithm(algorithm: str) -> None:
    """RAdam adapts its rate from the sixth of these steps on."""
    trainer = make_trainer(
        f"optimizer.algorithm={algorithm}",
        f"optimizer.learning_rate={RATE}",
        f"optimizer.weight_decay={DECAY}",
        "optimizer.constant_lr_fraction=1",
    )
    steps = take_steps(trainer, 8)
    last = [parameter.detach().numpy() for parameter in trainer.network.parameters()]
    for index, end in enumerate(last):
        weights, gradients = zip(*(step[index] for step in steps), strict=True)
        expected = list(REFERENCES[algorithm](list(weights), list(gradients)))
        for actual, reference in zip([*weights[1:], end], expected, strict=True):
            np.testing.assert_allclose(actual, reference, rtol=1e-9, atol=1e-12)


def test_learning_rate_falls_at_milestones() -> None:
    """At exactly the first step of the epochs that the fractions name."""
    epochs = ["training.epochs=70", "optimizer.milestones=[50/70,60/70]", "optimizer.milestone_factor=0.1"]
    trainer = make_trainer(*epochs, "optimizer.learning_rate=0.5")
    assert trainer.steps_per_epoch == 6
    by_epoch = {0: 0.5, 50: 0.05, 60: 0.005, 70: None}
    for first, end in ((0, 50), (50, 60), (60, 70)):
        rates = [trainer.scheduled_values(step).learning_rate for step in range(6 * first, 6 * end)]
        assert rates == pytest.approx([by_epoch[first]] * len(rates), rel=1e-12)


def test_l1_penalty_has_the_signs_of_weights_as_gradient() -> None:
    """Of linear and convolutional layers only, and without effect on the loss of the network itself."""
    penalized, plain = make_trainer("optimizer.l1_weight=0.01"), make_trainer()
    layers = [layer for layer in plain.network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    norm = sum(float(np.abs(layer.weight.detach().numpy()).sum()) for layer in layers)
    ids = {id(layer.weight) for layer in layers}
    is_penalized = [id(parameter) in ids for parameter in plain.network.parameters()]
    assert sum(is_penalized) == 4 and len(is_penalized) == 14
    losses = [trainer.step(0, *trainer.epoch_order(1)).item() for trainer in (penalized, plain)]
    assert losses[0] - losses[1] == pytest.approx(0.01 * norm, rel=1e-9)
    (with_penalty,), (without,) = take_steps(make_trainer("optimizer.l1_weight=0.01"), 1), take_steps(make_trainer(), 1)
    for (weight, gradient), (_, plain_gradient), expected in zip(with_penalty, without, is_penalized, strict=True):
        np.testing.assert_allclose(gradient - plain_gradient, 0.01 * expected * np.sign(weight), atol=1e-12)


def test_l1_penalty_requires_linear_layers() -> None:
    with pytest.raises(InputError, match=r"optimizer\.l1_weight=0\.1: .*linf_dist_mlp"):
        Trainer(load_config(RECIPE, ["optimizer.l1_weight=0.1"]), load_dataset("digits"))


@pytest.mark.integration
@pytest.mark.parametrize("algorithm", ["radam", "sgd"])
def test_resumed_training_is_bitwise_equal(tmp_path: Path, algorithm: str) -> None:
    settings = [f"optimizer.algorithm={algorithm}", "optimizer.milestones=[0.5]", "optimizer.l1_weight=1e-5"]
    experiment, data = load_config(RECIPE, [*RELU_NET, *settings]), load_dataset("digits")
    checkpoints, steps = CheckpointStore(tmp_path / "run"), []
    with pytest.raises(RunInterrupted):
        fit(experiment, data, on_step=steps.append, checkpoints=checkpoints, should_stop=lambda: len(steps) >= 10)
    resumed, whole = fit(experiment, data, checkpoints=checkpoints), fit(experiment, data)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name
    state = checkpoints.load()
    name = {"radam": "exp_avg_sq", "sgd": "momentum_buffer"}[algorithm]
    state["optimizer"]["state"][0][name] = torch.zeros(3)
    checkpoints.save(state)
    with pytest.raises(InputError, match="moments"):
        fit(experiment, data, checkpoints=checkpoints)
