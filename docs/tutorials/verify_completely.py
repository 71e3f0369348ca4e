"""Tutorial: verify a network completely."""

# %%
# # Verify completely
#
# Compare certifiers on one network, and decide every image: certified, or broken by an adversarial image.
#
# Incomplete certifiers leave a gap: images that no attack breaks and no certificate covers. A complete certifier closes
# it, if its time suffices.
from collections import Counter

import torch
from sklearn.datasets import load_digits
from torch import nn

import linflab
from linflab.models.robustness.certification import make_certifier

digits = load_digits()
images, labels = torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target)
torch.manual_seed(0)
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
network = linflab.fit(
    network, (images[:1400], labels[:1400]), eps=0.05, epochs=15, objective="adversarial_cross_entropy", batch_size=32
).network
test_images, test_labels, eps = images[1400:1440], labels[1400:1440], 0.05

# %%
# ## The gap
#
# This network was trained on adversarial images. `ibp` certifies few images, and tighter certifiers more. The attack
# bounds the number from above.
for certifier in ("ibp", "crown", "alpha_crown"):
    certificates = linflab.certify(network, test_images, test_labels, eps=eps, certifier=certifier)
    print(f"{certifier}: {int(certificates.certified.sum())} of 40 images certified")
attacked = linflab.attack(network, test_images, test_labels, eps=eps)
print(f"attack: {int(attacked.robust.sum())} of 40 images robust")

# %%
# ## Branch and bound
#
# `complete` attacks, then splits ReLUs until each subproblem is proven or a counterexample is found. `linflab.certify`
# accepts it like the others. `decide` also tells broken images from those for which the time was too short (unknown).
verifier = make_certifier(network, "complete", time_limit=60)
decisions = [verifier.decide(test_images[[row]], test_labels[[row]], eps) for row in range(len(test_labels))]
print(Counter(decision.status for decision in decisions))

# %%
# ## Adversarial images
#
# The decision about a falsified image has a misclassified image within eps.
falsified = next(number for number, decision in enumerate(decisions) if decision.status == "falsified")
adversarial = decisions[falsified].adversarial
assert adversarial is not None
print(f"largest change of a pixel {(adversarial - test_images[falsified]).abs().max():.3f}")
print(f"class {int(test_labels[falsified])}, predicted {int(network(adversarial[None]).argmax())}")

# %%
# ## Next
#
# - `linflab evaluate RUN --certifier complete` does the same for a test set.
# - [Exchange with other tools](../how-to/export.md) verifies ONNX models and VNN-LIB properties.
