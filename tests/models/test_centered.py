"""Boxes as centers and radii in training: values and gradients against independent formulas in float64."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.networks.channel_moments import channel_moments
from linflab.models.networks.layers import BatchNorm2d
from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.centered import (
    CenteredBox,
    centered_box,
    merge_normalizations,
    propagate_centered,
    sum_over_units,
)
from linflab.models.robustness.bounds.ibp import propagate_bounds
from linflab.models.robustness.bounds.steps import ShrunkReLU, Trace, TraceStep
from linflab.models.robustness.bounds.worst_case import WorstCaseBounds
from tests.models.backends import BACKENDS, every_backend, use_backend

SIZES = st.sampled_from([1, 15, 16, 17, 511, 4096, 4097, 9001])


def random_box(size: int, seed: int) -> CenteredBox:
    """Return a box of units of which about a third each is active, inactive and unstable."""
    generator = torch.Generator().manual_seed(seed)
    center, radius = torch.randn(size, generator=generator), torch.rand(size, generator=generator)
    return CenteredBox(center.requires_grad_(), radius.requires_grad_())


def in_float64(box: CenteredBox) -> CenteredBox:
    return CenteredBox(*(part.detach().double().requires_grad_() for part in box))


def run_relu(box: CenteredBox, factor: float) -> CenteredBox:
    layer = nn.ReLU() if factor == 1 else ShrunkReLU(factor)
    return propagate_centered(Trace("x", [TraceStep(layer, ("x",), "y")], "y"), box.ends)["y"]


def relu_by_ends(box: CenteredBox, factor: float) -> CenteredBox:
    lower, upper = box.center - box.radius, box.center + box.radius
    shrunk = torch.where((lower < 0) & (upper > 0), factor * upper, upper)
    return centered_box(Box(functional.relu(lower), functional.relu(shrunk)))


def assert_same_gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], expected: Sequence[Tensor], at: Sequence[Tensor]
) -> None:
    """Check values and vector-Jacobian products with random vectors."""
    for output, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.double(), other.double(), rtol=1e-5, atol=1e-5)
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.rand(output.shape, generator=generator) for output in outputs]
    ours = torch.autograd.grad(outputs, inputs, [v.to(o) for v, o in zip(vectors, outputs, strict=True)])
    theirs = torch.autograd.grad(expected, at, [v.to(o) for v, o in zip(vectors, expected, strict=True)])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@every_backend
@given(size=SIZES, seed=st.integers(0, 1000), factor=st.sampled_from([1.0, 0.8, 0.0]))
def test_relu_and_its_gradient(backend: str, size: int, seed: int, factor: float) -> None:
    box = random_box(size, seed)
    at = in_float64(box)
    with use_backend(backend):
        assert_same_gradients(run_relu(box, factor), box, relu_by_ends(at, factor), at)


@every_backend
def test_relu_keeps_nan(backend: str) -> None:
    center = torch.tensor([float("nan"), 1.0, -1.0])
    for box in (CenteredBox(center, torch.ones(3)), CenteredBox(torch.ones(3), center)):
        with use_backend(backend):
            result = run_relu(box, 1.0)
        assert result.center.isnan().tolist() == result.radius.isnan().tolist() == [True, False, False]


@every_backend
@given(size=SIZES, seed=st.integers(0, 1000))
def test_sums_over_units_and_their_gradients(backend: str, size: int, seed: int) -> None:
    box = random_box(size, seed)
    at = in_float64(box)
    active, inactive = (at.center > at.radius).double(), (-at.center > at.radius).double()
    expected = [at.radius.sum(), at.center.sum()]
    for chosen in (active, inactive):
        expected += [chosen.sum(), (chosen * at.center).sum(), (chosen * at.center**2).sum()]
    with use_backend(backend):
        sums = sum_over_units(box)
    assert all(value.dtype == torch.float64 for value in sums)
    has_gradient = [0, 1, 3, 4, 6, 7]  # numbers of units are constants
    assert sums.active == active.sum() and sums.inactive == inactive.sum()
    ours, theirs = ([values[k] for k in has_gradient] for values in (sums, expected))
    with use_backend(backend):
        assert_same_gradients(ours, box, theirs, at)


@every_backend
@pytest.mark.parametrize("shape", [(5, 3, 7, 7), (2, 1, 4, 4), (33, 2, 100), (9, 4)])
def test_channel_moments_and_their_gradients(shape: tuple[int, ...], backend: str) -> None:
    x = (3 + torch.randn(shape)).requires_grad_()
    y = x.detach().double().requires_grad_()
    dims = [0, *range(2, len(shape))]
    mean = y.mean(dims)
    variance = (y - mean.view(-1, *[1] * (len(shape) - 2))).square().mean(dims)
    with use_backend(backend):
        assert_same_gradients(channel_moments(x), [x], [mean, variance], [y])


@every_backend
def test_variance_of_large_means_is_accurate(backend: str) -> None:
    x = 1000 + torch.randn(64, 2, 14, 14)
    variance = x.double().var((0, 2, 3), correction=0)
    with use_backend(backend):
        torch.testing.assert_close(channel_moments(x)[1].double(), variance, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_kernels_do_not_depend_on_threads(backend: str) -> None:
    x, box = torch.randn(64, 8, 40, 40, requires_grad=True), random_box(900_000, 0)
    threads, results = torch.get_num_threads(), list[list[Tensor]]()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with use_backend(backend):
                values = [*run_relu(box, 0.8), *sum_over_units(box), *channel_moments(x)]
                gradients = torch.autograd.grad(sum(value.sum() for value in values), [*box, x])
            results.append([*values, *gradients])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def conv_network(norm: bool) -> nn.Sequential:
    def layers(layer: nn.Module, norm_layer: nn.Module) -> list[nn.Module]:
        return [layer, norm_layer, nn.ReLU()] if norm else [layer, nn.ReLU()]

    return nn.Sequential(
        *layers(nn.Conv2d(1, 3, 4, 2, 1, bias=False), BatchNorm2d(3)),
        *layers(nn.Conv2d(3, 5, 3, 1, "same", groups=1), nn.BatchNorm2d(5)),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *layers(nn.Linear(45, 7), nn.BatchNorm1d(7)),
        nn.Linear(7, 4),
    )


@pytest.mark.parametrize("norm", [False, True])
def test_boxes_are_those_of_ibp(norm: bool) -> None:
    torch.manual_seed(0)
    network = conv_network(norm).double().train()
    images = torch.rand(6, 1, 12, 12, dtype=torch.float64)
    traced, _ = WorstCaseBounds(network).trace_batch(images)
    box = Box(images - 0.05, images + 0.1)
    merged = merge_normalizations(traced)
    assert len(merged.steps) == len(traced.steps) - 3 * norm
    boxes, expected = propagate_centered(merged, box), propagate_bounds(traced, box)
    assert boxes.keys() <= expected.keys()
    parameters = list(network.parameters())
    for name in boxes:
        torch.testing.assert_close(boxes[name].ends, expected[name], rtol=1e-10, atol=1e-12)
    ours, theirs = (
        torch.autograd.grad(b.upper.square().sum(), parameters, retain_graph=True)
        for b in (boxes[traced.output].ends, expected[traced.output])
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_normalizations_with_other_uses_of_their_input_are_not_merged() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
            self.last = nn.Linear(2 * 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last((y + self.norm(y)).flatten(1))

    images = torch.rand(4, 1, 4, 4)
    traced, _ = WorstCaseBounds(Residual()).trace_batch(images)
    assert merge_normalizations(traced) == traced
    chain, _ = WorstCaseBounds(conv_network(norm=True)).trace_batch(torch.rand(4, 1, 12, 12))
    merged = merge_normalizations(chain, keep=chain.steps[0].output)
    assert [step.output for step in merged.steps[:2]] == [step.output for step in chain.steps[:2]]
    assert len(merged.steps) == len(chain.steps) - 2
    box = Box(images, images + 0.1)
    ours, theirs = propagate_centered(traced, box), propagate_bounds(traced, box)
    torch.testing.assert_close(ours[traced.output].ends, theirs[traced.output])


@pytest.mark.parametrize("outputs", [3, 5])  # as many as channels, or not
def test_linear_layers_on_maps_are_normalized_by_channel(outputs: int) -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Linear(6, outputs), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()
    ).double()
    images = torch.rand(4, 1, 6, 6, dtype=torch.float64)
    traced, _ = WorstCaseBounds(network).trace_batch(images)
    box = Box(images, images + 0.1)
    ours = propagate_centered(merge_normalizations(traced), box)[traced.output].ends
    torch.testing.assert_close(ours, propagate_bounds(traced, box)[traced.output])


@pytest.mark.parametrize("layer", [nn.Conv2d(1, 3, 4, padding="same", bias=False), nn.Flatten(-3)])
def test_options_without_a_rule_are_rejected(layer: nn.Module) -> None:
    norm = nn.BatchNorm2d(3) if isinstance(layer, nn.Conv2d) else nn.Identity()
    with pytest.raises(TypeError, match="is not supported"):
        traced = Trace("x", [TraceStep(layer, ("x",), "y"), TraceStep(norm, ("y",), "z")], "z")
        traced, _ = WorstCaseBounds._forward(traced, torch.rand(2, 1, 6, 6))
        propagate_centered(merge_normalizations(traced), Box(torch.zeros(2, 1, 6, 6), torch.ones(2, 1, 6, 6)))


def curvature(box: CenteredBox, x: Tensor) -> Tensor:
    """Return a scalar that depends on second derivatives of all functions with kernels."""
    values = [*run_relu(box, 0.8), *sum_over_units(box), *channel_moments(x)]
    total = sum((value.double().square().sum() for value in values), torch.zeros((), dtype=torch.float64))
    gradients = torch.autograd.grad(total, [*box, x], create_graph=True)
    return sum((gradient.double().square().sum() for gradient in gradients), torch.zeros((), dtype=torch.float64))


def test_gradients_can_be_differentiated_again() -> None:
    box, x = random_box(50, 0), torch.randn(4, 2, 3, 3, requires_grad=True)
    at, y = in_float64(box), x.detach().double().requires_grad_()
    ours, theirs = (torch.autograd.grad(curvature(b, z), [*b, z]) for b, z in ((box, x), (at, y)))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_transforms_of_torch_func_are_supported() -> None:
    def loss(center: Tensor) -> Tensor:
        box = CenteredBox(center, torch.full_like(center, 0.3))
        return run_relu(box, 1.0).radius.square().sum() + sum_over_units(box).active_squares.to(center)

    center = torch.randn(40, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(center), center)
    torch.testing.assert_close(torch.func.grad(loss)(center.detach()), expected)


def test_boxes_of_several_dtypes_use_plain_formulas() -> None:
    center, radius = torch.randn(100), torch.rand(100).bfloat16()
    result = run_relu(CenteredBox(center, radius), 1.0)
    expected = relu_by_ends(CenteredBox(center, radius.float()), 1.0)
    torch.testing.assert_close(result.center, expected.center, rtol=1e-5, atol=1e-5)


def test_empty_batches_are_supported() -> None:
    x = torch.rand(0, 3, 4, 4, requires_grad=True)
    mean, variance = channel_moments(x)
    assert mean.isnan().all() and variance.isnan().all()
    (mean + variance).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert run_relu(CenteredBox(x, x), 1.0).center.shape == x.shape
