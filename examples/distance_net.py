"""An l_inf-distance net from its layers, trained by a loop of plain PyTorch, and certified by its margin.

Run: python examples/distance_net.py
"""

import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.networks import LpDistance, MeanShift


class DistanceNet(nn.Module):
    """Two distance layers. At p = inf, every logit is 1-Lipschitz in the l_inf norm of the pixel values."""

    lipschitz_constant = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.shift, self.last = LpDistance(64, 128), MeanShift(128), LpDistance(128, 10)

    def forward(self, images: Tensor, p: float = math.inf) -> Tensor:
        """Return logits (B, 10) of images (B, 1, 8, 8): the closest center wins."""
        return -self.last(self.shift(self.hidden(images.flatten(1), p)), p)


digits = load_digits()
images, labels = torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target)
torch.manual_seed(0)
network = DistanceNet()
optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
epochs, theta = 30, 0.2
for epoch in range(epochs):
    p = 8 * (1000 / 8) ** (epoch / (epochs - 3)) if epoch < epochs - 3 else math.inf  # the p schedule
    for batch in torch.randperm(1400).split(32):
        logits = network(images[batch], p)
        difference = logits - logits.gather(1, labels[batch, None])
        others = difference.scatter(1, labels[batch, None], -torch.inf).max(dim=1).values
        hinge = functional.relu(others + 2 * theta).mean()  # the certified radius is half the margin
        loss = hinge + 0.1 * functional.cross_entropy(logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

network.eval()
with torch.no_grad():
    logits = network(images[1400:])
truth = logits.gather(1, labels[1400:, None])
margin = truth[:, 0] - logits.scatter(1, labels[1400:, None], -torch.inf).max(dim=1).values
radius = margin / 2  # in real arithmetic; networks of `linflab.models.networks` also account for rounding
print(f"clean {(margin > 0).float().mean():.2%}, certified at eps = 0.1 {(radius > 0.1).float().mean():.2%}")
