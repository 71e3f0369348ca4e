"""The l_p-distance operator against its definition in float64 numpy: every implementation that this machine can run."""

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
from tests.models.implementations import everywhere, using

EXPONENTS = st.one_of(
    st.sampled_from([1.0, 2.0, 8.0, 9.7, 100.5, 1000.0, 2000.0, math.inf]), st.floats(min_value=1, max_value=2000)
)


class Largest(TorchDispatchMode):
    """Sees the size of the largest tensor that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def by_definition(x: np.ndarray, weight: np.ndarray, p: float) -> np.ndarray:
    """||x - w||_p by way of logarithms in float64: another route than the one under test."""
    d = np.abs(x.astype(np.float64)[:, None] - weight.astype(np.float64)[None])
    if math.isinf(p):
        return d.max(axis=2)
    with np.errstate(divide="ignore"):
        return np.exp(np.logaddexp.reduce(p * np.log(d), axis=2) / p)


def slope_by_definition(x: np.ndarray, weight: np.ndarray, p: float) -> np.ndarray:
    """dy[b, o] / dx[b, i] for finite p, zero where y is zero; (B, O, I)."""
    d = x.astype(np.float64)[:, None] - weight.astype(np.float64)[None]
    y = by_definition(x, weight, p)[:, :, None]
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
    if draw(st.booleans()):  # on a coarse grid there are ties, and inputs equal to weights
        x, weight = np.round(x), np.round(weight)
    return torch.from_numpy(scale * x).float(), torch.from_numpy(scale * weight).float(), draw(EXPONENTS)


@everywhere
@given(case=operands())
def test_values(implementation: str, case: tuple[torch.Tensor, torch.Tensor, float]) -> None:
    x, weight, p = case
    with using(implementation):
        y = lp_distance(x, weight, p)
    assert relative_error(y, by_definition(x.numpy(), weight.numpy(), p)) < 1e-5


@everywhere
@given(case=operands(), seed=st.integers(0, 2**32 - 1))
def test_gradients(implementation: str, case: tuple[torch.Tensor, torch.Tensor, float], seed: int) -> None:
    x, weight, p = case
    upstream = np.random.default_rng(seed).normal(size=(len(x), len(weight)))
    x.requires_grad_()
    weight.requires_grad_()
    with using(implementation):
        lp_distance(x, weight, p).backward(torch.from_numpy(upstream).float())
    assert x.grad is not None and weight.grad is not None
    values = x.detach().numpy(), weight.detach().numpy()
    if math.isinf(p):
        d = values[0].astype(np.float64)[:, None] - values[1].astype(np.float64)[None]
        slope = np.zeros_like(d)
        rows, outs = np.ogrid[: d.shape[0], : d.shape[1]]
        first = np.abs(values[0][:, None] - values[1][None]).argmax(axis=2)  # ties as float32 sees them
        slope[rows, outs, first] = np.sign(d)[rows, outs, first]
    else:
        slope = slope_by_definition(*values, p)
    tolerance = max(1e-5, 0 if math.isinf(p) else p * 2**-22)
    for gradient, sign, indices in ((x.grad, 1, "bo,boi->bi"), (weight.grad, -1, "bo,boi->oi")):
        expected = sign * np.einsum(indices, upstream, slope)
        # relative to the size of what is summed: where terms cancel, their rounding remains
        size = np.linalg.norm(np.einsum(indices, np.abs(upstream), np.abs(slope)))
        assert np.linalg.norm(gradient.double().numpy() - expected) <= tolerance * size


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, 24.0, math.inf])
def test_gradients_are_derivatives(p: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: lp_distance(x, weight, p), (x, weight))


@everywhere
@pytest.mark.parametrize("p", [1, 3, 8, 9.7, 24, 64, 100.5, math.inf])
def test_rows_of_any_magnitude_beside_one_another(implementation: str, p: float) -> None:
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
        with using(implementation):
            y = lp_distance(*leaves, p)
            results.append([y, *torch.autograd.grad(y, leaves, upstream.to(dtype))])
    for single, double in zip(*results, strict=True):
        for row, expected in zip(single, double, strict=True):
            assert torch.linalg.vector_norm(row - expected) <= 1e-4 * torch.linalg.vector_norm(expected)


@everywhere
@pytest.mark.parametrize("p", [4.5, 5.2, 6.7, 8, 9.7, 60.5, 100.5])
def test_gradients_of_many_equal_terms(implementation: str, p: float) -> None:
    x, inputs = torch.ones(3, 5120, requires_grad=True), 5120
    with using(implementation):
        y = lp_distance(x, torch.zeros(2, inputs), p)
        y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(y, torch.full_like(y, inputs ** (1 / p)), rtol=1e-5, atol=0)
    slope = 2 * inputs ** (1 / p - 1)  # of two outputs
    torch.testing.assert_close(x.grad, torch.full_like(x, slope), rtol=max(1e-5, p * 2**-22), atol=0)


@everywhere
@pytest.mark.parametrize("p", [3, 8, 12, 16, 64, 9.7, 100.5, math.inf])
@pytest.mark.parametrize("size", [1e-20, 1e-15, 1e15])
def test_gradients_follow_upstream_gradients_of_any_size(implementation: str, p: float, size: float) -> None:
    torch.manual_seed(0)
    x, weight = 30 * torch.rand(5, 40), torch.rand(6, 40)
    upstream = torch.randn(5, 6)
    gradients = []
    for factor in (1.0, size):
        leaf = x.clone().requires_grad_()
        with using(implementation):
            lp_distance(leaf, weight, p).backward(upstream * factor)
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    difference = torch.linalg.vector_norm(gradients[1].double() / size - gradients[0])
    assert difference <= 1e-4 * torch.linalg.vector_norm(gradients[0])


@everywhere
@pytest.mark.parametrize("p", [8, 9.7, 24, 100.5, math.inf])
@pytest.mark.parametrize(("samples", "outputs"), [(0, 4), (2, 0), (0, 0)])
def test_nothing_in_nothing_out(implementation: str, p: float, samples: int, outputs: int) -> None:
    x, weight = torch.zeros(samples, 3, requires_grad=True), torch.zeros(outputs, 3, requires_grad=True)
    with using(implementation):
        y = lp_distance(x, weight, p)
        y.sum().backward()
    assert y.shape == (samples, outputs)
    for leaf in (x, weight):
        assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_second_gradients_are_refused() -> None:
    x = torch.rand(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(lp_distance(x, torch.rand(4, 3), 3.0).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        (gradient**2).sum().backward()


@everywhere
@pytest.mark.parametrize("inputs", [3, 40, 300])
def test_gradient_at_a_tie_belongs_to_the_first_term(implementation: str, inputs: int) -> None:
    x = torch.linspace(-0.5, 0.5, inputs)[None].repeat(5, 1)
    expected = torch.zeros(5, inputs)
    for row, (one, other) in enumerate([(0, 1), (0, inputs - 1), (1, 2), (inputs - 2, inputs - 1), (inputs // 2, 2)]):
        x[row, one], x[row, other] = 1.0, -1.0
        expected[row, min(one, other)] = x[row, min(one, other)]
    x.requires_grad_()
    with using(implementation):
        lp_distance(x, torch.zeros(1, inputs), math.inf).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, expected)


@everywhere
@pytest.mark.parametrize("p", [1.0, 1.5, 8.0, 9.7, 1000.0, math.inf])
def test_gradient_is_zero_where_input_equals_weight(implementation: str, p: float) -> None:
    x = torch.randn(2, 6).requires_grad_()
    with using(implementation):
        y = lp_distance(x, x.detach().clone()[:1].expand(3, 6).contiguous(), p)
        y[0].sum().backward()
    assert y[0].tolist() == [0.0, 0.0, 0.0]
    assert x.grad is not None and x.grad.abs().max() == 0


@pytest.mark.parametrize("p", [1.0, 8.0, 1000.0, math.inf])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@everywhere
def test_non_finite_input_gives_non_finite_output(implementation: str, p: float, bad: float) -> None:
    x = torch.randn(2, 60)
    x[0, 3] = bad
    x.requires_grad_()
    with using(implementation):
        y = lp_distance(x, torch.randn(3, 60), p)
        y.sum().backward()  # whatever it gives, it ends
    assert not y[0].isfinite().any() and y[1].isfinite().all()


@pytest.mark.parametrize("p", [1.0, 8.0, 9.7, 48.0, 100.5, 1000.0, math.inf])
@pytest.mark.parametrize("shape", [(33, 70, 1100), (300, 5, 800)])
def test_same_bits_on_any_number_of_threads(p: float, shape: tuple[int, int, int]) -> None:
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


@everywhere
@given(case=operands(), radius=st.floats(0, 3))
def test_bounds_are_the_exact_range(
    implementation: str, case: tuple[torch.Tensor, torch.Tensor, float], radius: float
) -> None:
    x, weight, _ = case
    reach = radius * x.abs().amax() * torch.rand_like(x)
    lower, upper = x - reach, x + reach
    with using(implementation):
        low, high = linf_distance_bounds(lower, upper, weight)
    # both ends are taken on by points of the box: the nearest to the weight, and in each coordinate the farthest
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


@everywhere
@pytest.mark.parametrize("p", [1.0, 8.0, 100.5, math.inf])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (2, 1), (3, 2)])
def test_convolution_is_the_distance_of_patches(
    implementation: str, p: float, stride: int, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 9, 7), torch.randn(4, 3, 3, 2)
    a, b = x.double().requires_grad_(), weight.double().requires_grad_()
    columns = torch.nn.functional.unfold(a, (3, 2), padding=padding, stride=stride).transpose(1, 2)
    expected = reference.lp_distance(columns.flatten(0, 1), b.flatten(1), p).unflatten(0, (5, -1)).transpose(1, 2)
    upstream = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, (a, b), upstream)
    for values in (1, 2**22):  # one sample at a time, and all together
        monkeypatch.setattr(convolution, "PATCH_VALUES", values)
        with using(implementation):
            c, d = x.clone().requires_grad_(), weight.clone().requires_grad_()
            y = lp_distance_conv2d(c, d, p, stride, padding)
            gradients = torch.autograd.grad(y, (c, d), upstream.float().view_as(y))
        torch.testing.assert_close(y.flatten(2), expected.float(), rtol=1e-5, atol=1e-5)
        for gradient, right in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, right.float(), rtol=1e-3, atol=1e-4)


def test_convolution_holds_few_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(64, 4, 12, 12, requires_grad=True), torch.randn(2, 4, 5, 5, requires_grad=True)
    unfolded = 64 * 100 * 8 * 8
    monkeypatch.setattr(convolution, "PATCH_VALUES", unfolded // 8)
    with Largest() as seen:
        lp_distance_conv2d(x, weight, 8.0).sum().backward()
    assert seen.numel <= unfolded // 8


@pytest.mark.parametrize(
    ("shape", "weight", "options", "says"),
    [
        ((2, 3, 8), (4, 3, 3, 3), {}, "(2, 3, 8)"),
        ((2, 3, 8, 8), (4, 2, 3, 3), {}, "(4, 2, 3, 3)"),
        ((2, 3, 8, 8), (4, 3, 9, 3), {}, "no larger"),
        ((2, 3, 8, 8), (4, 3, 3, 3), {"stride": 0}, "stride >= 1"),
        ((2, 3, 8, 8), (4, 3, 3, 3), {"padding": -1}, "padding >= 0"),
        ((2, 3, 8, 8), (4, 3, 3, 3), {"p": 0.5}, "p = 0.5"),
    ],
)
def test_wrong_convolutions(shape: tuple[int, ...], weight: tuple[int, ...], options: dict, says: str) -> None:
    with pytest.raises(ValueError, match="lp_distance_conv2d") as caught:
        lp_distance_conv2d(torch.zeros(shape), torch.zeros(weight), **options)
    assert says in str(caught.value)


def test_custom_ops_keep_the_rules_of_torch_library() -> None:
    x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    for p in (8.0, 9.7, math.inf):
        library.opcheck(torch.ops.linflab.lp_distance.default, (x, weight, p))
    box = (x.detach(), x.detach() + 1, weight.detach())
    library.opcheck(torch.ops.linflab.linf_distance_bounds.default, box)
    y = lp_distance(*box[::2], 8.0)
    transposed = torch.randn(7, 5).t()
    library.opcheck(
        torch.ops.linflab.lp_distance_backward.default,
        (torch.randn(5, 3), transposed, weight.detach(), y, 8.0),
        test_utils=("test_schema", "test_faketensor"),
    )
    images, filters = torch.randn(3, 2, 6, 5, requires_grad=True), torch.randn(4, 2, 3, 3, requires_grad=True)
    for x in (images, images.detach()):  # a first layer needs no gradients of its inputs
        library.opcheck(torch.ops.linflab.lp_distance_conv2d.default, (x, filters, 8.0, 2, 1))


def test_without_a_compiled_module() -> None:
    """One warning that says how to get the fast path; everything works."""
    code = """
import sys, warnings
for isa in ("avx512", "avx2", "portable"):
    sys.modules[f"linflab.models.distance._kernels_{isa}"] = None  # an import of it now fails
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from linflab.models.distance import lp_distance
    for _ in range(2):
        assert lp_distance(torch.zeros(1, 2), torch.ones(1, 2), 1.0).item() == 2
print([str(warning.message) for warning in caught if "C++" in str(warning.message)])
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pip install --no-deps --editable") == 1


@pytest.mark.parametrize("p", [8.0, math.inf])
def test_work_goes_in_tiles(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(reference.lp_distance(x, weight, p).sum(), (x, weight))

    torch.manual_seed(0)
    x, weight = torch.randn(33, 20).requires_grad_(), torch.randn(41, 20).requires_grad_()
    whole = gradients()
    monkeypatch.setattr(reference, "TILE", 1500)  # of 33 * 41 * 20 = 27060 terms, and of 1353 outputs
    with Largest() as seen:
        tiled = gradients()
    assert seen.numel <= 1500
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("x", "weight", "p", "error", "says"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), 2.0, ValueError, "(2, 3) and (4, 5)"),
        (torch.zeros(3), torch.zeros(4, 3), 2.0, ValueError, "(3,) and (4, 3)"),
        (torch.zeros(2, 0), torch.zeros(4, 0), 2.0, ValueError, "I >= 1"),
        (torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.float64), 2.0, TypeError, "float64"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.int64), 2.0, TypeError, "int64"),
        (torch.zeros(2, 3), torch.zeros(4, 3), 0.5, ValueError, "p = 0.5"),
        (torch.zeros(2, 3), torch.zeros(4, 3), math.nan, ValueError, "p = nan"),
        (torch.zeros(2, 3), torch.zeros(4, 3, device="meta"), 2.0, ValueError, "meta"),
    ],
)
def test_wrong_arguments(x: torch.Tensor, weight: torch.Tensor, p: float, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as caught:
        lp_distance(x, weight, p)
    assert says in str(caught.value)
