"""Certified training of a plain PyTorch module, with batches from a DataLoader.

Run: python examples/own_module.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import linflab


class SmallNet(nn.Module):
    """A convolutional network; normalization is a part of it, since eps is for pixel values in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 16, 3, padding=1)
        self.hidden = nn.Linear(16 * 8 * 8, 64)
        self.last = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 10) of images (B, 1, 8, 8)."""
        x = torch.relu(self.convolution((images - 0.3) / 0.4))
        return self.last(torch.relu(self.hidden(x.flatten(1))))


digits = load_digits()
images, labels = torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target)
train = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=100)
torch.manual_seed(0)
fitted = linflab.fit(SmallNet(), train, eps=0.05, epochs=15, objective="mtl_ibp", batch_size=32)

test_images, test_labels = images[1400:], labels[1400:]
attacked = linflab.attack(fitted.network, test_images, test_labels, eps=0.05)
for certifier in ("ibp", "crown"):
    certificates = linflab.certify(fitted.network, test_images, test_labels, eps=0.05, certifier=certifier)
    assert not (certificates.certified & ~attacked.robust).any()  # no attack breaks a certificate
    print(f"{certifier}: certified {certificates.certified_accuracy:.2%}")
print(f"clean {attacked.clean_accuracy:.2%}, robust under attack {attacked.robust_accuracy:.2%}")
