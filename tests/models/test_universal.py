"""Nets that approximate 1-Lipschitz functions: error, size, Lipschitz constant, certificates and export."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linflab.models.networks import count_parameters
from linflab.models.networks.linf_dist import LinfDistNet
from linflab.models.networks.universal import (
    Form,
    approximate,
    approximate_samples,
    covering_radius,
    network_size,
    plan_grid,
)
from linflab.models.robustness.certification import make_certifier
from linflab.models.robustness.margins import margin

FORMS: tuple[Form, Form] = ("shallow", "deep")
Function = Callable[[Tensor], Tensor]


def make_function(inputs: int, outputs: int, seed: int) -> Function:
    """Return a random 1-Lipschitz function: in each output, minima, maxima and means of distances, and waves."""
    generator = torch.Generator().manual_seed(seed)
    centers = 3 * torch.rand(outputs, 5, inputs, dtype=torch.float64, generator=generator) - 1
    offsets, kinds = torch.randn(outputs, 5, dtype=torch.float64, generator=generator), torch.arange(outputs) + seed

    def one(points: Tensor, k: int) -> Tensor:
        distances = (points[:, None] - centers[k]).abs().amax(dim=2)
        values = (
            (distances + offsets[k]).amin(dim=1),
            (offsets[k] - distances).amax(dim=1),
            torch.sin(3 * distances).mean(dim=1) / 3,
            points.mean(dim=1) - 2 * offsets[k, 0],
        )
        return values[int(kinds[k]) % len(values)]

    return lambda points: torch.stack([one(points, k) for k in range(outputs)], dim=1)


def make_box(inputs: int, seed: int) -> tuple[list[float], list[float]]:
    generator = torch.Generator().manual_seed(seed)
    lower = 4 * torch.rand(inputs, generator=generator) - 2
    return lower.tolist(), (lower + 0.5 + torch.rand(inputs, generator=generator)).tolist()


def fine_grid(lower: list[float], upper: list[float], count: int = 4000) -> Tensor:
    """Return a grid with the corners of the box."""
    per_axis = max(2, int(count ** (1 / len(lower))))
    axes = [torch.linspace(a, b, per_axis, dtype=torch.float64) for a, b in zip(lower, upper, strict=True)]
    return torch.cartesian_prod(*axes).reshape(-1, len(lower))


def widths(network: LinfDistNet) -> list[int]:
    return [len(layer.weight) for layer in (*network.features.distances, network.last)]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=20, deadline=None)
@given(
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    divisions=st.floats(0.6, 3.0),
)
def test_nets_are_lipschitz_and_within_the_tolerance(
    form: Form, inputs: int, outputs: int, seed: int, divisions: float
) -> None:
    function, (lower, upper) = make_function(inputs, outputs, seed), make_box(inputs, seed)
    tolerance = 0.5 / divisions
    network = approximate(function, lower, upper, tolerance, form)
    points = fine_grid(lower, upper)
    with torch.no_grad():
        assert (network(points) - function(points)).abs().max() <= tolerance + 1e-9
        size = plan_grid(lower, upper, tolerance).size(form, outputs)
        assert size.depth == len(widths(network)) and size.width == max(widths(network))
        assert size.parameters == count_parameters(network)
        assert form == "shallow" or size.width == inputs + 1 + outputs
        # The Lipschitz property holds everywhere, also outside the box and for tiny steps.
        starts = 6 * torch.rand(200, inputs, dtype=torch.float64) - 3
        for length in (1e-4, 0.1, 2.0):
            steps = length * (2 * torch.rand(200, inputs, dtype=torch.float64) - 1)
            change = (network(starts + steps) - network(starts)).abs().amax(dim=1)
            assert (change <= steps.abs().amax(dim=1) + 1e-11).all()


@pytest.mark.parametrize("inputs", [1, 2, 3, 4])
def test_width_of_one_function_is_at_most_inputs_plus_two(inputs: int) -> None:
    function, (lower, upper) = make_function(inputs, 1, seed=inputs), make_box(inputs, seed=3)
    network = approximate(function, lower, upper, 0.3, "deep")
    assert max(widths(network)) <= inputs + 2 and network.lipschitz_constant == 1


@pytest.mark.parametrize("form", FORMS)
def test_samples_determine_a_net_for_all_functions_with_these_values(form: Form) -> None:
    """The largest and the smallest 1-Lipschitz function with the values are both within the tolerance."""
    generator = torch.Generator().manual_seed(0)
    lower, upper = [0.0, 0.0], [1.0, 2.0]
    points = torch.rand(150, 2, dtype=torch.float64, generator=generator) * torch.tensor([1.0, 2.0])
    values = make_function(2, 2, seed=1)(points)
    radius = covering_radius(points, lower, upper)
    grid = fine_grid(lower, upper)
    distances = (grid[:, None] - points).abs().amax(dim=2)
    assert distances.amin(dim=1).max() <= radius <= distances.amin(dim=1).max() + 0.05
    network = approximate_samples(points, values, lower, upper, radius, form)
    with torch.no_grad():
        outputs = network(grid)
    for k in range(2):
        for extreme in ((distances + values[:, k]).amin(dim=1), (values[:, k] - distances).amax(dim=1)):
            assert (outputs[:, k] - extreme).abs().max() <= radius + 1e-9


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["lipschitz", "ibp"])
def test_certificates_hold_in_float32(form: Form, kind: str) -> None:
    """Radii are exact up to twice the tolerance for |f|, and no grid point of the ball has another class."""
    center = torch.tensor([0.4, 0.6], dtype=torch.float64)

    def logits(points: Tensor) -> Tensor:
        distance = (points - center).abs().amax(dim=1) - 0.25
        return torch.stack([distance, -distance], dim=1)

    network = approximate(logits, [0.0, 0.0], [1.0, 1.0], 0.06, form).float()
    points = torch.rand(40, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = network(points).argmax(dim=1)
    radii = make_certifier(network, kind).compute_radius(points, labels)
    expected = ((points - center).abs().amax(dim=1) - 0.25).abs()
    assert (radii > 0).sum() > 30 and (radii >= expected - 0.06 - 1e-4).all()
    grid = fine_grid([-1.0, -1.0], [1.0, 1.0], 400).float()
    for point, label, radius in zip(points, labels, radii.float(), strict=True):
        ball = (point + radius.clamp_min(0) * grid).clamp(0, 1)
        with torch.no_grad():
            assert radius <= 0 or (margin(network(ball), label.expand(len(ball))) > 0).all()


def test_invalid_arguments_are_rejected_by_name() -> None:
    def steep(points: Tensor) -> Tensor:
        return 2 * points[:, 0]

    points = torch.tensor([[0.0], [1.0]])
    for name, call in (
        ("function", lambda: approximate(steep, [0.0], [1.0], 0.1)),
        ("tolerance", lambda: approximate(steep, [0.0], [1.0], 0.0)),
        ("tolerance", lambda: approximate(steep, [0.0] * 4, [1.0] * 4, 0.01)),
        ("upper", lambda: plan_grid([0.0], [0.0], 0.1)),
        ("form", lambda: network_size("wide", 3, 1)),  # type: ignore[arg-type]
        ("samples", lambda: network_size("deep", 0, 1)),
        ("values", lambda: approximate_samples(points, torch.tensor([0.0, 1.5]), [0.0], [1.0], 0.6)),
        ("tolerance", lambda: approximate_samples(points, torch.tensor([0.0, 0.5]), [0.0], [1.0], 0.4)),
        ("points", lambda: approximate_samples(points, torch.tensor([0.0, 0.5]), [0.5], [1.0], 0.6)),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            call()
