"""Distances by fp16 matrix products, emulated on the CPU, against the definition in float64."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from linflab.models.distance import lp_distance, tensor_cores
from linflab.models.networks.hybrid import LinfDistHybridConfig
from linflab.models.networks.layers import LpDistance, SortDistance
from linflab.models.networks.linf_dist import DistanceNet, LinfDistMLPConfig
from linflab.models.robustness.attacks import AttackConfig, robust_under_attack
from linflab.models.robustness.certification import make_certifier
from linflab.models.robustness.objectives import Batch
from linflab.models.robustness.objectives.adversarial_cross_entropy import AdversarialCrossEntropyConfig

BOUND = 2 * tensor_cores.TOLERANCE  # on the relative error of distances
both_exponents = pytest.mark.parametrize("p", tensor_cores.EXPONENTS)
KINDS = ("normal", "last layer", "constant", "shifted", "magnitudes", "grid", "identical", "zeros", "sparse")


def make_operands(kind: str, batch: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    x, weight = torch.randn(batch, inputs), torch.randn(outputs, inputs)
    if kind == "last layer":  # all differences to some weights are small
        x = weight[torch.arange(batch) % outputs] + 0.5 * x
    elif kind == "constant":  # rounding errors of all inputs are equal
        x, weight = (3 * torch.rand(rows, 1).expand(rows, inputs).contiguous() for rows in (batch, outputs))
    elif kind == "shifted":
        x, weight = 1e3 + x, 1e3 + weight
    elif kind == "magnitudes":
        x, weight = (rows * 10 ** (4 * torch.rand(len(rows), 1) - 2) for rows in (x, weight))
    elif kind == "grid":
        x, weight = x.round(), weight.round()
    elif kind == "identical":
        x, weight = x[:1].expand(batch, inputs).contiguous(), x[:1].expand(outputs, inputs).contiguous()
    elif kind == "zeros":
        x[::2] = 0
        weight[::3] = 0
    elif kind == "sparse":
        weight = weight * (torch.rand_like(weight) < 0.2) * 10
    return x, weight


@st.composite
def operands(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    sizes = (draw(st.sampled_from([1, 2, 5, 17, 40])) for _ in range(3))
    x, weight = make_operands(draw(st.sampled_from(KINDS)), *sizes)
    scale = 10.0 ** draw(st.integers(-20, 20))
    return x * scale, weight * scale * 10.0 ** draw(st.sampled_from([0, 0, 0, -12, 3]))


@contextmanager
def any_share_flagged() -> Iterator[None]:
    """Allow all distances to be flagged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_cores, "MAX_FLAGGED", 1.0)
        yield


def exact(x: Tensor, weight: Tensor, p: int, upstream: Tensor) -> tuple[Tensor, ...]:
    """Distances, and gradients in x and weight, in float64."""
    leaves = [operand.double().detach().requires_grad_() for operand in (x, weight)]
    y = lp_distance(*leaves, p)
    return y.detach(), *torch.autograd.grad(y, leaves, upstream.double())


def relative_errors(value: Tensor, expected: Tensor) -> Tensor:
    return torch.where(expected == 0, value.double().abs(), (value.double() - expected).abs() / expected.abs())


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(value.double() - expected) / torch.linalg.vector_norm(expected))


@both_exponents
@given(case=operands())
def test_distances_are_within_the_bound(p: int, case: tuple[Tensor, Tensor]) -> None:
    with any_share_flagged():
        y, flagged = tensor_cores.forward(*case, p)
    errors = relative_errors(y, lp_distance(*(operand.double() for operand in case), p))
    assert flagged is not None and errors.max() < BOUND
    assert errors[flagged].numel() == 0 or errors[flagged].max() < 1e-5


@both_exponents
@given(case=operands())
def test_gradients_are_within_the_bound(p: int, case: tuple[Tensor, Tensor]) -> None:
    """Relative to a gradient of norm 1 for each output, the l_(p/(p-1)) norm of slopes: errors are below u R^(p-1)."""
    with any_share_flagged():
        y, flagged = tensor_cores.forward(*case, p)
    upstream = torch.randn(y.shape)
    bound = 1.05 * tensor_cores.UNIT_ROUNDOFF * (BOUND / 2 * p / tensor_cores.UNIT_ROUNDOFF) ** ((p - 1) / p)
    gradients = zip(tensor_cores.backward(upstream, *case, y, p, flagged), exact(*case, p, upstream)[1:], strict=True)
    for dim, (gradient, expected) in enumerate(gradients):
        errors = torch.linalg.vector_norm(gradient - expected, dim=1)
        assert (errors <= bound * upstream.abs().sum(dim=1 - dim) + 1e-5).all()


@both_exponents
@given(case=operands(), seed=st.integers(0, 2**32 - 1))
def test_gradients_of_flagged_distances_are_exact(p: int, case: tuple[Tensor, Tensor], seed: int) -> None:
    with any_share_flagged():
        y, flagged = tensor_cores.forward(*case, p)
    assert flagged is not None
    upstream = torch.zeros_like(y)
    upstream[flagged] = torch.randn(len(flagged[0]), generator=torch.Generator().manual_seed(seed))
    found = tensor_cores.backward(upstream, *case, y, p, flagged)
    for gradient, expected in zip(found, exact(*case, p, upstream)[1:], strict=True):
        # relative to a unit slope for each output, since gradients of equal rows cancel
        assert (gradient - expected).abs().max() <= 1e-5 * (1 + upstream.abs().sum())


@both_exponents
@given(case=operands())
def test_result_is_exact_if_many_distances_are_flagged(p: int, case: tuple[Tensor, Tensor]) -> None:
    y, flagged = tensor_cores.forward(*case, p)
    if flagged is None:
        assert torch.equal(y, lp_distance(*case, p))
    else:
        assert len(flagged[0]) <= tensor_cores.MAX_FLAGGED * y.numel()


def trained_operands(p: int) -> list[tuple[Tensor, Tensor]]:
    """Operands of the hidden layers of a small net after some training at this p."""
    torch.manual_seed(0)
    net = LinfDistMLPConfig(depth=3, width=64).build((1, 8, 8), 10, (0.3,), 0.4)
    labels = torch.arange(256) % 10
    images = 0.3 * torch.rand(256, 1, 8, 8) + torch.rand(10, 1, 8, 8)[labels] * 0.7
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.multi_margin_loss(net(images, p), labels, margin=1.0).backward()
        optimizer.step()
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in net.features.distances:
        layer.register_forward_hook(lambda layer, inputs, _: seen.append((inputs[0].flatten(1), layer.weight)))
    net(images, p)
    return [(x.detach(), weight.detach()) for x, weight in seen]


# Limits are about twice the largest measured errors.
@pytest.mark.parametrize(("p", "distances", "gradients"), [(8, 3e-4, 2.5e-3), (12, 6e-4, 8e-3)])
def test_errors_of_normal_and_trained_operands(p: int, distances: float, gradients: float) -> None:
    torch.manual_seed(0)
    normal = [(torch.randn(64, inputs), torch.randn(96, inputs)) for inputs in (64, 300)]
    for x, weight in [*normal, *trained_operands(p)]:
        y, flagged = tensor_cores.forward(x, weight, p)
        assert flagged is not None and len(flagged[0]) < 0.05 * y.numel()
        upstream = torch.randn_like(y)
        expected = exact(x, weight, p, upstream)
        assert relative_error(y, expected[0]) < distances
        for found, right in zip(tensor_cores.backward(upstream, x, weight, y, p, flagged), expected[1:], strict=True):
            assert relative_error(found, right) < gradients


@both_exponents
@pytest.mark.parametrize("slope_range", [tensor_cores.SLOPE_RANGE, 1000])  # one condition or both
def test_distances_that_underflow_in_fp16_are_flagged(
    p: int, slope_range: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_cores, "SLOPE_RANGE", slope_range)
    torch.manual_seed(0)
    x, weight = torch.rand(4, 50), -torch.rand(5, 50)  # no cancellation
    x[0], weight[0] = 1e-3 * x[0], 1e-3 * weight[0]
    _, flagged = tensor_cores.forward(x, weight, p)
    assert flagged is not None
    assert [tuple(place) for place in torch.stack(flagged, dim=1).tolist()] == [(0, 0)]


@both_exponents
@pytest.mark.parametrize("size", [1e-25, 1e-15, 1e15, 1e25])
def test_gradients_follow_upstream_gradients_of_any_size(p: int, size: float) -> None:
    torch.manual_seed(0)
    x, weight, upstream = torch.randn(5, 40), torch.randn(6, 40), torch.randn(5, 6)
    gradients = []
    for factor in (1.0, size):
        leaf = x.clone().requires_grad_()
        tensor_cores.lp_distance(leaf, weight, p).backward(upstream * factor)
        assert leaf.grad is not None
        gradients.append(leaf.grad.double() / factor)
    assert relative_error(gradients[1], gradients[0]) < 1e-2


@both_exponents
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # of the weight
def test_gradients_of_samples_with_upstream_gradients_of_any_size(p: int, scale: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 40), scale * torch.randn(7, 40)
    upstream = torch.randn(6, 7) * torch.tensor([1.0, 1e-3, 1e-6, 1e-10, 1e-15, 0.0])[:, None]
    y, flagged = tensor_cores.forward(x, weight, p)
    found, _ = tensor_cores.backward(upstream, x, weight, y, p, flagged)
    _, expected, _ = exact(x, weight, p, upstream)
    for row, right in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(row - right) <= 1e-2 * torch.linalg.vector_norm(right)


@both_exponents
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("operand", ["x", "weight"])
def test_non_finite_operands_give_the_exact_result(p: int, bad: float, operand: str) -> None:
    torch.manual_seed(0)
    tensors = {"x": torch.randn(20, 60), "weight": torch.randn(30, 60)}
    tensors[operand][0, 3] = bad
    results = []
    for distance in (tensor_cores.lp_distance, lp_distance):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors.values()]
        y = distance(*leaves, p)
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@both_exponents
@pytest.mark.parametrize(("samples", "outputs"), [(0, 4), (2, 0), (0, 0), (1, 1), (1, 5), (5, 1)])
def test_small_and_empty_shapes(p: int, samples: int, outputs: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(samples, 30).requires_grad_(), torch.randn(outputs, 30).requires_grad_()
    y = tensor_cores.lp_distance(x, weight, p)
    y.sum().backward()
    assert y.shape == (samples, outputs)
    torch.testing.assert_close(y, lp_distance(x, weight, p), rtol=BOUND, atol=0)
    for leaf in (x, weight):
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and leaf.grad.isfinite().all()


@both_exponents
@pytest.mark.parametrize("kind", ["normal", "last layer"])
def test_same_bits_again_and_equal_in_any_chunks(p: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight = make_operands(kind, 33, 40, 70)
    upstream = torch.randn(33, 40)

    def compute() -> list[Tensor]:
        with any_share_flagged():
            y, flagged = tensor_cores.forward(x, weight, p)
        assert flagged is not None and (kind == "normal" or len(flagged[0]))
        return [y, *tensor_cores.backward(upstream, x, weight, y, p, flagged)]

    first = compute()
    assert all(torch.equal(one, other) for one, other in zip(first, compute(), strict=True))
    monkeypatch.setattr(tensor_cores, "MAX_FLAGGED_TERMS", 500)
    monkeypatch.setattr(tensor_cores, "MAX_PRODUCT", 1)  # a product per power
    for one, other in zip(first, compute(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_gradients_of_repeated_use_add_up() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 30).requires_grad_(), torch.randn(5, 30).requires_grad_()
    y = tensor_cores.lp_distance(x, weight, 8)
    once = torch.autograd.grad(y.sum(), (x, weight), retain_graph=True)
    twice = torch.autograd.grad(y.sum() + tensor_cores.lp_distance(x, weight, 8).sum(), (x, weight))
    for one, two in zip(once, twice, strict=True):
        torch.testing.assert_close(2 * one, two)


def test_second_gradients_and_transforms_are_exact() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 9).requires_grad_(), torch.randn(5, 9).requires_grad_()
    second = []
    for distance in (tensor_cores.lp_distance, lp_distance):
        (first,) = torch.autograd.grad(distance(x, weight, 8).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), weight)[0])
    assert relative_error(*second) < 2e-2
    jacobians = [torch.func.jacrev(function)(x, weight, 8) for function in (tensor_cores.lp_distance, lp_distance)]
    assert torch.equal(*jacobians)


@pytest.mark.parametrize("p", [1.0, 8.5, 16.0, math.inf])
def test_other_exponents_and_float64_are_exact(p: float) -> None:
    x, weight = torch.randn(4, 30), torch.randn(5, 30)
    assert torch.equal(tensor_cores.lp_distance(x, weight, p), lp_distance(x, weight, p))
    x, weight = x.double(), weight.double()
    assert torch.equal(tensor_cores.lp_distance(x, weight, 8), lp_distance(x, weight, 8))


@pytest.mark.parametrize("weight", [torch.zeros(4, 5), torch.zeros(4, 3, device="meta")])
def test_wrong_arguments(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="lp_distance"):
        tensor_cores.lp_distance(torch.zeros(2, 3), weight, 8)


def build_with_flags(config: LinfDistMLPConfig | LinfDistHybridConfig) -> DistanceNet:
    """A net in training mode all of whose dense distance layers, even the last, would use tensor cores."""
    torch.manual_seed(0)
    net = config.build((1, 6, 6), 4, (0.4,), 0.4)
    for layer in net.modules():
        if isinstance(layer, LpDistance):
            layer.on_tensor_cores = True
    return net


@both_exponents
def test_layers_use_tensor_cores_in_training_mode_only(p: int) -> None:
    torch.manual_seed(0)
    layer, x = LpDistance(40, 30), torch.randn(8, 40)
    expected = lp_distance(x, layer.weight, p)
    assert torch.equal(layer(x, p), expected)
    layer.on_tensor_cores = True
    assert not torch.equal(layer(x, p), expected)
    assert torch.equal(layer.eval()(x, p), expected)
    sort = SortDistance(40, 30, 0.7)
    sort.on_tensor_cores = True
    kept = torch.ones(1, 40, dtype=torch.bool)
    torch.testing.assert_close(sort(x, p, kept), lp_distance(x, sort.weight, p), rtol=1e-6, atol=0)


NETS = [LinfDistMLPConfig(depth=3, width=20), LinfDistHybridConfig(backbone=LinfDistMLPConfig(depth=3, width=20))]


@pytest.mark.parametrize("config", NETS, ids=lambda config: config.kind)
def test_certificates_and_attacks_never_use_tensor_cores(
    config: LinfDistMLPConfig | LinfDistHybridConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal bits with the flag, and no call of the approximate operator, also for surrogate gradients at p = 8."""
    net, images, labels = build_with_flags(config), torch.rand(6, 1, 6, 6), torch.arange(6) % 4
    net(images, 8)  # running means
    plain = copy.deepcopy(net)
    for layer in plain.modules():
        if isinstance(layer, LpDistance):
            layer.on_tensor_cores = False
    net.eval()
    plain.eval()
    labels[:4] = net(images[:4]).argmax(dim=1)
    monkeypatch.setattr(tensor_cores, "forward", None)  # a call now fails
    for kind in ("lipschitz", "ibp") if config.is_lipschitz else ("ibp", "crown"):
        radii = [make_certifier(one, kind).compute_radius(images, labels) for one in (net, plain)]
        assert torch.equal(*radii) and radii[0].max() > 0
    attack = AttackConfig(methods=("pgd", "surrogate_pgd"), steps=3, surrogate_p=8)
    assert torch.equal(
        *(robust_under_attack(one, images, labels, 0.05, attack, torch.Generator()) for one in (net, plain))
    )
    assert torch.equal(net(images, 8), plain(images, 8))


def test_attacks_of_adversarial_training_do_not_use_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = build_with_flags(LinfDistMLPConfig(depth=3, width=20)), torch.rand(6, 1, 6, 6)
    objective, calls, forward = AdversarialCrossEntropyConfig(eps_train=0.1).build(math.nan), [], tensor_cores.forward
    monkeypatch.setattr(tensor_cores, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    objective.loss(net, Batch(images, torch.arange(6) % 4, 8.0, None, 0.0, 0.1, torch.rand_like(images)))
    assert len(calls) == 3  # one per layer, for the loss
