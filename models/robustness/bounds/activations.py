"""Error bounds of computed activations, and the minima of those that are not monotone.

Torch's implementations of exp, tanh, log1p and erf have errors of at most 4 u times their results, where u is the unit
roundoff. Further operations on these results, and the bounds, are rounded as well. The total error is below 10 u times
the magnitudes in `activation_error`.
"""

import torch
from torch import Tensor, nn

from linflab.models.robustness.bounds.rounding import UNDERFLOW_SLACK, unit_roundoff
from linflab.models.robustness.bounds.steps import Clamp

SILU_MINIMIZER, SILU_MINIMUM = -1.2784645427610738, -0.27846454276107380  # position and value of the minimum
GELU_MINIMIZER = {"none": -0.7517915246935645, "tanh": -0.7524614220710162}
GELU_MINIMUM = {"none": -0.16997120747990369, "tanh": -0.17004075057125412}


def activation_error(layer: nn.Module, inputs: Tensor, outputs: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the error bound of a computed activation (B, *shape); None for layers without rounding.

    Args:
        layer: Activation.
        inputs: Largest magnitudes of its inputs.
        outputs: Largest magnitudes of its outputs.
        dtype: Dtype of the computation.
    """
    match layer:
        case nn.Tanh() | nn.Sigmoid() | nn.SiLU():
            size = outputs
        case nn.GELU():  # the factor 1 + erf may cancel
            size = inputs
        case nn.ELU():
            size = outputs + abs(layer.alpha)
        case nn.Softplus():  # exp multiplies the rounding error of beta x by x
            size = outputs * (1 + abs(layer.beta) * inputs)
        case nn.LeakyReLU() | Clamp():  # slope and ends are rounded
            size = outputs
        case _:
            return None
    return 10 * unit_roundoff(dtype) * size + UNDERFLOW_SLACK
