"""Conformance tests of every registered attack."""

import pytest
import torch
from torch import Tensor, nn

from linflab.models.networks import LinfDistMLPConfig
from linflab.models.robustness.attacks import Attack, AttackConfig, AttackMethod, robust_under_attack
from tests.models.test_robustness import build_one_pixel_net

every_attack = pytest.mark.parametrize("kind", list(AttackMethod.registry))
# autoattack consists of other attacks, and has its own test.
every_single_attack = pytest.mark.parametrize(
    "kind", [kind for kind, method in AttackMethod.registry.items() if issubclass(method, Attack)]
)
EPS = 0.0625


def make_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recorder(nn.Module):
    """A network that records its inputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.inputs = network, list[Tensor]()

    def forward(self, images: Tensor) -> Tensor:
        self.inputs.append(images.detach().clone())
        return self.network(images)


class Fence(nn.Module):
    """A network whose second logit is larger exactly outside the ball around an image or outside [0, 1]."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = image

    def forward(self, images: Tensor) -> Tensor:
        x = images.double()
        distance = torch.maximum((x - self.image.double()).abs() - EPS, torch.maximum(-x, x - 1)).flatten(1).amax(dim=1)
        return torch.stack([torch.zeros_like(distance), distance - 1e-12], dim=1)


@every_single_attack
@pytest.mark.parametrize("restarts", [1, 2])
def test_attack_succeeds_exactly_within_the_radius(kind: str, restarts: int) -> None:
    images = torch.linspace(0, 0.49, 50).double().view(-1, 1, 1, 1)
    labels = torch.zeros(50, dtype=torch.int64)
    net = build_one_pixel_net(1.0)  # its centers lie outside the pixel range, so no gradient is zero
    config = AttackConfig(methods=(kind,), restarts=restarts)
    robust = robust_under_attack(net, images, labels, 0.205, config, make_generator())
    assert torch.equal(robust, 0.5 - images.flatten() > 0.205)


@every_single_attack
@pytest.mark.parametrize("shape", [(2, 3, 3), (5,)])
def test_attack_ignores_points_outside_ball_and_pixel_range(kind: str, shape: tuple[int, ...]) -> None:
    image = torch.rand(1, *shape, generator=make_generator(1))
    image.view(-1)[:4] = torch.tensor([0.0, 1.0, 0.01, 0.99])
    config = AttackConfig(methods=(kind,), steps=15, restarts=2, queries=100)
    assert robust_under_attack(Fence(image).eval(), image, torch.tensor([0]), EPS, config, make_generator()).all()


@every_single_attack
def test_random_draws_depend_only_on_the_generator(kind: str) -> None:
    torch.manual_seed(0)
    network = Recorder(LinfDistMLPConfig(depth=2, width=8, initialization="normal").build((1, 4, 4), 3)).eval()
    images = torch.rand(4, 1, 4, 4)
    labels = network(images).argmax(dim=1)
    config = AttackConfig(methods=(kind,), steps=4, restarts=2, queries=10)
    runs = []
    for seed in (1, 1, 2):
        torch.rand(3)
        network.inputs.clear()
        robust = robust_under_attack(network, images, labels, 0.005, config, make_generator(seed))
        runs.append((robust, torch.cat(network.inputs)))
        assert runs[-1][1].min() >= 0 and runs[-1][1].max() <= 1
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert runs[0][1].shape != runs[2][1].shape or not torch.equal(runs[0][1], runs[2][1])


@every_single_attack
def test_flat_images_are_supported(kind: str) -> None:
    """Square perturbs segments of the row of pixels."""
    net = nn.Linear(12, 4).eval()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([1.0, -1.0, 0.0, 0.0])[:, None].expand(4, 12))
        net.bias.copy_(torch.tensor([-11.0, 0.0, -20.0, -30.0]))
    images, labels = torch.full((3, 12), 0.5), torch.zeros(3, dtype=torch.long)
    config = AttackConfig(methods=(kind,), steps=5, queries=50)
    for eps, succeeds in ((0.01, False), (0.2, True)):
        assert robust_under_attack(net, images, labels, eps, config, make_generator()).tolist() == [not succeeds] * 3


@every_attack
def test_empty_and_misclassified_batches_are_supported(kind: str) -> None:
    net, config = nn.Linear(4, 3).eval(), AttackConfig(methods=(kind,), steps=2, queries=3)
    images = torch.rand(2, 4)
    assert robust_under_attack(
        net, images[:0], torch.zeros(0, dtype=torch.long), 0.1, config, make_generator()
    ).shape == (0,)
    wrong_labels = net(images).argmin(dim=1)
    assert not robust_under_attack(net, images, wrong_labels, 0.0, config, make_generator()).any()


@every_attack
def test_methods_consist_of_attacks_and_have_descriptions(kind: str) -> None:
    config = AttackConfig(methods=(kind,), steps=7, restarts=2)
    assert config.attacks()
    for attack in config.attacks():
        assert attack.config.methods == (attack.kind,)
        assert hasattr(attack.config, attack.effort) and attack.count_runs(3) >= 1
    assert config.describe() and ";" not in config.describe().partition(" (")[0]
