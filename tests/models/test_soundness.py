"""Sound certificates hold for networks as they are computed, in float32: no violation, at any point that was tried."""

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from linflab.models.networks.layers import LpDistance, LpDistanceConv2d, ScaledLinear, SortDistance
from linflab.models.networks.linf_dist import LinfDistMLPConfig, LinfDistNet
from linflab.models.networks.sort_net import draw_subsets
from linflab.models.robustness.bounds.crown import crown_bounds, crown_margins
from linflab.models.robustness.bounds.interval import (
    Box,
    interval_bounds,
    interval_margins,
    layer_bounds,
    linear_margins,
    pixel_box,
)
from linflab.models.robustness.bounds.rounding import (
    check_arithmetic,
    exact_products,
    gamma,
    logit_error,
    upper_float,
)
from linflab.models.robustness.bounds.tracing import Negation
from linflab.models.robustness.certification import (
    Certifier,
    certified,
    certified_radius,
    certifier_of,
    lipschitz_radius,
)
from linflab.models.robustness.objectives import margin, wrong_class_margins
from tests.models.relu_networks import RELU_NETS, Residual, relu_network
from tests.models.test_bounds import CLASSES, NETS

SHAPE = (1, 6, 6)
every_net = pytest.mark.parametrize("kind", [*sorted(NETS), *sorted(RELU_NETS)])


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    with exact_products():
        yield


def shape_of(kind: str) -> tuple[int, ...]:
    return (2, 6, 6) if kind in RELU_NETS else SHAPE


def certifiers_of(net: nn.Module) -> list[Certifier]:
    has_lines = any(isinstance(module, nn.ReLU | nn.Tanh | Residual) for module in net.modules())
    return [*(["lipschitz"] if certifier_of(net) == "lipschitz" else []), "interval", *(["crown"] if has_lines else [])]


def network(kind: str, seed: int = 0, scale: float = 1.0) -> nn.Module:
    """In float32 and evaluation mode, with running means of random images; weights may be large."""
    if kind in RELU_NETS:
        net = relu_network(kind, seed)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter *= scale
        return net
    torch.manual_seed(seed)
    net = NETS[kind].build(SHAPE, CLASSES, (0.4,), 0.37)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= scale
    images = torch.rand(16, *SHAPE)
    net(images, math.inf, draw_subsets(net, 16, 1, torch.Generator().manual_seed(seed)))
    return net.eval()


def points(box: Box, count: int) -> torch.Tensor:
    """Floats of a box (B, ...): corners, and inside; (count, B, ...)."""
    share = torch.rand(count, *box.lower.shape)
    share[::2] = share[::2].round()
    inside = torch.lerp(box.lower, box.upper, share)
    return torch.minimum(torch.maximum(inside, box.lower), box.upper)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-38])
@pytest.mark.parametrize(
    "layer",
    [
        LpDistance(36, 9),
        LpDistanceConv2d(1, 4),
        SortDistance(36, 9, 0.4),
        ScaledLinear(36, 9),
        nn.Linear(36, 9),
        nn.Tanh(),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.AvgPool2d(2),
        nn.BatchNorm2d(1),
        Negation(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_compute_nothing_outside_their_boxes(layer: nn.Module, scale: float) -> None:
    """Also near the smallest floats, where differences may be flushed to zero. Boxes so narrow that roundings count."""
    torch.manual_seed(1)
    layer = copy.deepcopy(layer).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter *= scale
    if isinstance(layer, nn.BatchNorm2d):
        layer.running_mean.fill_(0.3 * scale)
        layer.running_var.fill_(1e-3)
    of_maps = isinstance(layer, LpDistanceConv2d | nn.Conv2d | nn.AvgPool2d | nn.BatchNorm2d)
    shape = (8, *SHAPE) if of_maps else (8, 36)
    lower = torch.randn(shape) * scale
    for width in (0.0, 1e-7, 1e-3, 1.0):
        box = Box(lower, lower + width * scale * torch.rand(shape))
        with torch.no_grad():
            bounds = layer_bounds(layer, box, True)
            computed = layer(points(box, 64).flatten(0, 1)).unflatten(0, (64, 8))
        assert (computed >= bounds.lower).all() and (computed <= bounds.upper).all()


def test_bounds_hold_in_any_order_of_summation() -> None:
    """The order of a dense layer's inputs changes nothing but the order in which they are summed."""
    torch.manual_seed(2)
    layer = nn.Linear(1000, 9)
    lower = torch.rand(8, 1000)
    box = Box(lower, torch.nextafter(lower, lower + 1))
    sound, plain, outside = layer_bounds(layer, box, True), layer_bounds(layer, box), 0
    for _ in range(200):
        order = torch.randperm(1000)
        computed = nn.functional.linear(points(box, 1)[0][:, order], layer.weight[:, order], layer.bias)
        assert (computed >= sound.lower).all() and (computed <= sound.upper).all()
        outside += int(((computed < plain.lower) | (computed > plain.upper)).sum())
    assert outside > 0  # else nothing is tested


@pytest.mark.parametrize("kind", ["hybrid", *sorted(RELU_NETS)])
def test_plain_bounds_of_a_point_do_not_hold_in_float32(kind: str) -> None:
    """What the sound ones are for: bounds of a box of one image, and what is computed of the image in another batch."""
    outside = dict.fromkeys(("interval", "crown"), 0)
    for seed in range(10):
        net = network(kind, seed)
        images = torch.rand(33, *shape_of(kind))
        with torch.no_grad():
            logits = torch.cat([net(images[k : k + 1]) for k in range(len(images))])
            for name, bounds in (("interval", interval_bounds), ("crown", crown_bounds)):
                for sound in (False, True):
                    lower, upper = bounds(net, pixel_box(images, 0), sound=sound)
                    violations = int(((logits < lower) | (logits > upper)).sum())
                    assert not (sound and violations)
                    outside[name] += violations
    assert all(outside.values()), outside


@every_net
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-6, 1e-3, 0.1])
def test_sound_bounds_hold_in_float32(kind: str, scale: float, eps: float) -> None:
    """Two thousand points of eight boxes, some so narrow that only roundings remain, in batches of any size."""
    net = network(kind, 3, scale)
    images, labels = torch.rand(8, *shape_of(kind)), torch.randint(CLASSES, (8,))
    box = pixel_box(images, eps)
    with torch.no_grad():
        found = [(interval_bounds(net, box, sound=True), interval_margins(net, box, labels, sound=True))]
        plain = [interval_margins(net, box, labels)]
        for intermediate in ("crown", "interval") if "crown" in certifiers_of(net) else ():
            bounds = crown_bounds(net, box, intermediate, sound=True)
            found.append((bounds, crown_margins(net, box, labels, intermediate, sound=True)))
            plain.append(crown_margins(net, box, labels, intermediate))
        for (_, sound), exact in zip(found, plain, strict=True):
            size = exact[exact > -math.inf].abs().max()
            assert (sound >= exact - 1e-5 * size).all() and (sound <= exact + 1e-2 * size).all()
        for part in points(box, 256).split([1, 127, 128]):
            logits = net(part.flatten(0, 1)).unflatten(0, (len(part), 8)).double()
            for bounds, margins in found:
                assert (logits >= bounds.lower.double()).all() and (logits <= bounds.upper.double()).all()
                for z in logits:
                    assert (wrong_class_margins(z, labels) <= margins.double()).all()  # of computed logits, exactly


@every_net
def test_no_float_at_a_sound_radius_changes_the_class(kind: str) -> None:
    """Thousands of points in the box of each certified radius: random, corners, and signs of gradients."""
    net = network(kind, 4)
    images = torch.rand(32, *shape_of(kind))
    labels = net(images).argmax(dim=1)
    for certifier in certifiers_of(net):
        radius = certified_radius(net, images, labels, certifier, sound=True)
        assert (radius > 0).sum() > 16
        plain = certified_radius(net, images, labels, certifier)
        assert (radius <= plain.double() + 1e-6).all() and (radius >= plain.double() - 1e-3).all()
        safe = radius > 0
        box = pixel_box(images[safe], radius[safe].view(-1, 1, 1, 1))
        tried = [*points(box, 200)]
        for other in range(CLASSES):
            leaf = images[safe].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(net(leaf)[:, other].sum() - margin(net(leaf), labels[safe]).sum(), leaf)
            tried += [torch.where(gradient > 0, box.upper, box.lower)]
        with torch.no_grad():
            for point in tried:
                assert (margin(net(point), labels[safe]) > 0).all()


@every_net
def test_rounding_error_of_a_net_is_bounded(kind: str) -> None:
    """Logits in float32 against those in float64, of images and of corners of the pixel range."""
    for scale in (1.0, 30.0):
        net = network(kind, 5, scale)
        if not isinstance(net, LinfDistNet):
            continue
        images = torch.cat([torch.rand(500, *SHAPE), torch.rand(500, *SHAPE).round()])
        with torch.no_grad():
            computed, exact = net(images).double(), net.double()(images.double())
        error = (computed - exact).abs().max().item()
        assert 0 < error <= logit_error(net.float()) < 1e-3 * scale


def test_rounding_error_by_hand() -> None:
    """Two layers: normalisation, distance, shift, distance, bias; every rounding relative to what it rounds."""
    net = LinfDistMLPConfig(depth=2, width=3, initialization="normal").build((1, 1, 2), 2, (0.25,), 0.5).eval()
    assert isinstance(net, LinfDistNet)
    with torch.no_grad():
        net.features.distances[0].weight.copy_(torch.tensor([[1.0, -4.0], [0.0, 2.0], [3.0, 0.5]]))
        net.features.shifts[0].running_mean.copy_(torch.tensor([1.0, -2.0, 5.0]))
        net.last.weight.copy_(torch.tensor([[1.0, 7.0, -1.0], [0.0, 0.0, 2.0]]))
        net.bias.copy_(torch.tensor([0.5, -3.0]))
    pixels = 0.75 / 0.5  # largest normalised pixel
    first, shifted = pixels + 4, pixels + 4 + 5
    second, logits = shifted + 7, shifted + 7 + 3
    assert logit_error(net) == pytest.approx(1.2 * 2**-24 * (2 * pixels + first + shifted + second + logits))


def test_underflow_is_accounted_for() -> None:
    """Weights of the smallest float: their products vanish, and so would a bound that is relative to them."""
    least = 2.0**-149
    layer = nn.Linear(64, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([torch.full((64,), least), torch.zeros(64)]))
        layer.bias.copy_(torch.tensor([0.0, 10 * least]))
        box = Box(torch.full((1, 64), 0.499), torch.full((1, 64), 0.505))
        bounds, computed = layer_bounds(layer, box, True), layer(box.lower)
        assert (computed >= bounds.lower).all() and (computed <= bounds.upper).all()
        assert linear_margins(layer, box, torch.tensor([0]), sound=True)[0, 1] > 0


def test_what_sound_certificates_are_not_for() -> None:
    net, images, labels = network("mlp"), torch.rand(2, *SHAPE), torch.tensor([0, 1])
    for certifier in ("lipschitz", "interval"):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            certified(net, images + 1, labels, 0.1, certifier, sound=True)
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    for certifier in ("interval", "crown"):
        with pytest.raises(ValueError, match="may be in tf32"):
            certified(network("hybrid"), images, labels, 0.1, certifier, sound=True)
    with exact_products():
        certified(network("hybrid"), images, labels, 0.1, "interval", sound=True)
    assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    with torch.backends.nnpack.flags(enabled=True), pytest.raises(ValueError, match="NNPACK"):
        check_arithmetic(network("residual"), images)
    with torch.backends.nnpack.flags(enabled=True), pytest.raises(ValueError, match="NNPACK"):
        check_arithmetic(nn.AvgPool2d(2), images)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="autocast"):
            certified(network("hybrid"), images, labels, 0.1, "interval", sound=True)
        with exact_products():
            certified(network("hybrid"), images, labels, 0.1, "interval", sound=True)
    with pytest.raises(ValueError, match="float16"):
        certified(network("hybrid").bfloat16(), images.bfloat16(), labels, 0.1, "interval", sound=True)


def test_radii_of_two_certifiers() -> None:
    net = network("mlp", 6)
    images = torch.rand(64, *SHAPE)
    labels = net(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % CLASSES
    lipschitz, interval = (certified_radius(net, images, labels, kind) for kind in ("lipschitz", "interval"))
    assert lipschitz[0] < 0 and interval[0] < 0
    assert (interval[1:] >= lipschitz[1:] - 2e-6).all()
    for eps in (0.01, 0.05):
        for kind, radius in (("lipschitz", lipschitz), ("interval", interval)):
            clear = (radius - eps).abs() > 1e-5  # but for those that the bisection does not tell apart
            assert torch.equal(certified(net, images, labels, eps, kind)[clear], (radius > eps)[clear])


def test_sound_radii_of_unknown_networks_are_refused() -> None:
    class Other(nn.Module):
        lipschitz_constant = 1.0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    lipschitz_radius(Other().eval(), images, labels)
    with pytest.raises(TypeError, match="Other"):
        lipschitz_radius(Other().eval(), images, labels, sound=True)


@given(st.floats(0, 1), st.floats(0, 1))
def test_every_float_within_eps_is_in_the_box(pixel: float, eps: float) -> None:
    image = torch.full((1, 1, 1, 1), pixel)
    box = pixel_box(image, eps)
    exact = float(image)
    low, high = np.float32(max(0.0, exact - eps)), np.float32(min(1.0, exact + eps))
    low = low if float(low) >= exact - eps else np.nextafter(low, np.float32(2))
    high = high if float(high) <= exact + eps else np.nextafter(high, np.float32(-2))
    assert float(box.lower) <= max(low, 0) and float(box.upper) >= min(high, 1)
    assert float(upper_float(eps, image)) >= eps


def test_gamma() -> None:
    assert gamma(300, torch.bfloat16) == math.inf
    assert gamma(1000, torch.float32) == pytest.approx(1000 * 2**-24, rel=1e-3) and gamma(1, torch.float64) < 2e-16
