"""Conformance tests of every registered layer rule: boxes, affine maps and linear relaxations."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from linflab.models.networks import layers as own
from linflab.models.robustness.bounds import steps
from linflab.models.robustness.bounds.affine import affine_map
from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.ibp import ibp_bounds
from linflab.models.robustness.bounds.relaxations import has_relaxation, relax
from linflab.models.robustness.bounds.rules import propagate_layer
from tests.models.conformance.cases import sample_points

FLAT, SEQUENCE, MAPS = (36,), (2, 12), (2, 6, 6)
# At least one layer for each class with a rule, and the shape of its inputs.
LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    *((layer, FLAT) for layer in (nn.Linear(36, 9), own.ScaledLinear(36, 9), own.L1ProjectedLinear(36, 9))),
    *((layer, FLAT) for layer in (own.LpDistance(36, 9), own.SortDistance(36, 9, 0.4), own.GroupSort(3))),
    *((layer, FLAT) for layer in (nn.Identity(), nn.Dropout(), nn.BatchNorm1d(36), own.BatchNorm1d(36))),
    *((layer, FLAT) for layer in (nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.LeakyReLU(0.1), nn.LeakyReLU(3.0))),
    *((layer, FLAT) for layer in (nn.LeakyReLU(-0.3), nn.ELU(), nn.ELU(1.7), nn.Softplus(), nn.Softplus(3.0, 1.0))),
    *((layer, FLAT) for layer in (nn.SiLU(), nn.GELU(), nn.GELU("tanh"), steps.Clamp(-0.1, 0.3))),
    *((layer, FLAT) for layer in (steps.Clamp(-math.inf, 0.5), steps.Clamp(0.0, 6.0))),
    *((layer, FLAT) for layer in (steps.Negate(), steps.AddConstant(0.3), steps.Scale(-0.7), steps.Quotient(0.31))),
    *(
        (layer, FLAT)
        for layer in (steps.Scale(torch.randn(36)), steps.Reshape((4, 9)), steps.Masking(torch.rand(1, 36)))
    ),
    (steps.Rearrangement(torch.tensor([3, -1, 3, 0])), FLAT),
    (steps.ChannelAffine(torch.randn(2), torch.randn(2)), MAPS),
    *((layer, SEQUENCE) for layer in (nn.Conv1d(2, 3, 3, stride=2), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(5))),
    *((layer, SEQUENCE) for layer in (nn.MaxPool1d(2), nn.Dropout1d())),
    *((nn.AvgPool1d(3, 2, 1, ceil_mode, count), SEQUENCE) for ceil_mode in (False, True) for count in (False, True)),
    *((nn.AvgPool2d((3, 4), (2, 3), 1, ceil_mode, False), MAPS) for ceil_mode in (False, True)),
    *((nn.AvgPool2d(4, 3, 2, True, count, divisor), MAPS) for count in (False, True) for divisor in (None, 5)),
    *((layer, MAPS) for layer in (nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(2, 1, 1, dilation=3))),
    (nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 1), (2, 3), groups=2), (4, 7, 6)),
    (nn.Conv1d(4, 6, 3, 2, 1, 2, groups=2), (4, 9)),
    *((layer, MAPS) for layer in (nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 2, 2, groups=2, dilation=2))),
    *((layer, MAPS) for layer in (nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d((4, 5)))),
    *((layer, MAPS) for layer in (nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(3), nn.ZeroPad2d((1, 0, 2, 1)), nn.Flatten())),
    *((layer, MAPS) for layer in (nn.BatchNorm2d(2), own.BatchNorm2d(2), nn.Dropout2d(), own.MeanShift(2))),
    *((layer, MAPS) for layer in (own.LpDistanceConv2d(2, 4), own.Normalize((0.4, 0.5), 0.3))),
    (own.Normalize((0.4, 0.5), (0.3, 0.2)), MAPS),
]
MULTI_INPUT_LAYERS = (steps.Add(), steps.Concat(1))
BASE_CLASSES = {"_BatchNorm", "object", "OwnLayer"}  # OwnLayer: passes on the rules of the layer that it holds
TRAINING_CLASSES = {"ShrunkReLU"}  # their boxes do not contain all outputs


def prepare(layer: nn.Module, dtype: torch.dtype, scale: float = 1.0) -> nn.Module:
    layer = copy.deepcopy(layer).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter *= scale
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        layer.running_mean.fill_(0.3 * scale)
        layer.running_var.fill_(1e-3)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            object.__setattr__(layer, name, value.to(dtype))
    return layer.to(dtype)


def get_id(value: Any) -> str | None:
    return type(value).__name__ if isinstance(value, nn.Module) else None


every_layer = pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=get_id)


def test_every_rule_has_a_test_layer() -> None:
    """This ensures that every registered rule is tested."""
    tested = {type(layer).__name__ for layer in (*(layer for layer, _ in LAYERS), *MULTI_INPUT_LAYERS)}
    registered = (*propagate_layer.registry, *affine_map.registry, *relax.registry)
    assert {cls.__name__ for cls in registered if not cls.__module__.startswith("tests.")} <= (
        tested | BASE_CLASSES | TRAINING_CLASSES
    )


@every_layer
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-38])
def test_sound_boxes_contain_computed_outputs(layer: nn.Module, shape: tuple[int, ...], scale: float) -> None:
    """The scales include the smallest floats, where differences may underflow; narrow boxes test rounding."""
    torch.manual_seed(1)
    layer = prepare(layer, torch.float32, scale)
    lower = torch.randn(8, *shape) * scale
    lower[:2] *= 10
    for width in (0.0, 1e-7, 1e-3, 1.0):
        box = Box(lower, lower + width * scale * torch.rand_like(lower))
        with torch.no_grad():
            bounds = propagate_layer(layer, box, True)
            computed = layer(sample_points(box, 64).flatten(0, 1)).unflatten(0, (64, 8))
        assert (computed >= bounds.lower).all() and (computed <= bounds.upper).all()


@every_layer
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1), width=st.floats(0, 5))
def test_boxes_contain_outputs(layer: nn.Module, shape: tuple[int, ...], seed: int, width: float) -> None:
    torch.manual_seed(seed)
    layer = prepare(layer, torch.float64)
    lower = 3 * torch.randn(2, *shape, dtype=torch.float64)
    box = Box(lower, lower + width * torch.rand_like(lower))
    with torch.no_grad():
        low, high = propagate_layer(layer, box)
        outputs = layer(sample_points(box, 20).flatten(0, 1)).unflatten(0, (20, 2))
    slack = 1e-9 * (1 + outputs.abs().max())
    assert (outputs >= low - slack).all() and (outputs <= high + slack).all()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(layer, shape) for layer, shape in LAYERS if affine_map(layer, torch.Size(shape))],
    ids=get_id,
)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1))
def test_affine_maps_match_their_layers(layer: nn.Module, shape: tuple[int, ...], seed: int) -> None:
    """The transpose satisfies <A x, a> = <x, A^T a>. Float32 errors are within the stated bound."""
    torch.manual_seed(seed)
    exact, computed = prepare(layer, torch.float64), prepare(layer, torch.float32)
    affine = affine_map(exact, torch.Size(shape))
    assert affine is not None
    x = torch.randn(3, *shape, dtype=torch.float64).float().double()
    with torch.no_grad():
        weight = affine.weight.double()
        product = affine.apply(x, weight)
        torch.testing.assert_close(product + affine.bias.double(), exact(x))
        a = torch.randn_like(product)
        transposed = affine.transpose(a, weight)
        assert transposed.shape == x.shape
        torch.testing.assert_close((product * a).sum(), (x * transposed).sum())
        if not isinstance(layer, own.L1ProjectedLinear | own.ScaledLinear):  # their weights have rounding errors too
            error_bound = affine_map(computed, torch.Size(shape)).rounding_error(x.float().abs(), torch.float32)
            assert ((computed(x.float()).double() - exact(x)).abs() <= error_bound).all()


@pytest.mark.parametrize("layer", [layer for layer, _ in LAYERS if has_relaxation(layer)], ids=get_id)
@pytest.mark.parametrize("relaxation", ["adaptive", "parallel", "box"])
@settings(max_examples=12)
@given(lower=st.floats(-20, 20), width=st.floats(0, 20), sound=st.booleans())
def test_linear_relaxations_bound_activations(
    layer: nn.Module, relaxation: Any, lower: float, width: float, sound: bool
) -> None:
    box = Box(*torch.tensor([[lower], [lower + width]], dtype=torch.float64))
    x = torch.linspace(lower, lower + width, 1001, dtype=torch.float64)
    relaxed = relax(layer, box, relaxation, sound)
    assert relaxed is not None
    slack = 0 if sound else 1e-11
    assert (relaxed.lower_slope * x + relaxed.lower_intercept <= layer(x) + slack).all()
    assert (relaxed.upper_slope * x + relaxed.upper_intercept >= layer(x) - slack).all()
    assert relaxation == "adaptive" or relaxed.same_slope


@pytest.mark.parametrize("layer", MULTI_INPUT_LAYERS, ids=get_id)
@given(seed=st.integers(0, 2**32 - 1), width=st.floats(0, 5))
def test_boxes_of_multi_input_layers_contain_outputs(layer: nn.Module, seed: int, width: float) -> None:
    torch.manual_seed(seed)
    lowers = torch.randn(2, 3, 7)
    boxes = [Box(lower, lower + width * torch.rand(3, 7)) for lower in lowers]
    bounds = propagate_layer(layer, boxes, True)
    outputs = torch.stack([layer(*inputs) for inputs in zip(*(sample_points(box, 20) for box in boxes), strict=True)])
    assert (outputs >= bounds.lower).all() and (outputs <= bounds.upper).all()


def test_registering_a_rule_supports_a_new_layer() -> None:
    class Absolute(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.frexp(x).mantissa.abs()

    network = nn.Sequential(Absolute(), nn.Linear(4, 3)).eval()
    box = Box(torch.rand(2, 4) - 0.5, torch.rand(2, 4) + 0.5)
    with pytest.raises(TypeError, match=r"frexp.*propagate_layer\.register"):
        ibp_bounds(network, box)
    propagate_layer.register(Absolute, lambda layer, box, sound=False: Box(0 * box.lower, 0 * box.upper + 1))
    lower, upper = ibp_bounds(network, box)
    with torch.no_grad():
        logits = network(sample_points(box, 50).flatten(0, 1)).unflatten(0, (50, 2))
    assert (logits >= lower).all() and (logits <= upper).all()
