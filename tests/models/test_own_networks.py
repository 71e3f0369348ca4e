"""Tests of users' own networks: bounds are sound, and errors name unsupported operations."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from linflab.models.networks.layers import LpDistance, SortDistance
from linflab.models.robustness.bounds.affine import Affine, affine_map
from linflab.models.robustness.bounds.alpha_crown import alpha_crown_margins
from linflab.models.robustness.bounds.boxes import Box, perturbation_box
from linflab.models.robustness.bounds.coefficients import PatchCoefficients
from linflab.models.robustness.bounds.ibp import trace_and_check
from linflab.models.robustness.bounds.linear_bounds import LinearBounds
from linflab.models.robustness.bounds.pooling import get_pooling, maximum_lines
from linflab.models.robustness.bounds.relaxations import LinearRelaxation, RelaxationKind, relax
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.bounds.rules import propagate_layer
from linflab.models.robustness.bounds.steps import Scale
from linflab.models.robustness.bounds.worst_case import WorstCaseBounds
from linflab.models.robustness.certification import certify
from linflab.models.robustness.margins import cross_entropy_from_differences, logit_differences
from linflab.models.robustness.objectives import BoundMethod
from tests.models.own_networks import BODIES, CLASSES, IDIOMS, LAYERS, SHAPE, build_own_network
from tests.models.real_arithmetic import crown_bounds, crown_logit_differences, ibp_bounds, ibp_logit_differences

every_idiom = pytest.mark.parametrize(("body", "preprocess"), IDIOMS, ids=lambda name: name.replace(" ", "_"))


@pytest.fixture(autouse=True)
def _use_strict_float32() -> Iterator[None]:
    with strict_float32():
        yield


def sample_points(box: Box, count: int) -> Iterator[Tensor]:
    for k in range(count):
        fraction = torch.rand_like(box.lower)
        fraction = fraction.round() if k % 2 else fraction
        yield torch.minimum(torch.maximum(torch.lerp(box.lower, box.upper, fraction), box.lower), box.upper)


@every_idiom
def test_bounds_are_sound_for_every_idiom(body: str, preprocess: str) -> None:
    """Bounds contain sampled outputs, in float32 if they are sound. At eps = 0, they equal the output."""
    for dtype in (torch.float64, torch.float32):
        net = build_own_network(body, preprocess).to(dtype)
        images, labels = torch.rand(3, *SHAPE, dtype=dtype), torch.randint(CLASSES, (3,))
        sound = dtype == torch.float32
        with torch.no_grad():
            for eps in (0.0, 1e-7, 0.03, 0.4) if sound else (0.0, 0.1):
                box = perturbation_box(images, eps)
                bounds = [ibp_bounds(net, box, sound=sound), crown_bounds(net, box, "crown", sound=sound)]
                bounds.append(crown_bounds(net, box, "ibp", sound=sound))
                differences = [
                    ibp_logit_differences(net, box, labels, sound=sound),
                    crown_logit_differences(net, box, labels, sound=sound),
                ]
                slack = 0.0 if sound else 1e-9
                for point in sample_points(box, 12):
                    logits = net(point.clone()).double()
                    for lower, upper in bounds:
                        assert (logits >= lower - slack).all() and (logits <= upper + slack).all()
                    for difference in differences:
                        assert (logit_differences(logits, labels) <= difference + slack).all()
                if eps == 0.0:
                    tolerance = 2e-3 if sound else 1e-6
                    for lower, upper in bounds:
                        torch.testing.assert_close(lower.to(dtype), net(images.clone()), rtol=tolerance, atol=tolerance)
                        torch.testing.assert_close(upper.to(dtype), net(images.clone()), rtol=tolerance, atol=tolerance)


@every_idiom
def test_training_bounds_equal_certification_bounds(body: str, preprocess: str) -> None:
    """Parameters with gradients of the clean loss have finite gradients of the worst-case loss."""
    net = build_own_network(body, preprocess).double()
    images, labels = torch.rand(3, *SHAPE, dtype=torch.float64), torch.randint(CLASSES, (3,))
    box = perturbation_box(images, 0.03)
    bounds: dict[BoundMethod, Callable[[], Tensor]] = {
        "ibp": lambda: ibp_logit_differences(net, box, labels),
        "crown_ibp": lambda: crown_logit_differences(net, box, labels, "ibp"),
        "dual": lambda: crown_logit_differences(net, box, labels, relaxation="parallel"),
        "hybrid_zonotope": lambda: crown_logit_differences(net, box, labels, relaxation="box"),
    }
    clean_logits = net(images.clone())
    cross_entropy_from_differences(clean_logits, labels).mean().backward()
    with_gradients = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    for bound, expected in bounds.items():
        net.zero_grad()
        worst = WorstCaseBounds(net, bound)(images, labels, 0.03, math.inf)
        torch.testing.assert_close(worst.logits, clean_logits)
        with torch.no_grad():
            torch.testing.assert_close(worst.logit_difference_bounds, expected())
        (
            cross_entropy_from_differences(worst.logit_difference_bounds, labels).mean() + worst.logits.square().mean()
        ).backward()
        for name, parameter in net.named_parameters():
            if name in with_gradients:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        for point in sample_points(box, 10):
            assert (logit_differences(net(point.clone()), labels) <= worst.logit_difference_bounds + 1e-9).all()
    assert WorstCaseBounds(net, "crown_ibp_fused")(images, labels, 0.03, math.inf).loss_upper_bound.isfinite().all()
    assert (
        WorstCaseBounds(net)(images, labels, 0.03, math.inf, with_regularization=True)
        .logit_difference_bounds.isfinite()
        .any()
    )


def test_worst_case_bounds_follow_changed_constants() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor, self.layer, self.gain = 1.0, nn.Linear(72, CLASSES), nn.Parameter(torch.ones(CLASSES))

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images.flatten(1)).relu() * self.factor * self.gain.exp()

    torch.manual_seed(0)
    net = Changing()
    bounds, images, labels = WorstCaseBounds(net), torch.rand(3, *SHAPE), torch.tensor([0, 1, 2])
    for factor in (1.0, 3.0):
        net.factor = factor
        with torch.no_grad():
            net.gain += 0.1
        worst = bounds(images, labels, 0.0, math.inf)
        torch.testing.assert_close(worst.logits, net(images))
        torch.testing.assert_close(worst.logit_difference_bounds, logit_differences(net(images), labels))


@pytest.mark.parametrize("bound", ["ibp", "crown_ibp", "dual"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_batch_norm_uses_statistics_of_the_images(
    bound: BoundMethod, affine: bool, momentum: float | None
) -> None:
    """Compare with a frozen copy that has the statistics of the batch, and with PyTorch's updates."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3, affine=affine, momentum=momentum),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 6),
        nn.BatchNorm1d(6, affine=affine, momentum=momentum, track_running_stats=bound != "dual"),
        nn.ReLU(),
        nn.Linear(6, CLASSES),
    ).double()
    images, labels = torch.rand(5, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    reference, frozen_net = copy.deepcopy(net), copy.deepcopy(net)
    worst = WorstCaseBounds(net, bound)(images, labels, 0.03, math.inf)
    assert all(module.training for module in net.modules())
    torch.testing.assert_close(worst.logits, reference(images))
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(net.get_buffer(name), buffer)
    x = images
    with torch.no_grad():
        for k, layer in enumerate(frozen_net):
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                frozen = type(layer)(layer.num_features, affine=False).double()
                dims = [d for d in range(x.dim()) if d != 1]
                frozen.running_mean.copy_(x.mean(dim=dims))
                frozen.running_var.copy_(x.var(dim=dims, unbiased=False))
                frozen_net[k] = layer = frozen.eval()
            x = layer(x)
    torch.testing.assert_close(
        worst.logit_difference_bounds,
        WorstCaseBounds(frozen_net.eval(), bound)(images, labels, 0.03, 1.0).logit_difference_bounds,
    )


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.Dropout2d(0.5)])
@pytest.mark.parametrize("bound", ["ibp", "crown_ibp", "dual", "hybrid_zonotope"])
def test_training_dropout_shares_masks_of_bounds_and_logits(layer: nn.Module, bound: BoundMethod) -> None:
    """All points of the box share one mask, so at eps = 0 the bounds equal the logits of the step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), layer, nn.Conv2d(4, 2, 2), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(18, CLASSES))
    images, labels = torch.rand(6, *SHAPE), torch.randint(CLASSES, (6,))
    first, second = (WorstCaseBounds(net, bound)(images, labels, 0.0, math.inf) for _ in range(2))
    torch.testing.assert_close(
        first.logit_difference_bounds, logit_differences(first.logits, labels), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(first.logits, second.logits)
    torch.manual_seed(7)
    worst = WorstCaseBounds(net, bound)(images, labels, 0.05, math.inf)
    for point in sample_points(perturbation_box(images, 0.05), 10):
        torch.manual_seed(7)
        assert (logit_differences(net(point), labels) <= worst.logit_difference_bounds + 1e-4).all()
    assert (worst.logit_difference_bounds > logit_differences(worst.logits, labels)).any()


def test_functional_dropout_is_supported_only_in_training() -> None:
    class Dropping(nn.Module):
        def __init__(self, always: bool) -> None:
            super().__init__()
            self.always, self.layer = always, nn.Linear(72, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(functional.dropout(images.flatten(1), 0.5, self.always or self.training))

    images, labels = torch.rand(6, *SHAPE), torch.randint(CLASSES, (6,))
    net = Dropping(False)
    bounds = WorstCaseBounds(net)
    first, second = (bounds(images, labels, 0.0, math.inf) for _ in range(2))
    assert not torch.allclose(first.logits, second.logits)
    torch.testing.assert_close(
        first.logit_difference_bounds, logit_differences(first.logits, labels), rtol=1e-4, atol=1e-5
    )
    net.eval()
    torch.testing.assert_close(bounds(images, labels, 0.0, math.inf).logits, net(images))
    with pytest.raises(TypeError, match="dropout"):
        ibp_bounds(Dropping(True).eval(), perturbation_box(images, 0.1))


POOLINGS = [
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d((2, 3), (1, 2), (0, 1)),
    nn.MaxPool2d(2, 1, 1, dilation=3),
    nn.MaxPool2d(4, ceil_mode=True),
    nn.AdaptiveMaxPool2d((3, 2)),
]


@pytest.mark.parametrize("layer", POOLINGS, ids=str)
@pytest.mark.parametrize("relaxation", ["adaptive", "parallel", "box"])
@pytest.mark.parametrize("sound", [False, True])
def test_max_pooling_relaxation_is_sound_and_within_ibp(
    layer: nn.Module, relaxation: RelaxationKind, sound: bool
) -> None:
    torch.manual_seed(0)
    center, width = torch.randn(40, 2, 6, 6).double(), torch.rand(40, 1, 1, 1).double() * 2
    box = Box(center - width * torch.rand_like(center), center + width * torch.rand_like(center))
    pooling = get_pooling(layer, torch.Size(SHAPE))
    assert pooling is not None
    relaxed = maximum_lines(pooling, box, relaxation, sound)

    def evaluate(factors: Tensor, x: Tensor) -> Tensor:
        """Return sums of factors times values, by a loop over the positions of windows."""
        (height, columns), window, found = pooling.size, pooling.window, torch.zeros_like(layer(x))
        for row in range(found.shape[2]):
            for column in range(found.shape[3]):
                for k in range(height * columns):
                    i = row * window.stride[0] - window.padding[0] + k // columns * window.dilation[0]
                    j = column * window.stride[1] - window.padding[1] + k % columns * window.dilation[1]
                    if 0 <= i < 6 and 0 <= j < 6:
                        found[..., row, column] += factors[:, k, :, row, column] * x[..., i, j]
                    else:
                        assert (factors[:, k, :, row, column] == 0).all()
        return found

    ibp_box = propagate_layer(layer, box)
    for x in sample_points(box, 10):
        lower = evaluate(relaxed.lower, x) + relaxed.lower_intercept
        upper = evaluate(relaxed.upper, x) + relaxed.upper_intercept
        slack = 0.0 if sound else 1e-12
        assert (lower <= layer(x) + slack).all() and (upper >= layer(x) - slack).all()
        assert (upper <= ibp_box.upper + 1e-9).all()  # at most the constant bound
        assert relaxation != "box" or (lower >= ibp_box.lower - 1e-9).all()
    assert relaxed.same_slope == (relaxation != "adaptive")


def test_max_pooling_is_exact_when_one_input_dominates() -> None:
    """The network is then linear in the box, and CROWN returns its exact range."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, CLASSES)).double().eval()
    images = torch.rand(3, 1, 4, 4, dtype=torch.float64) * 0.1 + 0.2
    images[..., ::2, 1::2] += 0.5
    with torch.no_grad():
        net[0].weight.abs_()
        lower, upper = crown_bounds(net, perturbation_box(images, 0.1))
        jacobian = torch.func.vmap(torch.func.jacrev(lambda x: net(x[None])[0]))(images)
        radius = 0.1 * jacobian.abs().flatten(2).sum(dim=2)
        torch.testing.assert_close(upper, net(images) + radius)
        torch.testing.assert_close(lower, net(images) - radius)
        ibp = ibp_bounds(net, perturbation_box(images, 0.1))
        assert (upper - lower < ibp.upper - ibp.lower).all()


@pytest.mark.parametrize("body", sorted(name for name in (*BODIES, *LAYERS) if "max" in name or "padded" in name))
@pytest.mark.parametrize("relaxation", ["adaptive", "parallel", "box"])
def test_max_pooling_patches_match_dense_coefficients(
    body: str, relaxation: RelaxationKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = build_own_network(body).double()
    images, calls, identity = torch.rand(2, *SHAPE, dtype=torch.float64), [], PatchCoefficients.identity
    monkeypatch.setattr(
        PatchCoefficients, "identity", staticmethod(lambda *arguments: calls.append(1) or identity(*arguments))
    )
    with torch.no_grad():
        patches = crown_bounds(net, perturbation_box(images, 0.1), relaxation=relaxation)
        monkeypatch.setattr(LinearBounds, "_max_patch_elements", lambda self, name: None)
        num_calls = len(calls)
        dense = crown_bounds(net, perturbation_box(images, 0.1), relaxation=relaxation)
    assert num_calls == len(calls) > 0
    for found, expected in zip(patches, dense, strict=True):
        torch.testing.assert_close(found, expected)


@torch.jit.script
def _square_scripted(x: Tensor) -> Tensor:
    return x * x


class Doubled(nn.Linear):
    """A linear layer with twice the weights of its base class."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, 2 * self.weight, self.bias)


class Reversed(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return functional.relu(-input)


class Negated(nn.Identity):
    def forward(self, input: Tensor) -> Tensor:
        return -input


class MinPool(nn.MaxPool2d):
    def forward(self, input: Tensor) -> Tensor:
        return -super().forward(-input)


@propagate_layer.register
def _propagate_doubled(layer: Doubled, box: Box, sound: bool = False) -> Box:
    plain = nn.Linear(layer.in_features, layer.out_features).to(layer.weight)
    with torch.no_grad():
        plain.weight.copy_(2 * layer.weight)
        plain.bias.copy_(layer.bias)
    return propagate_layer(plain, box, sound)


@propagate_layer.register(Reversed)
@propagate_layer.register(Negated)
def _propagate_decreasing(layer: nn.Module, box: Box, sound: bool = False) -> Box:
    return Box(layer(box.upper), layer(box.lower))


@propagate_layer.register
def _propagate_min_pool(layer: MinPool, box: Box, sound: bool = False) -> Box:
    return Box(layer(box.lower), layer(box.upper))


class Tripled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


class Sixfold(Tripled):
    def forward(self, x: Tensor) -> Tensor:
        return 6 * x


@propagate_layer.register(Tripled)
@propagate_layer.register(Sixfold)
def _propagate_multiple(layer: nn.Module, box: Box, sound: bool = False) -> Box:
    return propagate_layer(Scale(6.0 if isinstance(layer, Sixfold) else 3.0), box, sound)


@affine_map.register
def _tripled_map(layer: Tripled, inputs: torch.Size) -> Affine | None:
    return affine_map(Scale(3.0), inputs)


OWN_LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "last linear": lambda: [nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), Doubled(8, 3)],
    "hidden linear": lambda: [nn.Flatten(), Doubled(16, 8), nn.ReLU(), nn.Linear(8, 3)],
    "relu": lambda: [nn.Flatten(), nn.Linear(16, 8), Reversed(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)],
    "identity": lambda: [Negated(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), Negated(), nn.Linear(8, 3)],
    "parametrized": lambda: [nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), weight_norm(Doubled(8, 3))],
    "map": lambda: [nn.Flatten(), nn.Linear(16, 8), Tripled(), nn.ReLU(), nn.Linear(8, 3)],
    "map of a base class": lambda: [nn.Flatten(), nn.Linear(16, 8), Sixfold(), nn.ReLU(), nn.Linear(8, 3)],
    "pooling": lambda: [nn.Conv2d(1, 2, 1), MinPool(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)],
}


@pytest.mark.parametrize("kind", sorted(OWN_LAYERS))
def test_layers_that_extend_a_supported_class_keep_their_own_rule(kind: str) -> None:
    """Linear maps, relaxations and other shortcuts of the base class do not apply to them."""
    for seed in range(10):
        torch.manual_seed(seed)
        net = nn.Sequential(*OWN_LAYERS[kind]()).eval()
        images, labels = torch.rand(3, 1, 4, 4), torch.randint(3, (3,))
        box = perturbation_box(images, 0.2)
        with torch.no_grad():
            bounds = [ibp_bounds(net, box, sound=True), crown_bounds(net, box, "crown", sound=True)]
            differences = [
                ibp_logit_differences(net, box, labels, sound=True),
                crown_logit_differences(net, box, labels, sound=True),
                WorstCaseBounds(net)(images, labels, 0.2, math.inf).logit_difference_bounds + 1e-5,
            ]
            for point in sample_points(box, 50):
                logits = net(point).double()
                for lower, upper in bounds:
                    assert (logits >= lower).all() and (logits <= upper).all()
                for difference in differences:
                    assert (logit_differences(logits, labels) <= difference).all()


@pytest.mark.parametrize("certifier", ["ibp", "crown", "alpha_crown", "complete"])
def test_own_linear_layers_are_not_certified_with_the_weights_of_their_base_class(certifier: str) -> None:
    """With weight 1 instead of 2, the difference of the logits would keep its sign over the ball."""
    for layers in ([nn.Flatten(), nn.ReLU(), Doubled(1, 2)], [nn.Flatten(), Doubled(1, 2), nn.ReLU(), nn.Linear(2, 2)]):
        net = nn.Sequential(*layers).eval()
        with torch.no_grad():
            linear = [layer for layer in net if isinstance(layer, nn.Linear)]
            linear[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
            linear[0].bias.copy_(torch.tensor([0.0, 0.5]))
            if len(linear) == 2:
                linear[0].bias.add_(1)  # the ReLUs are active
                linear[1].weight.copy_(torch.eye(2))
                linear[1].bias.zero_()
        assert net(torch.zeros(1, 1, 1, 1)).argmax() == 1
        image, label = torch.full((1, 1, 1, 1), 0.3), torch.tensor([0])
        assert not certify(net, image, label, 0.3, certifier).item()
        assert certify(net, image, label, 0.1, certifier).item()


class Coarse(nn.Module):
    """The identity, computed with few bits."""

    def forward(self, x: Tensor) -> Tensor:
        return (8 * x).round() / 8


@propagate_layer.register
def _propagate_coarse(layer: Coarse, box: Box, sound: bool = False) -> Box:
    return Box(layer(box.lower), layer(box.upper)) if sound else box


@relax.register
def _relax_coarse(
    layer: Coarse, box: Box, relaxation: RelaxationKind = "adaptive", sound: bool = False
) -> LinearRelaxation:
    slope, zero = torch.ones_like(box.lower), torch.zeros_like(box.lower)
    return LinearRelaxation(slope, zero, slope, zero)


def test_sound_linear_bounds_include_the_rounding_of_own_activations() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), Coarse(), nn.ReLU(), nn.Linear(8, 3)).eval()
    box, labels = perturbation_box(torch.rand(3, 1, 4, 4), 0.01), torch.tensor([0, 1, 2])
    with torch.no_grad():
        lower, upper = crown_bounds(net, box, "crown", sound=True)
        differences = [
            alpha_crown_margins(trace_and_check(net, box), box, labels, 3, 0),
            crown_logit_differences(net, box, labels, sound=True),
        ]
        for point in sample_points(box, 100):
            logits = net(point).double()
            assert (logits >= lower).all() and (logits <= upper).all()
            for difference in differences:
                assert (logit_differences(logits, labels) <= difference).all()


class OwnMish(nn.Mish):
    """An activation of torch for which the user registers rules."""


@relax.register
def _relax_mish(
    layer: OwnMish, box: Box, relaxation: RelaxationKind = "adaptive", sound: bool = False
) -> LinearRelaxation:
    """Exact for boxes of one point."""
    zero, value = torch.zeros_like(box.lower), functional.mish(box.lower)
    return LinearRelaxation(zero, value, zero, value)


@propagate_layer.register
def _propagate_mish(layer: OwnMish, box: Box, sound: bool = False) -> Box:
    values = functional.mish(box.lower)
    return Box(values - 0.01, values + 0.01) if sound else Box(values, values)


def test_sound_linear_bounds_do_not_use_relaxations_with_unknown_rounding() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), OwnMish(), nn.ReLU(), nn.Linear(8, 3)).eval()
    box = perturbation_box(torch.rand(3, 1, 4, 4), 0.0)
    with torch.no_grad():
        lower, upper = crown_bounds(net, box, "crown", sound=True)
        assert (upper - lower > 0.001).all()  # the width of the sound box
        lower, upper = crown_bounds(net, box, "crown")
        assert (upper - lower < 1e-5).all()


def test_arguments_may_be_lists_or_keywords() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.last = nn.MaxPool2d([2, 2]), nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            pooled = functional.max_pool2d(self.pool(images), [1, 1], stride=[1, 1])
            return self.last(torch.flatten(input=pooled, start_dim=1))

    torch.manual_seed(0)
    net, images = Net().eval(), torch.rand(5, 1, 4, 4)
    labels = net(images).argmax(dim=1)
    for certifier in ("ibp", "crown", "alpha_crown", "complete"):
        assert certify(net, images, labels, 1e-4, certifier).all()


@pytest.mark.parametrize("layer", [LpDistance(8, 8), SortDistance(8, 8, 0.5)])
def test_training_bounds_without_gradients_are_rejected(layer: nn.Module) -> None:
    """Otherwise, the layers below would not be trained."""
    net, images = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), layer, nn.Linear(8, 3)).eval(), torch.rand(3, 1, 4, 4)
    labels = torch.tensor([0, 1, 2])
    with pytest.raises(TypeError, match=rf"{type(layer).__name__}.*use another objective"):
        WorstCaseBounds(net)(images, labels, 0.1, math.inf)
    with torch.no_grad():
        assert WorstCaseBounds(net)(images, labels, 0.1, math.inf).logit_difference_bounds.shape == (3, 3)


class Refused(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.features, self.last = function, nn.Sequential(*layers), nn.Linear(72, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.function(self.features(images)).flatten(1))


def _branch_on_values(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def _overwrite_through_view(x: Tensor) -> Tensor:
    y = x * 2
    z = y.view(len(y), -1)
    z += 1
    return y + 1


def _assign_channel(x: Tensor) -> Tensor:
    x = x * 1
    x[:, 0] = 0
    return x


def _change_constant(x: Tensor) -> Tensor:
    constant = torch.zeros(6, 6)
    x = x + constant
    constant += 1
    return x * constant


@torch.jit.script
def _exceeds_scripted(x: Tensor) -> Tensor:
    return (x.amax() > 2).float()


def _write_into_constant(x: Tensor) -> Tensor:
    y = torch.zeros(len(x), 2, 6, 6)
    y[:] = x * 3
    return y


def _write_into_view(x: Tensor) -> Tensor:
    y = torch.zeros(2, 6, 6)
    y[:1].copy_((x[:1, 0].detach() > 2).float())
    return x + y


def _write_into_data(x: Tensor) -> Tensor:
    x = x * 1
    x.data.mul_(3)
    return x


def _write_with_out(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = torch.zeros(6)
        torch.amax(x.detach(), (0, 1, 2), out=y)
    return x * (y > 2)


def _scale_by_nonzero_count(x: Tensor) -> Tensor:
    return x * (1 + len((x > 0.99).nonzero()))


def _scale_by_masked_length(x: Tensor) -> Tensor:
    return x * (1 + len(x[x > 0.99]))


def _negate_rarely(x: Tensor) -> Tensor:
    return -x if torch.rand(()) < 1e-6 else x


class _HalfPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x).float()


class _Drifting(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("shift", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.function(self.shift)
        return x + self.shift


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], list[nn.Module], str]] = {
    "group norm": (lambda x: x, [nn.Identity(), nn.GroupNorm(2, 2)], "GroupNorm (layer 'features.1')"),
    "softmax": (lambda x: x, [nn.Softmax(dim=1)], "Softmax (layer 'features.0')"),
    "function": (lambda x: functional.hardswish(x), [], "torch.nn.functional.hardswish"),
    "method": (lambda x: x.cumsum(1), [], "torch.Tensor.cumsum"),
    "pooling": (lambda x: functional.lp_pool2d(x, 2, 1), [], "torch.nn.functional.lp_pool2d"),
    "largest of all samples": (lambda x: x + x.max(), [], "torch.Tensor.max"),
    "position of the largest": (lambda x: x * x.max(1)[1], [], "torch.Tensor.max"),
    "largest of two": (lambda x: torch.maximum(x, -x), [], "torch.maximum"),
    "transposed convolution": (lambda x: x, [nn.ConvTranspose2d(2, 2, 1)], "ConvTranspose2d (layer 'features.0')"),
    "functional transposed convolution": (
        lambda x: functional.conv_transpose2d(x, torch.ones(2, 2, 1, 1)),
        [],
        "conv_transpose2d",
    ),
    "PReLU": (lambda x: x, [nn.PReLU()], "PReLU (layer 'features.0')"),
    "negative divisor": (lambda x: functional.avg_pool2d(x, 1, divisor_override=-2).relu(), [], "divisor_override"),
    "product": (lambda x: x * x, [], "torch.Tensor.mul"),
    "of constants": (lambda x: 1 / (x + 1), [], "torch.Tensor.__rtruediv__"),
    "branch": (_branch_on_values, [], "branches"),
    "number": (lambda x: x / x.max().item(), [], "torch.Tensor.item"),
    "array": (lambda x: torch.as_tensor(x.numpy()), [], "torch.Tensor.numpy"),
    "batch": (lambda x: x - x.mean(0), [], "torch.Tensor.mean"),
    "other samples": (lambda x: x.flip(0), [], "torch.Tensor.flip"),
    "transposed batch": (lambda x: x.transpose(0, 1).relu().transpose(0, 1), [], "torch.Tensor.transpose"),
    "overwritten": (_overwrite_through_view, [], "in place"),
    "set": (_assign_channel, [], "in place"),
    "changed constant": (_change_constant, [], "in place"),
    "data": (lambda x: x.data, [], "torch.Tensor.data"),
    "type": (lambda x: x.half().float(), [], "torch.Tensor.half"),
    "random": (lambda x: x + torch.randn(6, 6), [], "Refused"),
    "filled": (lambda x: functional.pad(x, (1, 1), value=0.5)[..., 1:-1], [], "torch.nn.functional.pad"),
    "interpolated": (
        lambda x: x[..., ::2, ::2],
        [nn.Upsample(scale_factor=2, mode="bilinear")],
        "Upsample (layer 'features.0')",
    ),
    "script in a branch": (lambda x: x + _square_scripted(x), [], "Refused"),
    "script that sees all samples": (lambda x: x + _exceeds_scripted(x), [], "Refused"),
    "vmap": (lambda x: torch.vmap(lambda sample: sample * 3)(x), [], "Refused"),
    "written into constants": (_write_into_constant, [], "__setitem__"),
    "written into a view": (_write_into_view, [], "__getitem__"),
    "written into memory": (_write_into_data, [], "torch.Tensor.data"),
    "written by out": (_write_with_out, [], "amax"),
    "size of values": (_scale_by_nonzero_count, [], "size depends"),
    "masked size": (_scale_by_masked_length, [], "size depends"),
    "rarely random": (_negate_rarely, [], "random"),
    "half precision": (lambda x: x, [_HalfPrecision()], "Linear (layer 'features.0.inner')"),
    "changed buffer": (lambda x: x, [_Drifting(lambda shift: shift.add_(1e-8))], "buffer"),
    "changed memory of a buffer": (lambda x: x, [_Drifting(lambda shift: shift.data[0].add_(1e-8))], "buffer"),
    "batch size": (lambda x: x / len(x), [], "Refused"),
    "script": (lambda x: x, [torch.jit.trace(nn.ReLU(), torch.rand(1, 2, 6, 6))], "layer 'features.0'"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_unsupported_operations_are_rejected_by_name(kind: str) -> None:
    function, layers, name = REFUSED[kind]
    net = Refused(function, *layers).eval()
    box = perturbation_box(torch.rand(2, *SHAPE), 0.1)
    for bounds in (ibp_bounds, crown_bounds):
        with pytest.raises(TypeError) as error:
            bounds(net, box)
        assert name in str(error.value) and "\n" not in str(error.value) and "0x" not in str(error.value)
    with pytest.raises(TypeError):
        WorstCaseBounds(net.train())(torch.rand(3, *SHAPE), torch.zeros(3, dtype=torch.long), 0.1, math.inf)


@pytest.mark.parametrize("output", [lambda x: (x, x), lambda x: {"logits": x}, lambda x: [x]])
def test_non_tensor_outputs_are_rejected(output: Callable[[Tensor], object]) -> None:
    class Several(nn.Module):
        def forward(self, images: Tensor) -> object:
            return output(images.flatten(1))

    with pytest.raises(TypeError, match="Several"):
        ibp_bounds(Several().eval(), perturbation_box(torch.rand(2, *SHAPE), 0.1))


def test_images_of_another_shape_are_rejected() -> None:
    with pytest.raises(ValueError, match="Own"):
        ibp_bounds(build_own_network("view"), perturbation_box(torch.rand(2, 3, 6, 6), 0.1))


def test_tracing_leaves_networks_unchanged() -> None:
    """Hooks, modes and statistics are restored, also after an error."""
    for net in (build_own_network("batch normalization"), Refused(_branch_on_values, nn.BatchNorm2d(2))):
        net.train()
        net.conv.eval() if hasattr(net, "conv") else None
        modes, state = [module.training for module in net.modules()], copy.deepcopy(net.state_dict())
        with contextlib.suppress(TypeError):
            WorstCaseBounds(net)._trace(torch.rand(3, *SHAPE))
        assert [module.training for module in net.modules()] == modes
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_bounds_work_in_inference_mode() -> None:
    net, box = build_own_network("in place on a sum"), perturbation_box(torch.rand(2, *SHAPE), 0.05)
    expected = ibp_bounds(net, box)
    with torch.inference_mode():
        found = ibp_bounds(net, Box(*(corner.clone() for corner in box)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_operations_unrelated_to_the_output_are_ignored() -> None:
    class Recording(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            self.std_of_images = images.std()
            return images.flatten(1)

    images = torch.rand(2, *SHAPE)
    torch.testing.assert_close(ibp_bounds(Recording().eval(), perturbation_box(images, 0)).lower, images.flatten(1))


class _Standardized(nn.Conv2d):
    """A convolution that scales its weights in the forward pass."""

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(images, weight * 5, bias)


def test_overridden_convolutions_are_traced() -> None:
    torch.manual_seed(0)
    by_class = nn.Sequential(_Standardized(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    by_instance = copy.deepcopy(by_class)
    by_instance[0] = nn.Conv2d(1, 4, 2).eval()
    original_forward = by_instance[0]._conv_forward
    by_instance[0]._conv_forward = lambda images, weight, bias: original_forward(images, weight * 5, bias)
    for net in (by_class, by_instance):
        images = torch.rand(2, 1, 3, 3)
        box = perturbation_box(images, 0.1)
        with torch.no_grad():
            for bounds in (ibp_bounds(net, box, sound=True), crown_bounds(net, box, sound=True)):
                for point in sample_points(box, 200):
                    logits = net(point)
                    assert (logits >= bounds.lower).all() and (logits <= bounds.upper).all()


def test_custom_autograd_functions_are_traced() -> None:
    """Tracing records the operations in the forward pass of an autograd function."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient

    plain, custom = Refused(lambda x: x * 2).eval(), Refused(Doubled.apply).eval()
    custom.load_state_dict(plain.state_dict())
    box = perturbation_box(torch.rand(2, *SHAPE), 0.1)
    torch.testing.assert_close(ibp_bounds(custom, box), ibp_bounds(plain, box))


def test_bounds_are_independent_of_the_default_device() -> None:
    net, box = build_own_network("max pooling"), perturbation_box(torch.rand(2, *SHAPE), 0.05)
    for bounds in (ibp_bounds, crown_bounds):
        expected = bounds(net, box, sound=True)
        with torch.device("meta"):
            found = bounds(net, box, sound=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
