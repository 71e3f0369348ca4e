"""The kernels for CUDA devices, against the definitions in float64: on a device, or in Triton's interpreter on the CPU.

`test_cuda.py` runs these, in a process of their own: the interpreter must be chosen before Triton is imported.
"""

import copy
import math
import os
from typing import Any

import numpy as np
import pytest
import torch

from linflab.models.distance import cuda, lp_distance, lp_distance_conv2d, lp_distance_on_subsets, reference
from linflab.models.networks.hybrid import LinfDistHybridConfig
from linflab.models.networks.linf_dist import LinfDistConvNetConfig, LinfDistMLPConfig, Subsets
from linflab.models.networks.sort_net import SortNetConfig, draw_subsets
from linflab.models.robustness.bounds.interval import interval_margins, pixel_box
from linflab.models.robustness.certification import certifier_of, lipschitz_radius
from tests.models.test_distance import by_definition, relative_error, slope_by_definition

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    from tests.models.gluon_interpreter import install

    install()

EXPONENTS = [1.0, 2.0, 3.0, 5.0, 7.0, 8.0, 1.5, 9.7, 100.5, 1000.0, math.inf]
SHAPES = [(1, 1, 1), (3, 5, 33), (70, 3, 5), (2, 70, 6)]  # (B, O, I): within a tile, and over its edge


def operands(shape: tuple[int, int, int], grid: bool = False, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """x, weight and a gradient of y; on a grid there are ties, and inputs that equal weights."""
    batch, outputs, inputs = shape
    generator = np.random.default_rng(sum(shape))
    x, weight = generator.normal(size=(batch, inputs)), generator.normal(size=(outputs, inputs))
    if grid:
        x, weight = np.round(x), np.round(weight)
    upstream = generator.normal(size=(batch, outputs))
    return tuple(torch.from_numpy(array).float().to(DEVICE) for array in (scale * x, scale * weight, upstream))


@pytest.mark.parametrize("p", EXPONENTS)
def test_values_and_gradients_of_each_exponent(p: float) -> None:
    check(*operands((5, 4, 7)), p)
    check(*operands((5, 4, 7), grid=True), p)


@pytest.mark.parametrize("p", [8.0, 9.7, math.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_of_each_shape(shape: tuple[int, int, int], p: float) -> None:
    check(*operands(shape), p)


@pytest.mark.parametrize("p", [2.0, 8.0, 9.7, math.inf])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_whatever_the_scale(p: float, scale: float) -> None:
    """Also where powers of the distances themselves would overflow, or be lost."""
    check(*operands((5, 4, 7), scale=scale), p)


def test_distances_of_very_different_sizes() -> None:
    x, weight, upstream = operands((6, 5, 7))
    x[0], weight[0] = 1e4 * x[0], 1e-5 * weight[0]
    x[1] = weight[0] + 1e-7 * x[1]
    check(x, weight, upstream, 8.0)


def check(x: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor, p: float) -> None:
    y = cuda.forward(x, weight, p)
    values = x.cpu().numpy(), weight.cpu().numpy()
    assert relative_error(y.cpu(), by_definition(*values, p)) < 1e-5
    grad_x, grad_weight = cuda.backward(upstream, x, weight, y, p)
    if math.isinf(p):
        expected = reference.lp_distance_backward(*(t.cpu() for t in (upstream, x, weight, y)), p)
        for gradient, by_reference in zip((grad_x, grad_weight), expected, strict=True):
            assert torch.allclose(gradient.cpu(), by_reference, rtol=1e-5, atol=1e-5)
        return
    slope, grad_y = slope_by_definition(*values, p), upstream.cpu().double().numpy()
    tolerance = max(1e-5, p * 2**-22)
    for gradient, sign, indices in ((grad_x, 1, "bo,boi->bi"), (grad_weight, -1, "bo,boi->oi")):
        expected = sign * np.einsum(indices, grad_y, slope)
        size = np.linalg.norm(np.einsum(indices, np.abs(grad_y), np.abs(slope)))
        assert np.linalg.norm(gradient.cpu().double().numpy() - expected) <= tolerance * size


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bounds_are_those_of_the_definition(shape: tuple[int, int, int], grid: bool) -> None:
    x, weight, _ = operands(shape, grid)
    lower, upper = x - 0.25, x + 0.125
    for bound, expected in zip(
        cuda.bounds(lower, upper, weight), reference.linf_distance_bounds(lower, upper, weight), strict=True
    ):
        assert torch.equal(bound, expected)


@pytest.mark.parametrize("p", [1.0, 2.0, 8.0, 9.7, math.inf])
@pytest.mark.parametrize("group", [3, 32])
def test_on_subsets(p: float, group: int) -> None:
    """Groups that keep none, all and some of the inputs, the last one with fewer samples."""
    x, weight, upstream = operands((70, 5, 9))
    kept = torch.rand(-(-70 // group), 9, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.5
    kept[0], kept[1] = False, True
    y = cuda.forward_on_subsets(x, weight, p, kept, group)
    gradients = cuda.backward_on_subsets(upstream, x, weight, y, p, kept, group)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    expected = reference.lp_distance_on_subsets(*exact, p, kept, group)
    assert relative_error(y.cpu(), expected.detach().cpu().numpy()) < 1e-5
    for gradient, by_reference in zip(gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert torch.allclose(gradient.double(), by_reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [3.0, 9.7, math.inf])
def test_what_is_not_a_number_stays_so(p: float) -> None:
    x, weight, _ = operands((3, 4, 5))
    x[1, 2] = math.nan
    y = cuda.forward(x, weight, p)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


def test_the_same_bits_again() -> None:
    x, weight, upstream = operands((17, 9, 33))
    for p in (8.0, 9.7, math.inf):
        y = cuda.forward(x, weight, p)
        first, second = (cuda.backward(upstream, x, weight, y, p) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("p", [2.0, 3.0, 8.0])
def test_distances_do_not_depend_on_the_rest_of_the_batch(p: float) -> None:
    """Also beside samples that are so far away, or so near, that powers of these distances are infinite or lost."""
    x, weight, _ = operands((12, 5, 7))
    alone = cuda.forward(x[:4], weight, p)
    x[4:8] *= 1e20
    x[8:] = weight[0]
    x[8:, 0] += 1e-15 if p > 2 else 1e-20
    together = cuda.forward(x, weight, p)
    assert torch.equal(together[:4], alone)
    assert relative_error(together.cpu(), by_definition(x.cpu().numpy(), weight.cpu().numpy(), p)) < 1e-5


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 8.0, 9.7, math.inf])
def test_distances_do_not_depend_on_the_tile(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = operands((70, 70, 9))
    x[:2] *= 1e20
    kept = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.5
    for name in ("POWERS", "LARGEST", "GROUPED"):
        found = []
        for tile in getattr(cuda, name):
            monkeypatch.setattr(cuda, name, (tile,))
            found.append((cuda.forward(x, weight, p), cuda.forward_on_subsets(x, weight, p, kept, 32)))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
        monkeypatch.undo()


@pytest.mark.parametrize("p", [3.0, 6.0, 8.0])
def test_gradients_where_operands_are_much_larger_than_their_distances(p: float) -> None:
    x, weight, upstream = operands((5, 4, 7))
    x, weight = 1e9 + 64 * torch.round(x), 1e9 + 64 * torch.round(weight)
    check(x, weight, upstream, p)


def test_nothing_in_nothing_out() -> None:
    for batch, outputs in ((0, 3), (3, 0)):
        x, weight = torch.zeros(batch, 4, device=DEVICE), torch.zeros(outputs, 4, device=DEVICE)
        y = cuda.forward(x, weight, 8.0)
        assert y.shape == (batch, outputs)
        grad_x, grad_weight = cuda.backward(torch.zeros_like(y), x, weight, y, 8.0)
        assert not grad_x.any() and not grad_weight.any()


needs_a_device = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device: no op goes to the interpreter by itself")


@needs_a_device
def test_the_public_functions_use_them_on_a_device() -> None:
    x, weight, _ = operands((8, 5, 27))
    images, filters = torch.rand(2, 3, 8, 8, device=DEVICE), torch.rand(4, 3, 3, 3, device=DEVICE)
    kept = torch.rand(1, 27, device=DEVICE) < 0.5
    for p in (8.0, 9.7, math.inf):
        for function, tensors in (
            (lambda a, b, p=p: lp_distance(a, b, p), (x, weight)),
            (lambda a, b, p=p: lp_distance_on_subsets(a, b, p, kept, 32), (x, weight)),
            (lambda a, b, p=p: lp_distance_conv2d(a, b, p, 2, 1), (images, filters)),
        ):
            single = [tensor.clone().requires_grad_() for tensor in tensors]
            double = [tensor.double().requires_grad_() for tensor in tensors]
            y, exact = function(*single), function(*double)
            assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-6)
            upstream = torch.randn_like(y)
            gradients = torch.autograd.grad(y, single, upstream)
            expected = torch.autograd.grad(exact, double, upstream.double())
            for gradient, one in zip(gradients, expected, strict=True):
                assert torch.allclose(gradient.double(), one, rtol=1e-3, atol=1e-4)


@needs_a_device
@pytest.mark.parametrize("p", [8.0, 9.7, math.inf])
@pytest.mark.parametrize(
    "config",
    [
        LinfDistMLPConfig(depth=3, width=80),
        LinfDistConvNetConfig(width=4, dense_width=24),
        LinfDistHybridConfig(net=LinfDistMLPConfig(depth=3, width=80), hidden=24),
        SortNetConfig(depth=3, width=80),
    ],
    ids=lambda config: config.kind,
)
def test_networks_do_on_a_device_what_they_do_in_float64(config: Any, p: float) -> None:
    """Logits and gradients in training, then margins over boxes, and radii where the network has a constant."""
    torch.manual_seed(0)
    images, labels = torch.rand(70, 1, 12, 12), torch.randint(10, (70,))
    exact = config.build((1, 12, 12), 10, mean=(0.3,), std=0.4).double()
    subsets = draw_subsets(exact, len(images), 1, torch.Generator().manual_seed(0))
    on_device = copy.deepcopy(exact).float().to(DEVICE)
    logits = []
    for network, x in ((exact, images.double()), (on_device, images.to(DEVICE))):
        moved = subsets and Subsets([kept.to(x.device) for kept in subsets.kept], subsets.group)
        logits.append(network(x, p, moved))
        torch.nn.functional.cross_entropy(logits[-1], labels.to(x.device)).backward()
        network.eval()
    assert torch.allclose(logits[1].cpu().double(), logits[0], rtol=1e-4, atol=1e-4)
    for (name, of_exact), of_device in zip(exact.named_parameters(), on_device.parameters(), strict=True):
        off = (of_device.grad.cpu().double() - of_exact.grad).norm()
        assert off <= 1e-3 * of_exact.grad.norm() + 1e-6, name
    with torch.no_grad():
        margins = [
            interval_margins(network, pixel_box(x, 0.03), labels.to(x.device)).cpu().double()
            for network, x in ((exact, images.double()), (on_device, images.to(DEVICE)))
        ]
    assert torch.allclose(*margins, rtol=1e-3, atol=1e-3)
    if certifier_of(exact) == "lipschitz":
        radii = lipschitz_radius(on_device, images.to(DEVICE), labels.to(DEVICE))
        assert torch.allclose(radii.cpu().double(), lipschitz_radius(exact, images.double(), labels), atol=1e-5)
