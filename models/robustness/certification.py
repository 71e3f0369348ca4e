"""Certificates: for how large a perturbation the prediction is proven not to change."""

import torch
from torch import Tensor, nn

from linflab.models.robustness.bounds.interval import interval_margins, pixel_box
from linflab.models.robustness.objectives import margin


def lipschitz_radius(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The certified l_inf radius of each image, in pixels, from one forward pass at p = inf: margin / (2 L).

    The margin is z_y - max_{j != y} z_j. Both logits can move by at most L times the size of the perturbation, so no
    perturbation up to the radius makes another class win. An image counts as certified at eps when its radius is
    strictly greater than eps. Source: Zhang et al. 2021, Section 3.

    The bound is that of exact arithmetic: rounding errors of the logits, about 1e-7 of their size in float32, are not
    accounted for.

    Args:
        network: in evaluation mode, with an attribute `lipschitz_constant` (per pixel, l_inf norm).
        images: (B, C, H, W) in pixels of [0, 1].
        labels: (B), the right classes.

    Returns:
        Radii (B); zero or negative where the image is misclassified or tied.

    Raises:
        TypeError: the network has no Lipschitz constant by construction.
        ValueError: the network is in training mode, where outputs depend on the batch.
    """
    lipschitz_constant = getattr(network, "lipschitz_constant", None)
    if lipschitz_constant is None:
        raise TypeError(f"{type(network).__name__} has no lipschitz_constant: margin/2 certifies nothing for it")
    if any(module.training for module in network.modules()):
        raise ValueError("certification needs the network in evaluation mode: call network.eval() first")
    with torch.no_grad():
        return margin(network(images), labels) / (2 * lipschitz_constant)


def interval_certified(network: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Which images keep their right class within eps, by interval bounds through every layer at p = inf.

    The box of perturbed images is cut to [0, 1]. All margins must be strictly negative on it, so that the certified
    radius is above eps. Like `lipschitz_radius`, of exact arithmetic.

    Args:
        network: in evaluation mode; every layer needs a rule in `linflab.models.robustness.bounds.interval`.
        images: (B, C, H, W) in pixels of [0, 1].
        labels: (B), the right classes.
        eps: radius of the l_inf ball, in pixels.

    Returns:
        (B) bool.

    Raises:
        TypeError: a layer has no rule.
        ValueError: the network is in training mode, where outputs depend on the batch.
    """
    with torch.no_grad():
        return interval_margins(network, pixel_box(images, eps), labels).amax(dim=1) < 0


def certifier_of(network: nn.Module) -> str:
    """The name of the certifier that scores a network: `lipschitz` where it has a constant, else `interval`."""
    return "lipschitz" if "lipschitz_constant" in dir(network) else "interval"
