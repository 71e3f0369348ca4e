"""Certifiers and attacks on trained networks of every kind: which certify more, and no attack beats a certificate."""

from functools import cache

import pytest
import torch
from torch import nn

from linflab.models.robustness.attacks.suite import AttackConfig, robust_under_attack
from linflab.models.robustness.bounds.boxes import perturbation_box
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.certification import certified_radius, certify
from linflab.models.robustness.margins import margin
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import Split, load_dataset
from linflab.platform.training.fit import fit
from tests.conftest import RECIPE

pytestmark = pytest.mark.integration

HYBRID = [
    "model.kind=linf_dist_hybrid",
    "model.hidden_size=32",
    "objective.kind=worst_case_cross_entropy",
    "objective.eps_train=0.11",
]
KINDS = {
    "mlp": [],
    "conv": ["model.kind=linf_dist_conv_net", "model.width=4", "model.hidden_size=32", "training.epochs=8"],
    "sort": ["model.kind=sort_net", "model.q=0.7"],
    "hybrid": [*HYBRID, "model.backbone.kind=linf_dist_mlp", "model.backbone.width=64"],
    "sort hybrid": [*HYBRID, "model.backbone.kind=sort_net", "model.backbone.width=64"],
}
EPS = (0.03, 0.1, 0.2)
every_kind = pytest.mark.parametrize("kind", sorted(KINDS))


@cache
def train_network(kind: str) -> tuple[nn.Module, Split]:
    experiment = load_config(RECIPE, ["training.epochs=15", *KINDS[kind]])
    dataset = load_dataset("digits")
    return fit(experiment, dataset).network.eval(), dataset.test


def list_certifiers(kind: str) -> list[str]:
    """Return two certifiers whose radii take seconds for hundreds of images."""
    return ["ibp", "crown"] if "hybrid" in kind else ["lipschitz", "ibp"]


@every_kind
def test_ibp_certifies_what_lipschitz_certifies(kind: str) -> None:
    """Compare per image. For hybrids, crown replaces lipschitz; it is close at small eps, as IBP trained them."""
    net, split = train_network(kind)
    images, labels = split.batch(torch.arange(len(split)))
    for eps in EPS:
        for sound in (False, True):
            first, second = (certify(net, images, labels, eps, name, sound) for name in list_certifiers(kind))
            assert first.sum() > (90 if eps <= 0.1 else 0)
            assert (
                second[first].all()
                if "hybrid" not in kind
                else second.sum() > (0.95 if eps < 0.1 else 0.3) * first.sum()
            )
            plain = [certify(net, images, labels, eps, name) for name in list_certifiers(kind)]
            assert all(
                bool(real_mask[sound_mask].all()) for real_mask, sound_mask in zip(plain, (first, second), strict=True)
            )


@pytest.mark.slow
@every_kind
def test_no_attack_succeeds_on_a_certified_image(kind: str) -> None:
    net, split = train_network(kind)
    images, labels = split.batch(torch.arange(len(split)))
    attack = AttackConfig(
        methods=("pgd", "surrogate_pgd", "apgd", "targeted_apgd", "square"), steps=10, target_classes=2, queries=50
    )
    with strict_float32():
        for eps in EPS:
            robust = robust_under_attack(net, images, labels, eps, attack, torch.Generator().manual_seed(0))
            for name in list_certifiers(kind):
                assert robust[certify(net, images, labels, eps, name, sound=True)].all()
            assert robust.sum() < (margin(net(images), labels) > 0).sum()


@every_kind
def test_points_of_certified_boxes_have_the_same_class(kind: str) -> None:
    """Check corners and inner points of boxes with sound radii, and corners chosen by gradients at finite p."""
    net, split = train_network(kind)
    images, labels = split.batch(torch.arange(100))
    with strict_float32():
        for name in list_certifiers(kind):
            radii = certified_radius(net, images, labels, name, sound=True)
            is_certified = radii > 0
            assert is_certified.sum() > 50
            box = perturbation_box(images[is_certified], radii[is_certified].view(-1, 1, 1, 1))
            points = [torch.lerp(*box, torch.rand_like(box.lower).round_(decimals=k % 2)) for k in range(40)]
            for p in (8.0, 100.0) if "sort" not in kind else (torch.inf,):
                leaf = images[is_certified].clone().requires_grad_()
                (gradient,) = torch.autograd.grad(margin(net(leaf, p), labels[is_certified]).sum(), leaf)
                points.append(torch.where(gradient > 0, box.lower, box.upper))
            with torch.no_grad():
                for point in points:
                    inside = torch.clamp(point, box.lower, box.upper)
                    assert (margin(net(inside), labels[is_certified]) > 0).all()
