"""Tests of the l_p-distance operator against float64 NumPy, for every supported backend."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

from linflab.models.distance import (
    convolution,
    linf_distance_bounds,
    lp_distance,
    lp_distance_conv2d,
    reference,
)
from tests.models.backends import every_backend, use_backend

EXPONENTS = st.one_of(
    st.sampled_from([1.0, 2.0, 8.0, 9.7, 100.5, 1000.0, 2000.0, math.inf]), st.floats(min_value=1, max_value=2000)
)


class LargestTensor(TorchDispatchMode):
    """A mode that records the size of the largest tensor that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def compute_reference(x: np.ndarray, weight: np.ndarray, p: float) -> np.ndarray:
    """Return ||x - w||_p (B, O), computed with logarithms in float64, independently of the tested code."""
    d = np.abs(x.astype(np.float64)[:, None] - weight.astype(np.float64)[None])
    if math.isinf(p):
        return d.max(axis=2)
    with np.errstate(divide="ignore"):
        return np.exp(np.logaddexp.reduce(p * np.log(d), axis=2) / p)


def compute_reference_slope(x: np.ndarray, weight: np.ndarray, p: float) -> np.ndarray:
    """Return dy[b, o] / dx[b, i] (B, O, I) for finite p, zero where y is zero."""
    d = x.astype(np.float64)[:, None] - weight.astype(np.float64)[None]
    y = compute_reference(x, weight, p)[:, :, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(d == 0, 0.0, np.sign(d) * np.exp((p - 1) * (np.log(np.abs(d)) - np.log(y))))


def relative_error(value: torch.Tensor, expected: np.ndarray) -> float:
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(value.double().numpy() - expected) / norm) if norm else float(value.abs().max())


@st.composite
def operands(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, float]:
    batch, outputs, inputs = (draw(st.sampled_from([1, 2, 3, 5, 17])) for _ in range(3))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-6, 6))
    x, weight = generator.normal(size=(batch, inputs)), generator.normal(size=(outputs, inputs))
    if draw(st.booleans()):  # gives ties, and inputs equal to weights
        x, weight = np.round(x), np.round(weight)
    return torch.from_numpy(scale * x).float(), torch.from_numpy(scale * weight).float(), draw(EXPONENTS)


@every_backend
@given(case=operands())
def test_values_match_float64(backend: str, case: tuple[torch.Tensor, torch.Tensor, float]) -> None:
    x, weight, p = case
    with use_backend(backend):
        y = lp_distance(x, weight, p)
    assert relative_error(y, compute_reference(x.numpy(), weight.numpy(), p)) < 1e-5


@every_backend
@given(case=operands(), seed=st.integers(0, 2**32 - 1))
def test_gradients_match_float64(backend: str, case: tuple[torch.Tensor, torch.Tensor, float], seed: int) -> None:
    x, weight, p = case
    upstream = np.random.default_rng(seed).normal(size=(len(x), len(weight)))
    x.requires_grad_()
    weight.requires_grad_()
    with use_backend(backend):
        lp_distance(x, weight, p).backward(torch.from_numpy(upstream).float())
    assert x.grad is not None and weight.grad is not None
    values = x.detach().numpy(), weight.detach().numpy()
    if math.isinf(p):
        d = values[0].astype(np.float64)[:, None] - values[1].astype(np.float64)[None]
        slope = np.zeros_like(d)
        rows, columns = np.ogrid[: d.shape[0], : d.shape[1]]
        first = np.abs(values[0][:, None] - values[1][None]).argmax(axis=2)  # ties in float32
        slope[rows, columns, first] = np.sign(d)[rows, columns, first]
    else:
        slope = compute_reference_slope(*values, p)
    tolerance = max(1e-5, 0 if math.isinf(p) else p * 2**-22)
    for gradient, sign, indices in ((x.grad, 1, "bo,boi->bi"), (weight.grad, -1, "bo,boi->oi")):
        expected = sign * np.einsum(indices, upstream, slope)
        # The tolerance is relative to the summed magnitudes, since rounding errors of canceling terms remain.
        size = np.linalg.norm(np.einsum(indices, np.abs(upstream), np.abs(slope)))
        assert np.linalg.norm(gradient.double().numpy() - expected) <= tolerance * size


@every_backend
@pytest.mark.parametrize("shape", [(29, 67, 1300), (64, 33, 65), (25, 16, 64), (300, 9, 1000), (1, 40, 130)])
def test_largest_terms_are_exact_in_all_tiles(backend: str, shape: tuple[int, int, int]) -> None:
    """Multiples of 1/8 have exact differences and sums, and many ties."""
    batch, outputs, inputs = shape
    generator = np.random.default_rng(inputs)
    x, weight = (generator.integers(-40, 41, size=(rows, inputs)) / 8 for rows in (batch, outputs))
    upstream = generator.integers(-9, 10, size=(batch, outputs)).astype(float)
    weight[3] = x[0]
    d = x[:, None] - weight[None]
    first = np.abs(d).argmax(axis=2)
    slope = np.zeros_like(d)
    rows, columns = np.ogrid[:batch, :outputs]
    slope[rows, columns, first] = np.sign(d)[rows, columns, first] * upstream
    a, b = (torch.from_numpy(np.repeat(t, 2, axis=1)).float()[:, ::2].requires_grad_() for t in (x, weight))
    with use_backend(backend):
        with_gradients, without = lp_distance(a, b), lp_distance(a.detach(), b.detach())
        gradients = torch.autograd.grad(with_gradients, (a, b), torch.from_numpy(upstream).float())
        gradients_without_blocks = torch.ops.linflab.lp_distance_backward(
            torch.from_numpy(upstream).float(), a.detach(), b.detach(), without, math.inf
        )
    for y in (with_gradients, without):
        np.testing.assert_array_equal(y.detach().numpy(), np.abs(d).max(axis=2))
    for grad_x, grad_weight in (gradients, gradients_without_blocks):
        np.testing.assert_array_equal(grad_x.numpy(), slope.sum(axis=1))
        np.testing.assert_array_equal(grad_weight.numpy(), -slope.sum(axis=0))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, 24.0, math.inf])
def test_gradients_match_finite_differences(p: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: lp_distance(x, weight, p), (x, weight))


@every_backend
@pytest.mark.parametrize("p", [1, 3, 8, 9.7, 24, 64, 100.5, math.inf])
def test_rows_of_mixed_magnitudes_match_float64(backend: str, p: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.rand(40, 70), torch.rand(50, 70)
    for row, factor in ((3, 1e6), (5, 1e-6), (7, 1e15)):
        x[row] *= factor
        weight[row + 1] *= factor
    x[11] = weight[13]
    upstream = torch.randn(40, 50)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight)]
        with use_backend(backend):
            y = lp_distance(*leaves, p)
            results.append([y, *torch.autograd.grad(y, leaves, upstream.to(dtype))])
    for single, double in zip(*results, strict=True):
        for row, expected in zip(single, double, strict=True):
            assert torch.linalg.vector_norm(row - expected) <= 1e-4 * torch.linalg.vector_norm(expected)


@every_backend
@pytest.mark.parametrize("p", [4.5, 5.2, 6.7, 8, 9.7, 60.5, 100.5])
def test_gradients_are_exact_for_many_equal_terms(backend: str, p: float) -> None:
    x, inputs = torch.ones(3, 5120, requires_grad=True), 5120
    with use_backend(backend):
        y = lp_distance(x, torch.zeros(2, inputs), p)
        y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(y, torch.full_like(y, inputs ** (1 / p)), rtol=1e-5, atol=0)
    slope = 2 * inputs ** (1 / p - 1)  # sum over two outputs
    torch.testing.assert_close(x.grad, torch.full_like(x, slope), rtol=max(1e-5, p * 2**-22), atol=0)


@every_backend
@pytest.mark.parametrize("p", [3, 8, 12, 16, 64, 9.7, 100.5, math.inf])
@pytest.mark.parametrize("size", [1e-20, 1e-15, 1e15])
def test_gradients_scale_with_upstream_gradients(backend: str, p: float, size: float) -> None:
    torch.manual_seed(0)
    x, weight = 30 * torch.rand(5, 40), torch.rand(6, 40)
    upstream = torch.randn(5, 6)
    gradients = []
    for factor in (1.0, size):
        leaf = x.clone().requires_grad_()
        with use_backend(backend):
            lp_distance(leaf, weight, p).backward(upstream * factor)
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    difference = torch.linalg.vector_norm(gradients[1].double() / size - gradients[0])
    assert difference <= 1e-4 * torch.linalg.vector_norm(gradients[0])


@every_backend
@pytest.mark.parametrize("p", [8, 9.7, 24, 100.5, math.inf])
@pytest.mark.parametrize(("samples", "outputs"), [(0, 4), (2, 0), (0, 0)])
def test_empty_batch_returns_empty_output(backend: str, p: float, samples: int, outputs: int) -> None:
    x, weight = torch.zeros(samples, 3, requires_grad=True), torch.zeros(outputs, 3, requires_grad=True)
    with use_backend(backend):
        y = lp_distance(x, weight, p)
        y.sum().backward()
    assert y.shape == (samples, outputs)
    for leaf in (x, weight):
        assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros_like(leaf))


@every_backend
@pytest.mark.parametrize("inputs", [3, 40, 300])
def test_gradient_at_a_tie_goes_to_the_first_term(backend: str, inputs: int) -> None:
    x = torch.linspace(-0.5, 0.5, inputs)[None].repeat(5, 1)
    expected = torch.zeros(5, inputs)
    for row, (one, other) in enumerate([(0, 1), (0, inputs - 1), (1, 2), (inputs - 2, inputs - 1), (inputs // 2, 2)]):
        x[row, one], x[row, other] = 1.0, -1.0
        expected[row, min(one, other)] = x[row, min(one, other)]
    x.requires_grad_()
    with use_backend(backend):
        lp_distance(x, torch.zeros(1, inputs), math.inf).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, expected)


@every_backend
@pytest.mark.parametrize("p", [1.0, 1.5, 8.0, 9.7, 1000.0, math.inf])
def test_gradient_is_zero_when_input_equals_weight(backend: str, p: float) -> None:
    x = torch.randn(2, 6).requires_grad_()
    with use_backend(backend):
        y = lp_distance(x, x.detach().clone()[:1].expand(3, 6).contiguous(), p)
        y[0].sum().backward()
    assert y[0].tolist() == [0.0, 0.0, 0.0]
    assert x.grad is not None and x.grad.abs().max() == 0


@pytest.mark.parametrize("p", [1.0, 8.0, 1000.0, math.inf])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@every_backend
def test_non_finite_input_gives_non_finite_output(backend: str, p: float, bad: float) -> None:
    x = torch.randn(2, 60)
    x[0, 3] = bad
    x.requires_grad_()
    with use_backend(backend):
        y = lp_distance(x, torch.randn(3, 60), p)
        y.sum().backward()  # must terminate; the gradients are arbitrary
    assert not y[0].isfinite().any() and y[1].isfinite().all()


@pytest.mark.parametrize("p", [1.0, 8.0, 9.7, 48.0, 100.5, 1000.0, math.inf])
@pytest.mark.parametrize("shape", [(33, 70, 1100), (300, 5, 800)])
def test_results_are_bitwise_equal_for_any_thread_count(p: float, shape: tuple[int, int, int]) -> None:
    batch, outputs, inputs = shape
    torch.manual_seed(0)
    x, weight, upstream = torch.randn(batch, inputs), torch.randn(outputs, inputs), torch.randn(batch, outputs)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
            y = lp_distance(a, b, p)
            results.append((y, *torch.autograd.grad(y, (a, b), upstream)))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(results[0] * 2, results[1] + results[2], strict=True):
        assert torch.equal(one, other)


@every_backend
@given(case=operands(), radius=st.floats(0, 3))
def test_bounds_are_the_exact_range(
    backend: str, case: tuple[torch.Tensor, torch.Tensor, float], radius: float
) -> None:
    x, weight, _ = case
    radii = radius * x.abs().amax() * torch.rand_like(x)
    lower, upper = x - radii, x + radii
    with use_backend(backend):
        low, high = linf_distance_bounds(lower, upper, weight)
    # Points of the box attain both bounds: the nearest point to the weight, and the farthest one in each coordinate.
    d = np.stack(
        [
            np.subtract.outer(weight.numpy()[:, i], corner.numpy()[:, i])
            for corner in (lower, upper)
            for i in range(x.shape[1])
        ]
    ).reshape(2, x.shape[1], len(weight), len(x))
    farthest = np.abs(d).max(axis=(0, 1)).T
    nearest = np.where((d[0] >= 0) & (d[1] <= 0), 0, np.abs(d).min(axis=0)).max(axis=0).T
    np.testing.assert_array_equal(high.numpy(), farthest)
    np.testing.assert_array_equal(low.numpy(), nearest)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float, int, int]:
    """Return float32 images and filters, p, stride and padding; kernels may be larger than images with padding."""
    kernel = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    stride, padding = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    size = [draw(st.integers(max(1, k - 2 * padding), 9)) for k in kernel]
    batch, channels, filters = (draw(st.sampled_from(n)) for n in ([1, 2, 7], [1, 3, 16, 17], [1, 5, 13, 40]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    images, weight = (generator.normal(size=s) for s in ((batch, channels, *size), (filters, channels, *kernel)))
    if draw(st.booleans()):  # gives ties, and zero differences to padding
        images, weight = np.round(images), np.round(weight)
    return images.astype(np.float32), weight.astype(np.float32), draw(EXPONENTS), stride, padding


@every_backend
@given(case=convolutions(), seed=st.integers(0, 2**32 - 1), channels_last=st.booleans())
def test_convolutions_match_float64(
    backend: str, case: tuple[np.ndarray, np.ndarray, float, int, int], seed: int, channels_last: bool
) -> None:
    images, weight, p, stride, padding = case
    padded = np.pad(images, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    indices = np.arange(padded.size).reshape(padded.shape)
    windows = np.lib.stride_tricks.sliding_window_view(indices, weight.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    size = windows.shape[2:4]
    places = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, weight[0].size)  # of all patches in padded images
    patches, filters = padded.flat[places], weight.reshape(len(weight), -1)
    expected = compute_reference(patches, filters, p)
    if math.isinf(p):
        d = patches[:, None] - filters[None]  # ties in float32
        slope = np.zeros(d.shape)
        np.put_along_axis(slope, np.abs(d).argmax(axis=2)[..., None], 1.0, axis=2)
        slope *= np.sign(d)
    else:
        slope = compute_reference_slope(patches, filters, p)
    upstream = np.random.default_rng(seed).normal(size=expected.shape)

    leaves = [torch.from_numpy(t) for t in (images, weight)]
    if channels_last:
        leaves = [t.contiguous(memory_format=torch.channels_last) for t in leaves]
    maps = torch.from_numpy(upstream).float().view(len(images), *size, -1).permute(0, 3, 1, 2)
    with use_backend(backend):
        y = lp_distance_conv2d(*(leaf.requires_grad_() for leaf in leaves), p, stride, padding)
        gradients = torch.autograd.grad(y, leaves, maps)
        (weight_only,) = torch.autograd.grad(
            lp_distance_conv2d(leaves[0].detach(), leaves[1], p, stride, padding), leaves[1], maps
        )
    assert y.shape == (len(images), len(weight), *size)
    assert relative_error(y.detach().permute(0, 2, 3, 1).reshape(expected.shape), expected) < 1e-5
    assert torch.equal(weight_only, gradients[1])

    def sum_gradients(g: np.ndarray, s: np.ndarray, sign: float) -> tuple[np.ndarray, np.ndarray]:
        flat = np.zeros(padded.size)
        np.add.at(flat, places, np.einsum("qo,qoi->qi", g, s))
        inside = tuple(slice(padding, padding + n) for n in images.shape[2:])
        return flat.reshape(padded.shape)[(..., *inside)], sign * np.einsum("qo,qoi->oi", g, s).reshape(weight.shape)

    tolerance = max(1e-5, 0 if math.isinf(p) else p * 2**-22)
    sizes = sum_gradients(np.abs(upstream), np.abs(slope), 1.0)
    for gradient, exact, magnitude in zip(gradients, sum_gradients(upstream, slope, -1.0), sizes, strict=True):
        # The tolerance is relative to the summed magnitudes, since rounding errors of canceling terms remain.
        assert np.linalg.norm(gradient.double().numpy() - exact) <= tolerance * np.linalg.norm(magnitude)


@every_backend
@pytest.mark.parametrize("p", [1.0, 8.0, 24.0, 100.5, math.inf])
def test_convolutions_of_many_tiles_match_their_dense_form(backend: str, p: float) -> None:
    """Each image has several tiles of positions, and the batch several groups of images."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 24, 15, 14), torch.randn(9, 24, 5, 5)
    a, b = x.double().requires_grad_(), weight.double().requires_grad_()
    columns = torch.nn.functional.unfold(a, 5, padding=2).transpose(1, 2)
    expected = lp_distance(columns.flatten(0, 1), b.flatten(1), p).unflatten(0, (3, -1)).transpose(1, 2)
    upstream = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, (a, b), upstream)
    with use_backend(backend):
        c, d = x.requires_grad_(), weight.requires_grad_()
        y = lp_distance_conv2d(c, d, p, 1, 2)
        gradients = torch.autograd.grad(y, (c, d), upstream.float().view_as(y))
    torch.testing.assert_close(y.flatten(2), expected.float(), rtol=1e-5, atol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient.float(), rtol=1e-3, atol=1e-3)


@every_backend
@pytest.mark.parametrize("p", [8.0, 100.5, math.inf])
@pytest.mark.parametrize(("samples", "filters"), [(0, 4), (2, 0)])
def test_empty_convolutions_return_empty_maps(backend: str, p: float, samples: int, filters: int) -> None:
    x, weight = torch.zeros(samples, 2, 5, 4, requires_grad=True), torch.zeros(filters, 2, 3, 3, requires_grad=True)
    with use_backend(backend):
        y = lp_distance_conv2d(x, weight, p, padding=1)
        gradients = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == (samples, filters, 5, 4)
    assert all(torch.equal(*pair) for pair in zip(gradients, map(torch.zeros_like, (x, weight)), strict=True))


@every_backend
@pytest.mark.parametrize("p", [1.0, 8.0, 1000.0, math.inf])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_pixels_affect_only_their_patches(backend: str, p: float, bad: float) -> None:
    x = torch.randn(2, 3, 9, 9)
    x[0, 1, 2, 3] = bad
    with use_backend(backend):
        y = lp_distance_conv2d(x.requires_grad_(), torch.randn(4, 3, 3, 3), p)
        y.sum().backward()  # must terminate; the gradients are arbitrary
    reached = torch.zeros(7, 7, dtype=torch.bool)
    reached[:3, 1:4] = True
    assert torch.equal(y[0].isfinite(), ~reached.expand(4, 7, 7)) and y[1].isfinite().all()


@pytest.mark.parametrize("p", [8.0, 9.7, 100.5, math.inf])
@pytest.mark.parametrize("size", [3, 20])  # groups of many images, and of one
def test_convolutions_are_bitwise_equal_for_any_thread_count(p: float, size: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(70, 24, size, size, requires_grad=True), torch.randn(20, 24, 3, 3, requires_grad=True)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = lp_distance_conv2d(x, weight, p, padding=1)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(results[0] * 2, results[1] + results[2], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("p", [1.0, 8.0, math.inf])
def test_convolution_in_float64_is_independent_of_chunks(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 9, 7, dtype=torch.float64), torch.randn(4, 3, 3, 2, dtype=torch.float64)
    results = []
    for values in (1, 2**22):  # one sample per chunk, and all in one
        monkeypatch.setattr(convolution, "MAX_PATCH_ELEMENTS", values)
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = lp_distance_conv2d(a, b, p, 2, 1)
        results.append((y, *torch.autograd.grad(y.square().sum(), (a, b))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_convolution_limits_patch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((16, 4, 12, 12), (2, 4, 5, 5)))
    num_patch_elements = 16 * 100 * 8 * 8
    monkeypatch.setattr(convolution, "MAX_PATCH_ELEMENTS", num_patch_elements // 8)
    with LargestTensor() as recorder:
        lp_distance_conv2d(x, weight, 8.0).sum().backward()
    assert recorder.numel <= num_patch_elements // 8


@pytest.mark.parametrize(
    ("shape", "weight", "options", "fragment"),
    [
        ((2, 3, 8), (4, 3, 3, 3), {}, "(2, 3, 8)"),
        ((2, 3, 8, 8), (4, 2, 3, 3), {}, "(4, 2, 3, 3)"),
        ((2, 3, 8, 8), (4, 3, 9, 3), {}, "(4, 3, 9, 3)"),
        ((2, 3, 8, 8), (4, 3, 3, 3), {"stride": 0}, "stride=0"),
        ((2, 3, 8, 8), (4, 3, 3, 3), {"padding": -1}, "padding=-1"),
        ((2, 3, 8, 8), (4, 3, 3, 3), {"p": 0.5}, "p=0.5"),
    ],
)
def test_invalid_convolutions_are_rejected(
    shape: tuple[int, ...], weight: tuple[int, ...], options: dict, fragment: str
) -> None:
    with pytest.raises(ValueError, match="lp_distance_conv2d") as caught:
        lp_distance_conv2d(torch.zeros(shape), torch.zeros(weight), **options)
    assert fragment in str(caught.value)


@pytest.mark.integration
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_custom_ops_pass_opcheck(dtype: torch.dtype) -> None:
    x, weight = (torch.randn(rows, 7, dtype=dtype, requires_grad=True) for rows in (5, 3))
    for p in (8.0, 9.7, math.inf):
        library.opcheck(torch.ops.linflab.lp_distance.default, (x, weight, p))
    library.opcheck(torch.ops.linflab.linf_distance_with_blocks.default, (x, weight))
    box = (x.detach(), x.detach() + 1, weight.detach())
    library.opcheck(torch.ops.linflab.linf_distance_bounds.default, box)
    y = lp_distance(*box[::2], 8.0)
    transposed = torch.randn(7, 5, dtype=dtype).t()
    library.opcheck(
        torch.ops.linflab.lp_distance_backward.default,
        (torch.randn(5, 3, dtype=dtype), transposed, weight.detach(), y, 8.0),
        test_utils=("test_schema", "test_faketensor"),
    )
    images, filters = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((3, 2, 6, 5), (4, 2, 3, 3)))
    for x in (images, images.detach()):  # the inputs of a first layer need no gradients
        library.opcheck(torch.ops.linflab.lp_distance_conv2d.default, (x, filters, 8.0, 2, 1))


def test_linf_distances_with_blocks_match_those_without() -> None:
    x, weight = (torch.randn(rows, 200, dtype=torch.float64, requires_grad=True) for rows in (5, 3))
    y, blocks = torch.ops.linflab.linf_distance_with_blocks(x, weight)
    assert torch.equal(y, lp_distance(x, weight))
    assert torch.equal(blocks, ((x[:, None] - weight[None]).abs().argmax(dim=2) // 64).to(torch.int32))
    upstream = torch.randn(5, 3, dtype=torch.float64)
    gradients = torch.autograd.grad(y, (x, weight), upstream)
    expected = torch.autograd.grad(lp_distance(x, weight), (x, weight), upstream)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))


@pytest.mark.integration
def test_missing_kernels_warn_once() -> None:
    """A single warning names the installation command, and the operators work without compiled kernels."""
    code = """
import sys, warnings
for isa in ("avx512", "avx2", "portable"):
    sys.modules[f"linflab.models.distance._kernels_{isa}"] = None  # makes its import fail
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from linflab.models.distance import lp_distance
    for _ in range(2):
        assert lp_distance(torch.zeros(1, 2), torch.ones(1, 2), 1.0).item() == 2
print([str(warning.message) for warning in caught if "C++" in str(warning.message)])
"""
    completed = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.count("pip install --no-deps --editable") == 1


@pytest.mark.parametrize("p", [8.0, math.inf])
def test_tiles_limit_memory_and_keep_gradients(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> tuple[torch.Tensor, ...]:
        y = reference.lp_distance(x, weight, p)
        return reference.lp_distance_backward(torch.ones_like(y), x, weight, y, p)

    torch.manual_seed(0)
    x, weight = torch.randn(33, 20), torch.randn(41, 20)
    whole = gradients()
    monkeypatch.setattr(reference, "CPU_TILE_ELEMENTS", 1500)  # of 33 * 41 * 20 = 27060 terms and 1353 outputs
    with LargestTensor() as recorder:
        tiled = gradients()
    assert recorder.numel <= 1500
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("x", "weight", "p", "error", "fragment"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), 2.0, ValueError, "(4, 5)"),
        (torch.zeros(3), torch.zeros(4, 3), 2.0, ValueError, "(3,)"),
        (torch.zeros(2, 0), torch.zeros(4, 0), 2.0, ValueError, "(2, 0)"),
        (torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.float64), 2.0, TypeError, "float64"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.int64), 2.0, TypeError, "int64"),
        (torch.zeros(2, 3), torch.zeros(4, 3), 0.5, ValueError, "p=0.5"),
        (torch.zeros(2, 3), torch.zeros(4, 3), math.nan, ValueError, "p=nan"),
        (torch.zeros(2, 3), torch.zeros(4, 3, device="meta"), 2.0, ValueError, "meta"),
    ],
)
def test_invalid_arguments_are_rejected(
    x: torch.Tensor, weight: torch.Tensor, p: float, error: type[Exception], fragment: str
) -> None:
    with pytest.raises(error) as caught:
        lp_distance(x, weight, p)
    assert fragment in str(caught.value)
