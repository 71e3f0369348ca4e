"""IBP bounds of a network, together with the box of a value inside it and the part of the network behind it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from linflab.models.networks.hybrid import LinfDistHybrid
from linflab.models.networks.linf_dist import InputMasks
from linflab.models.networks.running_statistics import hold_batch_means
from linflab.models.robustness.bounds.boxes import Box, ball_box
from linflab.models.robustness.bounds.centered import Ends, merge_normalizations, propagate_centered
from linflab.models.robustness.bounds.cut import cut_trace, head_trace
from linflab.models.robustness.bounds.ibp import logit_difference_ranges
from linflab.models.robustness.bounds.steps import Trace, compute_output
from linflab.models.robustness.bounds.worst_case import (
    MIN_EPS,
    WorstCaseBounds,
    WorstCaseOutput,
    shrink_relus,
    warmup_regularization,
)


class TwoPartOutput(NamedTuple):
    """IBP bounds of a batch, and the second part of the network with the box of its inputs.

    Attributes:
        worst: Logits and their bounds by IBP through the whole network.
        latent: IBP bounds (B, ...) of the value at the cut.
        second: Part behind the cut, with batch statistics and random masks as constants.
    """

    worst: WorstCaseOutput
    latent: Box
    second: Trace


class TwoPartBounds(WorstCaseBounds):
    """Differentiable IBP bounds of a network that is cut into two parts.

    Args:
        network: Hybrid, which is cut inside its head or before it; or a network without distance layers, whose layers
            have rules.
        activations: Number of activation layers behind the cut.
        relu_shrink: Factor of the upper bounds of unstable ReLUs, see `ShrunkReLU`.
    """

    def __init__(self, network: nn.Module, activations: int, relu_shrink: float = 1.0) -> None:
        super().__init__(network, "ibp", relu_shrink)
        self.activations = activations

    def propagate(
        self,
        images: Tensor,
        labels: Tensor,
        eps: float,
        p: float,
        masks: InputMasks | None = None,
        with_regularization: bool = False,
        centers: Tensor | None = None,
        points: Tensor | None = None,
    ) -> TwoPartOutput:
        """Return the bounds of a batch, and the second part of the network.

        In training mode, the statistics of batch normalization and mean shifts are those of `images`.

        Args:
            images: (B, C, H, W), pixel values in [0, 1].
            labels: (B,) true classes, int64.
            eps: Radius of the l_inf ball, for pixel values in [0, 1].
            p: Exponent of the distance layers.
            masks: Input masks of SortNet in training.
            with_regularization: If True, compute the warm-up regularization, at a radius of at least MIN_EPS.
            centers: (B, C, H, W) centers of the balls, pixel values in [0, 1]; None: the images.
            points: (B, C, H, W) further points whose logits to return; None: none.

        Raises:
            TypeError: If a layer has no rule (the message names it).
            ValueError: If the network cannot be cut there.
        """
        radius, centers = max(eps, MIN_EPS) if with_regularization else eps, images if centers is None else centers
        point_logits = None
        if isinstance(network := self.network, LinfDistHybrid):
            traced = head_trace(network)
            with hold_batch_means(network):
                features = network.features(images, p, masks)
                middle = features if centers is images else network.features(centers, p, masks)
                if points is not None:
                    point_logits = network(points, p, masks)
            width = torch.full_like(features[:1], radius * network.features.lipschitz_constant)
            logits, box = network.head(features), Box(middle - width, middle + width)
        else:
            traced, values = self._forward(self._trace(images), images)
            logits, box = values[traced.output], ball_box(centers, radius)
            if points is not None:
                point_logits = compute_output(traced, points)
        if self.relu_shrink != 1:
            traced = shrink_relus(traced, self.relu_shrink)
        first, second = cut_trace(traced, self.activations)
        merged = merge_normalizations(traced, keep=first.output)
        boxes = propagate_centered(merged, box)
        ends = Ends(boxes)
        ends[traced.input] = box  # without rounding
        center, spread = logit_difference_ranges(traced, ends, labels)
        differences = (center + spread).scatter(1, labels[:, None], -torch.inf)
        penalty = warmup_regularization(merged, boxes).to(images) if with_regularization else 0.0
        return TwoPartOutput(
            WorstCaseOutput(logits, differences, None, penalty, point_logits), ends[first.output], second
        )
