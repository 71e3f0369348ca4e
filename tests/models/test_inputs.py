"""Tests of input checks: certifiers, bounds and attacks accept and reject the same inputs."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from linflab.models.networks.linf_dist import LinfDistMLPConfig
from linflab.models.robustness.attacks.suite import AttackConfig, robust_under_attack
from linflab.models.robustness.bounds.boxes import Box, perturbation_box
from linflab.models.robustness.bounds.crown import crown_bounds, crown_logit_differences
from linflab.models.robustness.bounds.ibp import ibp_bounds, ibp_logit_differences
from linflab.models.robustness.bounds.worst_case import WorstCaseBounds
from linflab.models.robustness.certification import Certifier, certified_radius, certify, lipschitz_radius
from linflab.models.robustness.inputs import check_images

SHAPE, CLASSES, BATCH = (1, 4, 4), 3, 4
ATTACK = AttackConfig(steps=2)


def make_relu_net(classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, classes)).eval()


def make_distance_net(classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(0)
    return LinfDistMLPConfig(depth=2, width=8).build(SHAPE, classes, (0.4,), 0.3).eval()


def run_attack(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, eps: float) -> torch.Tensor:
    return robust_under_attack(net, images, labels, eps, ATTACK, torch.Generator().manual_seed(0))


EntryPoint = Callable[[nn.Module, Any, Any, Any], torch.Tensor]
WITH_EPS: dict[str, tuple[Callable[..., nn.Module], EntryPoint]] = {
    "certified lipschitz": (make_distance_net, lambda net, x, y, eps: certify(net, x, y, eps, "lipschitz")),
    "certified interval": (make_relu_net, lambda net, x, y, eps: certify(net, x, y, eps, "ibp")),
    "certified crown": (make_relu_net, lambda net, x, y, eps: certify(net, x, y, eps, "crown")),
    "certified in real arithmetic": (
        make_relu_net,
        lambda net, x, y, eps: certify(net, x, y, eps, "crown", sound=False),
    ),
    "attack": (make_relu_net, run_attack),
    "attack of distances": (make_distance_net, run_attack),
    "ibp_logit_differences": (
        make_relu_net,
        lambda net, x, y, eps: ibp_logit_differences(net, perturbation_box(x, eps), y),
    ),
    "crown_logit_differences": (
        make_relu_net,
        lambda net, x, y, eps: crown_logit_differences(net, perturbation_box(x, eps), y),
    ),
}
ENTRIES = WITH_EPS | {
    "lipschitz_radius": (make_distance_net, lambda net, x, y, eps: lipschitz_radius(net, x, y)),
    "certified_radius lipschitz": (make_distance_net, lambda net, x, y, eps: certified_radius(net, x, y, "lipschitz")),
    "certified_radius interval": (make_relu_net, lambda net, x, y, eps: certified_radius(net, x, y, "ibp")),
    "certified_radius crown": (make_relu_net, lambda net, x, y, eps: certified_radius(net, x, y, "crown")),
}
every_entry = pytest.mark.parametrize("entry", sorted(ENTRIES))


def make_valid_inputs(make: Callable[..., nn.Module]) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    net = make()
    images = torch.rand(BATCH, *SHAPE, generator=torch.Generator().manual_seed(1))
    return net, images, net(images).argmax(dim=1)


@st.composite
def invalid_images(draw: st.DrawFn) -> Callable[[torch.Tensor], object]:
    """Draw a function that makes valid images invalid."""
    index = draw(st.integers(0, BATCH * 16 - 1))

    def set_pixel(value: float) -> Callable[[torch.Tensor], object]:
        def change(images: torch.Tensor) -> torch.Tensor:
            images = images.clone()
            images.view(-1)[index] = value
            return images

        return change

    outside = st.one_of(st.floats(1, 255, exclude_min=True, width=32), st.floats(-255, -(2.0**-100), width=32))
    pixels = st.one_of(outside, st.sampled_from([math.nan, math.inf, -math.inf])).map(set_pixel)
    forms = [
        lambda x: (x - 0.1307) / 0.3081,  # normalized outside the network
        lambda x: 2 * x - 1,
        lambda x: (255 * x).to(torch.uint8),
        lambda x: (255 * x).long(),
        lambda x: x > 0.5,
        lambda x: x.half(),
        lambda x: x.bfloat16(),
        lambda x: x.double(),
        lambda x: x.to(torch.complex64),
        lambda x: x[0],
        lambda x: x[0, 0, 0],
        lambda x: x[None],
        lambda x: x[:, :0],
        lambda x: x.numpy(),
        lambda x: x.to_sparse(),
        lambda x: x.to("meta"),
        lambda x: x.tolist(),
        lambda x: None,
    ]
    return draw(st.one_of(pixels, st.sampled_from(forms)))


@st.composite
def invalid_labels(draw: st.DrawFn) -> Callable[[torch.Tensor], object]:
    index = draw(st.integers(0, BATCH - 1))

    def set_label(value: int) -> Callable[[torch.Tensor], object]:
        def change(labels: torch.Tensor) -> torch.Tensor:
            labels = labels.clone()
            labels[index] = value
            return labels

        return change

    outside = st.one_of(st.integers(CLASSES, 2**62), st.integers(-(2**62), -1)).map(set_label)
    forms = [
        lambda y: y.float(),
        lambda y: y > 0,
        lambda y: y[:, None],
        lambda y: y[:-1],
        lambda y: y[0],
        lambda y: nn.functional.one_hot(y, CLASSES),
        lambda y: y.numpy(),
        lambda y: y.tolist(),
        lambda y: None,
    ]
    return draw(st.one_of(outside, st.sampled_from(forms)))


@every_entry
@settings(max_examples=25)
@given(data=st.data())
def test_invalid_inputs_are_rejected_by_name(entry: str, data: st.DataObject) -> None:
    make, call = ENTRIES[entry]
    net, images, labels = make_valid_inputs(make)
    eps: Any = 0.05
    invalid = data.draw(st.sampled_from(["images", "labels", "network", *(["eps"] if entry in WITH_EPS else [])]))
    if invalid == "images":
        images = data.draw(invalid_images())(images)
    elif invalid == "labels":
        labels = data.draw(invalid_labels())(labels)
    elif invalid == "eps":
        numbers = st.one_of(st.floats(max_value=0, exclude_max=True), st.floats(min_value=1, exclude_min=True))
        eps = data.draw(st.one_of(numbers, st.sampled_from([math.nan, "0.1", None, torch.full((2,), 0.1), [0.1]])))
    else:
        change = data.draw(
            st.sampled_from(
                [
                    lambda net: net.train(),
                    lambda net: [*net.children()][-1].train() and net,
                    lambda net: net.half(),
                    lambda net: net.bfloat16(),
                    lambda net: make(1).eval(),
                    lambda net: net.forward,
                ]
            )
        )
        net = change(net)
    with pytest.raises((TypeError, ValueError)) as caught:
        call(net, images, labels, eps)
    message = str(caught.value)
    # With float64 images and a float32 network, the error may name either. perturbation_box has no network.
    assert message.startswith(
        (invalid, "images" if invalid == "network" else invalid, "box", "eps" if invalid == "eps" else invalid)
    )
    assert "\n" not in message and "; " in message


@pytest.mark.parametrize("certifier", ["IBP", "", None, "Interval", 0])
def test_unknown_certifiers_are_rejected(certifier: Any) -> None:
    net, images, labels = make_valid_inputs(make_relu_net)
    for call in (
        lambda: certify(net, images, labels, 0.01, certifier),
        lambda: certified_radius(net, images, labels, certifier),
    ):
        with pytest.raises(ValueError, match=r"^certifier=") as caught:
            call()
        assert all(name in str(caught.value) for name in Certifier.registry)


@every_entry
def test_empty_batch_returns_empty_result(entry: str) -> None:
    make, call = ENTRIES[entry]
    net, images, labels = make_valid_inputs(make)
    result, whole = call(net, images[:0], labels[:0], 0.05), call(net, images, labels, 0.05)
    assert result.shape == (0, *whole.shape[1:]) and result.dtype == whole.dtype
    with pytest.raises(ValueError, match=r"^network"):
        call(net.train(), images[:0], labels[:0], 0.05)


def test_bounds_of_an_empty_box_are_empty() -> None:
    net, images, _ = make_valid_inputs(make_relu_net)
    for bounds in (ibp_bounds, crown_bounds):
        lower, upper = bounds(net, perturbation_box(images[:0], 0.1))
        assert lower.shape == upper.shape == (0, CLASSES)


@every_entry
def test_flat_images_give_the_same_results(entry: str) -> None:
    make, call = ENTRIES[entry]
    net, images, labels = make_valid_inputs(make)
    assert torch.equal(call(net, images.flatten(1), labels, 0.05), call(net, images, labels, 0.05))


@every_entry
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_labels_of_any_integer_dtype_are_accepted(entry: str, dtype: torch.dtype) -> None:
    make, call = ENTRIES[entry]
    net, images, labels = make_valid_inputs(make)
    assert torch.equal(call(net, images, labels.to(dtype), 0.05), call(net, images, labels, 0.05))


@every_entry
def test_images_of_any_memory_layout_are_accepted(entry: str) -> None:
    """Images may be non-contiguous, require gradients, or be inference tensors; they are not modified."""
    make, call = ENTRIES[entry]
    net, images, labels = make_valid_inputs(make)
    expected = call(net, images, labels, 0.05)
    strided = torch.stack([images, images], dim=-1)[..., 0]
    leaf = images.clone().requires_grad_()
    with torch.inference_mode():
        inference_images = images.clone()
    for variant in (
        strided,
        images.to(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().mT,
        leaf,
    ):
        before = variant.detach().clone()
        assert torch.equal(call(net, variant, labels, 0.05), expected)
        assert torch.equal(variant.detach(), before)
    assert torch.equal(call(net, inference_images, labels, 0.05), expected)


@pytest.mark.parametrize("entry", [name for name in ENTRIES if not name.startswith("attack")])  # random starts
def test_batches_match_single_images(entry: str) -> None:
    make, call = ENTRIES[entry]
    net, images, labels = make_valid_inputs(make)
    batched = call(net, images, labels, 0.05)
    separate = torch.cat([call(net, images[k : k + 1], labels[k : k + 1], 0.05) for k in range(BATCH)])
    if batched.dtype == torch.bool:
        assert torch.equal(batched, separate)
    torch.testing.assert_close(batched.double(), separate.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("logit", range(CLASSES))
@pytest.mark.parametrize("sound", [True, False])
def test_non_finite_logits_are_not_certified(value: float, logit: int, sound: bool) -> None:
    """This holds for every label, also if the logit of the label is infinite."""
    for make in (make_relu_net, make_distance_net):
        net, images, _ = make_valid_inputs(make)
        with torch.no_grad():
            (net.bias if make is make_distance_net else net[-1].bias)[logit] = value
        for label in range(CLASSES):
            labels = torch.full((BATCH,), label)
            for certifier in ("lipschitz", "ibp") if make is make_distance_net else ("ibp", "crown"):
                assert not certify(net, images, labels, 0.0, certifier, sound).any()
                assert (certified_radius(net, images, labels, certifier, sound) <= 0).all()


@pytest.mark.parametrize("constant", [0.0, -1.0, math.nan, math.inf])
def test_invalid_lipschitz_constants_are_rejected(constant: float) -> None:
    net, images, labels = make_valid_inputs(make_relu_net)
    net.lipschitz_constant = constant
    with pytest.raises(ValueError, match=r"^lipschitz_constant="):
        lipschitz_radius(net, images, labels, sound=False)


def test_invalid_output_shapes_are_rejected() -> None:
    """The outputs are feature maps, or a single row of logits for the whole batch."""
    _, images, labels = make_valid_inputs(make_relu_net)
    networks = [nn.Sequential(nn.Conv2d(1, CLASSES, 1)), nn.Sequential(nn.Flatten(0), nn.Linear(64, CLASSES))]
    for net in networks:
        net.eval().lipschitz_constant = 1.0
        for call in (
            lambda net: certify(net, images, labels, 0.1, "lipschitz", sound=False),
            lambda net: certify(net, images, labels, 0.1, "ibp"),
            lambda net: run_attack(net, images, labels, 0.1),
        ):
            with pytest.raises((ValueError, TypeError)):
                call(net)


@every_entry
def test_images_of_another_size_are_rejected(entry: str) -> None:
    make, call = ENTRIES[entry]
    net, images, labels = make_valid_inputs(make)
    for invalid in (images[:, :, 1:], images.flatten(1)[:, 1:], images.expand(-1, 3, -1, -1)):
        with pytest.raises((TypeError, ValueError), match=r"^images="):
            call(net, invalid, labels, 0.05)


@pytest.mark.parametrize(
    ("shape", "suggestion"), [((8,), "images[None]"), ((3, 8, 8), "images[None]"), ((50, 8, 8), "images[:, None]")]
)
def test_missing_axis_error_suggests_the_index(shape: tuple[int, ...], suggestion: str) -> None:
    images = torch.rand(shape)
    with pytest.raises(ValueError, match=rf"{re.escape(suggestion)} for"):
        check_images(images)


def test_invalid_boxes_are_rejected() -> None:
    net, images, labels = make_valid_inputs(make_relu_net)
    whole = torch.ones_like(images)
    for box in (
        Box(whole, -whole),
        Box(whole * math.nan, whole),
        Box(-whole, whole * math.inf),
        Box(whole, whole[:1]),
        Box(whole.half(), whole.half()),
        Box(whole, whole.double()),
        Box(whole.numpy(), whole.numpy()),
    ):
        for call in (
            lambda box: ibp_bounds(net, box),
            lambda box: crown_bounds(net, box),
            lambda box: ibp_logit_differences(net, box, labels),
            lambda box: crown_logit_differences(net, box, labels),
        ):
            with pytest.raises((TypeError, ValueError), match=r"^box"):
                call(box)


@pytest.mark.parametrize("eps", [-0.1, math.nan, 1.5, math.inf])
def test_each_radius_of_a_box_is_checked(eps: float) -> None:
    images = torch.rand(2, *SHAPE)
    with pytest.raises(ValueError, match=r"^eps"):
        perturbation_box(images, torch.tensor([0.1, eps], dtype=torch.float64).view(2, 1, 1, 1))


def test_worst_case_bounds_reject_invalid_eps_and_labels() -> None:
    for make in (make_relu_net, make_distance_net):
        net, images, labels = make_valid_inputs(make)
        bounds = WorstCaseBounds(net)
        for eps in (-0.1, math.nan, 2.0):
            with pytest.raises(ValueError, match=r"^eps="):
                bounds(images, labels, eps, math.inf)
        for invalid in (labels[:, None], labels.float(), labels[:-1]):
            with pytest.raises((ValueError, TypeError), match=r"^labels="):
                bounds(images, invalid, 0.1, math.inf)
        assert torch.equal(
            bounds(images, labels.int(), 0.1, math.inf).logit_difference_bounds,
            bounds(images, labels, 0.1, math.inf).logit_difference_bounds,
        )


def test_normalized_images_error_suggests_a_first_layer() -> None:
    """With the normalization as its first layer, the network's certificates hold against attacks."""
    torch.manual_seed(0)
    classes = torch.rand(CLASSES, 16)
    labels = torch.randint(CLASSES, (300,))
    images = (classes[labels] + 0.3 * torch.randn(300, 16)).clamp(0, 1)
    net = make_relu_net().train()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    normalized = (images - 0.5) / 0.25
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(normalized), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    for certifier in ("ibp", "crown"):
        with pytest.raises(ValueError, match=r"^images=.*first layer"):
            certify(net, normalized, labels, 0.01, certifier)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(16, 16)
            with torch.no_grad():
                self.scale.weight.copy_(4 * torch.eye(16))
                self.scale.bias.fill_(-2)
            self.network = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(self.scale(x))

    whole = Scaled().eval()
    for certifier in ("ibp", "crown"):
        certified = certify(whole, images, labels, 0.02, certifier)
        assert certified.any() and not (certified & (whole(images).argmax(dim=1) != labels)).any()
        assert run_attack(whole, images, labels, 0.02)[certified].all()


def test_eps_accepts_numpy_and_torch_scalars() -> None:
    net, images, labels = make_valid_inputs(make_relu_net)
    expected = certify(net, images, labels, 0.25, "ibp")
    for eps in (np.float32(0.25), torch.tensor(0.25), np.array(0.25)):
        assert torch.equal(certify(net, images, labels, eps, "ibp"), expected)
