"""Differentiable worst-case logit bounds over the eps-ball, for certified training.

Distance nets are bounded at any p. Their logits change by at most eps times their Lipschitz constant. So do the
features of hybrids, whose head is bounded by IBP over the box of features. At p = inf the bounds are certified. At
finite p they are what Zhang et al. (2021, Section 5) minimize during training. Certificates use `ibp`, which is
tighter.

Other networks are traced, and bounded over the box of images, intersected with [0, 1]. In training mode, batch
normalization uses the statistics of the batch; in evaluation mode, the running statistics. Dropout drops the same
values of an image and of its box.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from linflab.models.networks.hybrid import LinfDistHybrid
from linflab.models.networks.layers import LpDistance, LpDistanceConv2d, SortDistance, SyncedBatchNorm
from linflab.models.networks.linf_dist import DistanceNet, InputMasks
from linflab.models.networks.running_statistics import hold_batch_means
from linflab.models.robustness.bounds.batch_norm import normalization_of
from linflab.models.robustness.bounds.boxes import Box, ball_box
from linflab.models.robustness.bounds.centered import (
    CenteredBox,
    Ends,
    merge_normalizations,
    propagate_centered,
    sum_over_units,
)
from linflab.models.robustness.bounds.ibp import (
    check_trace,
    final_layer_logit_differences,
    logit_difference_ranges,
)
from linflab.models.robustness.bounds.linear_bounds import IntermediateMethod, LinearBounds
from linflab.models.robustness.bounds.loss_fusion import fused_cross_entropy
from linflab.models.robustness.bounds.relaxations import RelaxationKind, has_relaxation
from linflab.models.robustness.bounds.rules import has_rule, propagate_layer
from linflab.models.robustness.bounds.steps import MASKS, Masking, ShrunkReLU, Trace, TraceStep, compute_output
from linflab.models.robustness.bounds.tracing import evaluation_mode, has_only_own_modules, trace
from linflab.models.robustness.inputs import check_eps, check_image_form, check_label_form
from linflab.models.robustness.margins import cross_entropy_from_differences, logit_differences

BoundMethod = Literal["ibp", "crown_ibp", "crown_ibp_fused", "dual", "hybrid_zonotope"]
MIN_EPS = 1e-6  # lower limit of eps for warm-up regularization
# Linear relaxation of activations, and method of the pre-activation bounds.
LINEAR_METHODS: dict[BoundMethod, tuple[RelaxationKind, IntermediateMethod]] = {
    "crown_ibp": ("adaptive", "ibp"),
    "crown_ibp_fused": ("adaptive", "ibp"),
    "dual": ("parallel", "crown"),
    "hybrid_zonotope": ("box", "crown"),
}


class WorstCaseOutput(NamedTuple):
    """Logits of a batch, and their bounds over the eps-ball.

    Attributes:
        logits: (B, K) logits z of the clean images.
        logit_difference_bounds: (B, K) upper bounds M_j of z_j - z_y, -inf at y.
        loss_upper_bound: (B,) upper bounds of the cross entropy with loss fusion, else None.
        regularization: Warm-up regularization, a scalar.
        point_logits: (B, K) logits of further points, if they were given.
    """

    logits: Tensor
    logit_difference_bounds: Tensor
    loss_upper_bound: Tensor | None = None
    regularization: Tensor | float = 0.0
    point_logits: Tensor | None = None


class WorstCaseBounds:
    """Differentiable worst-case logit bounds over the eps-ball, for certified training.

    Args:
        network: Distance net or hybrid, which require `ibp`; or any network whose layers have rules.
        bound: Method that bounds the worst case.
        relu_shrink: Factor of the upper bounds of unstable ReLUs, see `ShrunkReLU`; only for `ibp`.
    """

    def __init__(self, network: nn.Module, bound: BoundMethod = "ibp", relu_shrink: float = 1.0) -> None:
        if relu_shrink != 1 and bound != "ibp":
            raise ValueError(f"relu_shrink={relu_shrink:g}: is not supported by bound={bound}; use bound=ibp")
        self.network, self.bound, self.relu_shrink = network, bound, relu_shrink
        self.is_distance_net = isinstance(network, DistanceNet)
        # User-defined modules may depend on attributes that change between steps, so they are traced in every step.
        self.is_fixed = has_only_own_modules(network)
        self.checked_forms: set[Any] = set()
        self.traces: dict[Any, Trace] = {}

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        eps: float,
        p: float,
        masks: InputMasks | None = None,
        crown_weight: float = 1.0,
        with_regularization: bool = False,
        centers: Tensor | None = None,
        points: Tensor | None = None,
    ) -> WorstCaseOutput:
        """Return the logits of a batch and their worst-case bounds.

        In training mode, the statistics of batch normalization and mean shifts are those of `images`, also for
        `centers` and `points`. Dropout drops the same values of all of them.

        Pixel values and label values are not checked, since that would stall every step on a GPU.

        Args:
            images: (B, C, H, W), pixel values in [0, 1].
            labels: (B,) true classes, of any integer dtype.
            eps: Radius of the l_inf ball, for pixel values in [0, 1].
            p: Exponent of the distance layers.
            masks: Input masks of SortNet in training.
            crown_weight: Weight of the CROWN bounds in CROWN-IBP; the IBP bounds have the rest of the weight. With loss
                fusion, it mixes the bounds of the loss (Xu et al. mix the bounds of the sum of exponentials).
            with_regularization: If True, compute the warm-up regularization, at a radius of at least MIN_EPS. Each
                data-parallel worker computes it for its own part of the batch.
            centers: (B, C, H, W) centers of the balls, pixel values in [0, 1]; None: the images.
            points: (B, C, H, W) further points whose logits to return; None: none.

        Raises:
            TypeError: If a layer has no rule for its computation in training mode or, with gradients, no differentiable
                bounds (the message names it), or images or labels have the wrong type.
            ValueError: If images or labels have an invalid shape, or eps is NaN, negative or above 1.
        """
        check_image_form(images)
        labels, eps = check_label_form(labels, images), check_eps(eps)
        if self.is_distance_net:
            with hold_batch_means(self.network):
                return self._distance_net_bounds(images, labels, eps, p, masks, centers, points)
        traced, values = self.trace_batch(images)
        if torch.is_grad_enabled():
            check_differentiable(traced)
        logits = values[traced.output]
        if logits.dim() != 2:
            shape = tuple(logits.shape)
            raise TypeError(
                f"bounds: {type(self.network).__name__} must return logits (B, K), not shape {shape}; use a wrapper"
            )
        point_logits = None if points is None else compute_output(traced, points)
        if self.relu_shrink != 1:
            traced = shrink_relus(traced, self.relu_shrink)
        centers = images if centers is None else centers
        box = ball_box(centers, max(eps, MIN_EPS) if with_regularization else eps)
        relaxation, intermediate = LINEAR_METHODS.get(self.bound, ("adaptive", "ibp"))
        merged = merge_normalizations(traced) if self.bound == "ibp" else traced
        boxes = propagate_centered(merged, box) if with_regularization or intermediate == "ibp" else {}
        penalty = warmup_regularization(merged, boxes).to(images) if with_regularization else 0.0
        if intermediate == "crown":
            differences = LinearBounds(traced, box, intermediate, relaxation).logit_differences(labels)
            return WorstCaseOutput(logits, differences, None, penalty, point_logits)
        ends = Ends(boxes) if self.bound == "ibp" else {name: box.ends for name, box in boxes.items()}
        ends[traced.input] = box  # without rounding
        center, spread = logit_difference_ranges(traced, ends, labels)
        differences = (center + spread).scatter(1, labels[:, None], -torch.inf)
        if self.bound == "ibp" or crown_weight == 0:
            return WorstCaseOutput(logits, differences, None, penalty, point_logits)
        bounds = LinearBounds(traced, box, intermediate, relaxation, boxes=ends)
        if self.bound == "crown_ibp":
            linear = bounds.logit_differences(labels)
            mixed_differences = (
                linear if crown_weight == 1 else crown_weight * linear + (1 - crown_weight) * differences
            )
            return WorstCaseOutput(logits, mixed_differences, None, penalty, point_logits)
        fused = fused_cross_entropy(bounds, center - spread, center + spread, labels)
        if crown_weight < 1:
            fused = crown_weight * fused + (1 - crown_weight) * cross_entropy_from_differences(differences, labels)
        return WorstCaseOutput(logits, differences, fused, penalty, point_logits)

    def trace_batch(self, images: Tensor) -> tuple[Trace, dict[str, Tensor]]:
        """Return the trace of a network without distance layers, and all its values for a batch, by name.

        In training mode, random masks and the statistics of the batch are constants of the trace.

        Args:
            images: (B, C, H, W), pixel values in [0, 1].

        Raises:
            TypeError: If a layer has no rule for its computation in training mode (the message names it).
        """
        return self._forward(self._trace(images), images)

    def _trace(self, images: Tensor) -> Trace:
        """Return the trace of the network, in its current mode, for the shape of these images."""
        network, form = self.network, (images.shape[1:], images.dtype, images.device)
        modes = tuple(module.training for module in network.modules())
        cached = self.traces.get((form, modes))
        if cached is not None and self.is_fixed and not cached.has_constants:
            return cached
        if form not in self.checked_forms:
            with evaluation_mode(network):
                check_trace(trace(network, has_rule, images), network, images[:3].detach())
            self.checked_forms.add(form)
        self.traces = {(form, modes): trace(network, has_rule, images)}
        return self.traces[form, modes]

    def _distance_net_bounds(
        self,
        images: Tensor,
        labels: Tensor,
        eps: float,
        p: float,
        masks: InputMasks | None,
        centers: Tensor | None,
        points: Tensor | None,
    ) -> WorstCaseOutput:
        network = self.network
        lipschitz_constant = getattr(network, "lipschitz_constant", None)
        if lipschitz_constant is not None:
            logits = network(images, p, masks)
            center_logits = logits if centers is None else network(centers, p, masks)
            point_logits = None if points is None else network(points, p, masks)
            differences = logit_differences(center_logits, labels) + 2 * eps * lipschitz_constant
            return WorstCaseOutput(logits, differences, point_logits=point_logits)
        if not isinstance(network, LinfDistHybrid):
            raise TypeError(
                f"bounds: {type(network).__name__} has distance layers but no lipschitz_constant, and is not a "
                "LinfDistHybrid; define lipschitz_constant or use a LinfDistHybrid"
            )
        features = network.features(images, p, masks)
        center_features = features if centers is None else network.features(centers, p, masks)
        point_logits = None if points is None else network(points, p, masks)
        radius = torch.full_like(features[:1], eps * network.features.lipschitz_constant)
        box = Box(center_features - radius, center_features + radius)
        for layer in network.head[:-1]:
            box = propagate_layer(layer, box)
        differences = final_layer_logit_differences(network.last, box, labels)
        return WorstCaseOutput(network.head(features), differences, point_logits=point_logits)

    @staticmethod
    def _forward(traced: Trace, images: Tensor) -> tuple[Trace, dict[str, Tensor]]:
        """Return the values of images, and the trace with random masks and batch statistics as constants."""
        values, steps = {traced.input: images}, list[TraceStep]()
        for step in traced.steps:
            layer = step.layer
            x = values[step.inputs[0]]
            if isinstance(layer, _BatchNorm) and (layer.training or isinstance(layer, SyncedBatchNorm)):
                layer = normalization_of(layer, x)
            elif isinstance(layer, MASKS) and layer.training:
                layer = Masking(layer(torch.ones_like(x)))
            values[step.output] = layer(*(values[name] for name in step.inputs))
            steps.append(step._replace(layer=layer))
        return traced._replace(steps=steps), values


def check_differentiable(traced: Trace) -> None:
    """Check that bounds of a traced network have gradients.

    Raises:
        TypeError: If a layer's boxes have none.
    """
    for step in traced.steps:
        if isinstance(step.layer, LpDistance | LpDistanceConv2d | SortDistance):
            raise TypeError(
                f"bounds: {type(step.layer).__name__} has no differentiable bounds in a network of your own; train a "
                "LinfDistNet, LinfDistHybrid or SortNet, or use another objective, such as cross_entropy"
            )


def shrink_relus(traced: Trace, factor: float) -> Trace:
    """Return a trace whose ReLUs are `ShrunkReLU`s with this factor."""
    return traced._replace(
        steps=[
            step._replace(layer=ShrunkReLU(factor)) if isinstance(step.layer, nn.ReLU) else step
            for step in traced.steps
        ]
    )


def warmup_regularization(traced: Trace, boxes: Mapping[str, CenteredBox], tolerance: float = 0.5) -> Tensor:
    """Return the warm-up regularization: bound tightness from layer to layer, and ReLU balance.

    For m layers of activations, let c and d be centers and radii of their pre-activation boxes, and t = tolerance:

        1/(t m) sum relu(t - mean d_0 / mean d) + 1/(t m) sum relu(t - min(a, 1/a)) + relu(t - min(v, 1/v))

    d_0 are the radii of the network's inputs. a is the sum of c over always active ReLUs, divided by that of -c over
    never active ReLUs. v is the same ratio for the sums of squares of c minus its mean. The terms of a and v are
    omitted for layers without always active or without never active ReLUs. Source: Shi et al., "Fast Certified Robust
    Training with Short Warmup", NeurIPS 2021.

    Args:
        traced: Steps of the network, in which normalizations may be merged.
        boxes: IBP boxes of the values in these steps, by name.
        tolerance: The threshold t.

    Returns:
        A scalar in float64.
    """

    def imbalance(active: Tensor, inactive: Tensor) -> Tensor:
        has_both = (active > 0) & (inactive > 0)
        one, other = torch.where(has_both, active, 1.0), torch.where(has_both, inactive, 1.0)
        return torch.relu(tolerance - torch.minimum(one / other, other / one))

    total, layers = torch.zeros((), dtype=torch.float64, device=boxes[traced.input].center.device), 0
    first = boxes[traced.input].radius.mean()
    for step in traced.steps:
        if not has_relaxation(step.layer):
            continue
        layers += 1
        box = boxes[step.inputs[0]]
        sums, count = sum_over_units(box), box.center.numel()
        radius = sums.radii / count
        widening = torch.where(radius > 0, first / torch.where(radius > 0, radius, 1.0), tolerance)
        total = total + torch.relu(tolerance - widening)
        if isinstance(step.layer, nn.ReLU):
            mean = sums.centers / count
            squares = [
                squares - 2 * mean * centers + mean.square() * number
                for number, centers, squares in (sums[2:5], sums[5:8])
            ]
            total = total + imbalance(sums.active_centers, -sums.inactive_centers) + imbalance(*squares)
    return total / (tolerance * max(layers, 1))
