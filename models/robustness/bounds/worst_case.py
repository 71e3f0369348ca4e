"""Logits and worst cases for training: differentiable, in training mode, and of a distance net at any p.

The features of a distance net move by at most eps times their Lipschitz constant; a net's logits likewise, and a
hybrid's head is bounded by intervals over that box of features. At p = inf the margins are proven, at finite p they
are what Zhang et al. (2021, Section 5) minimise on the way there. Certificates use `interval`, which is tighter.

Other networks are traced once, and bounded over the box of images, cut to [0, 1]. Batch normalisation is by the
statistics of the batch without perturbation, as in evaluation it is by the running ones.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from linflab.models.networks.hybrid import LinfDistHybrid
from linflab.models.networks.layers import WorkersBatchNorm
from linflab.models.networks.linf_dist import LinfDistNet, Subsets
from linflab.models.robustness.bounds.coefficients import Rows
from linflab.models.robustness.bounds.crown import Intermediate, LinearBounds
from linflab.models.robustness.bounds.interval import (
    Box,
    has_rule,
    layer_bounds,
    linear_margins,
    margin_range,
    pixel_box,
    propagate,
)
from linflab.models.robustness.bounds.lines import Relaxation, has_lines
from linflab.models.robustness.bounds.tracing import Scaling, Step, Trace, trace
from linflab.models.robustness.objectives import Bound, WorstCase, cross_entropies, wrong_class_margins

SMALLEST_RADIUS = 1e-6  # of boxes whose widening is looked at
# which lines hold activations, and what bounds their inputs
LINEAR: dict[Bound, tuple[Relaxation, Intermediate]] = {
    "crown_ibp": ("adaptive", "interval"),
    "crown_ibp_fused": ("adaptive", "interval"),
    "dual": ("parallel", "crown"),
    "hybrid_zonotope": ("box", "crown"),
}


class WorstCaseBounds:
    """What a network in training can come to within eps of its images.

    Args:
        network: a net of distance layers or a hybrid, whose bound is `interval`; or any whose layers have rules.
        bound: by what worst cases are bounded.
    """

    def __init__(self, network: nn.Module, bound: Bound = "interval") -> None:
        self.network, self.bound = network, bound
        self.traced: Trace | None = None
        if not isinstance(network, LinfDistNet | LinfDistHybrid):
            training = network.training
            self.traced = trace(network.eval(), has_rule)
            network.train(training)

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        eps: float,
        p: float,
        subsets: Subsets | None = None,
        crown_share: float = 1.0,
        penalized: bool = False,
    ) -> WorstCase:
        """The worst case of a batch.

        Args:
            images: (B, C, H, W) in pixels of [0, 1].
            labels: (B), the right classes.
            eps: radius of the l_inf ball, in pixels.
            p: of the distance layers.
            subsets: SortNet's, in training.
            crown_share: of CROWN-IBP's bounds, that by linear bounds; the rest is by intervals. Of loss fusion, it is
                the bounds of the loss that are mixed (Xu et al. mix those of the sum of exponentials).
            penalized: with the penalty on loose bounds, at a radius that is not 0. Of several workers each has that of
                its own part of the batch.

        Raises:
            TypeError: a layer does in training what there is no rule for; names it.
        """
        if self.traced is None:
            return self._of_distances(images, labels, eps, p, subsets)
        traced, values = self._forward(self.traced, images)
        logits = values[traced.output]
        box = pixel_box(images, max(eps, SMALLEST_RADIUS) if penalized else eps)
        relaxation, intermediate = LINEAR.get(self.bound, ("adaptive", "interval"))
        boxes = propagate(traced, box) if penalized or intermediate == "interval" else {}
        penalty = looseness(traced, boxes) if penalized else 0.0
        if intermediate == "crown":
            margins = LinearBounds(traced, box, intermediate, relaxation).margins(labels)
            return WorstCase(logits, margins, penalty=penalty)
        centre, spread = margin_range(traced, boxes, labels)
        margins = (centre + spread).scatter(1, labels[:, None], -torch.inf)
        if self.bound == "interval" or crown_share == 0:
            return WorstCase(logits, margins, penalty=penalty)
        bounds = LinearBounds(traced, box, intermediate, relaxation, boxes=boxes)
        if self.bound == "crown_ibp":
            linear = bounds.margins(labels)
            mixed = linear if crown_share == 1 else crown_share * linear + (1 - crown_share) * margins
            return WorstCase(logits, mixed, penalty=penalty)
        fused = fused_cross_entropy(bounds, centre - spread, centre + spread, labels)
        if crown_share < 1:
            fused = crown_share * fused + (1 - crown_share) * cross_entropies(margins, labels)
        return WorstCase(logits, margins, fused, penalty)

    def _of_distances(self, images: Tensor, labels: Tensor, eps: float, p: float, subsets: Subsets | None) -> WorstCase:
        network = self.network
        if isinstance(network, LinfDistNet):
            logits = network(images, p, subsets)
            return WorstCase(logits, wrong_class_margins(logits, labels) + 2 * eps * network.lipschitz_constant)
        assert isinstance(network, LinfDistHybrid)
        features = network.features(images, p, subsets)
        radius = torch.full_like(features[:1], eps * network.features.lipschitz_constant)
        box = Box(features - radius, features + radius)
        for layer in network.head[:-1]:
            box = layer_bounds(layer, box)
        return WorstCase(network.head(features), linear_margins(network.last, box, labels))

    @staticmethod
    def _forward(traced: Trace, images: Tensor) -> tuple[Trace, dict[str, Tensor]]:
        """The values of images, and the steps with the batch's statistics in place of batch normalisation."""
        values, steps = {traced.input: images}, list[Step]()
        for step in traced.steps:
            layer = step.layer
            if (
                layer.training
                and isinstance(layer, nn.Dropout | _BatchNorm)
                and not isinstance(layer, WorkersBatchNorm)
            ):
                raise TypeError(f"bounds: there is no rule for {type(layer).__name__} in training")
            if isinstance(layer, WorkersBatchNorm):
                mean, variance = layer.statistics(values[step.inputs[0]])
                scale = layer.weight * torch.rsqrt(variance + layer.eps)
                layer = Scaling(scale, layer.bias - mean * scale)
            values[step.output] = layer(*(values[name] for name in step.inputs))
            steps.append(step._replace(layer=layer))
        return traced._replace(steps=steps), values


def fused_cross_entropy(bounds: LinearBounds, lower: Tensor, upper: Tensor, labels: Tensor) -> Tensor:
    """Upper bounds (B) of the cross entropy log sum_j exp m_j, with m_j = z_j - z_y, bounded as one function.

    Each exp m_j is below its chord over the range of m_j, and the sum of all chords is one linear function of the
    logits: one pass back in place of one for every class. Source: Xu et al., "Automatic Perturbation Analysis",
    NeurIPS 2020 (loss fusion).

    Args:
        bounds: of the network.
        lower, upper: (B, K), ranges of the m_j; where j = y they are not looked at.
        labels: (B), the right classes.
    """
    index = labels[:, None]
    largest = upper.scatter(1, index, 0.0).amax(dim=1, keepdim=True).detach()  # taken out of all exponents
    top, width = (upper - largest).exp(), upper - lower
    # (1 - exp(-w)) / w without cancellation
    slope = top * torch.where(width > 0, -torch.expm1(-width) / torch.where(width > 0, width, 1.0), 1.0)
    slope = slope.scatter(1, index, 0.0)
    constant = (top - slope * upper).scatter(1, index, 0.0).sum(dim=1) + (-largest[:, 0]).exp()
    weights = (-slope).scatter(1, index, slope.sum(dim=1, keepdim=True))  # of minus the sum of slope_j (z_j - z_y)
    total = constant - bounds.lower(bounds.output, Rows(weights[:, None]))[:, 0]
    return largest[:, 0] + total.clamp_min(torch.finfo(total.dtype).tiny).log()


def looseness(traced: Trace, boxes: dict[str, Box], tolerance: float = 0.5) -> Tensor:
    """A penalty on bounds that widen from layer to layer, and on layers where most ReLUs are on one side of 0.

    With m layers of activations, c and d centres and radii of the boxes of their inputs, and t = tolerance,

        1/(t m) sum relu(t - mean d_0 / mean d) + 1/(t m) sum relu(t - min(a, 1/a)) + relu(t - min(v, 1/v)),

    where d_0 are the radii of the network's inputs, a is the sum of c over ReLUs that are always active over that of -c
    over those that never are, and v is the same ratio for the sums of squares of c minus its mean. Where either kind is
    missing, the second part is left out. Source: Shi et al., "Fast Certified Robust Training with Short Warmup",
    NeurIPS 2021.
    """

    def imbalance(active: Tensor, inactive: Tensor) -> Tensor:
        both = (active > 0) & (inactive > 0)
        one, other = torch.where(both, active, 1.0), torch.where(both, inactive, 1.0)
        return torch.relu(tolerance - torch.minimum(one / other, other / one))

    total, layers = boxes[traced.input].lower.new_zeros(()), 0
    first = ((boxes[traced.input].upper - boxes[traced.input].lower) / 2).mean()
    for step in traced.steps:
        if not has_lines(step.layer):
            continue
        layers += 1
        lower, upper = boxes[step.inputs[0]]
        centre, radius = (lower + upper) / 2, ((upper - lower) / 2).mean()
        widening = torch.where(radius > 0, first / torch.where(radius > 0, radius, 1.0), tolerance)
        total = total + torch.relu(tolerance - widening)
        if isinstance(step.layer, nn.ReLU):
            on, off = (lower > 0).to(centre), (upper < 0).to(centre)
            squares = (centre - centre.mean()).square()
            total = total + imbalance((centre * on).sum(), -(centre * off).sum())
            total = total + imbalance((squares * on).sum(), (squares * off).sum())
    return total / (tolerance * max(layers, 1))
