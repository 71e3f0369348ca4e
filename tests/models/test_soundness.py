"""Tests that sound certificates hold for networks computed in float32, at every tested point."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from linflab.models.networks.group_sort import GroupSortConfig, GroupSortNet
from linflab.models.networks.layers import L1ProjectedLinear, LpDistance
from linflab.models.networks.linf_dist import DistanceNetConfig, LinfDistMLPConfig, LinfDistNet
from linflab.models.networks.sort_net import sample_masks
from linflab.models.robustness.bounds.boxes import Box, perturbation_box
from linflab.models.robustness.bounds.crown import crown_bounds, crown_logit_differences
from linflab.models.robustness.bounds.ibp import final_layer_logit_differences, ibp_bounds, ibp_logit_differences
from linflab.models.robustness.bounds.lipschitz import lipschitz_rounding
from linflab.models.robustness.bounds.rounding import gamma, round_up, strict_float32
from linflab.models.robustness.bounds.rules import propagate_layer
from linflab.models.robustness.certification import (
    certified_radius,
    certify,
    default_certifier,
    lipschitz_radius,
)
from linflab.models.robustness.margins import logit_differences, margin
from tests.models.relu_networks import RELU_NETS, Residual, build_relu_network
from tests.models.test_bounds import CLASSES, NETS

pytestmark = pytest.mark.integration  # they compute for long

SHAPE = (1, 6, 6)
every_net = pytest.mark.parametrize("kind", [*sorted(NETS), "group sort", *sorted(RELU_NETS)])


def get_image_shape(kind: str) -> tuple[int, ...]:
    return (2, 6, 6) if kind in RELU_NETS else SHAPE


def list_certifiers(net: nn.Module) -> list[str]:
    has_relaxation = any(isinstance(module, nn.ReLU | nn.Tanh | Residual) for module in net.modules())
    return [
        *(["lipschitz"] if default_certifier(net) == "lipschitz" else []),
        "ibp",
        *(["crown"] if has_relaxation else []),
    ]


def build_network(kind: str, seed: int = 0, scale: float = 1.0) -> nn.Module:
    """Return a float32 network in evaluation mode, with scaled weights and random running means."""
    if kind in RELU_NETS:
        net = build_relu_network(kind, seed)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter *= scale
        return net
    torch.manual_seed(seed)
    if kind == "group sort":
        config: GroupSortConfig | DistanceNetConfig = GroupSortConfig(depth=3, width=14)
    else:
        config = NETS[kind]
    net = config.build(SHAPE, CLASSES, (0.4,), 0.37)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= scale
    if kind == "group sort":
        return net.eval()
    images = torch.rand(16, *SHAPE)
    net(images, math.inf, sample_masks(net, 16, 1, torch.Generator().manual_seed(seed)))
    return net.eval()


def sample_points(box: Box, count: int) -> torch.Tensor:
    """Return float points of a box (B, ...), every second one a corner, as (count, B, ...)."""
    fraction = torch.rand(count, *box.lower.shape)
    fraction[::2] = fraction[::2].round()
    inside = torch.lerp(box.lower, box.upper, fraction)
    return torch.minimum(torch.maximum(inside, box.lower), box.upper)


def test_bounds_are_sound_for_any_order_of_summation() -> None:
    """Permuting the inputs of a dense layer only changes the order of summation."""
    torch.manual_seed(2)
    layer = nn.Linear(1000, 9)
    lower = torch.rand(8, 1000)
    box = Box(lower, lower)  # a point, so that only rounding errors matter
    sound, real, num_outside = propagate_layer(layer, box, True), propagate_layer(layer, box), 0
    for _ in range(200):
        order = torch.randperm(1000)
        computed = nn.functional.linear(sample_points(box, 1)[0][:, order], layer.weight[:, order], layer.bias)
        assert (computed >= sound.lower).all() and (computed <= sound.upper).all()
        num_outside += int(((computed < real.lower) | (computed > real.upper)).sum())
    assert num_outside > 0  # rounding errors occur


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hybrid", *sorted(RELU_NETS)])
def test_real_arithmetic_bounds_are_violated_in_float32(kind: str) -> None:
    """At eps = 0, only sound bounds contain all logits that are computed in another batch."""
    num_outside = dict.fromkeys(("ibp", "crown"), 0)
    for seed in range(10):
        net = build_network(kind, seed)
        images = torch.rand(33, *get_image_shape(kind))
        with torch.no_grad():
            logits = torch.cat([net(images[k : k + 1]) for k in range(len(images))])
            for name, bounds in (("ibp", ibp_bounds), ("crown", crown_bounds)):
                for sound in (False, True):
                    lower, upper = bounds(net, perturbation_box(images, 0), sound=sound)
                    violations = int(((logits < lower) | (logits > upper)).sum())
                    assert not (sound and violations)
                    num_outside[name] += violations
    assert all(num_outside.values()), num_outside


@every_net
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-6, 1e-3, 0.1])
def test_sound_bounds_contain_float32_outputs(kind: str, scale: float, eps: float) -> None:
    """Test 2048 points of eight boxes in batches of several sizes; the narrowest boxes test rounding only."""
    net = build_network(kind, 3, scale)
    images, labels = torch.rand(8, *get_image_shape(kind)), torch.randint(CLASSES, (8,))
    box = perturbation_box(images, eps)
    with torch.no_grad():
        results = [(ibp_bounds(net, box, sound=True), ibp_logit_differences(net, box, labels, sound=True))]
        real = [ibp_logit_differences(net, box, labels, sound=False)]
        for intermediate in ("crown", "ibp") if "crown" in list_certifiers(net) else ():
            bounds = crown_bounds(net, box, intermediate, sound=True)
            results.append((bounds, crown_logit_differences(net, box, labels, intermediate, sound=True)))
            real.append(crown_logit_differences(net, box, labels, intermediate, sound=False))
        for (_, sound), exact in zip(results, real, strict=True):
            size = exact[exact > -math.inf].abs().max()
            assert (sound >= exact - 1e-5 * size).all() and (sound <= exact + 1e-2 * size).all()
        for part in sample_points(box, 256).split([1, 127, 128]):
            logits = net(part.flatten(0, 1)).unflatten(0, (len(part), 8)).double()
            for bounds, differences in results:
                assert (logits >= bounds.lower.double()).all() and (logits <= bounds.upper.double()).all()
                for z in logits:
                    # Use exact differences of float32 logits.
                    assert (logit_differences(z, labels) <= differences.double()).all()


@every_net
def test_sound_radii_preserve_the_class_in_float32(kind: str) -> None:
    """Test random points, corners and gradient signs in the box of each certified radius."""
    net = build_network(kind, 4)
    images = torch.rand(32, *get_image_shape(kind))
    labels = net(images).argmax(dim=1)
    for certifier in list_certifiers(net):
        radius = certified_radius(net, images, labels, certifier, sound=True)
        assert (radius > 0).sum() > 16
        real = certified_radius(net, images, labels, certifier, sound=False)
        assert (radius <= real.double() + 1e-6).all() and (radius >= real.double() - 1e-3).all()
        is_certified = radius > 0
        box = perturbation_box(images[is_certified], radius[is_certified].view(-1, 1, 1, 1))
        candidates = [*sample_points(box, 200)]
        for other in range(CLASSES):
            leaf = images[is_certified].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(
                net(leaf)[:, other].sum() - margin(net(leaf), labels[is_certified]).sum(), leaf
            )
            candidates += [torch.where(gradient > 0, box.upper, box.lower)]
        with torch.no_grad():
            for point in candidates:
                assert (margin(net(point), labels[is_certified]) > 0).all()


@pytest.mark.parametrize("kind", ["mlp", "conv", "sort"])
def test_logit_rounding_error_bounds_the_error(kind: str) -> None:
    """Compare float32 with float64 logits of images and of corners of the pixel range."""
    for scale in (1.0, 30.0):
        net = build_network(kind, 5, scale)
        assert isinstance(net, LinfDistNet)
        images = torch.cat([torch.rand(500, *SHAPE), torch.rand(500, *SHAPE).round()])
        with torch.no_grad():
            computed, exact = net(images).double(), net.double()(images.double())
        error = (computed - exact).abs().max().item()
        assert 0 < error <= lipschitz_rounding(net.float()).logit_rounding_error < 1e-3 * scale


def test_logit_rounding_error_matches_by_hand() -> None:
    """The steps are normalization, distance, shift, distance, bias; each error is relative to its result."""
    net = LinfDistMLPConfig(depth=2, width=3, initialization="normal").build((1, 1, 2), 2, (0.25,), 0.5).eval()
    assert isinstance(net, LinfDistNet)
    with torch.no_grad():
        net.features.distances[0].weight.copy_(torch.tensor([[1.0, -4.0], [0.0, 2.0], [3.0, 0.5]]))
        net.features.shifts[0].running_mean.copy_(torch.tensor([1.0, -2.0, 5.0]))
        net.last.weight.copy_(torch.tensor([[1.0, 7.0, -1.0], [0.0, 0.0, 2.0]]))
        net.bias.copy_(torch.tensor([0.5, -3.0]))
    pixels = 0.75 / 0.5  # largest normalized pixel
    first = [pixels + largest for largest in (4, 2, 3)]  # distances are from 0 to these
    shifted = max(abs(end - mean) for last, mean in zip(first, (1, -2, 5), strict=True) for end in (0, last))
    second = [shifted + largest for largest in (7, 2)]
    logits = max(abs(end + bias) for last, bias in zip(second, (0.5, -3), strict=True) for end in (0, last))
    assert lipschitz_rounding(net).logit_rounding_error == pytest.approx(
        1.2 * 2**-24 * (2 * pixels + max(first) + shifted + max(second) + logits)
    )


def build_group_sort_net(seed: int, depth: int, width: int, scale: float, std: float) -> GroupSortNet:
    torch.manual_seed(seed)
    net = GroupSortConfig(depth=depth, width=width).build((1, 5, 5), 4, (0.3,), std).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= scale
    return net


def compute_exact_logits(net: GroupSortNet, images: torch.Tensor) -> list[list[Fraction]]:
    """Return exact logits in rational arithmetic, using the weights projected in float32."""
    mean, std = Fraction(net.normalize.mean.item()), Fraction(net.normalize.std.item())
    rows = [[(Fraction(pixel) - mean) / std for pixel in image] for image in images.flatten(1).tolist()]
    for layer in net.layers:
        if isinstance(layer, L1ProjectedLinear):
            weight = [[Fraction(w) for w in row] for row in layer.projected_weight.tolist()]
            bias = [Fraction(b) for b in layer.bias.tolist()]
            rows = [
                [sum((w * x for w, x in zip(r, row, strict=True)), b) for r, b in zip(weight, bias, strict=True)]
                for row in rows
            ]
        elif not isinstance(layer, nn.Flatten):
            rows = [[x for k in range(0, len(row), 2) for x in sorted(row[k : k + 2])] for row in rows]
    return rows


@given(
    seed=st.integers(0, 2**32 - 1),
    depth=st.integers(1, 4),
    scale=st.sampled_from([1e-3, 0.3, 1.0, 30.0]),
    std=st.floats(0.05, 3),
)
def test_group_sort_rounding_bounds_the_error(seed: int, depth: int, scale: float, std: float) -> None:
    """Compare logits and l1 norms of the projected rows with rational arithmetic, for images and corners."""
    net = build_group_sort_net(seed, depth, 6, scale, std)
    images = torch.cat([torch.rand(2, 1, 5, 5), torch.rand(2, 1, 5, 5).round()])
    with torch.no_grad():
        error, factor, largest = lipschitz_rounding(net)
        computed, norm = net(images).tolist(), Fraction(1)
        assert max(abs(z) for row in computed for z in row) <= largest
        for row, exact in zip(computed, compute_exact_logits(net, images), strict=True):
            assert all(abs(Fraction(z) - e) <= Fraction(error) for z, e in zip(row, exact, strict=True))
        for layer in net.layers:
            if isinstance(layer, L1ProjectedLinear):
                norms = [sum(abs(Fraction(w)) for w in row) for row in layer.projected_weight.tolist()]
                norm *= max(Fraction(1), *norms)
    assert norm <= Fraction(factor) <= norm * (1 + Fraction(1, 10**6))
    assert 0 < error < 1e-3 * (1 + scale) / std


def test_group_sort_rounding_matches_by_hand() -> None:
    """One layer has two roundings of each pixel, then gamma of the nonzero terms."""
    net = GroupSortConfig(depth=1).build((1, 1, 2), 2, (0.25,), 0.5).eval()
    with torch.no_grad():
        net.layers[1].weight.copy_(torch.tensor([[0.5, 0.0], [0.25, -0.5]]))
        net.layers[1].bias.copy_(torch.tensor([4.0, 0.0]))
    u, pixel = 2**-24, 0.75 / 0.5
    first, second = 0.5 * 2 * u * pixel + 3 * u * (0.5 * pixel + 4), 0.75 * 2 * u * pixel + 4 * u * 0.75 * pixel
    assert lipschitz_rounding(net).logit_rounding_error == pytest.approx(1.2 * max(first, second), rel=1e-5)
    assert lipschitz_rounding(net).excess == 1.0


def test_group_sort_radii_are_violated_only_without_rounding() -> None:
    """The logits are +-w x of projected rows, so the radius is the distance to the boundary.

    With each pixel moved by exactly the radius, real arithmetic gives a tie at worst; float32 may misclassify.
    """
    net = GroupSortConfig(depth=1).build((1, 5, 5), 2, (0.5,), 0.5).eval()
    torch.manual_seed(0)
    num_violations = {True: 0, False: 0}
    for _ in range(20):
        with torch.no_grad():
            row = torch.rand(25)
            net.layers[1].weight.copy_(torch.stack([row, -row]))
            net.layers[1].bias.zero_()
        images = torch.rand(500, 1, 5, 5) * 0.2 + 0.4
        labels = net(images).argmax(dim=1)
        direction = torch.where(labels == 0, -1.0, 1.0).view(-1, 1, 1, 1)
        for sound in num_violations:
            radius = lipschitz_radius(net, images, labels, sound)
            box = perturbation_box(images, radius.double().clamp_min(0).view(-1, 1, 1, 1))
            edge = torch.where(direction < 0, box.lower, box.upper)
            # The box is rounded outward; use floats within the radius.
            inner = torch.nextafter(edge, images)
            is_beyond_radius = (edge.double() - images.double()).abs() > radius.double().view(-1, 1, 1, 1)
            with torch.no_grad():
                is_misclassified = margin(net(torch.where(is_beyond_radius, inner, edge)), labels) <= 0
            num_violations[sound] += int((is_misclassified & (radius > 0)).sum())
    assert num_violations[True] == 0 < num_violations[False]


def test_bounds_account_for_underflow() -> None:
    """Products with weights of the smallest float underflow, and so would a relative error bound."""
    smallest = 2.0**-149
    layer = nn.Linear(64, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([torch.full((64,), smallest), torch.zeros(64)]))
        layer.bias.copy_(torch.tensor([0.0, 10 * smallest]))
        box = Box(torch.full((1, 64), 0.499), torch.full((1, 64), 0.505))
        bounds, computed = propagate_layer(layer, box, True), layer(box.lower)
        assert (computed >= bounds.lower).all() and (computed <= bounds.upper).all()
        assert final_layer_logit_differences(layer, box, torch.tensor([0]), sound=True)[0, 1] > 0


def test_ibp_radii_are_at_least_lipschitz_radii() -> None:
    net = build_network("mlp", 6)
    images = torch.rand(64, *SHAPE)
    labels = net(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % CLASSES
    lipschitz, ibp = (certified_radius(net, images, labels, kind, sound=False) for kind in ("lipschitz", "ibp"))
    assert lipschitz[0] < 0 and ibp[0] < 0
    assert (ibp[1:] >= lipschitz[1:] - 2e-6).all()
    for eps in (0.01, 0.05):
        for kind, radius in (("lipschitz", lipschitz), ("ibp", ibp)):
            is_decided = (radius - eps).abs() > 1e-5  # beyond the resolution of bisection
            assert torch.equal(certify(net, images, labels, eps, kind, False)[is_decided], (radius > eps)[is_decided])


def test_sound_radii_of_unknown_networks_are_rejected() -> None:
    class Other(nn.Module):
        lipschitz_constant = 1.0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    lipschitz_radius(Other().eval(), images, labels, sound=False)
    for function in (lipschitz_radius, lambda *arguments: certify(*arguments, 0.1, "lipschitz")):
        with pytest.raises(TypeError, match=r"^sound=True: .*Other.*sound=False"):
            function(Other().eval(), images, labels)


@given(st.floats(0, 1), st.floats(0, 1))
def test_box_contains_every_float_within_eps(pixel: float, eps: float) -> None:
    image = torch.full((1, 1, 1, 1), pixel)
    box = perturbation_box(image, eps)
    exact = float(image)
    low, high = np.float32(max(0.0, exact - eps)), np.float32(min(1.0, exact + eps))
    low = low if float(low) >= exact - eps else np.nextafter(low, np.float32(2))
    high = high if float(high) <= exact + eps else np.nextafter(high, np.float32(-2))
    assert float(box.lower) <= max(low, 0) and float(box.upper) >= min(high, 1)
    assert float(round_up(eps, image)) >= eps


def test_gamma_matches_its_formula() -> None:
    assert gamma(300, torch.bfloat16) == math.inf
    assert gamma(1000, torch.float32) == pytest.approx(1000 * 2**-24, rel=1e-3) and gamma(1, torch.float64) < 2e-16


def test_certifiers_ignore_autocast() -> None:
    """Results are bitwise equal to those without autocast, and settings are restored."""
    backends = torch.backends
    for kind in ("mlp", "hybrid", "dense", "group sort"):
        net, images = build_network(kind, 7), torch.rand(16, *get_image_shape(kind))
        labels = net(images).argmax(dim=1)
        for certifier in list_certifiers(net):
            for sound in (True, False):
                if certifier == "crown" and kind == "hybrid":
                    continue  # takes a minute
                expected = certified_radius(net, images, labels, certifier, sound)
                before = (backends.mkldnn.matmul.fp32_precision, backends.cudnn.enabled)
                with torch.autocast("cpu", torch.bfloat16):
                    results = certified_radius(net, images, labels, certifier, sound)
                    assert torch.is_autocast_enabled("cpu")
                    certificates = certify(net, images, labels, 0.01, certifier, sound)
                assert torch.equal(results, expected)
                assert torch.equal(certificates, certify(net, images, labels, 0.01, certifier, sound))
                assert before == (backends.mkldnn.matmul.fp32_precision, backends.cudnn.enabled)


def get_arithmetic_settings() -> tuple[object, ...]:
    backends = torch.backends
    precisions = (backends.mkldnn.matmul, backends.mkldnn.conv, backends.cuda.matmul)
    return (*(one.fp32_precision for one in precisions), backends.cudnn.enabled, torch._C._get_nnpack_enabled())


def test_strict_float32_restores_settings_on_exit() -> None:
    """The context may be nested, left by an error, or left by threads in another order than they entered."""
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    try:
        before = get_arithmetic_settings()
        inside = ("ieee", "ieee", "ieee", False, False)
        assert before != inside
        with pytest.raises(RuntimeError), strict_float32():
            with strict_float32():
                assert get_arithmetic_settings() == inside
            assert get_arithmetic_settings() == inside
            raise RuntimeError
        assert get_arithmetic_settings() == before
        first_exited, second_entered = threading.Event(), threading.Event()
        settings_in_second = []

        def first() -> None:
            with strict_float32():
                second_entered.wait(10)
            first_exited.set()

        def second() -> None:
            with strict_float32():
                second_entered.set()
                first_exited.wait(10)
                settings_in_second.append(get_arithmetic_settings())

        threads = [threading.Thread(target=target) for target in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert settings_in_second == [inside] and get_arithmetic_settings() == before
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.slow
def test_threads_certify_concurrently() -> None:
    """torch.fx patches methods of all modules during tracing, including those that other threads use."""
    nets = [build_network(kind, 8) for kind in ("dense", "residual", "hybrid", "group sort")]
    batches = [torch.rand(4, *get_image_shape(kind)) for kind in ("dense", "residual", "hybrid", "group sort")]

    def compute_radii(k: int) -> torch.Tensor:
        with torch.no_grad():
            labels = nets[k](batches[k]).argmax(dim=1)
        return certified_radius(nets[k], batches[k], labels, "ibp")

    expected = [compute_radii(k) for k in range(4)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(compute_radii, [k % 4 for k in range(64)]))
    assert all(torch.equal(one, expected[k % 4]) for k, one in enumerate(results))
    assert nn.Module.__call__.__name__ != "module_call_wrapper"


def test_overflowing_sums_are_not_certified() -> None:
    """Infinite intermediate values may cancel to NaN, although tanh is bounded."""
    first, last = nn.Linear(4, 2), nn.Linear(2, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[3e38, 3e38, -3e38, -3e38]]).expand(2, 4))
        first.bias.zero_()
        last.weight.copy_(0.1 * torch.eye(2))
        last.bias.copy_(torch.tensor([1.0, 0.0]))
    net = nn.Sequential(first, nn.Tanh(), last).eval()
    images, labels = torch.full((2, 4), 0.5), torch.zeros(2, dtype=torch.long)
    for certifier in ("ibp", "crown"):
        assert not certify(net, images, labels, 0.5, certifier).any()
    with torch.no_grad():
        first.weight.div_(1e35)
    for certifier in ("ibp", "crown"):
        assert certify(net, images, labels, 0.5, certifier).all()


def test_smallest_radius_survives_underflow() -> None:
    """Half of the smallest float is zero, but a large weight amplifies the smallest float."""
    smallest = 2.0**-149
    net = nn.Linear(1, 2).eval()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0], [1e30]]))
        net.bias.copy_(torch.tensor([0.0, -1e-15]))
    images, labels = torch.zeros(1, 1), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        assert net(images).argmax() == 0 and net(images + smallest).argmax() == 1
    assert not certify(net, images, labels, smallest, "ibp").any()


@pytest.mark.parametrize("config", [LinfDistMLPConfig(depth=2, width=8), GroupSortConfig(depth=2, width=8)], ids=repr)
def test_lipschitz_certifier_rejects_hooks(config: DistanceNetConfig | GroupSortConfig) -> None:
    net = config.build((1, 3, 3), 3, (0.4,), 0.3).eval()
    images, labels = torch.rand(2, 1, 3, 3), torch.zeros(2, dtype=torch.long)
    for module in net.modules():
        hook = module.register_forward_hook(lambda module, inputs, output: 10 * output)
        with pytest.raises(TypeError):
            certify(net, images, labels, 0.01, "lipschitz")
        hook.remove()
    certify(net, images, labels, 0.01, "lipschitz")


class Tenfold(LpDistance):
    def forward(self, x: torch.Tensor, p: float = math.inf, masks: torch.Tensor | None = None) -> torch.Tensor:
        return 10 * super().forward(x, p)


class TenfoldLinear(L1ProjectedLinear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 10 * super().forward(input)


def test_lipschitz_certifier_rejects_layers_that_extend_its_own() -> None:
    """They have other Lipschitz constants."""
    images, labels = torch.rand(2, 1, 3, 3), torch.zeros(2, dtype=torch.long)
    distance_net = LinfDistMLPConfig(depth=2, width=8).build((1, 3, 3), 3, (0.4,), 0.3).eval()
    distance_net.last = Tenfold(8, 3).eval()
    group_sort_net = GroupSortConfig(depth=2, width=8).build((1, 3, 3), 3, (0.4,), 0.3).eval()
    group_sort_net.layers[-1] = TenfoldLinear(8, 3).eval()
    for net, name in ((distance_net, "Tenfold"), (group_sort_net, "TenfoldLinear")):
        with pytest.raises(TypeError, match=rf"{name} .* is not supported by certifier=lipschitz"):
            certify(net, images, labels, 0.01, "lipschitz")
