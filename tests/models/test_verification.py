"""Tests of verified properties against sampling, exact references and counterexamples."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from linflab.models.robustness.bounds import Box
from linflab.models.robustness.bounds.ibp import trace_and_check
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.certification import make_certifier
from linflab.models.robustness.verification import OutputBound, OutputSet, Region, robustness_region, verify
from tests.models.relu_networks import SHAPE, build_relu_network

NETWORKS = ("relu", "deep", "smooth", "affine", "pooled")


def make_network(kind: str, inputs: int = 3, outputs: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = {
        "relu": [nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, outputs)],
        "deep": [nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 8), nn.LeakyReLU(0.1), nn.Linear(8, outputs), nn.ReLU()],
        "smooth": [nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs)],
        "affine": [nn.Linear(inputs, 8), nn.Linear(8, outputs)],
        "pooled": [
            nn.Linear(inputs, 8), nn.Unflatten(1, (1, 2, 4)), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, outputs),
        ],
    }  # fmt: skip
    return nn.Sequential(*layers[kind]).eval()


def make_set(rows: list[list[float]], offsets: list[float], strict: bool = False) -> OutputSet:
    coefficients, constants = (torch.tensor(one, dtype=torch.float64) for one in (rows, offsets))
    return OutputSet(coefficients, constants, torch.full((len(rows),), strict))


def cube(center: float, radius: float, inputs: int, *unsafe: OutputSet) -> Region:
    middle = torch.full((inputs,), center, dtype=torch.float64)
    return Region(middle - radius, middle + radius, unsafe)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("bound", list(OutputBound.registry))
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), radius=st.sampled_from([0.0, 1e-6, 0.1, 2.0]))
def test_output_bounds_are_sound(kind: str, bound: str, seed: int, radius: float) -> None:
    network = make_network(kind, seed=seed % 5)
    generator = torch.Generator().manual_seed(seed)
    center = 2 * torch.rand(4, 3, generator=generator) - 1
    box = Box(center - radius, center + radius)
    functions = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    with strict_float32(), torch.no_grad():
        traced = trace_and_check(network, box)
        if bound == "crown" and kind == "affine":
            with pytest.raises(TypeError, match="crown"):
                OutputBound.registry[bound]().lower(traced, box, functions)
            return
        sound = OutputBound.registry[bound](True).lower(traced, box, functions)
        real = OutputBound.registry[bound](False).lower(traced, box, functions)
        points = torch.lerp(box.lower, box.upper, torch.rand(64, 4, 3, generator=generator).round(decimals=1))
        values = network(points.clamp(box.lower, box.upper).flatten(0, 1)).double() @ functions.mT
    assert (values.view(64, 4, 5) >= sound).all()
    assert (real >= sound - 1e-6).all()
    if radius == 0.0:  # the bounds are tight
        torch.testing.assert_close(real, values.view(64, 4, 5)[0], rtol=1e-5, atol=1e-5)


def find_range(network: nn.Module, lower: Tensor, upper: Tensor, row: Tensor) -> tuple[float, float]:
    """Return the exact range of a linear function of the outputs of Linear-ReLU-Linear, by enumeration of patterns."""
    import numpy as np
    from scipy.optimize import linprog

    first, _, last = network
    w, b, v, c = (one.detach().double().numpy() for one in (first.weight, first.bias, last.weight, last.bias))
    ends = []
    for sign in (1, -1):
        best = math.inf
        for pattern in itertools.product((0.0, 1.0), repeat=len(b)):
            active = np.array(pattern)
            weight = sign * (row.numpy() @ v * active)
            sides = np.where(active > 0, -1.0, 1.0)
            done = linprog(weight @ w, sides[:, None] * w, -sides * b, bounds=list(zip(lower, upper, strict=True)))
            if done.status == 0:
                best = min(best, done.fun + weight @ b + sign * row.numpy() @ c)
        ends.append(sign * best)
    return ends[0], ends[1]


@pytest.mark.parametrize("seed", range(4))
def test_answers_match_an_exact_solver(seed: int) -> None:
    """Thresholds just below and above the exact minimum are `unsat` and `sat`."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    row = torch.randn(2, dtype=torch.float64)
    region = cube(0.1, 0.7, 2)
    low, high = find_range(network, region.lower, region.upper, row)
    for sign, end in ((1.0, low), (-1.0, -high)):
        for gap, answer in ((-1e-3, "unsat"), (1e-3, "sat")):
            unsafe = make_set([(sign * row).tolist()], [-(end + gap)])  # sign * row @ y <= end + gap
            verdict = verify(network, (region._replace(unsafe=(unsafe,)),), (2,))
            assert verdict.answer == answer
            if answer == "sat":
                assert bool(unsafe.contains(network(verdict.inputs[None])).all())
                assert (verdict.inputs >= region.lower).all() and (verdict.inputs <= region.upper).all()


def test_every_disjunct_and_region_is_decided() -> None:
    """The network is y = (|x|, x): sets are out of reach in one region, and not in the other."""
    network = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        network[2].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    below, above = make_set([[1.0, 0.0]], [-0.2]), make_set([[-1.0, 0.0]], [0.7])  # |x| <= 0.2, |x| >= 0.7
    negative = make_set([[0.0, 1.0], [-1.0, 0.0]], [0.1, 0.45])  # x <= -0.1 and |x| >= 0.45
    right, left, wide = cube(0.45, 0.2, 1), cube(-0.45, 0.2, 1), cube(0.0, 0.1, 1)

    def answer(*regions: Region, certifier: str = "auto") -> str:
        return verify(network, regions, (1,), certifier).answer

    assert answer() == "unsat"
    assert answer(right._replace(unsafe=(below, above, negative))) == "unsat"
    assert answer(left._replace(unsafe=(below, above))) == "unsat"
    assert answer(left._replace(unsafe=(below, above, negative))) == "sat"
    assert answer(right._replace(unsafe=(below,)), wide._replace(unsafe=(below,))) == "sat"
    edge = Region(*(torch.tensor([x], dtype=torch.float64) for x in (0.25, 0.5)), (make_set([[-1.0, 0.0]], [0.5]),))
    assert answer(edge) == "sat"  # |x| = 0.5 at the end of the region
    assert answer(edge._replace(unsafe=(make_set([[-1.0, 0.0]], [0.5], strict=True),))) in ("unsat", "unknown")


@pytest.mark.parametrize("kind", ["relu", "deep", "smooth"])
def test_answers_agree_with_a_grid(kind: str) -> None:
    """No `unsat` property has a counterexample on a grid, and the others are decided by splits."""
    network, decided = make_network(kind, inputs=2), 0
    grid = torch.cartesian_prod(*(torch.linspace(-0.5, 0.5, 101),) * 2)
    with torch.no_grad():
        outputs = network(grid)
    for seed in range(12):
        torch.manual_seed(seed)
        unsafe = make_set(torch.randn(2, 3).tolist(), (torch.randn(2) / 4).tolist())
        verdict = verify(network, (cube(0.0, 0.5, 2, unsafe),), (2,))
        has_counterexample = bool(unsafe.contains(outputs).any())
        assert verdict.answer == ("sat" if has_counterexample else verdict.answer)
        decided += verdict.answer in ("unsat", "sat")
    assert decided == 12


@pytest.mark.parametrize(
    "kind", ["dense", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("convolutional", "residual"))]
)
def test_regions_of_many_inputs_are_decided_by_splits_of_neurons(kind: str) -> None:
    """The answers are those of the complete certifier, and bounds without splits leave some regions undecided."""
    network = build_relu_network(kind, 1)
    complete = make_certifier(network, "complete", time_limit=math.inf, max_subproblems=2000)
    answers, undecided = [], 0
    images = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(3))
    labels = network(images).argmax(dim=1)
    radii = complete.compute_radius(images, labels).tolist()
    for image, label, radius in zip(images.split(1), labels.split(1), radii, strict=True):
        for eps in (0.99 * radius, 1.01 * radius):
            lower, upper = ((image + sign * eps).clamp(0, 1).flatten() for sign in (-1, 1))
            region = robustness_region(lower, upper, int(label), 5)
            decision = complete.decide(image, label, eps)
            answer = {"certified": "unsat", "falsified": "sat", "unknown": "unknown"}[decision.status]
            verdict = verify(network, (region,), SHAPE)
            assert answer != "unknown" and verdict.answer == answer
            undecided += verify(network, (region,), SHAPE, "crown").answer == "unknown"
            answers.append(answer)
    assert answers == ["unsat", "sat"] and undecided


def test_several_rows_and_offsets_with_many_inputs() -> None:
    """A set is out of reach if an offset makes it so; sets of several rows stay unknown, as bounds leave them."""
    network = build_relu_network("dense", 1)
    lower, upper = torch.zeros(72, dtype=torch.float64), torch.full((72,), 0.2, dtype=torch.float64)
    center, row = network((lower + upper).float().view(1, *SHAPE) / 2)[0].double(), [1.0, -1.0, 0.0, 0.0, 0.0]
    value = float((center[0] - center[1]).detach())

    def answer(*rows: tuple[list[float], float]) -> str:
        unsafe = make_set([coefficients for coefficients, _ in rows], [offset for _, offset in rows])
        return verify(network, (Region(lower, upper, (unsafe,)),), SHAPE).answer

    assert answer((row, -value)) == "sat"
    offsets = [-value + size for size in (0.5, 1.0, 2.0, 4.0, 8.0)]
    answers = [answer((row, offset)) for offset in offsets]
    assert answers == sorted(answers) and answers[-1] == "unsat" and "unknown" not in answers
    barely = next(offset for offset, one in zip(offsets, answers, strict=True) if one == "unsat")
    assert answer((row, barely), ([0.0] * 5, -1.0)) in ("unsat", "unknown")


def test_regions_without_float32_numbers_use_the_nearest() -> None:
    network = nn.Sequential(nn.Linear(1, 2), nn.ReLU()).eval()
    point = torch.tensor([0.1], dtype=torch.float64)
    everything = make_set([[0.0, 0.0]], [0.0])
    verdict = verify(network, (Region(point, point, (everything,)),), (1,))
    assert verdict.answer == "sat" and verdict.inputs.item() == torch.tensor(0.1).item()
    low, high = (float(bound) for bound in Region(point, point, (everything,)).outer_box())
    assert low < 0.1 < high


def test_search_ends_at_the_time_limit() -> None:
    """A property that holds only up to rounding is never decided; many dimensions are not split."""
    network = make_network("relu", outputs=2)
    calls = itertools.count()
    equal = make_set([[1.0, -1.0]], [0.0])
    with torch.no_grad():  # y_0 and y_1 are equal up to a tiny offset
        network[2].weight[1] = network[2].weight[0]
        network[2].bias[:] = torch.tensor([1e-6, 0.0])
    region = cube(0.0, 1.0, 3, equal)
    assert verify(network, (region,), (3,), is_out_of_time=lambda: next(calls) > 60).answer == "timeout"
    assert verify(network, (region,), (3,), is_out_of_time=lambda: True).answer == "timeout"
    large = make_network("deep", inputs=30)
    rows = make_set([[1.0, 1.0, 1.0]], [1e-4])  # a sum of ReLU outputs is not negative
    assert verify(large, (cube(0.0, 1.0, 30, rows),), (30,)).answer == "unsat"
    bias = float(large(torch.zeros(1, 30))[0, 0]) + 0.1
    assert verify(large, (cube(0.0, 30.0, 30, make_set([[-1.0, 0.0, 0.0]], [1e3 + bias])),), (30,)).answer in (
        "unknown", "unsat",
    )  # fmt: skip


def test_unknown_certifiers_and_unsupported_networks_are_rejected() -> None:
    region = cube(0.0, 1.0, 3, make_set([[1.0, 0.0, 0.0]], [0.0]))
    with pytest.raises(ValueError, match="certifier=lipschitz"):
        verify(make_network("relu"), (region,), (3,), "lipschitz")
    with pytest.raises(TypeError, match="Softmax"):
        verify(nn.Sequential(nn.Linear(3, 3), nn.Softmax(dim=1)).eval(), (region,), (3,))


def test_robustness_region_counts_ties_as_errors() -> None:
    region = robustness_region(torch.zeros(2), torch.ones(2), 1, 3)
    outputs = torch.tensor([[0.0, 1.0, 0.5], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, math.nan, 0.0]])
    is_unsafe = torch.stack([one.contains(outputs) for one in region.unsafe]).any(dim=0)
    assert is_unsafe.tolist() == [False, True, True, False]
