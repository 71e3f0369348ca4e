"""IBP in real arithmetic with boxes as centers and radii, for certified training.

Affine layers map centers and radii directly, and one pass over memory maps both through ReLU, so a training step moves
about half as much memory as with lower and upper ends. Other layers use the rules of `rules.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from linflab.models.distance import cpu
from linflab.models.robustness.bounds import rules
from linflab.models.robustness.bounds.affine import affine_map
from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.rules import propagate_layer
from linflab.models.robustness.bounds.steps import ChannelAffine, ShrunkReLU, Trace, TraceStep

MERGED = (nn.Linear, nn.Conv1d, nn.Conv2d)  # not their subclasses, which may compute something else


class CenteredBox(NamedTuple):
    """The set of all x with |x - center| <= radius, elementwise."""

    center: Tensor
    radius: Tensor

    @property
    def ends(self) -> Box:
        """Lower and upper ends."""
        return Box(self.center - self.radius, self.center + self.radius)


def centered_box(box: Box) -> CenteredBox:
    """Return a box as its center and radius."""
    return CenteredBox((box.lower + box.upper) / 2, (box.upper - box.lower) / 2)


class Ends(dict[str, Box]):
    """Boxes by name with lower and upper ends, which are computed when they are first used."""

    def __init__(self, boxes: Mapping[str, CenteredBox]) -> None:
        super().__init__()
        self.centered = boxes

    def __missing__(self, name: str) -> Box:
        self[name] = box = self.centered[name].ends
        return box


class NormalizedAffine(nn.Module):
    """A linear layer or convolution and a normalization of its outputs, as one layer of the same kind.

    Args:
        layer: Linear layer or convolution.
        normalization: Scales and offsets of its features or channels.
    """

    parts: tuple[nn.Linear | nn.Conv1d | nn.Conv2d, Tensor, Tensor]

    def __init__(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d, normalization: ChannelAffine) -> None:
        super().__init__()
        scale = normalization.scale
        weight = layer.weight * scale.view(-1, *[1] * (layer.weight.dim() - 1))
        bias = normalization.offset if layer.bias is None else normalization.offset + layer.bias * scale
        # Neither a module nor parameters of this one.
        object.__setattr__(self, "parts", (layer, weight, bias))

    def propagate(self, box: CenteredBox) -> CenteredBox:
        """Return the box of outputs."""
        layer, weight, bias = self.parts
        if isinstance(layer, nn.Linear):
            return CenteredBox(functional.linear(box.center, weight, bias), functional.linear(box.radius, weight.abs()))
        return CenteredBox(
            layer._conv_forward(box.center, weight, bias), layer._conv_forward(box.radius, weight.abs(), None)
        )


def merge_normalizations(traced: Trace, keep: str | None = None) -> Trace:
    """Return a trace in which normalizations with given statistics are merged into the affine layers before them.

    Args:
        traced: Steps of a network.
        keep: Name of a value that must remain, besides the output; None: no other.
    """
    uses = [name for step in traced.steps for name in step.inputs] + [traced.output, keep]
    sources = {step.output: step for step in traced.steps}
    steps = {step.output: step for step in traced.steps}
    for step in traced.steps:
        source = sources.get(step.inputs[0])
        if (
            type(step.layer) is not ChannelAffine
            or source is None
            or uses.count(source.output) > 1
            or source.output == keep
        ):
            continue
        if isinstance(source.layer, nn.Linear | nn.Conv1d | nn.Conv2d) and type(source.layer) in MERGED:
            steps[step.output] = TraceStep(NormalizedAffine(source.layer, step.layer), source.inputs, step.output)
            del steps[source.output]
    return traced._replace(steps=list(steps.values()))


def propagate_centered(traced: Trace, box: Box) -> dict[str, CenteredBox]:
    """Return the boxes of all values of a network, by name, over a box of inputs, in real arithmetic."""
    boxes = {traced.input: centered_box(box)}
    for step in traced.steps:
        boxes[step.output] = _propagate(step.layer, [boxes[name] for name in step.inputs])
    return boxes


def _propagate(layer: nn.Module, boxes: Sequence[CenteredBox]) -> CenteredBox:
    if isinstance(layer, NormalizedAffine):
        return layer.propagate(boxes[0])
    rule = RULES.get(propagate_layer.dispatch(type(layer)))
    if rule is not None:
        return rule(layer, boxes[0])
    ends = [box.ends for box in boxes]
    return centered_box(propagate_layer(layer, ends if isinstance(layer, rules.Add | rules.Concat) else ends[0]))


def _affine(layer: nn.Module, box: CenteredBox) -> CenteredBox:
    affine = affine_map(layer, box.center.shape[1:])
    assert affine is not None
    return CenteredBox(layer(box.center), affine.apply(box.radius, affine.weight.abs().to(box.radius)))


def _flatten(layer: nn.Module, box: CenteredBox) -> CenteredBox:
    return CenteredBox(layer(box.center), layer(box.radius))


def _relu(layer: nn.Module, box: CenteredBox) -> CenteredBox:
    factor = layer.factor if isinstance(layer, ShrunkReLU) else 1.0
    return CenteredBox(*_ReLUOfBoxes.apply(box.center, box.radius, factor))


RULES: dict[Callable[..., Box], Callable[[nn.Module, CenteredBox], CenteredBox]] = {
    rules._affine: _affine,
    rules._flatten: _flatten,
    rules._relu: _relu,
    rules._shrunk_relu: _relu,
}


def _kernels(center: Tensor) -> Any:
    """Return the module of C++ kernels if they support these tensors, else None."""
    return cpu.KERNELS if center.is_cpu and cpu.is_supported(center) else None


class _ReLUOfBoxes(torch.autograd.Function):
    """Centers and radii of max(x, 0), with the upper ends of unstable units multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        center, radius = center.contiguous(), radius.contiguous()
        ctx.factor = factor
        ctx.save_for_backward(center, radius)
        if kernels := _kernels(center):
            outputs = torch.empty_like(center), torch.empty_like(center)
            pointers = [tensor.data_ptr() for tensor in (center, radius, *outputs)]
            kernels.relu_of_boxes(*pointers, center.numel(), factor, torch.get_num_threads())
            return outputs
        lower, upper = (center - radius), functional.relu(center + radius)
        if factor != 1:
            upper = torch.where(lower < 0, factor * upper, upper)
        lower = functional.relu(lower)
        return (lower + upper) / 2, (upper - lower) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_center: Tensor, grad_radius: Tensor) -> tuple[Tensor, Tensor, None]:
        center, radius = ctx.saved_tensors
        if kernels := _kernels(center):
            gradients = torch.empty_like(center), torch.empty_like(center)
            tensors = (center, radius, grad_center.contiguous(), grad_radius.contiguous(), *gradients)
            pointers = [tensor.data_ptr() for tensor in tensors]
            kernels.relu_of_boxes_backward(*pointers, center.numel(), ctx.factor, torch.get_num_threads())
            return *gradients, None
        by_lower = ((grad_center - grad_radius) / 2).masked_fill(center <= radius, 0)
        by_upper = ((grad_center + grad_radius) / 2).masked_fill(center + radius <= 0, 0)
        if ctx.factor != 1:
            by_upper = torch.where(center < radius, ctx.factor * by_upper, by_upper)
        return by_upper + by_lower, by_upper - by_lower, None


class _SumsOfBoxes(torch.autograd.Function):
    """Sums over units, (8,) in float64; see `UnitSums`."""

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor) -> Tensor:
        center, radius = center.contiguous(), radius.contiguous()
        ctx.save_for_backward(center, radius)
        if kernels := _kernels(center):
            sums = torch.empty(8, dtype=torch.float64)
            pointers = [tensor.data_ptr() for tensor in (center, radius, sums)]
            kernels.sums_of_boxes(*pointers, center.numel(), torch.get_num_threads())
            return sums
        units = [radius.sum(dtype=torch.float64), center.sum(dtype=torch.float64)]
        for chosen in (center > radius, center + radius < 0):
            values = center * chosen
            units += [value.sum(dtype=torch.float64) for value in (chosen, values, values.square())]
        return torch.stack(units)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        center, radius = ctx.saved_tensors
        if kernels := _kernels(center):
            gradients = torch.empty_like(center), torch.empty_like(center)
            pointers = [tensor.data_ptr() for tensor in (center, radius, gradient.contiguous(), *gradients)]
            kernels.sums_of_boxes_backward(*pointers, center.numel(), torch.get_num_threads())
            return gradients
        by = gradient.to(center).unbind()
        active = (by[3] + 2 * center * by[4]).masked_fill(center <= radius, 0)
        inactive = (by[6] + 2 * center * by[7]).masked_fill(center + radius >= 0, 0)
        return by[1] + active + inactive, by[0].expand_as(radius)


class UnitSums(NamedTuple):
    """Sums over the pre-activations of a layer, scalars in float64.

    Units are active if their lower end is above 0, and inactive if their upper end is below 0.

    Attributes:
        radii: Sum of radii.
        centers: Sum of centers.
        active: Number of active units.
        active_centers: Sum of their centers.
        active_squares: Sum of the squares of their centers.
        inactive: Number of inactive units.
        inactive_centers: Sum of their centers.
        inactive_squares: Sum of the squares of their centers.
    """

    radii: Tensor
    centers: Tensor
    active: Tensor
    active_centers: Tensor
    active_squares: Tensor
    inactive: Tensor
    inactive_centers: Tensor
    inactive_squares: Tensor


def sum_over_units(box: CenteredBox) -> UnitSums:
    """Return sums over the units of a layer, from the box of its pre-activations."""
    return UnitSums(*_SumsOfBoxes.apply(*box).unbind())
