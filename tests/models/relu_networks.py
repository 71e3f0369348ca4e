"""Small ReLU networks with random weights and running statistics."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.networks.layers import Normalize

SHAPE = (2, 6, 6)


class Residual(nn.Module):
    """A network with one residual block: two convolutions and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.inner, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.outer, self.shortcut = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.last = nn.Linear(144, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.stem(images))
        x = functional.relu(self.outer(functional.relu(self.norm(self.inner(x)))) + self.shortcut(x))
        return self.last(x.flatten(1))


RELU_NETS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5)
    ),
    "convolutional": lambda: nn.Sequential(
        Normalize((0.4, 0.5), (0.3, 0.2)),
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 2, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6, 5),
    ),
    "batchnorm": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AvgPool2d(2, padding=1),
        nn.Flatten(),
        nn.Linear(64, 12),
        nn.BatchNorm1d(12, affine=False),
        nn.ReLU(),
        nn.Linear(12, 5),
    ),
    "residual": Residual,
}


def build_relu_network(kind: str, seed: int) -> nn.Module:
    """Return a float32 network in evaluation mode, with random parameters and batch-norm statistics."""
    torch.manual_seed(seed)
    net = RELU_NETS[kind]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    for _ in range(10):
        net(torch.rand(32, *SHAPE))
    return net.eval()
