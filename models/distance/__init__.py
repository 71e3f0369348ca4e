"""The l_p-distance operator: one public function in front of one implementation per device."""

import math

import torch
from torch import Tensor

from linflab.models.distance import reference

__all__ = ["lp_distance"]


def lp_distance(x: Tensor, weight: Tensor, p: float = math.inf) -> Tensor:
    """The l_p distance of every input to every row of a weight: y[b, o] = ||x[b] - weight[o]||_p.

    At p = inf each output is 1-Lipschitz in the l_inf norm of x. Source: Zhang et al., "Towards Certifying l_inf
    Robustness using Neural Networks with l_inf-dist Neurons", ICML 2021, Section 3 (p = inf) and 4 (finite p).

    Args:
        x: inputs (B, I), float32 or float64.
        weight: one centre per output (O, I), of the dtype and device of x.
        p: any real number in [1, inf]; it is used as it is, never rounded.

    Returns:
        Distances (B, O), differentiable once in x and weight. Where several terms share the maximum, the gradient
        at p = inf is the subgradient that belongs to the first of them; where x equals weight it is zero.

    Raises:
        TypeError: x and weight are not both float32 or both float64.
        ValueError: the shapes do not fit, the devices differ, or p is below 1 or NaN.
    """
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lp_distance takes float32 or float64 for both, got x {x.dtype} and weight {weight.dtype}")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.shape[1] == 0:
        raise ValueError(
            f"lp_distance takes x (B, I) and weight (O, I) with one I >= 1, "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.device != weight.device:
        raise ValueError(f"lp_distance takes x and weight on one device, got {x.device} and {weight.device}")
    if not p >= 1:
        raise ValueError(f"lp_distance takes 1 <= p <= inf, got p = {p}")
    return reference.lp_distance(x, weight, float(p))
