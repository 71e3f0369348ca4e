"""Certification: l_inf radii within which a network's prediction is proven constant.

Each certifier has a `kind`:

- `lipschitz`: one forward pass of a network that is Lipschitz by construction;
- `ibp`: interval bounds of every layer over the box of images, intersected with [0, 1]; tighter than `lipschitz`;
- `crown`: linear bounds through activations such as ReLU and tanh; tighter than `ibp` for networks that were not
  trained with IBP;
- `alpha_crown`: CROWN with optimized slopes; at least as tight as `ibp` and `crown` on every image;
- `complete`: attacks, then branch and bound, until an image is decided or its time is up;
- `cascade`: the above from cheap to complete, image by image, with a verdict that names the deciding stage.

Certificates are floating-point sound by default: they hold for the network as it is computed, rounding included, in any
order of summation. With `sound=False` they hold in real arithmetic, and rounding may violate them right at the radius.

Certifiers compute outside autocast, in the dtype of the network, with plain float32 sums of products (see
`strict_float32`). They restore torch's settings afterwards. Networks in half precision are rejected, since a
certificate of the float32 copy does not apply to the half-precision computation.
"""

from typing import Any

from torch import Tensor, nn

from linflab.models.robustness.certification.base import (
    BoxCertifier,
    Certifier,
    CertifierSettings,
    TracingCertifier,
    build_settings,
)

# Certifiers register on import; messages list them in this order.
from linflab.models.robustness.certification.lipschitz import LipschitzCertifier  # isort: split

from linflab.models.robustness.certification.ibp import IBPCertifier  # isort: split

from linflab.models.robustness.certification.crown import CROWNCertifier  # isort: split

from linflab.models.robustness.certification.alpha_crown import AlphaCROWNCertifier, AlphaCROWNSettings  # isort: split

from linflab.models.robustness.certification.complete import CompleteCertifier, CompleteSettings, Decision  # isort: split

from linflab.models.robustness.certification.cascade import CascadeCertifier, Verdict
from linflab.models.robustness.certification.judging import is_classified_correctly, judge_images
from linflab.models.robustness.inputs import check_choice

__all__ = [
    "AlphaCROWNCertifier",
    "AlphaCROWNSettings",
    "BoxCertifier",
    "CROWNCertifier",
    "CascadeCertifier",
    "Certifier",
    "CertifierSettings",
    "CompleteCertifier",
    "CompleteSettings",
    "Decision",
    "IBPCertifier",
    "LipschitzCertifier",
    "TracingCertifier",
    "Verdict",
    "certified_radius",
    "certify",
    "default_certifier",
    "is_classified_correctly",
    "judge_images",
    "lipschitz_radius",
    "make_certifier",
]


def default_certifier(network: nn.Module) -> str:
    """Return the default certifier: `lipschitz` if the network has a Lipschitz constant, else `ibp`."""
    return "lipschitz" if "lipschitz_constant" in dir(network) else "ibp"


def make_certifier(network: nn.Module, kind: str, sound: bool = True, **settings: Any) -> Certifier:
    """Create a certifier of a network.

    Args:
        network: Network in evaluation mode, in float32 or float64.
        kind: `lipschitz`, `ibp`, `crown`, `alpha_crown`, `complete` or another registered certifier.
        sound: Account for rounding in the network and in the certificate.
        **settings: Settings of this certifier, such as `time_limit=60` for `complete`; default: those of its
            `settings_class`.

    Raises:
        ValueError: If `kind` is not registered, or a setting does not exist or has an invalid value.
    """
    check_choice("certifier", kind, tuple(Certifier.registry))
    certifier = Certifier.registry[kind]
    if not settings:
        return certifier(network, sound)
    return certifier(network, sound, build_settings(kind, certifier.settings_class, settings))


def certify(
    network: nn.Module, images: Tensor, labels: Tensor, eps: float, certifier: str, sound: bool = True
) -> Tensor:
    """Return which images have a certified radius strictly above eps.

    Args:
        network: Network in evaluation mode, in float32 or float64.
        images: (B, C, H, W) or flat (B, D), pixel values in [0, 1]; an empty batch gives an empty result.
        labels: (B,) true classes, of any integer dtype.
        eps: Radius of the l_inf ball, for pixel values in [0, 1].
        certifier: `lipschitz`, `ibp`, `crown`, `alpha_crown`, `complete` or another registered certifier.
        sound: Account for rounding in the network and in the certificate.

    Returns:
        (B,) bool. Images with NaN or infinite logits are not certified.

    Raises:
        TypeError: If the certifier does not support the network, or an argument has the wrong type or dtype.
            `lipschitz` requires a Lipschitz constant by construction, and a known rounding bound if `sound`. The
            others require a rule for each layer. `crown` and `alpha_crown` also require an activation or max pooling
            with a linear relaxation.
        ValueError: If the network is in training mode, or shapes, pixel values, labels, eps or the certifier are
            invalid.
    """
    return make_certifier(network, certifier, sound).certify(images, labels, eps)


def certified_radius(network: nn.Module, images: Tensor, labels: Tensor, certifier: str, sound: bool = True) -> Tensor:
    """Return the certified l_inf radius of each image, for pixel values in [0, 1].

    Use bisection over [0, 1], except for `lipschitz`, which is closed-form. The returned radius is itself certified.

    Args:
        network: Network in evaluation mode, in float32 or float64.
        images: (B, C, H, W) or flat (B, D), pixel values in [0, 1]; an empty batch gives an empty result.
        labels: (B,) true classes, of any integer dtype.
        certifier: `lipschitz`, `ibp`, `crown`, `alpha_crown`, `complete` or another registered certifier.
        sound: Account for rounding in the network and in the certificate.

    Returns:
        (B,) radii in float64, except for `lipschitz` with `sound=False`, which keeps the dtype of the network. They are
        zero or negative where the image is misclassified or tied, or has NaN or infinite logits.

    Raises:
        TypeError: If the certifier does not support the network, or an argument has the wrong type or dtype (see
            `certify`).
        ValueError: If the network is in training mode, or shapes, pixel values, labels or the certifier are invalid.
    """
    return make_certifier(network, certifier, sound).compute_radius(images, labels)


def lipschitz_radius(network: nn.Module, images: Tensor, labels: Tensor, sound: bool = True) -> Tensor:
    """Return the Lipschitz certified radius, margin / (2 L), from one forward pass at p = inf.

    Args:
        network: Network in evaluation mode, in float32 or float64, with an attribute `lipschitz_constant` L.
        images: (B, C, H, W) or flat (B, D), pixel values in [0, 1]; an empty batch gives an empty result.
        labels: (B,) true classes, of any integer dtype.
        sound: Account for rounding in the network and in the certificate.

    Returns:
        (B,) radii, for pixel values in [0, 1]; in float64 if `sound`, else in the dtype of the network. They are zero
        or negative where the image is misclassified or tied, or has NaN or infinite logits.

    Raises:
        TypeError: If the network has no Lipschitz constant by construction, or no known rounding bound if `sound`. If
            an argument has the wrong type or dtype.
        ValueError: If the network is in training mode, or shapes, pixel values or labels are invalid.
    """
    return certified_radius(network, images, labels, "lipschitz", sound)
