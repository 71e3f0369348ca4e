"""Bound on the robust test error of l_inf-dist nets from their margins on training images, with proven constants.

Zhang et al. (ICML 2021) bound the robust error by a training margin term, a network size term O~(L W^2 / (delta
sqrt(n))) and a confidence term, for L layers of width W. The constant and the logarithms are not stated. The bound here
has the same form, and explicit constants:

    P(radius <= eps) <= share of n training images with radius <= eps + delta
                        + sqrt((D log ceil(2 G B std / delta) + log(T / (1 - confidence))) / (2 n)),

where the radius is std times half the margin, D counts the weights, biases and running means, G the tensors that hold
them, B bounds their magnitudes, and T counts the pairs of delta and B that are tried. The left side is at least the
probability that an attack of size eps succeeds, since logits are 1/std-Lipschitz.

Proof. The distances ||z - w|| and ||z' - w'|| differ by at most ||z - z'|| + ||w - w'||. So do those of SortNet, whose
coefficients sum to at most 1. So if each of the G tensors changes by at most h, logits change by at most G h on every
image. Round each of the D numbers in [-B, B] to the center of one of ceil(B / h) intervals of half-width h. With
G h = xi = delta / (2 std), every net has a rounded net whose logits differ by at most xi, whose margin by at most 2 xi,
and whose radius by at most delta / 2. There are at most ceil(B / h)^D rounded nets. By Hoeffding's inequality and a
union bound over them, P(radius' <= s) exceeds the share of training images by at most the square root, for all rounded
nets together and s = eps + delta / 2. Rounding costs delta / 2 on each side. A union bound over T pairs allows delta
and B to depend on the training.

Proven: everything above. Assumed: training and test images are independent draws from one distribution; architecture,
mean and std are fixed before the training images are drawn, and so is the number of images that is used.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linflab.models.networks.layers import LpDistance, LpDistanceConv2d
from linflab.models.networks.linf_dist import LinfDistNet

DELTAS = tuple(2.0 ** (-k / 4) for k in range(40))  # additional radii, from 1 down to 0.0012
MAX_EXPONENT = 25  # magnitudes are bounded by B = 1, 2, 4, ..., 2^25; training stops at larger weights
TRIED_PAIRS = len(DELTAS) * (MAX_EXPONENT + 1)


@dataclass(frozen=True)
class NetworkClass:
    """Set of l_inf-dist nets with one architecture and bounded parameters, over which the bound holds.

    Attributes:
        parameters: Number D of weights, biases and running means.
        tensors: Number G of tensors that hold them.
        magnitude: Bound B of their magnitudes, a power of two.
        std: Standard deviation by which pixel values are divided.
        depth: Number L of distance layers.
        width: Largest number W of neurons of a layer; filters count once.
    """

    parameters: int
    tensors: int
    magnitude: float
    std: float
    depth: int
    width: int


def network_class(network: nn.Module) -> NetworkClass:
    """Return the class of nets to which a network belongs.

    Raises:
        TypeError: If the network does not consist of distance layers.
        ValueError: If a parameter is not finite, or larger than 2^25.
    """
    if type(network) is not LinfDistNet:
        raise TypeError(
            f"network={type(network).__name__}: must consist of distance layers, over which the bound is proven; use "
            "an l_inf-dist net or SortNet"
        )
    layers = [layer for layer in network.modules() if isinstance(layer, LpDistance | LpDistanceConv2d)]
    means = [shift.running_mean for shift in network.features.shifts]
    tensors = [*(layer.weight for layer in layers), *(mean for mean in means if isinstance(mean, Tensor)), network.bias]
    largest = max(tensor.detach().abs().max().item() for tensor in tensors)
    if not largest <= 2.0**MAX_EXPONENT:
        raise ValueError(f"network: must have parameters of magnitude at most 2^{MAX_EXPONENT}, but has {largest:g}")
    return NetworkClass(
        parameters=sum(tensor.numel() for tensor in tensors),
        tensors=len(tensors),
        magnitude=2.0 ** max(0, math.ceil(math.log2(largest))) if largest > 0 else 1.0,
        std=float(network.features.normalize.std),
        depth=len(layers),
        width=max(len(layer.weight) for layer in layers),
    )


def size_term(nets: NetworkClass, images: int, delta: float, confidence: float) -> float:
    """Return the proven network size term, with the confidence term; see the module.

    Args:
        nets: Class of nets.
        images: Number n of training images.
        delta: Additional radius, for pixel values in [0, 1].
        confidence: Probability in (0, 1) with which the bound holds for all nets of the class.
    """
    return math.sqrt(_complexity(nets, delta, confidence) / (2 * images))


def _complexity(nets: NetworkClass, delta: float, confidence: float) -> float:
    cells = math.ceil(2 * nets.tensors * nets.magnitude * nets.std / delta)
    return nets.parameters * math.log(cells) + math.log(TRIED_PAIRS / (1 - confidence))


def published_size_term(nets: NetworkClass, images: int, delta: float, confidence: float) -> float:
    """Return the last three terms of the published theorem, with an assumed constant of 1 and without logarithms.

    They are L W^2 / (delta sqrt(n)) + sqrt(log log_2(2 / delta) / n) + t / sqrt(n), where t follows from the confidence
    1 - 2 exp(-2 t^2). Source: Zhang et al., ICML 2021, theorem on the robust generalization error. This is no bound,
    since the constant is not proven.
    """
    t = math.sqrt(math.log(2 / (1 - confidence)) / 2)
    iterated = math.log(max(1.0, math.log2(2 / delta)))
    size = nets.depth * nets.width**2 / delta
    return (size + math.sqrt(iterated) + t) / math.sqrt(images)


@dataclass(frozen=True)
class GeneralizationBound:
    """Bound on the robust test error, for the best of the tried `DELTAS`.

    Attributes:
        eps: l_inf radius of the attack, for pixel values in [0, 1].
        images: Number n of training images.
        confidence: Probability with which the bound holds.
        nets: Class of nets over which it holds.
        delta: Additional radius that gives the smallest bound. If all are at least 1, the delta for which the fewest
            training images would suffice for a bound below 1.
        margin_share: Share of training images with a radius of at most eps + delta.
        size_term: Network size term at delta, with the confidence term.
        needed_images: Number of training images from which on the bound would be below 1 with these margins; None if
            no margin exceeds any eps + delta.
    """

    eps: float
    images: int
    confidence: float
    nets: NetworkClass
    delta: float
    margin_share: float
    size_term: float
    needed_images: int | None

    @property
    def bound(self) -> float:
        """Bound on the robust test error, at most 1."""
        return min(1.0, self.margin_share + self.size_term)

    @property
    def is_vacuous(self) -> bool:
        """True if the bound is 1, so that it excludes nothing."""
        return self.bound >= 1


def margin_shares(radii: Tensor, eps: float, deltas: Sequence[float] = DELTAS) -> list[float]:
    """Return, for each delta, the share of radii (N,) of at most eps + delta."""
    return [float((radii.double() <= eps + delta).double().mean()) for delta in deltas]


def generalization_bound(nets: NetworkClass, radii: Tensor, eps: float, confidence: float) -> GeneralizationBound:
    """Return the bound on the robust test error of a net.

    Args:
        nets: Class of the net, from `network_class`.
        radii: (N,) certified radii of all training images, or of images that were selected independently of their
            pixels and labels; for pixel values in [0, 1].
        eps: l_inf radius of the attack, for pixel values in [0, 1].
        confidence: Probability in (0, 1) with which the bound holds over the draw of the training images.

    Raises:
        ValueError: If there are no radii, or the confidence is not in (0, 1).
    """
    if not len(radii):
        raise ValueError("radii: must have at least one training image; use a nonempty split")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must be between 0 and 1; use 0.95")
    terms = [size_term(nets, len(radii), delta, confidence) for delta in DELTAS]
    shares = margin_shares(torch.nan_to_num(radii, nan=-1.0), eps)
    needed = [
        term**2 * len(radii) / (1 - share) ** 2 if share < 1 else math.inf
        for share, term in zip(shares, terms, strict=True)
    ]
    best = min(range(len(DELTAS)), key=lambda k: shares[k] + terms[k])
    if shares[best] + terms[best] >= 1 and min(needed) < math.inf:
        best = needed.index(min(needed))
    count = math.floor(min(needed)) + 1 if min(needed) < math.inf else None
    return GeneralizationBound(
        eps, len(radii), confidence, nets, DELTAS[best], shares[best], terms[best], needed_images=count
    )
