"""Tests of SortNet's operators against float64 references, for every supported backend."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from linflab.models.distance import (
    linf_distance_bounds,
    lp_distance,
    masked_lp_distance,
    sort_distance,
    sort_distance_bounds,
)
from tests.models.backends import every_backend, use_backend

SIZES = [1, 2, 3, 4, 5, 8, 12, 16, 17, 70]
ORDERS = st.tuples(st.sampled_from([0.02, 0.3, 0.9]), st.integers(1, 16))
EXPONENTS = st.one_of(st.sampled_from([1.0, 2.0, 8.0, 24.0, 100.5, math.inf]), st.floats(min_value=1, max_value=1000))


def compute_coefficients(q: float, top_k: int, inputs: int) -> torch.Tensor:
    c = q * (1 - q) ** torch.arange(min(top_k, inputs), dtype=torch.float64)
    return c / c.sum()


def compute_reference(x: torch.Tensor, weight: torch.Tensor, q: float, top_k: int) -> torch.Tensor:
    """Return differentiable float64 distances. The order is that of float32, so that ties are the same."""
    d = (x[:, None] - weight).abs()
    rounded = (x.detach().float()[:, None] - weight.detach().float()).abs()
    order = rounded.sort(dim=2, descending=True, stable=True).indices
    c = compute_coefficients(q, top_k, x.shape[1])
    return d.gather(2, order[..., : len(c)]) @ c


def compute_with_gradients(
    function, x: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor
) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y))]


def assert_near(results: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    for result, expected_value in zip(results, expected, strict=True):
        assert torch.linalg.vector_norm(result.double() - expected_value) <= tolerance * torch.linalg.vector_norm(
            expected_value
        )


@st.composite
def operands(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw inputs, weights, and upstream gradients."""
    batch, outputs = (draw(st.sampled_from([1, 2, 5, 9])) for _ in range(2))
    inputs = draw(st.sampled_from(SIZES))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-6, 6))
    x, weight = generator.normal(size=(batch, inputs)), generator.normal(size=(outputs, inputs))
    if draw(st.booleans()):  # gives ties, and inputs equal to weights
        x, weight = np.round(x), np.round(weight)
    upstream = generator.normal(size=(batch, outputs))
    return torch.from_numpy(scale * x).float(), torch.from_numpy(scale * weight).float(), torch.from_numpy(upstream)


@every_backend
@given(case=operands(), order=ORDERS)
def test_values_and_gradients_match_float64(
    backend: str, case: tuple[torch.Tensor, ...], order: tuple[float, int]
) -> None:
    x, weight, upstream = case
    with use_backend(backend):
        results = compute_with_gradients(lambda a, b: sort_distance(a, b, *order), x, weight, upstream)
    expected = compute_with_gradients(
        lambda a, b: compute_reference(a, b, *order), x.double(), weight.double(), upstream
    )
    sizes = compute_with_gradients(
        lambda a, b: compute_reference(a, b, *order), x.double(), weight.double(), upstream.abs()
    )
    # Rounding errors of canceling slopes remain.
    for result, expected_value, size in zip(results, expected, sizes, strict=True):
        bound = 1e-5 * (torch.linalg.vector_norm(expected_value) + torch.linalg.vector_norm(size))
        assert torch.linalg.vector_norm(result.double() - expected_value) <= bound


@every_backend
@pytest.mark.parametrize("inputs", [9, 16, 65, 1024, 1100])
def test_wide_layers_match_float64(backend: str, inputs: int) -> None:
    torch.manual_seed(0)
    x, weight, upstream = torch.randn(6, inputs), torch.randn(7, inputs), torch.randn(6, 7)
    x[1], weight[2] = x[1].round(), weight[2].round()
    with use_backend(backend):
        results = compute_with_gradients(lambda a, b: sort_distance(a, b, 0.3), x, weight, upstream)
    expected = compute_with_gradients(
        lambda a, b: compute_reference(a, b, 0.3, 10), x.double(), weight.double(), upstream
    )
    assert_near(results, expected)


@every_backend
@pytest.mark.parametrize("inputs", [4, 40, 1000])
def test_ties_are_ranked_in_input_order(backend: str, inputs: int) -> None:
    x, weight = torch.full((3, inputs), -2.0), torch.zeros(5, inputs)
    x[1, -1], x[2] = 3.0, 0.0
    with use_backend(backend):
        y, grad_x, grad_weight = compute_with_gradients(
            lambda a, b: sort_distance(a, b, 0.3, 6), x, weight, torch.tensor([[1.0], [0.0], [1.0]]).expand(3, 5)
        )
        grad_other = compute_with_gradients(
            lambda a, b: sort_distance(a, b, 0.3, 6), x[1:2], weight[:1], torch.ones(1, 1)
        )[1]
    c = compute_coefficients(0.3, 6, inputs)
    torch.testing.assert_close(y[:, 0], torch.tensor([2.0, 2.0 + float(c[0]), 0.0]))
    expected = torch.zeros(inputs, dtype=torch.float64)
    expected[: len(c)] = -c
    torch.testing.assert_close(grad_x[0].double(), 5 * expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad_weight[3].double(), -expected, rtol=1e-6, atol=0)
    assert not grad_x[2].any()  # inputs equal to weights
    expected.zero_()
    expected[: len(c) - 1], expected[-1] = -c[1:], c[0]
    torch.testing.assert_close(grad_other[0].double(), expected, rtol=1e-6, atol=0)


@every_backend
@given(case=operands())
def test_q_one_equals_the_linf_distance(backend: str, case: tuple[torch.Tensor, ...]) -> None:
    x, weight, upstream = case
    with use_backend(backend):
        results = compute_with_gradients(lambda a, b: sort_distance(a, b, 1.0), x, weight, upstream)
        expected = compute_with_gradients(lp_distance, x, weight, upstream)
        bounds = sort_distance_bounds(x - 1, x + 1, weight, 1.0)
        expected_bounds = linf_distance_bounds(x - 1, x + 1, weight)
    for result, expected_value in zip([*results, *bounds], [*expected, *expected_bounds], strict=True):
        assert torch.equal(result, expected_value)


@every_backend
@given(case=operands(), order=ORDERS, radius=st.sampled_from([0.0, 0.1, 3.0]), seed=st.integers(0, 2**32 - 1))
def test_bounds_are_the_exact_range(
    backend: str, case: tuple[torch.Tensor, ...], order: tuple[float, int], radius: float, seed: int
) -> None:
    x, weight, _ = case
    generator = torch.Generator().manual_seed(seed)
    radii = radius * x.abs().amax() * torch.rand(x.shape, generator=generator)
    lower, upper = x - radii, x + radii
    with use_backend(backend):
        low, high = (bound.double() for bound in sort_distance_bounds(lower, upper, weight, *order))
    lower, upper, weight = lower.double(), upper.double(), weight.double()
    slack = 1e-5 * high + 1e-30
    for b in range(len(x)):
        for o, center in enumerate(weight):  # the nearest point and the farthest corner attain them
            nearest = center.clamp(lower[b], upper[b])
            farthest = torch.where((upper[b] - center).abs() > (lower[b] - center).abs(), upper[b], lower[b])
            ends = compute_reference(torch.stack([nearest, farthest]), center[None], *order)[:, 0]
            assert abs(ends[0] - low[b, o]) <= slack[b, o] and abs(ends[1] - high[b, o]) <= slack[b, o]
    for _ in range(5):
        corner = torch.where(torch.rand(x.shape, generator=generator) < 0.5, lower, upper)
        y = compute_reference(corner, weight, *order)
        assert (y >= low - slack).all() and (y <= high + slack).all()


def compute_masked_reference(
    x: torch.Tensor, weight: torch.Tensor, p: float, mask: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Return the distances, computed for each group separately."""
    parts = []
    for number, row in enumerate(mask):
        x_part, weight_part = x[number * group_size : (number + 1) * group_size][:, row], weight[:, row]
        parts.append(lp_distance(x_part, weight_part, p) if row.any() else x_part.sum(1)[:, None] + weight_part.sum(1))
    return torch.cat(parts)


@every_backend
@given(
    case=operands(),
    p=EXPONENTS,
    group_size=st.sampled_from([1, 2, 4, 32]),
    keep_probability=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_masked_distances_match_group_by_group(
    backend: str, case: tuple[torch.Tensor, ...], p: float, group_size: int, keep_probability: float, seed: int
) -> None:
    x, weight, upstream = case
    mask = (
        torch.rand(-(-len(x) // group_size), x.shape[1], generator=torch.Generator().manual_seed(seed))
        < keep_probability
    )
    with use_backend(backend):
        results = compute_with_gradients(
            lambda a, b: masked_lp_distance(a, b, p, mask, group_size), x, weight, upstream
        )
        expected = compute_with_gradients(
            lambda a, b: compute_masked_reference(a, b, p, mask, group_size), x, weight, upstream
        )
        sizes = compute_with_gradients(
            lambda a, b: compute_masked_reference(a, b, p, mask, group_size), x, weight, upstream.abs()
        )
    tolerance = 1e-5 + (0 if math.isinf(p) else p * 2**-21)
    for result, expected_value, size in zip(results, expected, sizes, strict=True):
        bound = tolerance * (torch.linalg.vector_norm(expected_value) + torch.linalg.vector_norm(size))
        assert torch.linalg.vector_norm(result - expected_value) <= bound
    if math.isinf(p):
        assert torch.equal(results[0], expected[0])


@every_backend
@pytest.mark.parametrize("p", [1.0, 8.0, 9.7, 24.0, 64.0, 100.5, math.inf])
def test_masked_distances_of_wide_layers_match_float64(backend: str, p: float) -> None:
    torch.manual_seed(0)
    x, weight, upstream = torch.rand(70, 700), torch.randn(40, 700), torch.randn(70, 40)
    x[3] *= 1e15  # powers of these distances overflow
    x[66, 6] = math.nan
    mask = torch.rand(3, 700) < 0.4
    mask[1], mask[2, 6] = False, False
    with use_backend(backend):
        results = compute_with_gradients(lambda a, b: masked_lp_distance(a, b, p, mask), x, weight, upstream)
    doubles = x.double(), weight.double()
    expected = compute_with_gradients(lambda a, b: compute_masked_reference(a, b, p, mask, 32), *doubles, upstream)
    for result, expected_value in zip(results, expected, strict=True):
        error = torch.linalg.vector_norm(result.double() - expected_value, dim=1)
        assert (error <= 2e-4 * torch.linalg.vector_norm(expected_value, dim=1)).all()
    assert not results[0][32:64].any() and not results[1][32:64].any()
    full_mask = torch.ones(1, 700, dtype=torch.bool)
    x[66, 6] = 0.0
    with use_backend(backend):
        results = compute_with_gradients(lambda a, b: masked_lp_distance(a, b, p, full_mask, 70), x, weight, upstream)
        expected = compute_with_gradients(lambda a, b: lp_distance(a, b, p), x, weight, upstream)
    assert_near(results, [t.double() for t in expected], 1e-5 + (0 if math.isinf(p) else p * 2**-22))


@every_backend
@pytest.mark.parametrize("top_k", range(1, 17))
def test_every_top_k_matches_float64(backend: str, top_k: int) -> None:
    """Layers have top_k inputs, slightly more, or many more. The bounds of a point equal its value."""
    torch.manual_seed(top_k)
    for inputs in (top_k, top_k + 1, top_k + 3, 200):
        x, weight = torch.randn(9, inputs), torch.randn(7, inputs)
        expected = compute_reference(x.double(), weight.double(), 0.4, top_k)
        with use_backend(backend):
            torch.testing.assert_close(sort_distance(x, weight, 0.4, top_k).double(), expected, rtol=1e-6, atol=1e-6)
            for bound in sort_distance_bounds(x, x.clone(), weight, 0.4, top_k):
                torch.testing.assert_close(bound.double(), expected, rtol=1e-6, atol=1e-6)


@every_backend
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_input_gives_non_finite_output(backend: str, bad: float) -> None:
    x, weight = torch.randn(2, 60), torch.randn(3, 60)
    x[0, 3] = bad
    mask = torch.ones(1, 60, dtype=torch.bool)
    for function in (
        lambda a, b: sort_distance(a, b, 0.3),
        lambda a, b: masked_lp_distance(a, b, 8.0, mask),
        lambda a, b: masked_lp_distance(a, b, math.inf, mask),
    ):
        with use_backend(backend):
            y = compute_with_gradients(function, x, weight, torch.ones(2, 3))[0]  # gradients must terminate
        assert not y[0].isfinite().any()
    with use_backend(backend):
        assert sort_distance(x, weight, 0.3)[1].isfinite().all()
        for bound in sort_distance_bounds(x, x.clone(), weight, 0.3):
            assert not bound[0].isfinite().any() and bound[1].isfinite().all()


@every_backend
@pytest.mark.parametrize(("samples", "outputs"), [(0, 4), (2, 0), (0, 0)])
def test_empty_batch_returns_empty_output(backend: str, samples: int, outputs: int) -> None:
    x, weight = torch.zeros(samples, 3), torch.zeros(outputs, 3)
    mask = torch.ones(min(samples, 1), 3, dtype=torch.bool)
    with use_backend(backend):
        bounds = sort_distance_bounds(x, x, weight, 0.3)
        for function in (
            lambda a, b: sort_distance(a, b, 0.3),
            lambda a, b: masked_lp_distance(a, b, 8.0, mask),
            lambda a, b: masked_lp_distance(a, b, math.inf, mask),
        ):
            y, *gradients = compute_with_gradients(function, x, weight, torch.zeros(samples, outputs))
            assert y.shape == bounds[0].shape == bounds[1].shape == (samples, outputs)
            assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("shape", [(33, 70, 1100), (300, 5, 800)])
def test_results_are_bitwise_equal_for_any_thread_count(shape: tuple[int, int, int]) -> None:
    batch, outputs, inputs = shape
    torch.manual_seed(0)
    x, weight, upstream = torch.randn(batch, inputs), torch.randn(outputs, inputs), torch.randn(batch, outputs)
    mask = torch.rand(-(-batch // 32), inputs) < 0.4
    results: list[list[torch.Tensor]] = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(compute_with_gradients(lambda a, b: sort_distance(a, b, 0.3), x, weight, upstream))
            results[-1] += sort_distance_bounds(x, x + 0.1, weight, 0.3)
            for p in (8.0, 9.7, 100.5, math.inf):
                results[-1] += compute_with_gradients(
                    lambda a, b, p=p: masked_lp_distance(a, b, p, mask), x, weight, upstream
                )
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(results[0] * 2, results[1] + results[2], strict=True):
        assert torch.equal(one, other)


def test_float64_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 12, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64)
    mask = torch.rand(3, 12) < 0.5
    leaves = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: sort_distance(a, b, 0.3, 5), leaves)
    for p in (3.5, math.inf):
        assert torch.autograd.gradcheck(lambda a, b, p=p: masked_lp_distance(a, b, p, mask, 2), leaves)


def test_mean_over_masks_equals_the_sort_distance() -> None:
    torch.manual_seed(0)
    x, weight, q = torch.rand(1, 16), torch.randn(3, 16), 0.4
    mask = torch.rand(20000, 16) < q
    mask = mask[mask.any(dim=1)]
    y = masked_lp_distance(x.expand(len(mask), 16), weight, math.inf, mask, 1).mean(dim=0)
    torch.testing.assert_close(y, sort_distance(x, weight, q, 16)[0], rtol=0.01, atol=0)


@pytest.mark.integration
@pytest.mark.slow
@settings(max_examples=5)
@given(q=st.sampled_from([0.3, 0.9]), p=st.sampled_from([8.0, 100.5, math.inf]))
def test_custom_ops_pass_opcheck(q: float, p: float) -> None:
    x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    mask, upstream = torch.rand(3, 7) < 0.5, torch.randn(5, 3)
    ops, box = torch.ops.linflab, (x.detach(), x.detach() + 1, weight.detach())
    library.opcheck(ops.sort_distance.default, (x, weight, q, 4))
    library.opcheck(ops.masked_lp_distance.default, (x, weight, p, mask, 2))
    library.opcheck(ops.sort_distance_bounds.default, (*box, q, 4))
    only = ("test_schema", "test_faketensor")
    x, weight = x.detach().t().contiguous().t(), weight.detach()
    library.opcheck(ops.sort_distance_backward.default, (upstream, x, weight, q, 4), test_utils=only)
    y = masked_lp_distance(x, weight, p, mask, 2)
    arguments = (upstream, x, weight, y, p, mask, 2)
    library.opcheck(ops.masked_lp_distance_backward.default, arguments, test_utils=only)


A, B = torch.zeros(2, 3), torch.zeros(4, 3)
MASK = torch.ones(1, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "fragment"),
    [
        (lambda: sort_distance(A, torch.zeros(4, 5), 0.3), ValueError, "(4, 5)"),
        (lambda: sort_distance(A, B.double(), 0.3), TypeError, "float64"),
        (lambda: sort_distance(A, B, 0.0), ValueError, "q=0.0"),
        (lambda: sort_distance(A, B, 1.5), ValueError, "q=1.5"),
        (lambda: sort_distance(A, B, math.nan), ValueError, "q=nan"),
        (lambda: sort_distance(A, B, 0.3, 0), ValueError, "top_k=0"),
        (lambda: sort_distance(A, B, 0.3, 17), ValueError, "1 to 16"),
        (lambda: sort_distance_bounds(A, A[:1], B, 0.3), ValueError, "(1, 3)"),
        (lambda: sort_distance_bounds(A, A, B, -1.0), ValueError, "q=-1.0"),
        (lambda: sort_distance_bounds(A, A, B.to("meta"), 0.3), ValueError, "meta"),
        (lambda: masked_lp_distance(A, B, 0.5, MASK), ValueError, "p=0.5"),
        (lambda: masked_lp_distance(A, B, 8.0, MASK.float()), TypeError, "float32"),
        (lambda: masked_lp_distance(A, B, 8.0, MASK[0]), ValueError, "(3,)"),
        (lambda: masked_lp_distance(A, B, 8.0, MASK, 1), ValueError, "(2, 3)"),
        (lambda: masked_lp_distance(A, B, 8.0, MASK, 0), ValueError, "group_size=0"),
        (lambda: masked_lp_distance(A, B, 8.0, MASK.to("meta")), ValueError, "meta"),
    ],
)
def test_invalid_arguments_are_rejected(call, error: type[Exception], fragment: str) -> None:
    with pytest.raises(error, match=r"^(sort_distance|masked_lp_distance)") as caught:
        call()
    assert fragment in str(caught.value)
