"""Tests of objectives against their formulas, and of Lipschitz certificates against perturbed images."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linflab.models.networks.linf_dist import LinfDistMLPConfig, LinfDistNet
from linflab.models.robustness.certification import lipschitz_radius
from linflab.models.robustness.margins import logit_differences
from linflab.models.robustness.objectives import (
    ClippedHingeCrossEntropyConfig,
    HingeConfig,
    WorstCaseCrossEntropyConfig,
    WorstCaseHingeConfig,
    WorstCaseOutput,
)
from tests.conftest import TrainedOnDigits


@st.composite
def logits_and_labels(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    batch, classes = draw(st.integers(1, 6)), draw(st.integers(2, 7))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return 3 * torch.randn(batch, classes, dtype=torch.float64), torch.randint(classes, (batch,))


@given(logits_and_labels(), st.floats(0.01, 1), st.floats(0, 1), st.floats(0.5, 10))
def test_hinge_matches_the_formula(
    case: tuple[torch.Tensor, torch.Tensor], theta: float, a: float, lipschitz: float
) -> None:
    z, labels = case
    expected = []
    for row, y in zip(z.tolist(), labels.tolist(), strict=True):
        terms = [max(0.0, row[j] - row[y] + 2 * lipschitz * theta) for j in range(len(row)) if j != y]
        expected.append(a * max(terms) + (1 - a) * sum(terms) / len(row))
    loss = HingeConfig(theta=theta, max_weight=a).build(lipschitz)(z, labels, 0.0)
    assert loss.item() == pytest.approx(np.mean(expected))


@given(logits_and_labels(), st.floats(0.01, 1), st.floats(0.001, 2), st.floats(0.5, 10))
def test_clipped_hinge_matches_the_formula(
    case: tuple[torch.Tensor, torch.Tensor], theta: float, weight: float, lipschitz: float
) -> None:
    z, labels = case
    objective = ClippedHingeCrossEntropyConfig(theta=theta).build(lipschitz)
    with torch.no_grad():
        objective.scale.fill_(1.7)
    expected = []
    for row, y in zip(z.tolist(), labels.tolist(), strict=True):
        threshold = 2 * lipschitz * theta
        margin = max(row[j] - row[y] for j in range(len(row)) if j != y)
        scaled = 1.7 * np.array(row)
        cross_entropy = np.log(np.exp(scaled).sum()) - scaled[y]
        expected.append(min(1.0, max(0.0, (margin + threshold) / threshold)) + weight * cross_entropy)
    assert objective(z, labels, weight).item() == pytest.approx(np.mean(expected), rel=1e-5)


@st.composite
def worst_case_logits(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw logits, worst-case logit differences slightly above the logit differences, and labels."""
    z, labels = draw(logits_and_labels())
    differences = logit_differences(z, labels)
    return z, differences + torch.rand_like(differences), labels


@given(worst_case_logits(), st.floats(0, 1))
def test_worst_case_cross_entropy_matches_the_formula(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor], weight: float
) -> None:
    z, worst, labels = case
    expected = []
    for row, bound, y in zip(z.tolist(), worst.tolist(), labels.tolist(), strict=True):
        clean = np.log(np.exp(row).sum()) - row[y]
        bounded = np.log(1 + sum(np.exp(bound[j]) for j in range(len(row)) if j != y))
        expected.append(weight * bounded + (1 - weight) * clean)
    objective = WorstCaseCrossEntropyConfig(eps_train=0.1, worst_case_weight=weight).build(1.0)
    assert objective(WorstCaseOutput(z, worst), labels, 0.0, 0.1).item() == pytest.approx(np.mean(expected))


@given(worst_case_logits(), st.floats(0.001, 2))
def test_worst_case_hinge_matches_the_formula(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor], weight: float
) -> None:
    z, worst, labels = case
    objective = WorstCaseHingeConfig(eps_train=0.1).build(1.0)
    with torch.no_grad():
        objective.scale.fill_(0.6)
    expected = []
    for row, bound, y in zip(z.tolist(), worst.tolist(), labels.tolist(), strict=True):
        wrong = [j for j in range(len(row)) if j != y]
        is_correct = all(row[y] > row[j] for j in wrong)
        hinge = max(0.0, max(bound[j] + 1 for j in wrong)) if is_correct else 0.0
        scaled = 0.6 * np.array(row)
        expected.append(hinge + weight * (np.log(np.exp(scaled).sum()) - scaled[y]))
    assert objective(WorstCaseOutput(z, worst), labels, weight, 0.1).item() == pytest.approx(
        np.mean(expected), rel=1e-5
    )


def test_objectives_have_finite_gradients_at_equal_logits() -> None:
    for config in (HingeConfig(theta=0.1), ClippedHingeCrossEntropyConfig(theta=0.1)):
        z = torch.zeros(3, 4, requires_grad=True)
        config.build(2.0)(z, torch.tensor([0, 1, 2]), 0.1).backward()
        assert z.grad is not None and z.grad.isfinite().all() and z.grad.abs().max() > 0
    for config in (WorstCaseCrossEntropyConfig(eps_train=0.1), WorstCaseHingeConfig(eps_train=0.1)):
        z, labels = torch.zeros(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
        config.build(2.0)(WorstCaseOutput(z, logit_differences(z, labels) + 0.3), labels, 0.1, 0.1).backward()
        assert z.grad is not None and z.grad.isfinite().all() and z.grad.abs().max() > 0


def build_one_pixel_net(std: float) -> LinfDistNet:
    """Return a net with class centers at normalized -1 and +1, and its only boundary at pixel 0.5."""
    net = LinfDistMLPConfig(depth=1, width=1).build((1, 1, 1), 2, mean=(0.5,), std=std).double().eval()
    with torch.no_grad():
        net.last.weight.copy_(torch.tensor([[-1.0], [1.0]]))
    return net


@pytest.mark.parametrize("std", [0.25, 1.0, 3.0])
def test_radius_accounts_for_the_normalization(std: float) -> None:
    """The pixel 0.3 has distance 0.2 to the boundary for every std, and the certificate is tight."""
    radius = lipschitz_radius(build_one_pixel_net(std), torch.full((1, 1, 1, 1), 0.3).double(), torch.tensor([0]))
    assert radius.item() == pytest.approx(0.2, rel=1e-6)


def test_certified_images_keep_their_class(digits_net: TrainedOnDigits) -> None:
    """The images move by 0.999 of their certified radius along sign patterns, in float32."""
    network = digits_net.trained.network
    images, labels = digits_net.dataset.test.batch(torch.arange(len(digits_net.dataset.test)))
    radius = lipschitz_radius(network, images, labels)
    is_certified = radius > 0
    assert is_certified.float().mean() > 0.8  # enough images to test
    images, labels, radius = images[is_certified], labels[is_certified], radius[is_certified]
    step = (0.999 * radius.view(-1, 1, 1, 1)).to(images)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        signs = torch.randint(0, 2, images.shape, generator=generator) * 2.0 - 1
        assert torch.equal(network(images + step * signs).argmax(dim=1), labels)
    # Also use the signs of the gradients at p = 8, the worst direction to first order.
    for other in range(10):
        point = images.clone().requires_grad_()
        logits = network(point, 8.0)
        gain = (logits[:, other] - logits.gather(1, labels[:, None])[:, 0]).sum()
        (gradient,) = torch.autograd.grad(gain, point)
        assert torch.equal(network(images + step * gradient.sign()).argmax(dim=1), labels)


def test_invalid_settings_are_rejected(digits_net: TrainedOnDigits) -> None:
    images, labels = digits_net.dataset.test.batch(torch.arange(2))
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    with pytest.raises(TypeError, match="lipschitz_constant"):
        lipschitz_radius(plain, images, labels)
    untrained = digits_net.experiment.model.build((1, 8, 8), 10).train()
    with pytest.raises(ValueError, match=r"^network"):
        lipschitz_radius(untrained, images, labels)
