"""SortNet's operators against their definitions in float64: every implementation that this machine can run."""

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
    lp_distance_on_subsets,
    sort_distance,
    sort_distance_bounds,
)
from tests.models.implementations import everywhere, using

SIZES = [1, 2, 3, 4, 5, 8, 12, 16, 17, 70]
ORDERS = st.tuples(st.sampled_from([0.02, 0.3, 0.9]), st.integers(1, 16))
EXPONENTS = st.one_of(st.sampled_from([1.0, 2.0, 8.0, 24.0, 100.5, math.inf]), st.floats(min_value=1, max_value=1000))


def coefficients(q: float, terms: int, inputs: int) -> torch.Tensor:
    c = q * (1 - q) ** torch.arange(min(terms, inputs), dtype=torch.float64)
    return c / c.sum()


def by_definition(x: torch.Tensor, weight: torch.Tensor, q: float, terms: int) -> torch.Tensor:
    """In float64, differentiable; equal terms keep their order. Differences are float32's, for the sake of ties."""
    d = (x[:, None] - weight).abs()
    rounded = (x.detach().float()[:, None] - weight.detach().float()).abs()
    order = rounded.sort(dim=2, descending=True, stable=True).indices
    c = coefficients(q, terms, x.shape[1])
    return d.gather(2, order[..., : len(c)]) @ c


def with_gradients(function, x: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y))]


def assert_near(results: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    for result, right in zip(results, expected, strict=True):
        assert torch.linalg.vector_norm(result.double() - right) <= tolerance * torch.linalg.vector_norm(right)


@st.composite
def operands(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, weights, and gradients of outputs."""
    batch, outputs = (draw(st.sampled_from([1, 2, 5, 9])) for _ in range(2))
    inputs = draw(st.sampled_from(SIZES))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-6, 6))
    x, weight = generator.normal(size=(batch, inputs)), generator.normal(size=(outputs, inputs))
    if draw(st.booleans()):  # on a coarse grid there are many ties, and inputs equal to weights
        x, weight = np.round(x), np.round(weight)
    upstream = generator.normal(size=(batch, outputs))
    return torch.from_numpy(scale * x).float(), torch.from_numpy(scale * weight).float(), torch.from_numpy(upstream)


@everywhere
@given(case=operands(), order=ORDERS)
def test_values_and_gradients(implementation: str, case: tuple[torch.Tensor, ...], order: tuple[float, int]) -> None:
    x, weight, upstream = case
    with using(implementation):
        results = with_gradients(lambda a, b: sort_distance(a, b, *order), x, weight, upstream)
    expected = with_gradients(lambda a, b: by_definition(a, b, *order), x.double(), weight.double(), upstream)
    sizes = with_gradients(lambda a, b: by_definition(a, b, *order), x.double(), weight.double(), upstream.abs())
    for result, right, size in zip(results, expected, sizes, strict=True):  # where slopes cancel, rounding remains
        bound = 1e-5 * (torch.linalg.vector_norm(right) + torch.linalg.vector_norm(size))
        assert torch.linalg.vector_norm(result.double() - right) <= bound


@everywhere
@pytest.mark.parametrize("inputs", [9, 16, 65, 1024, 1100])
def test_wide_layers(implementation: str, inputs: int) -> None:
    torch.manual_seed(0)
    x, weight, upstream = torch.randn(6, inputs), torch.randn(7, inputs), torch.randn(6, 7)
    x[1], weight[2] = x[1].round(), weight[2].round()
    with using(implementation):
        results = with_gradients(lambda a, b: sort_distance(a, b, 0.3), x, weight, upstream)
    expected = with_gradients(lambda a, b: by_definition(a, b, 0.3, 10), x.double(), weight.double(), upstream)
    assert_near(results, expected)


@everywhere
@pytest.mark.parametrize("inputs", [4, 40, 1000])
def test_of_equal_terms_the_first_are_the_largest(implementation: str, inputs: int) -> None:
    x, weight = torch.full((3, inputs), -2.0), torch.zeros(5, inputs)
    x[1, -1], x[2] = 3.0, 0.0
    with using(implementation):
        y, grad_x, grad_weight = with_gradients(
            lambda a, b: sort_distance(a, b, 0.3, 6), x, weight, torch.tensor([[1.0], [0.0], [1.0]]).expand(3, 5)
        )
        grad_of_other = with_gradients(lambda a, b: sort_distance(a, b, 0.3, 6), x[1:2], weight[:1], torch.ones(1, 1))[
            1
        ]
    c = coefficients(0.3, 6, inputs)
    torch.testing.assert_close(y[:, 0], torch.tensor([2.0, 2.0 + float(c[0]), 0.0]))
    expected = torch.zeros(inputs, dtype=torch.float64)
    expected[: len(c)] = -c
    torch.testing.assert_close(grad_x[0].double(), 5 * expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad_weight[3].double(), -expected, rtol=1e-6, atol=0)
    assert not grad_x[2].any()  # inputs equal to weights
    expected.zero_()
    expected[: len(c) - 1], expected[-1] = -c[1:], c[0]
    torch.testing.assert_close(grad_of_other[0].double(), expected, rtol=1e-6, atol=0)


@everywhere
@given(case=operands())
def test_q_one_is_the_linf_distance(implementation: str, case: tuple[torch.Tensor, ...]) -> None:
    x, weight, upstream = case
    with using(implementation):
        results = with_gradients(lambda a, b: sort_distance(a, b, 1.0), x, weight, upstream)
        expected = with_gradients(lp_distance, x, weight, upstream)
        bounds = sort_distance_bounds(x - 1, x + 1, weight, 1.0)
        expected_bounds = linf_distance_bounds(x - 1, x + 1, weight)
    for result, right in zip([*results, *bounds], [*expected, *expected_bounds], strict=True):
        assert torch.equal(result, right)


@everywhere
@given(case=operands(), order=ORDERS, radius=st.sampled_from([0.0, 0.1, 3.0]), seed=st.integers(0, 2**32 - 1))
def test_bounds_are_the_exact_range(
    implementation: str, case: tuple[torch.Tensor, ...], order: tuple[float, int], radius: float, seed: int
) -> None:
    x, weight, _ = case
    generator = torch.Generator().manual_seed(seed)
    reach = radius * x.abs().amax() * torch.rand(x.shape, generator=generator)
    lower, upper = x - reach, x + reach
    with using(implementation):
        low, high = (bound.double() for bound in sort_distance_bounds(lower, upper, weight, *order))
    lower, upper, weight = lower.double(), upper.double(), weight.double()
    slack = 1e-5 * high + 1e-30
    for b in range(len(x)):
        for o, centre in enumerate(weight):  # both ends are taken on: next to the weight, and at the farthest corner
            nearest = centre.clamp(lower[b], upper[b])
            farthest = torch.where((upper[b] - centre).abs() > (lower[b] - centre).abs(), upper[b], lower[b])
            ends = by_definition(torch.stack([nearest, farthest]), centre[None], *order)[:, 0]
            assert abs(ends[0] - low[b, o]) <= slack[b, o] and abs(ends[1] - high[b, o]) <= slack[b, o]
    for _ in range(5):
        corner = torch.where(torch.rand(x.shape, generator=generator) < 0.5, lower, upper)
        y = by_definition(corner, weight, *order)
        assert (y >= low - slack).all() and (y <= high + slack).all()


def restricted(x: torch.Tensor, weight: torch.Tensor, p: float, kept: torch.Tensor, group: int) -> torch.Tensor:
    """The distance of each group by itself."""
    parts = []
    for number, row in enumerate(kept):
        of_x, of_weight = x[number * group : (number + 1) * group][:, row], weight[:, row]
        parts.append(lp_distance(of_x, of_weight, p) if row.any() else of_x.sum(1)[:, None] + of_weight.sum(1))
    return torch.cat(parts)


@everywhere
@given(
    case=operands(),
    p=EXPONENTS,
    group=st.sampled_from([1, 2, 4, 32]),
    share=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_subsets(
    implementation: str, case: tuple[torch.Tensor, ...], p: float, group: int, share: float, seed: int
) -> None:
    x, weight, upstream = case
    kept = torch.rand(-(-len(x) // group), x.shape[1], generator=torch.Generator().manual_seed(seed)) < share
    with using(implementation):
        results = with_gradients(lambda a, b: lp_distance_on_subsets(a, b, p, kept, group), x, weight, upstream)
        alike = with_gradients(lambda a, b: restricted(a, b, p, kept, group), x, weight, upstream)
        sizes = with_gradients(lambda a, b: restricted(a, b, p, kept, group), x, weight, upstream.abs())
    tolerance = 1e-5 + (0 if math.isinf(p) else p * 2**-21)
    for result, right, size in zip(results, alike, sizes, strict=True):
        bound = tolerance * (torch.linalg.vector_norm(right) + torch.linalg.vector_norm(size))
        assert torch.linalg.vector_norm(result - right) <= bound
    if math.isinf(p):
        assert torch.equal(results[0], alike[0])


@everywhere
@pytest.mark.parametrize("p", [1.0, 8.0, 9.7, 24.0, 64.0, 100.5, math.inf])
def test_subsets_of_wide_layers(implementation: str, p: float) -> None:
    torch.manual_seed(0)
    x, weight, upstream = torch.rand(70, 700), torch.randn(40, 700), torch.randn(70, 40)
    x[3] *= 1e15  # powers of such distances leave the range of floats
    x[66, 6] = math.nan
    kept = torch.rand(3, 700) < 0.4
    kept[1], kept[2, 6] = False, False
    with using(implementation):
        results = with_gradients(lambda a, b: lp_distance_on_subsets(a, b, p, kept), x, weight, upstream)
    doubles = x.double(), weight.double()
    expected = with_gradients(lambda a, b: restricted(a, b, p, kept, 32), *doubles, upstream)
    for result, right in zip(results, expected, strict=True):
        error = torch.linalg.vector_norm(result.double() - right, dim=1)
        assert (error <= 2e-4 * torch.linalg.vector_norm(right, dim=1)).all()
    assert not results[0][32:64].any() and not results[1][32:64].any()
    everything = torch.ones(1, 700, dtype=torch.bool)
    x[66, 6] = 0.0
    with using(implementation):
        results = with_gradients(lambda a, b: lp_distance_on_subsets(a, b, p, everything, 70), x, weight, upstream)
        expected = with_gradients(lambda a, b: lp_distance(a, b, p), x, weight, upstream)
    assert_near(results, [t.double() for t in expected], 1e-5 + (0 if math.isinf(p) else p * 2**-22))


@everywhere
@pytest.mark.parametrize("terms", range(1, 17))
def test_every_number_of_terms(implementation: str, terms: int) -> None:
    """With as many inputs as terms, a few more, and many; the bounds of a point are its value."""
    torch.manual_seed(terms)
    for inputs in (terms, terms + 1, terms + 3, 200):
        x, weight = torch.randn(9, inputs), torch.randn(7, inputs)
        expected = by_definition(x.double(), weight.double(), 0.4, terms)
        with using(implementation):
            torch.testing.assert_close(sort_distance(x, weight, 0.4, terms).double(), expected, rtol=1e-6, atol=1e-6)
            for bound in sort_distance_bounds(x, x.clone(), weight, 0.4, terms):
                torch.testing.assert_close(bound.double(), expected, rtol=1e-6, atol=1e-6)


@everywhere
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_input_gives_non_finite_output(implementation: str, bad: float) -> None:
    x, weight = torch.randn(2, 60), torch.randn(3, 60)
    x[0, 3] = bad
    kept = torch.ones(1, 60, dtype=torch.bool)
    for function in (
        lambda a, b: sort_distance(a, b, 0.3),
        lambda a, b: lp_distance_on_subsets(a, b, 8.0, kept),
        lambda a, b: lp_distance_on_subsets(a, b, math.inf, kept),
    ):
        with using(implementation):
            y = with_gradients(function, x, weight, torch.ones(2, 3))[0]  # whatever the gradients are, they end
        assert not y[0].isfinite().any()
    with using(implementation):
        assert sort_distance(x, weight, 0.3)[1].isfinite().all()
        for bound in sort_distance_bounds(x, x.clone(), weight, 0.3):
            assert not bound[0].isfinite().any() and bound[1].isfinite().all()


@everywhere
@pytest.mark.parametrize(("samples", "outputs"), [(0, 4), (2, 0), (0, 0)])
def test_nothing_in_nothing_out(implementation: str, samples: int, outputs: int) -> None:
    x, weight = torch.zeros(samples, 3), torch.zeros(outputs, 3)
    kept = torch.ones(min(samples, 1), 3, dtype=torch.bool)
    with using(implementation):
        bounds = sort_distance_bounds(x, x, weight, 0.3)
        for function in (
            lambda a, b: sort_distance(a, b, 0.3),
            lambda a, b: lp_distance_on_subsets(a, b, 8.0, kept),
            lambda a, b: lp_distance_on_subsets(a, b, math.inf, kept),
        ):
            y, *gradients = with_gradients(function, x, weight, torch.zeros(samples, outputs))
            assert y.shape == bounds[0].shape == bounds[1].shape == (samples, outputs)
            assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("shape", [(33, 70, 1100), (300, 5, 800)])
def test_same_bits_on_any_number_of_threads(shape: tuple[int, int, int]) -> None:
    batch, outputs, inputs = shape
    torch.manual_seed(0)
    x, weight, upstream = torch.randn(batch, inputs), torch.randn(outputs, inputs), torch.randn(batch, outputs)
    kept = torch.rand(-(-batch // 32), inputs) < 0.4
    results: list[list[torch.Tensor]] = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(lambda a, b: sort_distance(a, b, 0.3), x, weight, upstream))
            results[-1] += sort_distance_bounds(x, x + 0.1, weight, 0.3)
            for p in (8.0, 9.7, 100.5, math.inf):
                results[-1] += with_gradients(
                    lambda a, b, p=p: lp_distance_on_subsets(a, b, p, kept), x, weight, upstream
                )
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(results[0] * 2, results[1] + results[2], strict=True):
        assert torch.equal(one, other)


def test_float64() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 12, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64)
    kept = torch.rand(3, 12) < 0.5
    leaves = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: sort_distance(a, b, 0.3, 5), leaves)
    for p in (3.5, math.inf):
        assert torch.autograd.gradcheck(lambda a, b, p=p: lp_distance_on_subsets(a, b, p, kept, 2), leaves)


def test_the_mean_over_subsets_is_sortnets_neuron() -> None:
    torch.manual_seed(0)
    x, weight, q = torch.rand(1, 16), torch.randn(3, 16), 0.4
    kept = torch.rand(20000, 16) < q
    kept = kept[kept.any(dim=1)]
    y = lp_distance_on_subsets(x.expand(len(kept), 16), weight, math.inf, kept, 1).mean(dim=0)
    torch.testing.assert_close(y, sort_distance(x, weight, q, 16)[0], rtol=0.01, atol=0)


@settings(max_examples=5)
@given(q=st.sampled_from([0.3, 0.9]), p=st.sampled_from([8.0, 100.5, math.inf]))
def test_custom_ops_keep_the_rules_of_torch_library(q: float, p: float) -> None:
    x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    kept, upstream = torch.rand(3, 7) < 0.5, torch.randn(5, 3)
    ops, box = torch.ops.linflab, (x.detach(), x.detach() + 1, weight.detach())
    library.opcheck(ops.sort_distance.default, (x, weight, q, 4))
    library.opcheck(ops.lp_distance_on_subsets.default, (x, weight, p, kept, 2))
    library.opcheck(ops.sort_distance_bounds.default, (*box, q, 4))
    only = ("test_schema", "test_faketensor")
    x, weight = x.detach().t().contiguous().t(), weight.detach()
    library.opcheck(ops.sort_distance_backward.default, (upstream, x, weight, q, 4), test_utils=only)
    y = lp_distance_on_subsets(x, weight, p, kept, 2)
    arguments = (upstream, x, weight, y, p, kept, 2)
    library.opcheck(ops.lp_distance_on_subsets_backward.default, arguments, test_utils=only)


def test_second_gradients_are_refused() -> None:
    x, weight = torch.rand(2, 3, requires_grad=True), torch.rand(4, 3)
    for function in (
        lambda: sort_distance(x, weight, 0.3),
        lambda: lp_distance_on_subsets(x, weight, 3.0, torch.ones(1, 3, dtype=torch.bool)),
    ):
        (gradient,) = torch.autograd.grad(function().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once"):
            (gradient**2).sum().backward()


A, B = torch.zeros(2, 3), torch.zeros(4, 3)
KEPT = torch.ones(1, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: sort_distance(A, torch.zeros(4, 5), 0.3), ValueError, "(2, 3) and (4, 5)"),
        (lambda: sort_distance(A, B.double(), 0.3), TypeError, "float64"),
        (lambda: sort_distance(A, B, 0.0), ValueError, "q = 0.0"),
        (lambda: sort_distance(A, B, 1.5), ValueError, "q = 1.5"),
        (lambda: sort_distance(A, B, math.nan), ValueError, "q = nan"),
        (lambda: sort_distance(A, B, 0.3, 0), ValueError, "got 0"),
        (lambda: sort_distance(A, B, 0.3, 17), ValueError, "1 to 16"),
        (lambda: sort_distance_bounds(A, A[:1], B, 0.3), ValueError, "one shape"),
        (lambda: sort_distance_bounds(A, A, B, -1.0), ValueError, "q = -1.0"),
        (lambda: sort_distance_bounds(A, A, B.to("meta"), 0.3), ValueError, "meta"),
        (lambda: lp_distance_on_subsets(A, B, 0.5, KEPT), ValueError, "p = 0.5"),
        (lambda: lp_distance_on_subsets(A, B, 8.0, KEPT.float()), TypeError, "float32"),
        (lambda: lp_distance_on_subsets(A, B, 8.0, KEPT[0]), ValueError, "(3,)"),
        (lambda: lp_distance_on_subsets(A, B, 8.0, KEPT, 1), ValueError, "(2, 3)"),
        (lambda: lp_distance_on_subsets(A, B, 8.0, KEPT, 0), ValueError, "group = 0"),
        (lambda: lp_distance_on_subsets(A, B, 8.0, KEPT.to("meta")), ValueError, "meta"),
    ],
)
def test_wrong_arguments(call, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=r"^(sort_distance|lp_distance_on_subsets)") as caught:
        call()
    assert says in str(caught.value)
