"""Tests that forward mode, transforms and second derivatives of the distance operators match float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian

from linflab.models.distance import (
    derivatives,
    lp_distance,
    lp_distance_conv2d,
    masked_lp_distance,
    sort_distance,
)
from linflab.models.networks.hybrid import LinfDistHybridConfig
from linflab.models.networks.layers import LpDistanceConv2d
from linflab.models.networks.linf_dist import LinfDistConvNetConfig
from linflab.models.networks.sort_net import SortNetConfig
from tests.models.backends import BACKENDS, use_backend

Operator = Callable[[Tensor, Tensor], Tensor]
MASKS = torch.tensor([[True, False, True, True, True], [False, True, True, False, True]])
OPERATORS: dict[str, Operator] = {
    **{f"lp {p:g}": lambda x, w, p=p: lp_distance(x, w, p) for p in (1.0, 2.0, 9.7, math.inf)},
    **{
        f"subsets {p:g}": lambda x, w, p=p: masked_lp_distance(x, w, p, MASKS, group_size=2)
        for p in (1.0, 2.0, 9.7, math.inf)
    },
    **{f"conv {p:g}": lambda x, w, p=p: lp_distance_conv2d(x, w, p, 2, 1) for p in (1.0, 2.0, 9.7, math.inf)},
    "sort": lambda x, w: sort_distance(x, w, 0.6, 3),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)
every_computation = pytest.mark.parametrize(  # PyTorch, and the fastest kernels available
    ("backend", "dtype"),
    [("reference", torch.float64), *((one, torch.float32) for one in dict.fromkeys(BACKENDS[:2]))],
)


def make_operands(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    shapes = ((1, 2, 3, 4), (3, 2, 3, 3)) if name.startswith("conv") else ((3, 5), (4, 5))
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x.to(dtype), weight.to(dtype)


@every_operator
def test_all_modes_agree_with_finite_differences(name: str) -> None:
    """Check forward and reverse mode, batched and not, then forward over reverse and reverse over reverse."""
    leaves = [leaf.requires_grad_() for leaf in make_operands(name, torch.float64)]
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(OPERATORS[name], leaves, check_forward_ad=True, **batched)
    assert torch.autograd.gradgradcheck(OPERATORS[name], leaves, check_fwd_over_rev=True, check_batched_grad=True)


def compute_tangent(function: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        output_tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
    assert output_tangent is not None
    return output_tangent


def compute_penalized_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of a loss with a penalty on the norm of its gradient."""
    leaf = x.detach().requires_grad_()
    loss = function(leaf).square().sum()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return torch.autograd.grad(loss + 10 * (gradient.norm() - 1) ** 2, leaf)[0]


@every_computation
@every_operator
def test_transforms_match_float64_in_every_dtype(backend: str, dtype: torch.dtype, name: str) -> None:
    operator, (x, weight) = OPERATORS[name], make_operands(name, torch.float64)
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def with_weight(w: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda a: operator(a, w)

    def loss(w: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda a: operator(a, w).square().sum()

    exact = jacobian(with_weight(weight), x)  # from first derivatives, tested elsewhere
    directional = (exact * tangent).flatten(-x.dim()).sum(dim=-1)
    (first,) = torch.autograd.functional.vjp(loss(weight), x)[1:]
    second = hessian(loss(weight), x)
    a, w, t = x.to(dtype), weight.to(dtype), tangent.to(dtype)
    results = {}
    with use_backend(backend):
        results["jvp"] = torch.func.jvp(with_weight(w), (a,), (t,))[1], directional
        results["forward_ad"] = compute_tangent(with_weight(w), a, t), directional
        results["jacfwd"] = torch.func.jacfwd(with_weight(w))(a), exact
        results["jacrev"] = torch.func.jacrev(with_weight(w))(a), exact
        results["vjp"] = (
            torch.func.vjp(with_weight(w), a)[1](torch.ones_like(directional, dtype=dtype))[0],
            exact.sum(dim=tuple(range(directional.dim()))),
        )
        results["grad"] = torch.func.grad(loss(w))(a), first
        results["vectorized"] = jacobian(with_weight(w), a, vectorize=True), exact
        results["forward vectorized"] = jacobian(with_weight(w), a, vectorize=True, strategy="forward-mode"), exact
        results["vmap"] = torch.vmap(with_weight(w))(torch.stack([a, 2 * a]))[0], operator(x, weight)
        results["vmap of weights"] = (
            torch.vmap(lambda b: operator(a, b))(torch.stack([2 * w, w]))[1],
            operator(x, weight),
        )
        per_sample = torch.vmap(torch.func.grad(loss(w)))(torch.stack([a, a]))
        results["vmap of grad"] = per_sample[1], first
        results["hessian"] = torch.func.hessian(loss(w))(a), second
        results["reverse over reverse"] = torch.func.jacrev(torch.func.jacrev(loss(w)))(a), second
        results["double backward"] = hessian(loss(w), a), second
        results["penalty"] = (
            compute_penalized_gradient(with_weight(w), a),
            compute_penalized_gradient(with_weight(weight), x),
        )
    for transform, (value, expected) in results.items():
        assert value.dtype == dtype, transform
        size = expected.abs().max().item()
        tolerance = 2e-3 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(
            value.double(),
            expected,
            rtol=0,
            atol=tolerance * max(size, 1),
            msg=lambda text, t=transform: f"{t}: {text}",
        )


@every_computation
@every_operator
def test_gradients_are_bitwise_equal_with_create_graph(backend: str, dtype: torch.dtype, name: str) -> None:
    leaves = [leaf.requires_grad_() for leaf in make_operands(name, dtype)]
    with use_backend(backend):
        y = OPERATORS[name](*leaves).square().sum()
        with_graph = torch.autograd.grad(y, leaves, create_graph=True)
        without_graph = torch.autograd.grad(y, leaves)
        (weight_gradient,) = torch.autograd.grad(
            OPERATORS[name](leaves[0].detach(), leaves[1]).square().sum(), leaves[1:]
        )
    assert all(torch.equal(*pair) for pair in zip(without_graph, with_graph, strict=True)) and torch.equal(
        weight_gradient, without_graph[1]
    )
    assert all(gradient.requires_grad for gradient in with_graph)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_operator
def test_tangents_of_upstream_gradients_are_propagated(dtype: torch.dtype, name: str) -> None:
    """The forward pass is outside the dual level. Gradients are linear in the upstream gradients."""
    leaves = [leaf.requires_grad_() for leaf in make_operands(name, dtype)]
    y = OPERATORS[name](*leaves)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.zeros_like(y), torch.ones_like(y))
        tangents = [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(y, leaves, upstream)]
    expected = torch.autograd.grad(OPERATORS[name](*leaves).sum(), leaves)
    for tangent, gradient in zip(tangents, expected, strict=True):
        torch.testing.assert_close(tangent, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 8.0, 9.7, math.inf])
def test_derivatives_are_finite_when_inputs_equal_weights(p: float) -> None:
    x = torch.randn(3, 5)
    weight = torch.cat([x[:1], torch.randn(2, 5)])
    weight[1, 2] = x[1, 2]
    tangents = torch.func.jvp(lambda a: lp_distance(a, weight, p), (x,), (torch.randn(3, 5),))[1]
    assert tangents[0, 0] == 0 and tangents.isfinite().all()
    assert compute_penalized_gradient(lambda a: lp_distance(a, weight, p), x).isfinite().all()
    assert torch.func.hessian(lambda a: lp_distance(a, weight, p).sum())(x).isfinite().all()


def test_euclidean_hessian_is_exact_at_a_zero_difference() -> None:
    x, weight = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    diagonal = torch.func.hessian(lambda a: lp_distance(a, weight, 2.0).sum())(x)[0, :, 0]
    torch.testing.assert_close(diagonal, torch.tensor([[0.0, 0.0], [0.0, 0.5]]))


def test_third_derivatives_match_finite_differences() -> None:
    x, weight = make_operands("lp 2", torch.float64)

    def second(a: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(lp_distance(a, weight, 9.7).sum(), a, create_graph=True)
        return torch.autograd.grad(first.square().sum(), a, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, x.requires_grad_())


@pytest.mark.parametrize("batch", [0, 40])
def test_tangents_are_independent_of_the_tile_size(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(batch, 7), torch.randn(9, 7)
    expected = torch.func.jvp(lambda a: lp_distance(a, weight, 3.0), (x,), (x,))
    monkeypatch.setattr(derivatives, "MAX_TILE_TERMS", 50)
    for tiled, whole in zip(torch.func.jvp(lambda a: lp_distance(a, weight, 3.0), (x,), (x,)), expected, strict=True):
        assert tiled.shape == (batch, 9)
        torch.testing.assert_close(tiled, whole)


@pytest.mark.parametrize(
    "config",
    [
        LinfDistConvNetConfig(width=2, hidden_size=6),
        SortNetConfig(depth=3, width=8),
        LinfDistHybridConfig(backbone=SortNetConfig(depth=3, width=8), hidden_size=4),
    ],
    ids=lambda config: config.kind,
)
def test_network_jacobians_agree_in_both_modes(config: object) -> None:
    torch.manual_seed(0)
    network = config.build((1, 4, 4), 3).eval()
    image = torch.rand(1, 1, 4, 4)
    expected = jacobian(network, image)
    assert expected.abs().max() > 0
    for mode in (torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(mode(network)(image), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_operator
def test_compiled_transforms_match_eager(dtype: torch.dtype, name: str) -> None:
    operator, (x, weight) = OPERATORS[name], make_operands(name, dtype)

    def transform_all(a: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        tangent = torch.func.jvp(lambda b: operator(b, w), (a,), (t,))[1]
        gradient = torch.func.grad(lambda b: operator(b, w).square().sum())(a)
        batched = torch.vmap(lambda b: operator(b, w))(torch.stack([a, t]))
        return operator(a, w), tangent, gradient, batched

    torch.compiler.reset()
    compiled = torch.compile(transform_all, backend="aot_eager")(x, weight, 2 * x)
    for value, expected in zip(compiled, transform_all(x, weight, 2 * x), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_mode_of_exported_convolutions_is_rejected(dtype: torch.dtype) -> None:
    """Exported graphs call the ops directly, whose tangents would be zero."""
    layer, images = LpDistanceConv2d(1, 2).to(dtype), torch.randn(1, 1, 4, 4, dtype=dtype)
    exported = torch.export.export(layer, (images,)).module()
    torch.testing.assert_close(exported(images), layer(images))
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(exported, (images,), (images,))
    assert compute_tangent(layer, images, images).abs().max() > 0
