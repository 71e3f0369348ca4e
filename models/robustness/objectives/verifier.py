"""Verifier network: predicts the multipliers of a dual bound from the activations of the network that is trained."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.robustness.bounds.boxes import Box

NUM_FEATURES = 4  # per neuron


class ReluInput(NamedTuple):
    """Input of a ReLU layer.

    Attributes:
        values: (B, *shape) pre-activations z of the clean images.
        box: Bounds l, u of z over the eps-ball, (B, *shape) each.
    """

    values: Tensor
    box: Box


class _LayerVerifier(nn.Module):
    """Corrections of the multipliers of one ReLU layer.

    Args:
        channels: Channels C of a feature map, or number of neurons of a dense layer.
        width: Size H of the state.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.from_features = nn.Linear(2 * channels, width)
        self.from_state = nn.Linear(width, width, bias=False)
        self.to_corrections = nn.Linear(width, 2 * channels)
        self.feature_weights = nn.Parameter(torch.zeros(2, NUM_FEATURES, channels))
        nn.init.zeros_(self.to_corrections.weight)
        nn.init.zeros_(self.to_corrections.bias)

    def forward(self, state: Tensor, relu_input: ReluInput) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next state, and the slopes for negative and for positive multipliers.

        Args:
            state: (B, R, H) state after the following layer.
            relu_input: Input of the layer.

        Returns:
            (B, R, H) state, and (B, R, *shape) slopes twice.
        """
        lower, upper = relu_input.box
        unstable = (lower < 0) & (upper > 0)
        slope = torch.where(unstable, upper / torch.where(unstable, upper - lower, 1.0), (lower >= 0).to(lower))
        with torch.no_grad():
            # Position of the clean activation between 0 and its upper bound.
            position = functional.relu(relu_input.values) / upper.clamp_min(torch.finfo(upper.dtype).tiny)
            features = [torch.ones_like(slope), unstable.to(slope), slope.detach(), position.clamp_max(1.0)]
            pooled = torch.cat(
                [part.reshape(*part.shape[:2], -1).mean(dim=2) for part in (features[1], features[3])], dim=1
            )
        state = functional.relu(self.from_state(state) + self.from_features(pooled)[:, None])
        dims = [1] * (slope.dim() - 2)
        context = self.to_corrections(state).unflatten(2, (2, -1, *dims))
        slopes = []
        for sign in (0, 1):
            local = sum(
                feature * weight.view(-1, *dims)
                for feature, weight in zip(features, self.feature_weights[sign], strict=True)
            )
            slopes.append(slope[:, None] * (1 + local[:, None] + context[:, :, sign]))
        return state, slopes[0], slopes[1]


class Verifier(nn.Module):
    """Network that predicts multipliers mu = lambda times a slope, from the last ReLU layer to the first.

    The slope is (1 + d) u / (u - l) for unstable ReLUs, 1 + d for active ones, and 0 for inactive ones. Without d, this
    is the dual solution of Wong and Kolter (ICML 2018). d is learned, separately for positive and for negative lambda,
    and is 0 before training. It is the sum of two terms:

    - a linear function, with weights per channel, of four features of the neuron: 1, whether its ReLU is unstable, the
      slope without d, and the clean activation divided by its upper bound;
    - a number per channel, which is a linear function of a state. The state depends on the function of the logits, on
      the mean features of this layer's channels, and on the state after the following layer.

    d = -1 at all neurons of the last layer gives the bound by IBP. d = -1 at all unstable neurons gives the box
    relaxation of hybrid zonotopes.

    Args:
        shapes: Shape of each ReLU layer's inputs without the batch, in order of computation.
        classes: Number of classes K.
        width: Size of the state.
    """

    def __init__(self, shapes: Sequence[torch.Size], classes: int, width: int) -> None:
        super().__init__()
        self.from_direction = nn.Linear(classes, width)
        self.layers = nn.ModuleList(_LayerVerifier(shape[0], width) for shape in shapes)

    def start(self, functions: Tensor) -> Tensor:
        """Return the state (B, R, H) for functions (B, R, K) of the logits."""
        scale = functions.detach().abs().amax(dim=2, keepdim=True).clamp_min(torch.finfo(functions.dtype).tiny)
        return functional.relu(self.from_direction(functions.detach() / scale))
