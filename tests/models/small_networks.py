"""Small random and trained networks whose exact radii a mixed-integer program finds in less than a second."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.networks.hybrid import LinfDistHybridConfig
from linflab.models.networks.layers import Normalize
from linflab.models.networks.linf_dist import LinfDistMLPConfig, LinfDistNet
from tests.models.milp import Layer, ReLULayer, describe_distance_net, describe_sequential, extract_affine

CLASSES = 3
SHAPES = {
    "dense": (1, 3, 3),
    "convolutional": (1, 5, 5),
    "residual": (1, 4, 4),
    "linf_dist": (1, 2, 3),
    "hybrid": (1, 1, 2),
}


class SmallResidual(nn.Module):
    """A convolution, a residual block and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.outer, self.last = nn.Conv2d(2, 2, 1), nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.stem(images))
        x = functional.relu(self.outer(functional.relu(self.inner(x))) + x)
        return self.last(x.flatten(1))


def build_small_network(kind: str, seed: int) -> nn.Module:
    """Return a float32 network in evaluation mode; networks with odd seeds are trained for a few steps."""
    torch.manual_seed(seed)
    shape = SHAPES[kind]
    network: nn.Module
    if kind == "dense":
        network = nn.Sequential(
            Normalize((0.4,), 0.3),
            nn.Flatten(),
            nn.Linear(9, 8),
            nn.ReLU(),
            nn.Linear(8, 8),
            nn.ReLU(),
            nn.Linear(8, CLASSES),
        )
    elif kind == "convolutional":
        network = nn.Sequential(
            nn.Conv2d(1, 2, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2, 3, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, CLASSES),
        )
    elif kind == "residual":
        network = SmallResidual()
    elif kind == "linf_dist":
        network = LinfDistMLPConfig(depth=3, width=5, initialization="normal").build(shape, CLASSES, (0.5,), 0.4)
    else:
        backbone = LinfDistMLPConfig(depth=3, width=4, initialization="normal")
        network = LinfDistHybridConfig(backbone=backbone, hidden_size=4).build(shape, CLASSES, (0.5,), 0.4)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and kind != "hybrid":
                module.weight *= 2  # small random weights make logits that hardly depend on the image
    network(torch.rand(64, *shape))  # running means
    network.eval()
    balance_classes(network, shape)
    if seed % 2:
        train_briefly(network, shape)
    return network


@torch.no_grad()
def balance_classes(network: nn.Module, shape: Sequence[int]) -> None:
    """Give random images logits of mean zero, so that each class is predicted for some."""
    means = network(torch.rand(256, *shape)).mean(dim=0)
    if isinstance(network, LinfDistNet):
        network.bias += means
    else:
        last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
        last.bias -= means


def train_briefly(network: nn.Module, shape: Sequence[int]) -> None:
    """Train to tell where an image is brightest."""
    images = torch.rand(128, *shape)
    labels = torch.stack([part.mean(dim=1) for part in images.flatten(1).tensor_split(CLASSES, dim=1) if part.shape[1]])
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(30):
        optimizer.zero_grad()
        functional.cross_entropy(network(images), labels.argmax(dim=0)).backward()
        optimizer.step()


def describe(network: nn.Module, kind: str) -> list[Layer]:
    """Return the layers of a network in float64."""
    exact = network.double()
    if isinstance(exact, nn.Sequential):
        return describe_sequential(exact, SHAPES[kind])
    if isinstance(exact, LinfDistNet):
        return describe_distance_net(exact, SHAPES[kind])
    assert isinstance(exact, SmallResidual)
    stem, c0 = extract_affine(exact.stem, SHAPES[kind])
    inner, c1 = extract_affine(exact.inner, (2, 2, 2))
    outer, c2 = extract_affine(exact.outer, (2, 2, 2))
    last, c3 = extract_affine(lambda x: exact.last(x.flatten(1)), (2, 2, 2))
    n = len(c0)
    return [
        ReLULayer(stem, c0, n),
        _pass_through(inner, c1),
        ReLULayer(torch.cat([torch.as_tensor(outer), torch.eye(n)], dim=1).numpy(), c2, n),
        ReLULayer(last, c3, 0),
    ]


def _pass_through(weight: object, bias: object) -> ReLULayer:
    """Return a layer whose outputs are those of ReLUs, and its inputs."""
    matrix, constant = torch.as_tensor(weight), torch.as_tensor(bias)
    count = matrix.shape[1]
    stacked = torch.cat([matrix, torch.eye(count, dtype=matrix.dtype)])
    return ReLULayer(stacked.numpy(), torch.cat([constant, torch.zeros(count)]).numpy(), len(constant))


def find_images(network: nn.Module, kind: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random images, and the classes that a network predicts."""
    images = torch.rand(count, *SHAPES[kind], generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return images, network(images).argmax(dim=1)
