"""Tests of GroupSort nets: exact projection onto the l1 ball, Lipschitz constant, bounds and export."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from linflab.models.networks.cost import count_flops
from linflab.models.networks.group_sort import GroupSortConfig, GroupSortNet
from linflab.models.networks.layers import GroupSort, L1ProjectedLinear, project_onto_l1_ball
from linflab.models.robustness.bounds.boxes import Box, perturbation_box
from linflab.models.robustness.bounds.rules import propagate_layer
from linflab.models.robustness.certification import certified_radius, default_certifier
from linflab.models.robustness.margins import logit_differences
from tests.models.real_arithmetic import ibp_bounds, ibp_logit_differences

SHAPE = (1, 4, 4)


def make_random_net(seed: int, depth: int = 3, width: int = 12, group_size: int = 2, std: float = 0.5) -> GroupSortNet:
    torch.manual_seed(seed)
    return GroupSortConfig(depth=depth, width=width, group_size=group_size).build(SHAPE, 5, (0.3,), std).double().eval()


def project_by_sorting(row: np.ndarray) -> np.ndarray:
    """Return the projection onto the l1 ball by sorting (Duchi et al. 2008, Figure 1)."""
    if np.abs(row).sum() <= 1:
        return row
    magnitudes = np.sort(np.abs(row))[::-1]
    thresholds = (np.cumsum(magnitudes) - 1) / np.arange(1, len(row) + 1)
    return np.sign(row) * np.maximum(np.abs(row) - thresholds[np.nonzero(magnitudes > thresholds)[0][-1]], 0)


@given(
    seed=st.integers(0, 2**32 - 1),
    inputs=st.integers(1, 60),
    scale=st.sampled_from([1e-8, 1e-3, 0.05, 1.0, 1e3]),
    kind=st.sampled_from(["normal", "rounded", "heavy"]),
)
def test_projection_matches_sorting(seed: int, inputs: int, scale: float, kind: str) -> None:
    """The rows include ties, zeros and a few dominating weights."""
    torch.manual_seed(seed)
    rows = torch.randn(9, inputs, dtype=torch.float64)
    rows = {"normal": rows, "rounded": rows.round(), "heavy": rows**7}[kind] * scale
    expected = torch.from_numpy(np.stack([project_by_sorting(row) for row in rows.numpy()]))
    torch.testing.assert_close(project_onto_l1_ball(rows), expected, rtol=1e-11, atol=1e-11 * max(1, rows.abs().max()))
    single = project_onto_l1_ball(rows.float())
    assert single.double().abs().sum(dim=1).max() <= 1 + 1e-6
    inside = rows.float().abs().sum(dim=1) <= 1
    assert torch.equal(single[inside], rows.float()[inside])


def test_projection_gradient_matches_finite_differences() -> None:
    """The rows lie inside the ball, with zeros, and outside, where the threshold depends on the weights."""
    torch.manual_seed(0)
    rows = torch.randn(6, 8, dtype=torch.float64) * torch.tensor([0.01, 0.1, 0.5, 1, 3, 1000]).double()[:, None]
    rows[0, :3] = 0
    assert torch.autograd.gradcheck(project_onto_l1_ball, rows.requires_grad_(), eps=1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_leave_other_rows_finite(value: float) -> None:
    rows = torch.randn(5, 30)
    rows[2, 7] = value
    projected = project_onto_l1_ball(rows)
    assert not projected[2].isfinite().all() and projected[[0, 1, 3, 4]].isfinite().all()


def test_projection_of_long_rows_has_unit_norm() -> None:
    torch.manual_seed(0)
    layer = L1ProjectedLinear(1024, 64)
    norms = layer.projected_weight.double().abs().sum(dim=1)
    assert norms.max() <= 1 + 1e-6 and norms.min() >= 1 - 1e-6
    x = torch.randn(3, 1024)
    torch.testing.assert_close(layer(x), x @ layer.projected_weight.T + layer.bias)


@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_group_sort_matches_numpy(group_size: int) -> None:
    x = torch.randn(7, 12)
    expected = np.sort(x.numpy().reshape(7, -1, group_size), axis=2).reshape(7, 12)
    assert np.array_equal(GroupSort(group_size)(x).numpy(), expected)
    box = Box(x, x + torch.rand(7, 12))
    lower, upper = propagate_layer(GroupSort(group_size), box)
    assert torch.equal(lower, GroupSort(group_size)(box.lower)) and torch.equal(upper, GroupSort(group_size)(box.upper))


@given(
    seed=st.integers(0, 2**32 - 1),
    depth=st.integers(1, 5),
    group_size=st.sampled_from([2, 3, 12]),
    std=st.floats(0.05, 2),
    size=st.floats(1e-6, 3),
)
def test_logits_respect_the_lipschitz_constant(seed: int, depth: int, group_size: int, std: float, size: float) -> None:
    net = make_random_net(seed, depth=depth, group_size=group_size, std=std)
    x = torch.rand(32, *SHAPE, dtype=torch.float64)
    step = torch.rand_like(x) * 2 - 1
    step[::2] = step[::2].sign()
    with torch.no_grad():
        difference = (net(x) - net(x + size * step)).abs().amax(dim=1)
    limit = net.lipschitz_constant * size * step.flatten(1).abs().amax(dim=1)
    assert net.lipschitz_constant == pytest.approx(1 / std, rel=1e-6)
    assert (difference <= limit * (1 + 1e-12) + 1e-12).all()


def test_lipschitz_constant_is_attained() -> None:
    """The net passes one pixel on unchanged, so a smaller constant would be unsound."""
    net = GroupSortConfig(depth=2, width=2).build((1, 1, 1), 2, std=0.25).eval()
    with torch.no_grad():
        for layer in net.layers:
            if isinstance(layer, L1ProjectedLinear):
                layer.weight.zero_()[:, 0] = 9.0
    difference = net(torch.tensor([[[[0.1]]]])) - net(torch.tensor([[[[0.2]]]]))
    assert difference.abs().max().item() == pytest.approx(0.1 * net.lipschitz_constant, rel=1e-5)


@pytest.mark.integration
@given(seed=st.integers(0, 2**32 - 1), eps=st.floats(0, 0.3), group_size=st.sampled_from([2, 3]))
def test_bounds_contain_all_outputs_in_the_box(seed: int, eps: float, group_size: int) -> None:
    net = make_random_net(seed, group_size=group_size)
    images, labels = torch.rand(8, *SHAPE, dtype=torch.float64), torch.randint(5, (8,))
    box = perturbation_box(images, eps)
    with torch.no_grad():
        outputs, differences = ibp_bounds(net, box), ibp_logit_differences(net, box, labels)
        for k in range(20):
            fraction = torch.rand_like(images)
            logits = net(torch.lerp(*box, fraction.round() if k % 2 else fraction))
            assert (logits >= outputs.lower - 1e-9).all() and (logits <= outputs.upper + 1e-9).all()
            assert (logit_differences(logits, labels) <= differences + 1e-9).all()


def test_lipschitz_radii_are_below_ibp_radii() -> None:
    """The default certifier is `lipschitz`; `ibp` is at least as tight."""
    net = make_random_net(0)
    images = torch.rand(16, *SHAPE, dtype=torch.float64)
    labels = net(images).argmax(dim=1)
    assert default_certifier(net) == "lipschitz"
    radii = [certified_radius(net, images, labels, certifier) for certifier in ("lipschitz", "ibp")]
    assert (radii[0] > 0).all() and (radii[1] >= radii[0].clamp_max(1) - 1e-5).all()


def test_flops_match_the_published_table() -> None:
    with torch.device("meta"):
        net = GroupSortConfig().build((1, 28, 28), 10)
    assert f"{count_flops(net, (1, 28, 28)) / 1e6:.2g}" == "2.9"


def test_group_size_must_divide_the_width() -> None:
    with pytest.raises(ValidationError, match=r"group_size=3.*width=1024.*width=1026"):
        GroupSortConfig(group_size=3)


def test_exported_network_matches_eager() -> None:
    """MLflow stores the exported network; export cannot trace a loop whose end depends on values."""
    torch.manual_seed(0)
    net = GroupSortConfig(depth=3, width=16).build((1, 4, 4), 5, (0.3,), 0.4).eval()
    with torch.no_grad():
        for layer in net.parameters():
            layer.mul_(5)
    images = torch.rand(3, 1, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(net, (images,)).module()(images), net(images))
