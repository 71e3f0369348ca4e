"""Tests of zonotopes with estimated widths against explicit generator matrices in float64."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from linflab.models.robustness.bounds.boxes import Box, perturbation_box
from linflab.models.robustness.bounds.ibp import trace_and_check
from linflab.models.robustness.bounds.steps import Trace
from linflab.models.robustness.bounds.zonotope import ZonotopeEstimate
from tests.models.relu_networks import RELU_NETS, SHAPE, build_relu_network
from tests.models.test_crown import Affine, to_affine_chain

every_net = pytest.mark.parametrize("kind", sorted(RELU_NETS))


class Generators(NamedTuple):
    """Center (N,) and generators (N, D) of a zonotope."""

    center: np.ndarray
    matrix: np.ndarray

    @property
    def width(self) -> np.ndarray:
        return np.abs(self.matrix).sum(axis=1)


def deep_z(low: float, high: float) -> tuple[float, float, float]:
    """Return slope, offset and radius of the smallest parallelogram around a ReLU on [low, high]."""
    if low >= 0 or high <= 0:
        return float(low >= 0), 0.0, 0.0
    slope = high / (high - low)
    return slope, -slope * low / 2, -slope * low / 2


def propagate_generators(
    chain: list[Affine], center: np.ndarray, radius: np.ndarray, given: list[list[np.ndarray]] | None = None
) -> tuple[list[Generators], list[list[np.ndarray]]]:
    """Return zonotopes before each ReLU and of the outputs, and slopes, offsets and radii of the ReLUs.

    Args:
        chain: Affine maps, each followed by a ReLU on its first outputs.
        center: Center of the input box.
        radius: Half-widths of the input box.
        given: Slopes, offsets and radii to use; by default those of DeepZ.
    """
    zonotope, before, relaxations = Generators(center, np.diag(radius)), [], []
    for matrix, constant, relu in chain:
        zonotope = Generators(matrix @ zonotope.center + constant, matrix @ zonotope.matrix)
        before.append(zonotope)
        if not relu:
            continue
        low, high = zonotope.center - zonotope.width, zonotope.center + zonotope.width
        lines = [np.array(column) for column in zip(*map(deep_z, low[:relu], high[:relu]), strict=True)]
        relaxations.append(lines)
        slope, offset, extra = given[len(relaxations) - 1] if given is not None else lines
        slope = np.append(slope, np.ones(len(low) - relu))
        new = np.zeros((len(low), relu))
        np.fill_diagonal(new, extra)
        center = slope * zonotope.center
        center[:relu] += offset
        zonotope = Generators(center, np.hstack([slope[:, None] * zonotope.matrix, new]))
    return before, relaxations


class ExactZonotope(ZonotopeEstimate):
    """Zonotopes with exact widths, given for one sample in the order in which activations need them."""

    widths: list[np.ndarray]

    def width(self, name: str) -> Tensor:
        return torch.tensor(self.widths[len(self.terms) - 1]).view_as(self.centers[name])


def make_case(kind: str, eps: float, images: int = 1) -> tuple[nn.Module, Trace, Box]:
    net = build_relu_network(kind, 3).double()
    box = perturbation_box(torch.rand(images, *SHAPE, dtype=torch.float64), eps)
    return net, trace_and_check(net, box), box


def flat_box(box: Box, sample: int = 0) -> tuple[np.ndarray, np.ndarray]:
    lower, upper = (bound[sample].flatten().numpy() for bound in box)
    return (lower + upper) / 2, (upper - lower) / 2


@every_net
@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_zonotope_with_exact_widths_equals_deep_z(kind: str, eps: float) -> None:
    net, traced, box = make_case(kind, eps)
    before, relaxations = propagate_generators(to_affine_chain(net), *flat_box(box))
    zonotope = ExactZonotope(traced, box, 2, torch.Generator())
    zonotope.widths = [z.width[: len(lines[0])] for z, lines in zip(before, relaxations, strict=False)]
    with torch.no_grad():
        zonotope.propagate(traced.steps)
    _, *activations = zonotope.terms
    for name, lines in zip(activations, relaxations, strict=True):
        for actual, expected in zip(zonotope.terms[name], lines, strict=True):
            np.testing.assert_allclose(actual.flatten().numpy(), expected, rtol=1e-9, atol=1e-12)
    unstable = [np.mean((lines[0] > 0) & (lines[0] < 1)) for lines in relaxations]
    assert max(unstable) > 0.1  # the relaxations matter
    np.testing.assert_allclose(zonotope.centers[traced.output][0].numpy(), before[-1].center, rtol=1e-9)

    coefficients = {name: 2 * torch.rand_like(terms.offset) - 1 for name, terms in zonotope.terms.items()}
    values = zonotope.points(coefficients, traced.steps)
    flat = np.concatenate([part.flatten().numpy() for part in coefficients.values()])
    expected = before[-1].center + before[-1].matrix @ flat
    np.testing.assert_allclose(values[traced.output][0].detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@every_net
def test_estimated_widths_converge_to_exact_ones(kind: str) -> None:
    """The chain of matrices uses the estimate's own relaxations, which widths of earlier layers determine."""
    projections = 1000
    net, traced, box = make_case(kind, 0.05, images=2)
    zonotope = ZonotopeEstimate(traced, box, projections, torch.Generator().manual_seed(0))
    with torch.no_grad():
        zonotope.propagate(traced.steps)
        names = [step.inputs[0] for step in traced.steps if step.output in zonotope.terms]
        widths = [zonotope.width(name) for name in (*names, traced.output)]
    _, *terms = zonotope.terms.values()
    error = math.pi / 2 / math.sqrt(projections)  # standard error of the sample median, relative
    for sample in range(2):
        given = [[part[sample].flatten().numpy() for part in term] for term in terms]
        before, _ = propagate_generators(to_affine_chain(net), *flat_box(box, sample), given)
        for k, (width, exact) in enumerate(zip(widths, before, strict=True)):
            ratio = width[sample].flatten().numpy() / exact.width[: width[sample].numel()]
            if k == 0:
                np.testing.assert_allclose(ratio, 1, rtol=1e-9)
            else:
                assert np.abs(ratio - 1).max() < 5 * error and 0.2 * error < np.abs(ratio - 1).mean() < 1.5 * error


def test_layer_without_relaxation_returns_a_box() -> None:
    """Max pooling has no relaxation with equal slopes; its outputs get coefficients of their own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)).double().eval()
    box = perturbation_box(torch.rand(2, *SHAPE, dtype=torch.float64), 0.1)
    traced = trace_and_check(net, box)
    zonotope = ZonotopeEstimate(traced, box, 3, torch.Generator())
    with torch.no_grad():
        zonotope.propagate(traced.steps)
        weight, bias = net[0].weight, net[0].bias
        center = nn.functional.conv2d((box.lower + box.upper) / 2, weight, bias)
        width = nn.functional.conv2d((box.upper - box.lower) / 2, weight.abs())
        low, high = (nn.functional.max_pool2d(bound, 2).flatten(1) for bound in (center - width, center + width))
        expected = net[3]((low + high) / 2), (high - low) / 2 @ net[3].weight.abs().T
    torch.testing.assert_close(zonotope.centers[traced.output], expected[0])
    torch.testing.assert_close(zonotope.width(traced.output), expected[1])
