"""Checks of the CUDA kernels against float64, on a device or in Triton's interpreter on the CPU.

`test_cuda.py` runs them in a separate process, since the interpreter must be selected before Triton is imported.
"""

import copy
import math
import os
from typing import Any

import numpy as np
import pytest
import torch

from linflab.models.distance import (
    cuda,
    lp_distance,
    lp_distance_conv2d,
    masked_lp_distance,
    reference,
    tensor_cores,
)
from linflab.models.networks.hybrid import LinfDistHybridConfig
from linflab.models.networks.linf_dist import LinfDistConvNetConfig, LinfDistMLPConfig
from linflab.models.networks.sort_net import SortNetConfig, sample_masks
from linflab.models.robustness.bounds.boxes import perturbation_box
from linflab.models.robustness.bounds.ibp import ibp_logit_differences
from linflab.models.robustness.certification import default_certifier, lipschitz_radius
from tests.models.test_distance import compute_reference, compute_reference_slope, relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    from tests.models.gluon_interpreter import install

    install()

EXPONENTS = [1.0, 2.0, 3.0, 5.0, 7.0, 8.0, 12.0, 24.0, 64.0, 1.5, 9.7, 50.5, 100.5, 1000.0, math.inf]
SHAPES = [(1, 1, 1), (3, 5, 33), (70, 3, 5), (2, 70, 6)]  # (B, O, I): within one tile, and larger than one


def make_operands(shape: tuple[int, int, int], grid: bool = False, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Return x, weight and a gradient of y. Values on a grid have ties and inputs that equal weights."""
    batch, outputs, inputs = shape
    generator = np.random.default_rng(sum(shape))
    x, weight = generator.normal(size=(batch, inputs)), generator.normal(size=(outputs, inputs))
    if grid:
        x, weight = np.round(x), np.round(weight)
    upstream = generator.normal(size=(batch, outputs))
    return tuple(torch.from_numpy(array).float().to(DEVICE) for array in (scale * x, scale * weight, upstream))


@pytest.mark.parametrize("p", EXPONENTS)
def test_values_and_gradients_match_for_each_exponent(p: float) -> None:
    check_values_and_gradients(*make_operands((5, 4, 7)), p)
    check_values_and_gradients(*make_operands((5, 4, 7), grid=True), p)


@pytest.mark.parametrize("p", [8.0, 9.7, math.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_match_for_each_shape(shape: tuple[int, int, int], p: float) -> None:
    check_values_and_gradients(*make_operands(shape), p)


@pytest.mark.parametrize("p", [2.0, 8.0, 9.7, math.inf])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_values_and_gradients_match_at_any_scale(p: float, scale: float) -> None:
    """The scales include those at which powers of the distances overflow or underflow."""
    check_values_and_gradients(*make_operands((5, 4, 7), scale=scale), p)


def test_values_and_gradients_match_for_mixed_magnitudes() -> None:
    x, weight, upstream = make_operands((6, 5, 7))
    x[0], weight[0] = 1e4 * x[0], 1e-5 * weight[0]
    x[1] = weight[0] + 1e-7 * x[1]
    check_values_and_gradients(x, weight, upstream, 8.0)


def check_values_and_gradients(x: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor, p: float) -> None:
    y = cuda.forward(x, weight, p)
    values = x.cpu().numpy(), weight.cpu().numpy()
    assert relative_error(y.cpu(), compute_reference(*values, p)) < 1e-5
    grad_x, grad_weight = cuda.backward(upstream, x, weight, y, p)
    if math.isinf(p):
        expected = reference.lp_distance_backward(*(t.cpu() for t in (upstream, x, weight, y)), p)
        for gradient, expected_gradient in zip((grad_x, grad_weight), expected, strict=True):
            assert torch.allclose(gradient.cpu(), expected_gradient, rtol=1e-5, atol=1e-5)
        return
    slope, grad_y = compute_reference_slope(*values, p), upstream.cpu().double().numpy()
    tolerance = max(1e-5, p * 2**-22)
    for gradient, sign, indices in ((grad_x, 1, "bo,boi->bi"), (grad_weight, -1, "bo,boi->oi")):
        expected = sign * np.einsum(indices, grad_y, slope)
        size = np.linalg.norm(np.einsum(indices, np.abs(grad_y), np.abs(slope)))
        assert np.linalg.norm(gradient.cpu().double().numpy() - expected) <= tolerance * size


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bounds_equal_the_reference(shape: tuple[int, int, int], grid: bool) -> None:
    x, weight, _ = make_operands(shape, grid)
    lower, upper = x - 0.25, x + 0.125
    for bound, expected in zip(
        cuda.bounds(lower, upper, weight), reference.linf_distance_bounds(lower, upper, weight), strict=True
    ):
        assert torch.equal(bound, expected)


@pytest.mark.parametrize("p", [1.0, 2.0, 8.0, 9.7, math.inf])
@pytest.mark.parametrize("group", [3, 32])
def test_masked_distances_match_the_reference(p: float, group: int) -> None:
    """Masks keep none, all and some of the inputs; the last group has fewer samples."""
    x, weight, upstream = make_operands((70, 5, 9))
    mask = torch.rand(-(-70 // group), 9, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.5
    mask[0], mask[1] = False, True
    y = cuda.masked_forward(x, weight, p, mask, group)
    gradients = cuda.masked_backward(upstream, x, weight, y, p, mask, group)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    expected = masked_lp_distance(*exact, p, mask, group)
    assert relative_error(y.cpu(), expected.detach().cpu().numpy()) < 1e-5
    for gradient, expected_gradient in zip(
        gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True
    ):
        assert torch.allclose(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [8.0, 16.0, 9.7, 100.5, math.inf])
def test_values_and_gradients_match_for_many_inputs(p: float) -> None:
    """The inputs fill several parts of a sum, blocks of a search, slabs of gradients, and no whole slice."""
    check_values_and_gradients(*make_operands((3, 2, 1091)), p)


@pytest.mark.parametrize("p", [8.0, math.inf])
def test_gradients_match_in_slices_of_the_batch(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MAX_PARTIAL_SUMS", 1)
    check_values_and_gradients(*make_operands((70, 3, 5)), p)


@pytest.mark.parametrize("p", [12.0, 64.0])
def test_gradients_match_where_distances_differ_by_orders_of_magnitude(p: float) -> None:
    """Their powers do not fit in float32 together, in samples of one block and with masks too."""
    x, weight, upstream = make_operands((40, 4, 9))
    x *= 10.0 ** torch.linspace(-3, 3, 40, device=DEVICE)[:, None]
    x[5] = weight[2]
    x[6] = weight[2] + 1e-6 * x[7]
    check_values_and_gradients(x, weight, upstream, p)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.5
    y = cuda.masked_forward(x, weight, p, mask, 32)
    gradients = cuda.masked_backward(upstream, x, weight, y, p, mask, 32)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    expected = masked_lp_distance(*exact, p, mask, 32)
    assert relative_error(y.cpu(), expected.detach().cpu().numpy()) < 1e-5
    for gradient, expected_gradient in zip(
        gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True
    ):
        assert torch.allclose(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("p", "scale"), [(8.0, 1e36), (12.0, 1e34), (64.0, 1e31), (64.0, 1e-30), (9.7, 1e36)])
def test_gradients_match_near_the_limits_of_float32(p: float, scale: float) -> None:
    check_values_and_gradients(*make_operands((3, 2, 5), scale=scale), p)


@pytest.mark.parametrize("p", [1.0, 8.0, 9.7, math.inf])
def test_gradients_are_zero_where_large_operands_are_equal(p: float) -> None:
    x = torch.tensor([[1e10, 3e9]], device=DEVICE)
    y = cuda.forward(x, x, p)
    gradients = cuda.backward(torch.ones_like(y), x, x, y, p)
    assert not y.any() and all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("p", [1.0, 8.0, 9.7, math.inf])
def test_nan_reaches_gradients_of_its_row_only(p: float) -> None:
    x, weight, upstream = make_operands((4, 3, 5))
    weight[1, 2] = math.nan
    y = cuda.forward(x, weight, p)
    grad_x, grad_weight = cuda.backward(upstream, x, weight, y, p)
    assert grad_x.isnan().any(dim=1).all() and grad_weight[1].isnan().any()
    assert not grad_weight[[0, 2]].isnan().any()


def test_huge_finite_exponents_are_infinite() -> None:
    x, weight, _ = make_operands((4, 3, 5))
    for p in (1e9, 1e39):
        assert relative_error(cuda.forward(x, weight, p).cpu(), cuda.forward(x, weight, math.inf).cpu().numpy()) < 1e-6


def test_masked_distances_of_an_empty_batch_are_empty() -> None:
    x, weight = torch.zeros(0, 4, device=DEVICE), torch.zeros(3, 4, device=DEVICE)
    mask = torch.zeros(0, 4, dtype=torch.bool, device=DEVICE)
    y = cuda.masked_forward(x, weight, 8.0, mask, 3)
    assert y.shape == (0, 3)
    assert not cuda.masked_backward(y, x, weight, y, 8.0, mask, 3)[1].any()


def test_blocks_have_the_first_largest_term() -> None:
    x, weight, upstream = make_operands((5, 4, 200), grid=True)  # ties
    y, blocks = cuda.linf_forward(x, weight)
    expected, expected_blocks = reference.linf_distance_with_blocks(x.cpu(), weight.cpu())
    assert torch.equal(y.cpu(), expected) and torch.equal(blocks.cpu(), expected_blocks)
    gradients = cuda.linf_backward(upstream, x, weight, y, blocks)
    for gradient, other in zip(gradients, cuda.backward(upstream, x, weight, y, math.inf), strict=True):
        assert torch.equal(gradient, other)
    x[1, 150] = math.nan
    y, _ = cuda.linf_forward(x, weight)
    assert y[1].isnan().all() and not y[[0, 2, 3, 4]].isnan().any()


def test_linf_gradients_keep_small_and_faulty_slopes() -> None:
    """Sums are of integers: slopes of other magnitudes in the same row must not be lost, nor NaN and inf."""
    x, weight, upstream = make_operands((6, 70, 9))
    upstream[0] = 0
    upstream[0, 3], upstream[1], upstream[2, 1] = 1e-30, 1e-12 * upstream[1], math.nan
    y, blocks = cuda.linf_forward(x, weight)
    gradient, _ = cuda.linf_backward(upstream, x, weight, y, blocks)
    expected, _ = reference.linf_distance_backward(*(t.double().cpu() for t in (upstream, x, weight, y)), blocks.cpu())
    finite = [0, 1, 3, 4, 5]
    assert torch.allclose(gradient[finite].double().cpu(), expected[finite], rtol=1e-5, atol=0)
    assert gradient[2].isnan().any()


@pytest.mark.parametrize("p", [3.0, 9.7, math.inf])
def test_nan_inputs_give_nan_outputs(p: float) -> None:
    x, weight, _ = make_operands((3, 4, 5))
    x[1, 2] = math.nan
    y = cuda.forward(x, weight, p)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


def test_gradients_are_bitwise_reproducible() -> None:
    x, weight, upstream = make_operands((17, 9, 33))
    for p in (8.0, 9.7, math.inf):
        y = cuda.forward(x, weight, p)
        first, second = (cuda.backward(upstream, x, weight, y, p) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("p", [2.0, 3.0, 8.0])
def test_distances_are_independent_of_other_samples(p: float) -> None:
    """The other samples have distances whose powers overflow or underflow."""
    x, weight, _ = make_operands((12, 5, 7))
    separate = cuda.forward(x[:4], weight, p)
    x[4:8] *= 1e20
    x[8:] = weight[0]
    x[8:, 0] += 1e-15 if p > 2 else 1e-20
    combined = cuda.forward(x, weight, p)
    assert torch.equal(combined[:4], separate)
    assert relative_error(combined.cpu(), compute_reference(x.cpu().numpy(), weight.cpu().numpy(), p)) < 1e-5


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 8.0, 9.7, math.inf])
def test_distances_are_independent_of_the_tile(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = make_operands((70, 70, 9))
    x[:2] *= 1e20
    results = []
    for tile in (*cuda.SUM_TILES, *cuda.LARGE_TILES, *cuda.MASKED_TILES):
        monkeypatch.setattr(cuda, "SUM_TILES", (tile,))
        monkeypatch.setattr(cuda, "LARGE_TILES", (tile,))
        results.append(cuda.forward(x, weight, p))
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("p", [3.0, 6.0, 8.0])
def test_gradients_match_when_operands_exceed_distances(p: float) -> None:
    x, weight, upstream = make_operands((5, 4, 7))
    x, weight = 1e9 + 64 * torch.round(x), 1e9 + 64 * torch.round(weight)
    check_values_and_gradients(x, weight, upstream, p)


def test_empty_batch_returns_empty_output() -> None:
    for batch, outputs in ((0, 3), (3, 0)):
        x, weight = torch.zeros(batch, 4, device=DEVICE), torch.zeros(outputs, 4, device=DEVICE)
        y = cuda.forward(x, weight, 8.0)
        assert y.shape == (batch, outputs)
        grad_x, grad_weight = cuda.backward(torch.zeros_like(y), x, weight, y, 8.0)
        assert not grad_x.any() and not grad_weight.any()


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize(("shape", "top_k"), [((3, 5, 33), 10), ((20, 40, 6), 10), ((2, 3, 20), 16), ((1, 2, 1), 1)])
def test_sorted_distances_match_the_reference(shape: tuple[int, int, int], top_k: int, grid: bool) -> None:
    x, weight, upstream = make_operands(shape, grid)
    operands = [tensor.double().cpu() for tensor in (x, weight, upstream)]
    y, expected = cuda.sort_forward(x, weight, 0.2, top_k), reference.sort_distance(*operands[:2], 0.2, top_k)
    assert relative_error(y.cpu(), expected.numpy()) < 1e-6
    gradients = cuda.sort_backward(upstream, x, weight, 0.2, top_k)
    expected_gradients = reference.sort_distance_backward(operands[2], *operands[:2], 0.2, top_k)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient.double().cpu(), expected_gradient, rtol=1e-5, atol=1e-6)
    bounds = cuda.sort_bounds(x - 0.25, x + 0.125, weight, 0.2, top_k)
    expected_bounds = reference.sort_distance_bounds(operands[0] - 0.25, operands[0] + 0.125, operands[1], 0.2, top_k)
    for bound, expected_bound in zip(bounds, expected_bounds, strict=True):
        assert torch.allclose(bound.double().cpu(), expected_bound, rtol=1e-5, atol=1e-6)


def test_sorted_gradients_match_in_slices_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, upstream = make_operands((7, 5, 12))
    whole = cuda.sort_backward(upstream, x, weight, 0.3, 4)
    monkeypatch.setattr(cuda, "MAX_SORTED_TERMS", 2 * 4 * 5)
    for gradient, expected in zip(cuda.sort_backward(upstream, x, weight, 0.3, 4), whole, strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_nan_reaches_sorted_distances_of_its_row_only() -> None:
    x, weight, upstream = make_operands((4, 3, 12))
    weight[1, 2] = math.nan
    y = cuda.sort_forward(x, weight, 0.2, 4)
    assert y[:, 1].isnan().all() and not y[:, [0, 2]].isnan().any()
    grad_x, grad_weight = cuda.sort_backward(upstream, x, weight, 0.2, 4)
    assert grad_x.isnan().any(dim=1).all() and grad_weight[1].isnan().any()
    assert not grad_weight[[0, 2]].isnan().any()
    low, high = cuda.sort_bounds(x, x, weight, 0.2, 4)
    assert low[:, 1].isnan().all() and high[:, 1].isnan().all() and not high[:, [0, 2]].isnan().any()


@pytest.mark.parametrize(("batch", "outputs"), [(0, 3), (3, 0)])
def test_sorted_distances_of_an_empty_batch_are_empty(batch: int, outputs: int) -> None:
    x, weight = torch.zeros(batch, 4, device=DEVICE), torch.zeros(outputs, 4, device=DEVICE)
    y = cuda.sort_forward(x, weight, 0.2, 3)
    assert y.shape == (batch, outputs) and cuda.sort_bounds(x, x, weight, 0.2, 3)[0].shape == y.shape
    grad_x, grad_weight = cuda.sort_backward(y, x, weight, 0.2, 3)
    assert not grad_x.any() and not grad_weight.any()


requires_cuda = pytest.mark.skipif(INTERPRETED, reason="requires a CUDA device: ops do not dispatch to the interpreter")


@requires_cuda
def test_public_functions_match_float64_on_cuda() -> None:
    x, weight, _ = make_operands((8, 5, 27))
    images, filters = torch.rand(2, 3, 8, 8, device=DEVICE), torch.rand(4, 3, 3, 3, device=DEVICE)
    mask = torch.rand(1, 27, device=DEVICE) < 0.5
    for p in (8.0, 9.7, math.inf):
        for function, tensors in (
            (lambda a, b, p=p: lp_distance(a, b, p), (x, weight)),
            (lambda a, b, p=p: masked_lp_distance(a, b, p, mask, 32), (x, weight)),
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


@requires_cuda
@pytest.mark.parametrize("p", [8.0, 9.7, math.inf])
@pytest.mark.parametrize(
    "config",
    [
        LinfDistMLPConfig(depth=3, width=80),
        LinfDistConvNetConfig(width=4, hidden_size=24),
        LinfDistHybridConfig(backbone=LinfDistMLPConfig(depth=3, width=80), hidden_size=24),
        SortNetConfig(depth=3, width=80),
    ],
    ids=lambda config: config.kind,
)
def test_networks_match_float64_on_cuda(config: Any, p: float) -> None:
    """Compare training logits and gradients, bounds of logit differences, and Lipschitz radii."""
    torch.manual_seed(0)
    images, labels = torch.rand(70, 1, 12, 12), torch.randint(10, (70,))
    exact = config.build((1, 12, 12), 10, mean=(0.3,), std=0.4).double()
    input_masks = sample_masks(exact, len(images), 1, torch.Generator().manual_seed(0))
    on_device = copy.deepcopy(exact).float().to(DEVICE)
    logits = []
    for network, x in ((exact, images.double()), (on_device, images.to(DEVICE))):
        masks_on_device = input_masks and input_masks._replace(masks=[mask.to(x.device) for mask in input_masks.masks])
        logits.append(network(x, p, masks_on_device))
        torch.nn.functional.cross_entropy(logits[-1], labels.to(x.device)).backward()
        network.eval()
    assert torch.allclose(logits[1].cpu().double(), logits[0], rtol=1e-4, atol=1e-4)
    for (name, exact_parameter), device_parameter in zip(exact.named_parameters(), on_device.parameters(), strict=True):
        error = (device_parameter.grad.cpu().double() - exact_parameter.grad).norm()
        assert error <= 1e-3 * exact_parameter.grad.norm() + 1e-6, name
    with torch.no_grad():
        differences = [
            ibp_logit_differences(network, perturbation_box(x, 0.03), labels.to(x.device)).cpu().double()
            for network, x in ((exact, images.double()), (on_device, images.to(DEVICE)))
        ]
    assert torch.allclose(*differences, rtol=1e-3, atol=1e-3)
    if default_certifier(exact) == "lipschitz":
        radii = lipschitz_radius(on_device, images.to(DEVICE), labels.to(DEVICE))
        assert torch.allclose(radii.cpu().double(), lipschitz_radius(exact, images.double(), labels), atol=1e-5)


@requires_cuda
@pytest.mark.parametrize("p", tensor_cores.EXPONENTS)
@pytest.mark.parametrize("noise", [1.0, 4.0])
def test_tensor_cores_agree_with_their_emulation(p: int, noise: float) -> None:
    """Also where some distances are flagged, and bit by bit when repeated."""
    torch.manual_seed(0)
    weight, upstream = torch.randn(300, 200), torch.randn(100, 300)
    x = weight[:100] + noise * torch.randn(100, 200)
    results = []
    for device in ("cpu", DEVICE, DEVICE):
        leaves = [operand.to(device, copy=True).requires_grad_() for operand in (x, weight)]
        y = tensor_cores.lp_distance(*leaves, p)
        results.append([y, *torch.autograd.grad(y, leaves, upstream.to(device))])
    for emulated, once, again in zip(*results, strict=True):
        assert torch.equal(once, again)
        assert (once.cpu() - emulated).norm() <= 1e-4 * emulated.norm()
