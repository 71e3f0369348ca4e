"""The cascade decides each image as its stages do, and an error concerns one image only."""

import math

import pytest
import torch
from torch import Tensor, nn

from linflab.models.networks.linf_dist import LinfDistMLPConfig
from linflab.models.robustness.attacks import AttackConfig, robust_under_attack
from linflab.models.robustness.certification import (
    AlphaCROWNCertifier,
    CascadeCertifier,
    CompleteCertifier,
    CROWNCertifier,
    Decision,
    IBPCertifier,
    Verdict,
    certify,
)
from linflab.models.robustness.certification.cascade import CascadeSettings
from linflab.models.robustness.certification.judging import judge_images
from linflab.models.robustness.margins import margin
from tests.models.relu_networks import SHAPE, build_relu_network

LIMITS = CascadeSettings(time_limit=math.inf, max_subproblems=200)


def make_images(network: nn.Module, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Return random images, and predictions as labels, of which the first is changed."""
    images = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        labels = network(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 5
    return images, labels


@pytest.mark.parametrize("kind", ["dense", "convolutional", "residual"])
@pytest.mark.parametrize("eps", [0.01, 0.05, 0.15])
def test_verdicts_agree_with_stages_and_attacks(kind: str, eps: float) -> None:
    network = build_relu_network(kind, 1)
    images, labels = make_images(network, 0, 12)
    seen: dict[int, Verdict] = {}
    verdicts = CascadeCertifier(network, True, LIMITS).judge(images, labels, eps, seen.__setitem__)
    assert [seen[k] for k in range(12)] == verdicts
    assert verdicts[0].status == "falsified" and verdicts[0].certifier == "forward"
    certified = torch.tensor([one.status == "certified" for one in verdicts])
    for certifier in ("ibp", "crown", "alpha_crown"):
        assert certified[certify(network, images, labels, eps, certifier)].all()
    robust = robust_under_attack(
        network, images, labels, eps, AttackConfig(methods=("pgd",), steps=10), torch.Generator().manual_seed(0)
    )
    assert not (certified & ~robust).any()
    for image, label, one in zip(images, labels, verdicts, strict=True):
        assert (one.adversarial is not None) == (one.status == "falsified") and one.seconds > 0 and not one.message
        if one.adversarial is not None:
            assert (one.adversarial.double() - image.double()).abs().max() <= eps
            assert one.adversarial.min() >= 0 and one.adversarial.max() <= 1
            with torch.no_grad():
                assert not margin(network(one.adversarial[None]), label[None]) > 0
    assert sum(one.status == "unknown" for one in verdicts) <= 1


@pytest.mark.parametrize("wrong_first", [False, True])
def test_stages_do_not_depend_on_the_first_image(wrong_first: bool) -> None:
    """Branch and bound with rounding requires float32, whether or not the first image is classified correctly."""
    network = build_relu_network("dense", 1).double()
    images = torch.rand(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = network(images).argmax(dim=1)
    if wrong_first:
        labels[0] = (labels[0] + 1) % 5
    certifier = CascadeCertifier(network, True, LIMITS)
    radii, verdicts = certifier.compute_radius(images, labels), certifier.judge(images, labels, 0.3)
    assert (radii[1:] > 0).all() and (radii[0] > 0).item() is not wrong_first
    assert {one.status for one in verdicts[1:]} <= {"certified", "falsified", "unknown"}
    with pytest.raises(TypeError, match="float32"):
        CompleteCertifier(network, True).decide(images[:1], labels[:1], 0.1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_verdicts_accept_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    network = build_relu_network("dense", 1)
    images, labels = make_images(network, 0, 4)
    for certifier in (IBPCertifier(network), CascadeCertifier(network, True, LIMITS)):
        statuses = [one.status for one in judge_images(certifier, images, labels.to(dtype), 0.001)]
        assert statuses == ["falsified", "certified", "certified", "certified"]


def test_stages_run_from_cheap_to_complete() -> None:
    """Every stage decides some image of a network whose bounds are loose."""
    network = build_relu_network("dense", 1)
    stages = set()
    for eps in (0.005, 0.02, 0.03, 0.05, 0.07, 0.1):
        images, labels = make_images(network, 3, 24)
        stages |= {one.certifier for one in CascadeCertifier(network, True, LIMITS).judge(images, labels, eps)}
    assert stages >= {"forward", "ibp", "crown", "attack", "complete"}


def test_lipschitz_networks_are_decided_by_their_margin_first() -> None:
    torch.manual_seed(0)
    network = LinfDistMLPConfig(depth=2, width=8, initialization="normal").build((1, 3, 3), 3, (0.5,), 0.3).eval()
    images = torch.rand(8, 1, 3, 3)
    with torch.no_grad():
        labels = network(images).argmax(dim=1)
    radii = CascadeCertifier(network)._certifiers[0].compute_radius(images, labels)
    eps = float(radii.median()) * 0.99
    verdicts = CascadeCertifier(network, True, LIMITS).judge(images, labels, eps)
    assert [one.certifier == "lipschitz" for one in verdicts] == (radii > eps).tolist()


def test_errors_concern_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_relu_network("dense", 1)
    images, labels = make_images(network, 0, 6)
    bad = images[3].clone()
    original = CROWNCertifier._certify

    def fail(self: CROWNCertifier, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        if eps and any(torch.equal(image, bad) for image in images):
            raise RuntimeError("out of memory")
        return original(self, images, labels, eps)

    expected = CascadeCertifier(network, True, LIMITS).judge(images, labels, 0.05)
    assert expected[3].certifier != "ibp"
    monkeypatch.setattr(CROWNCertifier, "_certify", fail)
    verdicts = CascadeCertifier(network, True, LIMITS).judge(images, labels, 0.05)
    assert verdicts[3].status == expected[3].status != "unknown"  # a later stage decides
    others = [k for k in range(6) if k != 3]
    assert [verdicts[k][:2] for k in others] == [expected[k][:2] for k in others]

    def fail_to_decide(self: CompleteCertifier, *arguments: object) -> Decision:
        raise MemoryError("out of memory")

    monkeypatch.setattr(CompleteCertifier, "decide", fail_to_decide)
    monkeypatch.setattr(AlphaCROWNCertifier, "_certify", lambda self, images, *rest: torch.zeros(len(images)) > 0)
    monkeypatch.setattr(CompleteCertifier, "find_adversarial", lambda *arguments: None)
    verdicts = CascadeCertifier(network, True, LIMITS).judge(images, labels, 0.05)
    assert verdicts[3].status == "error" and verdicts[3].certifier == "crown" and "out of memory" in verdicts[3].message


def test_images_without_a_decision_are_unknown() -> None:
    network = build_relu_network("dense", 1)
    images, labels = make_images(network, 3, 24)
    settings = CascadeSettings(time_limit=1e-6)
    verdicts = CascadeCertifier(network, True, settings).judge(images, labels, 0.05)
    statuses = {one.status for one in verdicts if one.certifier == "complete"}
    assert "unknown" in statuses and statuses <= {"unknown", "certified"}


def test_networks_without_a_certifier_are_rejected() -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1)

    network = nn.Sequential(nn.Flatten(), nn.Linear(72, 5), Sums()).eval()
    with pytest.raises(TypeError, match=r"\b(cumsum|Sums)\b"):
        CascadeCertifier(network).judge(torch.rand(1, *SHAPE), torch.zeros(1, dtype=torch.long), 0.1)
    network = build_relu_network("dense", 1)
    assert CascadeCertifier(network).judge(torch.rand(0, *SHAPE), torch.zeros(0, dtype=torch.long), 0.1) == []
