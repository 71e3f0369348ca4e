"""Upper bounds of linear functions of logits by Lagrangian duality, for any multipliers.

A network of affine layers and ReLUs computes z_k = W_k x_(k-1) + b_k and, for k < n, x_k = relu(z_k). The logits are
z_n. The maximum of c z_n over a box of inputs x_0 has these equations as constraints. Multipliers mu_k of the equations
of z_k and lambda_k of those of x_k define a Lagrangian. Its maximum over the boxes [l_k, u_k] of all z_k is an upper
bound for any multipliers (weak duality):

    max over x_0 of (W_1^T mu_1) x_0 + sum_k mu_k b_k + sum_(k < n) max over z_k of (lambda_k relu(z_k) - mu_k z_k)

Here mu_n = c. The maxima separate into single neurons, where z_k = l_k, u_k or, between them, 0 attains the maximum.
The Lagrangian also has the terms (W_(k+1)^T mu_(k+1) - lambda_k) x_k. They vanish, since lambda_k = W_(k+1)^T mu_(k+1)
is optimal for given mu: a maximum over x_k and z_k separately is at least that over all x_k = relu(z_k).

If mu_k is lambda_k times the slope of a linear relaxation, this is the bound of backward bound propagation (CROWN). If
mu_k = 0, it is the bound by the box of x_k (IBP).

Source: Dvijotham et al., "A Dual Approach to Scalable Verification of Deep Networks", UAI 2018.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.robustness.bounds.affine import affine_map
from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.coefficients import DenseCoefficients
from linflab.models.robustness.bounds.steps import VIEW_LAYERS, Masking, Trace, TraceStep, unwrap

Multipliers = Callable[[TraceStep, Tensor], Tensor]


def relu_steps(traced: Trace, shapes: Mapping[str, torch.Size]) -> list[TraceStep]:
    """Return the ReLU steps of a chain of affine layers and ReLUs, in order of computation.

    Args:
        traced: Steps of the network.
        shapes: Shapes of all values without the batch, by name.

    Raises:
        TypeError: If the network is not such a chain (the message names the layer).
    """
    value, found = traced.input, list[TraceStep]()
    for step in traced.steps:
        kind = type(unwrap(step.layer)).__name__
        if step.inputs != (value,):
            raise TypeError(f"{kind} does not follow the layer before it: shortcuts and branches are not supported")
        if isinstance(step.layer, nn.ReLU):
            found.append(step)
        elif not isinstance(step.layer, (*VIEW_LAYERS, Masking)) and affine_map(step.layer, shapes[value]) is None:
            raise TypeError(f"{kind} is neither affine nor a ReLU")
        value = step.output
    if not found:
        raise TypeError("it has no ReLU")
    return found


def dual_bound(traced: Trace, boxes: Mapping[str, Box], functions: Tensor, multipliers: Multipliers) -> Tensor:
    """Return upper bounds (B, R) of linear functions of the logits over a box of inputs, in real arithmetic.

    Args:
        traced: Steps of a chain of affine layers and ReLUs (see `relu_steps`).
        boxes: Boxes of all its values, by name, such as those of IBP.
        functions: (B, R, K) coefficients c of the logits.
        multipliers: Function from a ReLU step and lambda (B, R, *shape), the coefficients of its outputs, to mu of the
            same shape, the coefficients of its inputs. It is called from the last ReLU to the first. The bounds hold
            for any result.
    """
    a = DenseCoefficients(functions)
    total = functions.new_zeros(())
    for step in reversed(traced.steps):
        shape = boxes[step.inputs[0]].lower.shape[1:]
        if isinstance(step.layer, nn.ReLU):
            mu = multipliers(step, a.a)
            total = total + _relu_maxima(a.a, mu, boxes[step.inputs[0]])
            a = DenseCoefficients(mu)
        elif isinstance(step.layer, Masking):
            a = DenseCoefficients(a.a * step.layer.constant[:, None])
        elif isinstance(step.layer, VIEW_LAYERS):
            a = DenseCoefficients(a.a.flatten(2).unflatten(2, shape))
        else:
            affine = affine_map(step.layer, shape)
            assert affine is not None  # checked by `relu_steps`
            if affine.bias.dim() or affine.bias != 0:
                total = total + a.dot(affine.bias.to(a.a).expand(boxes[step.output].lower.shape[1:])[None])
            a = a.backward_through(affine, shape)
    lower, upper = boxes[traced.input]
    return total + a.dot((lower + upper) / 2) + a.abs().dot((upper - lower) / 2)


def _relu_maxima(relu_factors: Tensor, factors: Tensor, box: Box) -> Tensor:
    """Return the sums (B, R) of the maxima over a box of lambda relu(z) - mu z over all neurons.

    Args:
        relu_factors: (B, R, *shape) lambda.
        factors: (B, R, *shape) mu.
        box: Lower and upper bounds of z, (B, *shape).
    """
    lower, upper = box.lower[:, None], box.upper[:, None]
    ends = torch.maximum(
        relu_factors * functional.relu(lower) - factors * lower, relu_factors * functional.relu(upper) - factors * upper
    )
    at_zero = torch.where((lower < 0) & (upper > 0), 0.0, -torch.inf)
    return torch.maximum(ends, at_zero).flatten(2).sum(dim=2)
