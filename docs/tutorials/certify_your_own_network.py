"""Tutorial: certify your own network."""

# %%
# # Certify your own network
#
# Train a small ReLU network on scikit-learn's digits in two ways, and certify both. You need no dataset files.
#
# Any `torch.nn.Module` of [supported layers](../how-to/own-networks.md) works the same way. Images are tensors (N, C,
# H, W) with pixel values in [0, 1].
from collections import Counter

import torch
from sklearn.datasets import load_digits
from torch import nn

import linflab

digits = load_digits()
images = torch.tensor(digits.images / 16).float()[:, None]
labels = torch.tensor(digits.target)
train, validation = (images[:1200], labels[:1200]), (images[1200:1400], labels[1200:1400])
test_images, test_labels = images[1400:], labels[1400:]
print(images.shape, images.min().item(), images.max().item())


# %%
# ## Standard training
#
# `objective="cross_entropy"` minimizes the loss of the clean images. The network is accurate, but it is certified for
# few images at eps = 0.05. `certify` returns one status per image: certified, falsified (misclassified) or unknown.
def make_network() -> nn.Module:
    """Return a network with the same initial weights at each call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10)
    )


standard = linflab.fit(
    make_network(), train, eps=0.05, epochs=20, objective="cross_entropy", validation=validation, batch_size=32
)
certificates = linflab.certify(standard.network, test_images, test_labels, eps=0.05)
print(Counter(certificates.status))
print(f"certified {certificates.certified_accuracy:.2%}")

# %%
# ## Certified training
#
# The default objective is IBP: the cross entropy of worst-case logit differences, with eps growing from 0. `validation`
# selects the epoch with the best certified accuracy.
robust = linflab.fit(make_network(), train, eps=0.05, epochs=20, validation=validation, batch_size=32)
certificates = linflab.certify(robust.network, test_images, test_labels, eps=0.05)
print(f"selected epoch {robust.epoch}, validation certified {robust.val_certified:.2%}")
print(f"certified {certificates.certified_accuracy:.2%}")

# %%
# ## Attack
#
# Attacks bound the robust accuracy from above, and certificates from below. The truth is between both numbers.
attacked = linflab.attack(robust.network, test_images, test_labels, eps=0.05)
print(f"clean {attacked.clean_accuracy:.2%}, robust under attack {attacked.robust_accuracy:.2%}")

# %%
# ## Certified radii
#
# Without eps, `certify` finds the largest certified radius of each image. It is 0 where the image is misclassified.
radii = linflab.certify(robust.network, test_images[:50], test_labels[:50]).to_frame()
print(radii.head())
print(radii["radius"].describe().round(4))

# %%
# ## Next
#
# - Larger certified accuracy: `objective="mtl_ibp"` and other [methods](../methods/index.md), more epochs, or a
#   network that is Lipschitz by construction, as in [Train on digits](train_on_digits.md).
# - Tighter certificates: other [certifiers](../concepts/certifiers.md).
