"""Certifiers and attacks on trained networks of every kind: who certifies more, and that attack never beats proof."""

from functools import cache

import pytest
import torch
from torch import nn

from linflab.models.robustness.attacks.suite import AttackConfig, withstands
from linflab.models.robustness.bounds.interval import pixel_box
from linflab.models.robustness.bounds.rounding import exact_products
from linflab.models.robustness.certification import CERTIFIERS, Certifier, certified, certified_radius
from linflab.models.robustness.objectives import margin
from linflab.platform.config import load_experiment
from linflab.platform.datasets import Split, load_dataset
from linflab.platform.training import fit
from tests.conftest import RECIPE

HYBRID = [
    "model.kind=linf_dist_hybrid",
    "model.hidden=32",
    "objective.kind=worst_case_cross_entropy",
    "objective.eps_train=0.11",
]
KINDS = {
    "mlp": [],
    "conv": ["model.kind=linf_dist_conv_net", "model.width=4", "model.dense_width=32", "training.epochs=8"],
    "sort": ["model.kind=sort_net", "model.q=0.7"],
    "hybrid": [*HYBRID, "model.net.kind=linf_dist_mlp", "model.net.width=64"],
    "sort hybrid": [*HYBRID, "model.net.kind=sort_net", "model.net.width=64"],
}
EPS = (0.03, 0.1, 0.2)
every_kind = pytest.mark.parametrize("kind", sorted(KINDS))


@cache
def trained(kind: str) -> tuple[nn.Module, Split]:
    experiment = load_experiment(RECIPE, ["training.epochs=15", *KINDS[kind]])
    dataset = load_dataset("digits")
    return fit(experiment, dataset).network.eval(), dataset.test


def certifiers_of(kind: str) -> list[Certifier]:
    return [name for name in CERTIFIERS if name != ("lipschitz" if "hybrid" in kind else "crown")]


@every_kind
def test_interval_certifies_what_lipschitz_does(kind: str) -> None:
    """Sample by sample. Hybrids have crown instead, close while eps is small: they are trained on intervals."""
    net, split = trained(kind)
    images, labels = split.batch(torch.arange(len(split)))
    for eps in EPS:
        for sound in (False, True):
            first, second = (certified(net, images, labels, eps, name, sound) for name in certifiers_of(kind))
            assert first.sum() > (90 if eps <= 0.1 else 0)
            assert (
                second[first].all()
                if "hybrid" not in kind
                else second.sum() > (0.95 if eps < 0.1 else 0.3) * first.sum()
            )
            plain = [certified(net, images, labels, eps, name) for name in certifiers_of(kind)]
            assert all(bool(by[proof].all()) for by, proof in zip(plain, (first, second), strict=True))


@every_kind
def test_no_attack_breaks_what_is_certified(kind: str) -> None:
    net, split = trained(kind)
    images, labels = split.batch(torch.arange(len(split)))
    attack = AttackConfig(
        kinds=("pgd", "surrogate_pgd", "apgd", "targeted_apgd", "square"), steps=10, targets=2, queries=50
    )
    with exact_products():
        for eps in EPS:
            robust = withstands(net, images, labels, eps, attack, torch.Generator().manual_seed(0))
            for name in certifiers_of(kind):
                assert robust[certified(net, images, labels, eps, name, sound=True)].all()
            assert robust.sum() < (margin(net(images), labels) > 0).sum()


@every_kind
def test_no_point_of_a_certified_box_has_another_class(kind: str) -> None:
    """Corners and inner points of the boxes of sound radii, and corners where gradients at finite p point to."""
    net, split = trained(kind)
    images, labels = split.batch(torch.arange(100))
    with exact_products():
        for name in certifiers_of(kind):
            radii = certified_radius(net, images, labels, name, sound=True)
            right = radii > 0
            assert right.sum() > 50
            box = pixel_box(images[right], radii[right].view(-1, 1, 1, 1))
            points = [torch.lerp(*box, torch.rand_like(box.lower).round_(decimals=k % 2)) for k in range(40)]
            for p in (8.0, 100.0) if "sort" not in kind else (torch.inf,):
                leaf = images[right].clone().requires_grad_()
                (gradient,) = torch.autograd.grad(margin(net(leaf, p), labels[right]).sum(), leaf)
                points.append(torch.where(gradient > 0, box.lower, box.upper))
            with torch.no_grad():
                for point in points:
                    inside = torch.clamp(point, box.lower, box.upper)
                    assert (margin(net(inside), labels[right]) > 0).all()
