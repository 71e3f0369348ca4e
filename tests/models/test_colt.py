"""Tests of COLT: its points, loss, frozen layers and schedules."""

import copy
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from linflab.models.networks.convnets import CNN7Config
from linflab.models.robustness.bounds.boxes import ball_box
from linflab.models.robustness.bounds.steps import TraceStep
from linflab.models.robustness.bounds.zonotope import ZonotopeEstimate
from linflab.models.robustness.objectives import Batch, COLTConfig
from tests.models.relu_networks import SHAPE, build_relu_network
from tests.models.test_crown import to_affine_chain
from tests.models.test_zonotope import flat_box, propagate_generators

EPS = 0.1
CONFIG = COLTConfig(eps_train=EPS, stages=3, projections=40, stability_weight=0.5)
UNSTABLE = CONFIG.model_copy(update={"stability_weight": 0.0})
MIXED, OWN = 0.15, 0.5  # fractions of a stage with kappa = 1/2 and 1
Call = tuple[ZonotopeEstimate, Mapping[str, Tensor], dict[str, Tensor]]


def make_batch(stage: int, done: float) -> Batch:
    torch.manual_seed(5)
    images, labels = torch.rand(3, *SHAPE, dtype=torch.float64), torch.randint(5, (3,))
    starts = torch.rand(3, *SHAPE, dtype=torch.float64)
    return Batch(images, labels, math.inf, None, 0.0, EPS, starts, (stage + done) / CONFIG.stages, seed=11)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """A list that receives zonotope, coefficients and values of each computed point."""
    seen: list[Call] = []
    points = ZonotopeEstimate.points

    def record(
        self: ZonotopeEstimate, coefficients: Mapping[str, Tensor], steps: Sequence[TraceStep]
    ) -> dict[str, Tensor]:
        values = points(self, coefficients, steps)
        seen.append((self, coefficients, values))
        return values

    monkeypatch.setattr(ZonotopeEstimate, "points", record)
    return seen


def test_first_stage_is_adversarial_training_on_the_input_box() -> None:
    """The attack is computed again in pixels, and the stability loss with the magnitudes of the first weights."""
    net, batch = build_relu_network("dense", 0).double(), make_batch(0, MIXED)
    assert batch.starts is not None
    low, high = (batch.images - EPS).clamp(0, 1), (batch.images + EPS).clamp(0, 1)
    radius, x = (high - low) / 2, low + batch.starts * (high - low)
    for _ in range(8):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(functional.cross_entropy(net(x), batch.labels), x)
        x = torch.minimum(torch.maximum(x + 0.25 * radius * gradient.sign(), low), high)
    first = net[1]
    center, width = first(((low + high) / 2).flatten(1)), radius.flatten(1) @ first.weight.abs().T
    stability = (functional.relu(width - center) * functional.relu(width + center)).sum(dim=1).mean()
    adversarial, clean = (functional.cross_entropy(net(images), batch.labels) for images in (x.detach(), batch.images))
    expected = 0.5 * adversarial + 0.5 * clean + 0.5 * 0.5 * stability
    gradients = torch.autograd.grad(expected, list(net.parameters()))
    loss = CONFIG.build(math.nan).loss(net.train(), batch)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("kind", ["dense", "convolutional", "batchnorm"])
def test_adversarial_points_lie_in_the_zonotope_and_increase_the_loss(kind: str, calls: list[Call]) -> None:
    net, batch = build_relu_network(kind, 0).double().train(), make_batch(2, OWN)
    chain = to_affine_chain(copy.deepcopy(net).eval())
    matrix, constant = (torch.tensor(part) for part in chain[2][:2])
    loss = UNSTABLE.build(math.nan).loss(net, batch)
    assert len(calls) == 9  # 8 gradients, and the end
    assert all(part.abs().max() <= 1 for _, coefficients, _ in calls for part in coefficients.values())
    zonotope, coefficients, values = calls[-1]
    *_, activation = zonotope.terms
    assert len(zonotope.terms) == 3  # inputs and two ReLUs
    lines = [[part.flatten(1).detach().numpy() for part in term] for term in list(zonotope.terms.values())[1:]]
    points, box = values[activation].flatten(1), ball_box(batch.images, EPS)
    for sample, point in enumerate(points.numpy()):
        (first, second) = ([part[sample] for part in parts] for parts in lines)
        before, _ = propagate_generators(chain, *flat_box(box, sample), [first, second])
        slope, offset, radius = second
        center = slope * before[1].center + offset
        generators = np.hstack([slope[:, None] * before[1].matrix, np.diag(radius)])
        flat = np.concatenate([part[sample].flatten().numpy() for part in coefficients.values()])
        np.testing.assert_allclose(point, center + generators @ flat, atol=1e-9)
        assert (np.abs(point - center) <= np.abs(generators).sum(axis=1) + 1e-9).all()
    losses = [
        functional.cross_entropy(z.flatten(1) @ matrix.T + constant, batch.labels, reduction="none")
        for z in (calls[0][2][activation], points)
    ]
    assert (losses[1] > losses[0]).all()
    torch.testing.assert_close(loss, losses[1].mean())


def test_later_stage_mixes_its_loss_with_that_of_the_previous_stage(calls: list[Call]) -> None:
    net, batch = build_relu_network("dense", 0).double().train(), make_batch(1, MIXED)
    config = CONFIG.model_copy(update={"projections": 3000})
    loss = config.build(math.nan).loss(net, batch)
    assert len(calls) == 18
    (zonotope, _, own), (_, _, previous) = calls[8], calls[17]
    (_, activation) = zonotope.terms
    logits = [net[3:](own[activation]), net(previous[zonotope.traced.input])]
    chain, box, given = to_affine_chain(net), ball_box(batch.images, EPS), zonotope.terms[activation]
    stability = 0.0
    for sample in range(3):
        lines = [part[sample].numpy() for part in given]
        before, _ = propagate_generators(chain, *flat_box(box, sample), [lines, lines])
        center, width = before[1].center, before[1].width
        stability += (np.maximum(width - center, 0) * np.maximum(width + center, 0)).sum() / 3
    entropy = sum(0.5 * functional.cross_entropy(z, batch.labels).item() for z in logits)
    assert loss.item() == pytest.approx(entropy + 0.5 * 0.5 * 1.5 * stability, rel=0.05)
    assert stability > 0.2 * entropy


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_frozen_layers_have_no_gradients_and_keep_their_statistics(stage: int) -> None:
    torch.manual_seed(0)
    net = CNN7Config(width=2, hidden_size=8).build((2, 8, 8), 4, (0.4, 0.5), 0.3)
    images, labels, starts = torch.rand(8, 2, 8, 8), torch.arange(8) % 4, torch.rand(8, 2, 8, 8)
    net(images)
    before = copy.deepcopy(net.state_dict())
    batch = Batch(images, labels, math.inf, None, 0.0, EPS, starts, (stage + MIXED) / 3)
    objective = CONFIG.build(math.nan)
    objective.prepare(net, (2, 8, 8))
    objective.loss(net, batch).backward()
    num_frozen = 3 * stage + (stage > 0)  # modules: normalization, then convolution, batch normalization and ReLU
    for number, layer in enumerate(net):
        assert layer.training and (layer in objective.frozen_layers(batch.progress)) == (number < num_frozen)
        for parameter in layer.parameters():
            assert (parameter.grad is None) == (number < num_frozen)
            assert number < num_frozen or parameter.grad.abs().max() > 0 or parameter.dim() == 1
    changed = {
        int(name.split(".")[0]) for name, value in net.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {number for number in (2, 5, 8, 11, 14) if number >= num_frozen}


def test_random_draws_depend_only_on_starts_and_seed() -> None:
    """The attack has few steps, since after many it is in a corner for all starts."""
    net, batch = build_relu_network("convolutional", 0).double().train(), make_batch(2, OWN)
    assert batch.starts is not None
    objective = CONFIG.model_copy(update={"steps": 2}).build(math.nan)
    others = batch._replace(seed=12), batch._replace(starts=1 - batch.starts)
    losses = [objective.loss(net, each) for each in (batch, batch, *others)]
    assert losses[0] == losses[1] and len({loss.item() for loss in losses}) == 3
    first_two = take(batch, slice(2))
    parts = [take(batch, slice(rank, 2, 2))._replace(rank=rank, workers=2) for rank in range(2)]
    one, two = (objective.loss(net, part) for part in parts)
    # Workers together compute the loss of the batch.
    torch.testing.assert_close((one + two) / 2, objective.loss(net, first_two))


def take(batch: Batch, samples: slice) -> Batch:
    """Return these samples of a batch."""
    return Batch(*(x[samples] if isinstance(x, Tensor) else x for x in batch))


@given(
    stages=st.integers(1, 7), stage=st.integers(0, 6), steps_per_stage=st.integers(20, 1000), step=st.integers(0, 1000)
)
def test_schedules_have_exact_boundaries(stages: int, stage: int, steps_per_stage: int, step: int) -> None:
    """Compared with counts of steps: no rounding moves a boundary to another step."""
    stage, step, steps_per_stage = stage % stages, step % steps_per_stage, 20 * (steps_per_stage // 20)
    step %= steps_per_stage
    config = COLTConfig(eps_train=EPS, stages=stages, eps_growth=1.5, stage_lr_factor=0.75, lr_decay_factor=0.5)
    progress = (stage * steps_per_stage + step) / (stages * steps_per_stage)
    assert config.stage(progress)[0] == stage
    mixing = 3 * steps_per_stage // 10  # lr_decay_interval is a twentieth of a stage
    assert config.own_weight(progress) == pytest.approx(min(1.0, step / mixing), abs=1e-9)
    decays = max(0, (step - mixing) // (steps_per_stage // 20))
    assert config.learning_rate_factor(progress) == pytest.approx(0.75**stage * 0.5**decays)
    assert config.eps_factor(progress) == pytest.approx(1.5 ** (stages - 1 - stage))


def test_too_many_stages_are_rejected() -> None:
    with torch.device("meta"):
        net = CNN7Config().build((3, 32, 32), 10)
    CONFIG.model_copy(update={"stages": 7}).check_network(net, (3, 32, 32))
    with pytest.raises(ValueError, match=r"^stages=8\b.*\b6\b.*\b7\b"):
        CONFIG.model_copy(update={"stages": 8}).check_network(net, (3, 32, 32))
