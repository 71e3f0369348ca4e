"""Invalid arguments of the Python API: rejected before anything starts, in one line that names the argument."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import linflab
from linflab.platform.config.schedules import PSchedule

IMAGES, LABELS = torch.rand(6, 1, 4, 4), torch.arange(6) % 3


def make_small_net(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, outputs)).eval()


def make_batches() -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)


def fit(module: Any = None, train: Any = (IMAGES, LABELS), **settings: Any) -> Any:
    return linflab.fit(make_small_net() if module is None else module, train, **{"eps": 0.1, "epochs": 1, **settings})


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: linflab.certify(make_small_net(), make_batches(), LABELS, eps=0.1), "images=DataLoader"),
        (lambda: linflab.certify(make_small_net(), (IMAGES, LABELS), eps=0.1), "images"),
        (lambda: linflab.certify(lambda x: x, IMAGES, LABELS, eps=0.1), "module=function"),
        (lambda: linflab.certify(make_small_net(), IMAGES, LABELS, eps=0.1, batch_size=2.5), "batch_size=2.5"),
        (lambda: linflab.certify(make_small_net(), IMAGES, LABELS, eps=0.1, batch_size=0), "batch_size=0"),
        (lambda: linflab.certify(make_small_net(), IMAGES, eps=0.1), "labels=None"),
        (lambda: linflab.certify(make_small_net(), IMAGES[0], LABELS[0], eps=0.1), "images[None]"),
        (lambda: linflab.certify(make_small_net(), IMAGES[0, 0, 0], LABELS[0], eps=0.1), "images[None]"),
        (lambda: linflab.certify(make_small_net(), IMAGES[0], int(LABELS[0])), "images[None]"),
        (lambda: linflab.certify(make_small_net(), IMAGES[:1], LABELS[0]), "labels=()"),
        (lambda: linflab.certify(make_small_net(), IMAGES[:, 0], LABELS), "images[:, None]"),
        (lambda: linflab.attack(make_small_net(), IMAGES[:, 0], LABELS, eps=0.1), "images[:, None]"),
        (lambda: fit(train=(IMAGES[:, 0], LABELS)), "images[:, None]"),
        (lambda: fit(train=(IMAGES[0], LABELS[0])), "images[None]"),
        (lambda: fit(train=(IMAGES[:0], LABELS[:0])), "train=(0, 1, 4, 4)"),
        (lambda: fit(train=(IMAGES.flatten(1), LABELS)), "(B, C, H, W)"),
        (lambda: fit(train=(255 * IMAGES, LABELS)), "images / 255"),
        (lambda: linflab.certify(make_small_net(), 255 * IMAGES, LABELS), "images / 255"),
        (lambda: linflab.attack(lambda x: x, IMAGES, LABELS, eps=0.1), "module=function"),
        (lambda: linflab.attack(make_small_net(), IMAGES, LABELS, eps=0.1, attacks=None), "attacks=NoneType"),
        (lambda: linflab.attack(make_small_net(), IMAGES, LABELS, eps=0.1, attacks=["default"]), "attacks=default"),
        (lambda: linflab.attack(make_small_net(), IMAGES, LABELS, eps=0.1, attacks=["pgd", "pgd"]), "methods"),
        (lambda: linflab.attack(make_small_net(), IMAGES, LABELS, eps=0.1, attacks=[]), "methods"),
        (lambda: fit(module=lambda x: x), "module=function"),
        (lambda: fit(module=nn.Flatten()), "module=Flatten"),
        (lambda: fit(module=make_small_net().double()), "module=torch.float64"),
        (lambda: fit(module=make_small_net(2)), "labels=2"),
        (lambda: fit(epochs=0), "epochs=0"),
        (lambda: fit(epochs=1.5), "epochs=1.5"),
        (lambda: fit(batch_size=0), "batch_size=0"),
        (lambda: fit(learning_rate=-1), "learning_rate=-1"),
        (lambda: fit(seed=-1), "seed=-1"),
        (lambda: fit(p_schedule=3), "p_schedule=int"),
        (lambda: fit(eps_schedule=PSchedule()), "eps_schedule=PSchedule"),
        (lambda: fit(objective="hinge"), "objective=hinge"),
        (lambda: fit(objective="clipped_hinge_cross_entropy"), "objective=clipped_hinge_cross_entropy"),
        (lambda: fit(objective="none"), "objective=none"),
        (lambda: fit(train=IMAGES), "train=Tensor"),
        (lambda: fit(train=[IMAGES, IMAGES]), "train"),
        (lambda: fit(validation=(IMAGES, LABELS + 3)), "labels=5"),
    ],
)
def test_invalid_arguments_are_named_in_one_line(call: Callable[[], object], expected: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert expected in message and "\n" not in message and "http" not in message


@pytest.mark.parametrize("constant", [None, 0.0, -1.0, math.inf])
def test_lipschitz_objectives_require_a_positive_constant(constant: float | None) -> None:
    module = make_small_net()
    module.lipschitz_constant = constant
    with pytest.raises(ValueError, match=r"objective=hinge.*lipschitz_constant"):
        fit(module=module, objective="hinge")


def test_fit_leaves_threads_and_random_state_unchanged() -> None:
    module, threads = make_small_net(), torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(module, batch_size=3)
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == threads


def test_attacks_use_the_float32_precision_of_certificates() -> None:
    precisions = []

    class Net(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            precisions.append(torch.backends.cuda.matmul.fp32_precision)
            return images.flatten(1)[:, :3]

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        linflab.attack(Net().eval(), IMAGES, LABELS, eps=0.1, attacks="pgd")
        assert set(precisions) == {"ieee"} and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
