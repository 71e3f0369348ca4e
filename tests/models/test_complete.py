"""Exactness of the complete certifier against mixed-integer programs, and the order of certifiers."""

import copy
import itertools
import math
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from linflab.models.networks.convnets import ConvNetConfig
from linflab.models.robustness.attacks import AttackConfig, robust_under_attack
from linflab.models.robustness.bounds import reduction
from linflab.models.robustness.bounds.alpha_crown import alpha_crown_margins, tight_boxes
from linflab.models.robustness.bounds.boxes import perturbation_box
from linflab.models.robustness.bounds.ibp import propagate_bounds, trace_and_check
from linflab.models.robustness.bounds.linear_program import LinearProgram
from linflab.models.robustness.bounds.reduction import Reduction
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.bounds.subproblems import Subproblems, split
from linflab.models.robustness.certification import (
    AlphaCROWNCertifier,
    CompleteCertifier,
    CompleteSettings,
    Decision,
    certify,
    make_certifier,
)
from linflab.models.robustness.certification.base import BISECTION_STEPS
from linflab.models.robustness.margins import margin
from tests.models.milp import evaluate, exact_radius
from tests.models.relu_networks import RELU_NETS, SHAPE, build_relu_network
from tests.models.small_networks import build_small_network, describe, find_images

KINDS = ("dense", "convolutional", "residual", "linf_dist")
TOLERANCE = 1e-4  # of radii
NO_LIMIT = CompleteSettings(time_limit=math.inf)


def check_exactness(kind: str, seed: int, count: int) -> None:
    """Check images just below and just above the exact radius of a network, which is that of real arithmetic.

    The solver satisfies constraints to 1e-6. Margins of -1e-5 and 1e-5 therefore replace 0. They give almost the same
    radius, except where a margin hardly depends on the image. With rounding, margins below the rounding error, which is
    less than 1e-4 here, may be unknown.
    """
    network = build_small_network(kind, seed)
    images, labels = find_images(network, kind, count, seed)
    layers, num_sharp = describe(copy.deepcopy(network), kind), 0
    certifier, sound = (CompleteCertifier(network, is_sound, NO_LIMIT) for is_sound in (False, True))
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        pixels = image.double().flatten().numpy()
        np.testing.assert_allclose(evaluate(layers, pixels), network(image)[0].detach().numpy(), atol=1e-5)
        low, high = (exact_radius(layers, pixels, int(label), shift) for shift in (1e-5, -1e-5))
        num_sharp += high - low < TOLERANCE
        if low > TOLERANCE:
            eps = min(1.0, low - TOLERANCE)
            below = certifier.decide(image, label, eps)
            assert below.status == "certified" and below.adversarial is None
            assert sound.decide(image, label, eps).status != "falsified"
        clear = exact_radius(layers, pixels, int(label), 1e-4)
        if clear > TOLERANCE:
            assert sound.decide(image, label, min(1.0, clear - TOLERANCE)).status == "certified"
        if high < 1 - TOLERANCE:
            for one in (certifier, sound):
                above = one.decide(image, label, high + TOLERANCE)
                assert above.status == "falsified" and above.adversarial is not None
                check_adversarial(network, image, label, above.adversarial, high + TOLERANCE)
    assert num_sharp > 0


def check_adversarial(network: nn.Module, image: Tensor, label: Tensor, adversarial: Tensor, eps: float) -> None:
    assert adversarial.shape == image.shape[1:] and adversarial.dtype == image.dtype
    assert (adversarial.double() - image[0].double()).abs().max() <= eps
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    with torch.no_grad(), strict_float32():
        assert not margin(network(adversarial[None]), label) > 0


@pytest.mark.parametrize(("kind", "seed"), itertools.product(KINDS, range(2)))
def test_decisions_are_exact(kind: str, seed: int) -> None:
    check_exactness(kind, seed, 2 if kind == "dense" else 3)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), itertools.product(KINDS, range(2, 12)))
def test_decisions_are_exact_on_many_networks(kind: str, seed: int) -> None:
    check_exactness(kind, seed, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sound", [True, False])
def test_radii_are_exact(kind: str, sound: bool) -> None:
    network = build_small_network(kind, 3)
    images, labels = find_images(network, kind, 2, 3)
    layers = describe(copy.deepcopy(network), kind)
    radii = CompleteCertifier(network, sound, NO_LIMIT).compute_radius(images, labels)
    expected = [
        exact_radius(layers, image.double().flatten().numpy(), int(label))
        for image, label in zip(images, labels, strict=True)
    ]
    assert radii.tolist() == pytest.approx(expected, abs=TOLERANCE)


def grid_radii(network: nn.Module, image: Tensor, label: Tensor) -> tuple[float, float]:
    """Return bounds of the exact radius of a network with two pixels, from its logits on a fine grid.

    The lower bound uses a Lipschitz constant of logit differences in the l_inf norm: that of the features times the
    sums of magnitudes of the weights of the head, since tanh is 1-Lipschitz.
    """
    exact = copy.deepcopy(network).double()
    first, _, last = exact.head
    rows = (last.scaled_weight - last.scaled_weight[label]).abs() @ first.scaled_weight.abs()
    constant = exact.features.lipschitz_constant * rows.sum(dim=1).max().item()
    points = torch.linspace(0, 1, 201, dtype=torch.float64)
    grid = torch.cartesian_prod(points, points).view(-1, 1, 1, 2)
    with torch.no_grad():
        margins = torch.cat([margin(exact(part), label.expand(len(part))) for part in grid.split(200_000)])
    distances = (grid - image.double()).abs().flatten(1).amax(dim=1)
    spacing = 0.0025  # every image is this close to a grid point
    lower = distances[margins <= constant * spacing]
    upper = distances[margins <= 0]
    return (
        lower.min().item() - spacing if len(lower) else math.inf,
        upper.min().item() if len(upper) else math.inf,
    )


@pytest.mark.parametrize("seed", range(3))
def test_hybrids_are_decided_as_on_a_grid(seed: int) -> None:
    """A tanh has no exact encoding in a mixed-integer program; two pixels can be searched exhaustively."""
    network = build_small_network("hybrid", seed)
    images, labels = find_images(network, "hybrid", 3, seed)
    certifier = CompleteCertifier(network, True, NO_LIMIT)
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        lower, upper = grid_radii(network, image, label)
        if lower > 0.001:
            assert certifier.decide(image, label, min(1.0, lower - 0.001)).status == "certified"
        if upper < 1:
            above = certifier.decide(image, label, upper + 1e-6)
            assert above.status == "falsified" and above.adversarial is not None
            check_adversarial(network, image, label, above.adversarial, upper + 1e-6)
        if lower < upper < 1:  # the exact radius lies between them
            middle = certifier.decide(image, label, (lower + upper) / 2)
            assert middle.status in ("certified", "falsified")


@pytest.mark.parametrize("kind", sorted(RELU_NETS))
@pytest.mark.parametrize("sound", [True, False])
def test_alpha_crown_is_at_least_as_tight_as_ibp_and_crown(kind: str, sound: bool) -> None:
    """Compare margins of every image; the margins of images that an earlier bound certifies may be its own."""
    network = build_relu_network(kind, 1)
    images = torch.rand(4, *SHAPE)
    labels = network(images).argmax(dim=1)
    is_tighter = 0
    for eps in (0.01, 0.05, 0.1):
        box = perturbation_box(images, eps)
        with torch.no_grad(), strict_float32():
            traced = trace_and_check(network, box)
            found = {
                name: make_certifier(network, name, sound).bound_margins(traced, box, labels).double()
                for name in ("ibp", "crown", "alpha_crown")
            }
            logits = torch.stack(
                [network(box.lower + torch.rand_like(images).round() * (box.upper - box.lower)) for _ in range(50)]
            )
        best = torch.minimum(found["ibp"], found["crown"])
        is_open = best.amax(dim=1) >= 0
        assert (found["alpha_crown"][is_open] <= best[is_open] + 1e-6).all()  # rounding depends on the batch
        assert (found["alpha_crown"].amax(dim=1) < 0).logical_or(is_open).all()
        is_tighter += (found["alpha_crown"] < best - 1e-3).sum()
        reached = (logits - logits.gather(2, labels.expand(50, -1)[..., None])).amax(dim=0)
        assert (reached <= found["alpha_crown"].where(found["alpha_crown"].isfinite(), 0.0) + 1e-6).all()
    assert is_tighter > 0


@pytest.mark.parametrize("kind", ["dense", "batchnorm"])
def test_certifiers_are_ordered_and_no_attack_breaks_a_certificate(kind: str) -> None:
    network = build_relu_network(kind, 1)
    images = torch.rand(4, *SHAPE)
    labels = network(images).argmax(dim=1)
    attack = AttackConfig(methods=("pgd", "targeted_apgd", "square"), steps=10, target_classes=4, queries=50)
    certified = 0
    for eps in (0.014, 0.025, 0.07):
        ibp, crown, alpha = (certify(network, images, labels, eps, name) for name in ("ibp", "crown", "alpha_crown"))
        complete = CompleteCertifier(network, True, NO_LIMIT).certify(images, labels, eps)
        assert not ((ibp | crown) & ~alpha).any() and not (alpha & ~complete).any()
        with strict_float32():
            robust = robust_under_attack(network, images, labels, eps, attack, torch.Generator())
        assert robust[complete].all()
        certified += complete.sum() - alpha.sum()
    assert certified > 0


def test_bounds_of_neurons_contain_all_values() -> None:
    """Boxes of the reduction, whose bounds are optimized, contain the values that the network computes."""
    network = build_relu_network("residual", 6)
    images = torch.rand(3, *SHAPE)
    box = perturbation_box(images, 0.1)
    with torch.no_grad(), strict_float32():
        traced = trace_and_check(network, box)
        before = tight_boxes(traced, box, True)
        reduction = Reduction(traced, before, True, 10, split_distances=True)
        for _ in range(100):
            values = {traced.input: box.lower + torch.rand_like(images).round() * (box.upper - box.lower)}
            for step in traced.steps:
                values[step.output] = step.layer(*(values[name] for name in step.inputs))
                lower, upper = reduction.boxes[step.output]
                assert (values[step.output] >= lower).all() and (values[step.output] <= upper).all()
    width = sum((box.upper - box.lower).sum() for box in reduction.boxes.values())
    assert width < 0.998 * sum((box.upper - box.lower).sum() for box in before.values())
    assert width < 0.6 * sum((box.upper - box.lower).sum() for box in propagate_bounds(traced, box, True).values())


@pytest.mark.parametrize("kind", ["dense", "linf_dist", "hybrid"])
@pytest.mark.parametrize("splits", [0, 2])
def test_multipliers_of_linear_programs_reach_their_optimum(kind: str, splits: int) -> None:
    """Backward propagation with the dual solution gives the optimum of the program, for infeasible splits too."""
    network = build_small_network(kind, 1)
    images, labels = find_images(network, kind, 1, 1)
    box = perturbation_box(images, 0.4)
    with torch.no_grad(), strict_float32():
        traced = trace_and_check(network, box)
        reduction = Reduction(traced, tight_boxes(traced, box, False), False, 5, split_distances=True)
        reduced = reduction.network
        functions, _ = reduction.logit_difference_rows(labels)
        functions = functions.select(torch.tensor([[0]]))
        params = reduced.start_params(len(reduced.levels), 1, splits=True)
        states = [{name: x.clone() for name, x in state.items()} for state in reduced.states]
        problem = Subproblems(torch.tensor([0]), states, params, torch.tensor([-1.0], dtype=torch.float64))
        for k in range(splits):
            neuron = torch.tensor([int(reduced.levels[-1].gaps(torch.ones(1), states[-1], params[-1])[0, 0].argmax())])
            problem = split(reduced, problem, torch.tensor([len(reduced.levels) - 1]), neuron, torch.tensor([k]))
            states = problem.states
        solutions = list(LinearProgram(reduced, functions, problem).solutions())
        assert solutions
        for found in solutions:
            bound = reduced.propagate(functions, found.params, problem.states).bounds.item()
            assert bound == pytest.approx(found.optimum, rel=1e-6, abs=1e-6)


def test_limits_end_the_search_without_a_decision() -> None:
    network = build_relu_network("dense", 1)
    torch.manual_seed(1)
    images = torch.rand(1, *SHAPE)
    label = network(images).argmax(dim=1)
    radius = make_certifier(network, "alpha_crown").compute_radius(images, label).item()
    settings = CompleteSettings(max_subproblems=0, attack_restarts=0)
    decisions = [CompleteCertifier(network, True, settings).decide(images, label, eps) for eps in (radius, 2 * radius)]
    assert decisions[0].status == "certified" and decisions[1].status != "certified"
    start = time.monotonic()
    assert make_certifier(network, "complete").decide(images, label, 1.4 * radius, start).status != "certified"
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("kind", ["dense", "convolutional", "linf_dist"])
@pytest.mark.parametrize("limit", [{"time_limit": 1e-6}, {"max_subproblems": 0}, {"time_limit": 0.5}])
def test_radii_within_limits_are_at_least_those_without_splits(kind: str, limit: dict[str, float]) -> None:
    network = build_small_network(kind, 3)
    images, labels = find_images(network, kind, 2, 3)
    names = ["ibp", *(["crown"] if kind != "linf_dist" else [])]
    if "max_subproblems" in limit and kind != "linf_dist":
        names.append("alpha_crown")
    expected = torch.stack([make_certifier(network, name).compute_radius(images, labels) for name in names]).amax(dim=0)
    assert (expected > 0).all()
    for name in ("complete", "cascade"):
        certifier = make_certifier(network, name, **limit)
        radii = certifier.compute_radius(images, labels)
        assert (radii >= expected - 2.0**-BISECTION_STEPS).all()
        assert (certifier.compute_radius(images, (labels + 1) % 3) <= 0).all()


def test_one_step_of_a_radius_leaves_time_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the exact radius, branch and bound takes all the time that it gets; smaller radii still get some."""
    network = build_small_network("dense", 3)
    images, labels = find_images(network, "dense", 1, 3)
    start = make_certifier(network, "alpha_crown").compute_radius(images, labels).item()
    limits = []

    def decide_slowly(
        self: CompleteCertifier, image: Tensor, label: Tensor, eps: float, deadline: float, max_subproblems: int | None
    ) -> Decision:
        limits.append(deadline - time.monotonic())
        if eps < 1.1 * start:
            return Decision("certified", None, 0.0, 0)
        time.sleep(max(0.0, deadline - time.monotonic()))
        return Decision("unknown", None, 0.0, 0)

    monkeypatch.setattr(CompleteCertifier, "_decide", decide_slowly)
    begin = time.monotonic()
    radius = CompleteCertifier(network, True, CompleteSettings(time_limit=3)).compute_radius(images, labels).item()
    assert 1.05 * start < radius < 1.1 * start
    assert time.monotonic() - begin < 20 and max(limits) < 1.5


def test_radii_keep_their_time_limit() -> None:
    """CROWN's radius takes about a second; bounds without splits would take many."""
    torch.manual_seed(0)
    network = ConvNetConfig(size="strided").build((1, 16, 16), 10).eval()
    images = torch.rand(1, 1, 16, 16)
    labels = network(images).argmax(dim=1)
    expected = make_certifier(network, "crown").compute_radius(images, labels)
    begin = time.monotonic()
    radii = make_certifier(network, "complete", time_limit=1.0).compute_radius(images, labels)
    assert (radii >= expected).all() and time.monotonic() - begin < 30


def test_bounds_do_not_depend_on_other_images_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_small_network("convolutional", 3)
    images, labels = find_images(network, "convolutional", 3, 3)
    box = perturbation_box(images, 0.1)
    traced = trace_and_check(network, box)
    with torch.no_grad():
        expected = alpha_crown_margins(traced, box, labels, 3, 3)
    assert expected.isfinite().any(dim=1).all()
    widest = int(max(end.flatten(1).shape[1] for end, _ in propagate_bounds(traced, box).values()))
    monkeypatch.setattr(reduction, "MAX_ROWS_SIZE", 2 * widest * images[0].numel())  # enough for one image only
    with torch.no_grad():
        torch.testing.assert_close(alpha_crown_margins(traced, box, labels, 3, 3), expected)


def test_networks_too_large_for_memory_are_still_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory for branch and bound on neurons, the input is split; alpha-CROWN is then as tight as CROWN."""
    monkeypatch.setattr(reduction, "MAX_ROWS_SIZE", 8)
    for kind in ("dense", "linf_dist"):
        network = build_small_network(kind, 3)
        images, labels = find_images(network, kind, 2, 3)
        bounds = [name for name in ("ibp", "crown") if kind == "dense" or name == "ibp"]
        expected = torch.stack([make_certifier(network, name).compute_radius(images, labels) for name in bounds])
        radii = make_certifier(network, "complete", time_limit=1).compute_radius(images, labels)
        assert (radii >= expected.amax(dim=0)).all()
        if kind == "dense":
            assert (make_certifier(network, "alpha_crown").compute_radius(images, labels) >= expected.amax(dim=0)).all()
        label, image, layers = int(labels[0]), images[0], describe(copy.deepcopy(network), kind)
        assert radii[0] <= exact_radius(layers, image.double().flatten().numpy(), label) + TOLERANCE


def test_wrong_settings_are_rejected() -> None:
    network = build_relu_network("dense", 0)
    for kind, settings, message in (
        ("complete", {"time_limit": -1.0}, "^time_limit=-1.0: .*greater than 0"),
        ("complete", {"batch_size": 0}, "^batch_size=0: .*greater than or equal to 1"),
        ("complete", {"seconds": 3}, "^seconds=3: is not a setting of certifier=complete; use time_limit"),
        ("alpha_crown", {"steps": -1}, "^steps=-1: "),
        ("ibp", {"steps": 1}, "^steps=1: is not a setting of certifier=ibp; leave it out"),
        ("magic", {}, "^certifier=magic: must be lipschitz, .*alpha_crown, complete or cascade"),
    ):
        with pytest.raises(ValueError, match=message):
            make_certifier(network, kind, **settings)
    images = torch.rand(2, *SHAPE)
    labels = network(images).argmax(dim=1)
    with pytest.raises(ValueError, match=r"^images=\(2, 2, 6, 6\): must be one image"):
        make_certifier(network, "complete").decide(images, labels, 0.1)
    exact = network.double()
    for certifier in (AlphaCROWNCertifier(exact), CompleteCertifier(exact)):
        with pytest.raises(TypeError, match=f"sound=True: {certifier.kind} requires a network in torch.float32"):
            certifier.certify(images.double(), labels, 0.1)
    assert CompleteCertifier(exact, sound=False).certify(images.double(), labels, 1e-4).all()
