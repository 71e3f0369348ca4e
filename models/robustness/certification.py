"""Certificates: for how large a perturbation the prediction is proven not to change.

Certifiers, each by its name: `lipschitz`, one forward pass of a network that is Lipschitz by construction; `interval`,
bounds through every layer on the box of images, cut to [0, 1], which are tighter; `crown`, linear bounds through ReLU
and tanh layers, tighter for networks that were not trained on intervals. By default all are those of exact arithmetic.
Asked to be `sound` they hold for the network as it is computed, with all its roundings.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from linflab.models.networks.linf_dist import LinfDistNet
from linflab.models.robustness.bounds.crown import crown_margins
from linflab.models.robustness.bounds.interval import Box, interval_margins, pixel_box
from linflab.models.robustness.bounds.rounding import lipschitz_excess, logit_error, unit_roundoff
from linflab.models.robustness.objectives import margin

Certifier = Literal["lipschitz", "interval", "crown"]
CERTIFIERS: tuple[Certifier, ...] = get_args(Certifier)
BISECTIONS = 20  # radii by `interval` are too small by 2^-20 at most


def certifier_of(network: nn.Module) -> Certifier:
    """The certifier that scores a network unless another is asked for: `lipschitz` where it has a constant."""
    return "lipschitz" if "lipschitz_constant" in dir(network) else "interval"


def certified(
    network: nn.Module, images: Tensor, labels: Tensor, eps: float, certifier: Certifier, sound: bool = False
) -> Tensor:
    """Which images keep their right class at every image within eps: the certified radius is strictly above eps.

    Args:
        network: in evaluation mode.
        images: (B, C, H, W) in pixels of [0, 1].
        labels: (B), the right classes.
        eps: radius of the l_inf ball, in pixels.
        certifier: by what.
        sound: account for the roundings of the network and of the certificate.

    Returns:
        (B) bool.

    Raises:
        TypeError: `lipschitz`, and the network has no constant by construction; `interval` or `crown`, and a layer has
            no rule; `crown`, and there is no ReLU or tanh.
        ValueError: the network is in training mode, where outputs depend on the batch; sound certificates of what is
            no image in [0, 1], or where torch may compute with other roundings (see `exact_products`).
    """
    if certifier == "lipschitz":
        return lipschitz_radius(network, images, labels, sound).double() > eps
    _check_images(images, sound)
    with torch.no_grad():
        return _proven(network, pixel_box(images, eps), labels, certifier, sound)


def _proven(network: nn.Module, box: Box, labels: Tensor, certifier: Certifier, sound: bool) -> Tensor:
    """For which boxes (B) no image in them is given another class than its right one."""
    margins = interval_margins if certifier == "interval" else crown_margins
    return margins(network, box, labels, sound=sound).amax(dim=1) < 0


def certified_radius(
    network: nn.Module, images: Tensor, labels: Tensor, certifier: Certifier, sound: bool = False
) -> Tensor:
    """The certified l_inf radius of each image (B), in pixels; zero or negative where it is not classified rightly.

    Args, raises: as `certified`. But for `lipschitz` it is found by bisection of [0, 1], and is proven itself.
    """
    if certifier == "lipschitz":
        return lipschitz_radius(network, images, labels, sound)
    _check_images(images, sound)
    inside = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    outside = torch.ones_like(inside)
    with torch.no_grad():
        right = certified(network, images, labels, 0.0, certifier, sound)
        for _ in range(BISECTIONS):
            middle = (inside + outside) / 2
            box = pixel_box(images, middle.view(-1, 1, 1, 1))
            proven = _proven(network, box, labels, certifier, sound)
            inside, outside = torch.where(proven, middle, inside), torch.where(proven, outside, middle)
    return torch.where(right, inside, -1.0)


def lipschitz_radius(network: nn.Module, images: Tensor, labels: Tensor, sound: bool = False) -> Tensor:
    """The certified l_inf radius of each image, in pixels, from one forward pass at p = inf: margin / (2 L).

    The margin is z_y - max_{j != y} z_j. Both logits can move by at most L times the size of the perturbation, so no
    perturbation up to the radius makes another class win. An image counts as certified at eps when its radius is
    strictly greater than eps. Source: Zhang et al. 2021, Section 3.

    To be sound, 4 E is taken off the margin: two logits, each computed at two images in [0, 1], are off by at most E
    (`logit_error`). The margin and what is made of it are rounded six times: 8 u of either is more.

    Args:
        network: in evaluation mode, with an attribute `lipschitz_constant` (per pixel, l_inf norm).
        images: (B, C, H, W) in pixels of [0, 1].
        labels: (B), the right classes.
        sound: account for roundings; for nets of distance layers.

    Returns:
        Radii (B); zero or negative where the image is misclassified or tied.

    Raises:
        TypeError: the network has no Lipschitz constant by construction, or sound radii are not known for its kind.
        ValueError: the network is in training mode, where outputs depend on the batch.
    """
    lipschitz_constant = getattr(network, "lipschitz_constant", None)
    if lipschitz_constant is None:
        raise TypeError(f"{type(network).__name__} has no lipschitz_constant: margin/2 certifies nothing for it")
    if any(module.training for module in network.modules()):
        raise ValueError("certification needs the network in evaluation mode: call network.eval() first")
    with torch.no_grad():
        margins = margin(network(images), labels)
        if not sound:
            return margins / (2 * lipschitz_constant)
        _check_images(images, sound)
        if type(network) is not LinfDistNet:
            raise TypeError(f"no bound on the roundings of {type(network).__name__} is known: sound=True can't be had")
        rounded = 8 * unit_roundoff(margins.dtype)
        kept = margins.double() - rounded * margins.abs().double() - 4 * logit_error(network)
        radius = kept / (2 * lipschitz_constant * lipschitz_excess(network))
        return radius - rounded * radius.abs()


def _check_images(images: Tensor, sound: bool) -> None:
    if sound and not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError("sound certificates are for images in [0, 1]; some pixels are outside")
