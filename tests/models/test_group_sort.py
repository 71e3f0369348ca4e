"""GroupSort nets: Lipschitz in pixels by rows that are truly projected onto the l1 ball."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from linflab.models.networks.cost import count_flops
from linflab.models.networks.group_sort import GroupSortConfig, GroupSortNet
from linflab.models.networks.layers import GroupSort, L1Linear, project_onto_l1_ball
from linflab.models.robustness.bounds.interval import Box, interval_bounds, interval_margins, layer_bounds, pixel_box
from linflab.models.robustness.certification import certified_radius, certifier_of
from linflab.models.robustness.objectives import wrong_class_margins

SHAPE = (1, 4, 4)


def random_net(seed: int, depth: int = 3, width: int = 12, group: int = 2, std: float = 0.5) -> GroupSortNet:
    torch.manual_seed(seed)
    return GroupSortConfig(depth=depth, width=width, group=group).build(SHAPE, 5, (0.3,), std).double().eval()


def projection(row: np.ndarray) -> np.ndarray:
    """By sorting, as Duchi et al. 2008, Figure 1, in the dtype of the row."""
    if np.abs(row).sum() <= 1:
        return row
    sizes = np.sort(np.abs(row))[::-1]
    thresholds = (np.cumsum(sizes) - 1) / np.arange(1, len(row) + 1)
    return np.sign(row) * np.maximum(np.abs(row) - thresholds[np.nonzero(sizes > thresholds)[0][-1]], 0)


@given(
    seed=st.integers(0, 2**32 - 1),
    inputs=st.integers(1, 60),
    scale=st.sampled_from([1e-8, 1e-3, 0.05, 1.0, 1e3]),
    kind=st.sampled_from(["normal", "rounded", "heavy"]),
)
def test_projection(seed: int, inputs: int, scale: float, kind: str) -> None:
    """Also of rows with ties and zeros, and of those that a few weights rule."""
    torch.manual_seed(seed)
    rows = torch.randn(9, inputs, dtype=torch.float64)
    rows = {"normal": rows, "rounded": rows.round(), "heavy": rows**7}[kind] * scale
    expected = torch.from_numpy(np.stack([projection(row) for row in rows.numpy()]))
    torch.testing.assert_close(project_onto_l1_ball(rows), expected, rtol=1e-11, atol=1e-11 * max(1, rows.abs().max()))
    single = project_onto_l1_ball(rows.float())
    assert single.double().abs().sum(dim=1).max() <= 1 + 1e-6
    inside = rows.float().abs().sum(dim=1) <= 1
    assert torch.equal(single[inside], rows.float()[inside])


def test_gradient_of_the_projection() -> None:
    """Of rows inside, zeros among them, and outside, where the threshold moves with the weights."""
    torch.manual_seed(0)
    rows = torch.randn(6, 8, dtype=torch.float64) * torch.tensor([0.01, 0.1, 0.5, 1, 3, 1000]).double()[:, None]
    rows[0, :3] = 0
    assert torch.autograd.gradcheck(project_onto_l1_ball, rows.requires_grad_(), eps=1e-7)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_stay_so_alone(wrong: float) -> None:
    rows = torch.randn(5, 30)
    rows[2, 7] = wrong
    projected = project_onto_l1_ball(rows)
    assert not projected[2].isfinite().all() and projected[[0, 1, 3, 4]].isfinite().all()


def test_projection_of_rows_as_long_as_those_of_the_paper() -> None:
    torch.manual_seed(0)
    layer = L1Linear(1024, 64)
    norms = layer.projected_weight.double().abs().sum(dim=1)
    assert norms.max() <= 1 + 1e-6 and norms.min() >= 1 - 1e-6
    x = torch.randn(3, 1024)
    torch.testing.assert_close(layer(x), x @ layer.projected_weight.T + layer.bias)


@pytest.mark.parametrize("group", [2, 3, 6])
def test_group_sort(group: int) -> None:
    x = torch.randn(7, 12)
    expected = np.sort(x.numpy().reshape(7, -1, group), axis=2).reshape(7, 12)
    assert np.array_equal(GroupSort(group)(x).numpy(), expected)
    box = Box(x, x + torch.rand(7, 12))
    lower, upper = layer_bounds(GroupSort(group), box)
    assert torch.equal(lower, GroupSort(group)(box.lower)) and torch.equal(upper, GroupSort(group)(box.upper))


@given(
    seed=st.integers(0, 2**32 - 1),
    depth=st.integers(1, 5),
    group=st.sampled_from([2, 3, 12]),
    std=st.floats(0.05, 2),
    size=st.floats(1e-6, 3),
)
def test_lipschitz_in_pixels(seed: int, depth: int, group: int, std: float, size: float) -> None:
    net = random_net(seed, depth=depth, group=group, std=std)
    x = torch.rand(32, *SHAPE, dtype=torch.float64)
    step = torch.rand_like(x) * 2 - 1
    step[::2] = step[::2].sign()
    with torch.no_grad():
        moved = (net(x) - net(x + size * step)).abs().amax(dim=1)
    allowed = net.lipschitz_constant * size * step.flatten(1).abs().amax(dim=1)
    assert net.lipschitz_constant == pytest.approx(1 / std, rel=1e-6)
    assert (moved <= allowed * (1 + 1e-12) + 1e-12).all()


def test_lipschitz_constant_is_reached() -> None:
    """One pixel, passed on whole: a smaller constant would be unsound."""
    net = GroupSortConfig(depth=2, width=2).build((1, 1, 1), 2, std=0.25).eval()
    with torch.no_grad():
        for layer in net.layers:
            if isinstance(layer, L1Linear):
                layer.weight.zero_()[:, 0] = 9.0
    moved = net(torch.tensor([[[[0.1]]]])) - net(torch.tensor([[[[0.2]]]]))
    assert moved.abs().max().item() == pytest.approx(0.1 * net.lipschitz_constant, rel=1e-5)


@given(seed=st.integers(0, 2**32 - 1), eps=st.floats(0, 0.3), group=st.sampled_from([2, 3]))
def test_bounds_hold_everything_in_the_box(seed: int, eps: float, group: int) -> None:
    net = random_net(seed, group=group)
    images, labels = torch.rand(8, *SHAPE, dtype=torch.float64), torch.randint(5, (8,))
    box = pixel_box(images, eps)
    with torch.no_grad():
        outputs, margins = interval_bounds(net, box), interval_margins(net, box, labels)
        for k in range(20):
            share = torch.rand_like(images)
            logits = net(torch.lerp(*box, share.round() if k % 2 else share))
            assert (logits >= outputs.lower - 1e-9).all() and (logits <= outputs.upper + 1e-9).all()
            assert (wrong_class_margins(logits, labels) <= margins + 1e-9).all()


def test_certificates() -> None:
    """By the Lipschitz constant, unless another is asked for; intervals, at least as tight, agree."""
    net = random_net(0)
    images = torch.rand(16, *SHAPE, dtype=torch.float64)
    labels = net(images).argmax(dim=1)
    assert certifier_of(net) == "lipschitz"
    radii = [certified_radius(net, images, labels, certifier) for certifier in ("lipschitz", "interval")]
    assert (radii[0] > 0).all() and (radii[1] >= radii[0].clamp_max(1) - 1e-5).all()


def test_size_of_the_table() -> None:
    with torch.device("meta"):
        net = GroupSortConfig().build((1, 28, 28), 10)
    assert f"{count_flops(net, (1, 28, 28)) / 1e6:.2g}" == "2.9"


def test_groups_must_fill_the_width() -> None:
    with pytest.raises(ValidationError, match="group=3 does not divide width=1024; it divides width=1026"):
        GroupSortConfig(group=3)


def test_exported_as_it_is() -> None:
    """As MLflow's record has it: tracing can't follow a loop that ends by numbers."""
    torch.manual_seed(0)
    net = GroupSortConfig(depth=3, width=16).build((1, 4, 4), 5, (0.3,), 0.4).eval()
    with torch.no_grad():
        for layer in net.parameters():
            layer.mul_(5)
    images = torch.rand(3, 1, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(net, (images,)).module()(images), net(images))
