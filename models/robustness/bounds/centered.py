"""IBP in real arithmetic with boxes as centers and radii, for certified training.

Affine layers map centers and radii directly, and one pass over memory maps both through ReLU, so a training step moves
about half as much memory as with lower and upper ends. Other layers use the rules of `rules.py`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.distance import cpu, derivatives
from linflab.models.robustness.bounds import rules
from linflab.models.robustness.bounds.affine import affine_map
from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.rules import check_flatten, propagate_layer
from linflab.models.robustness.bounds.steps import Add, ChannelAffine, Concat, ShrunkReLU, Trace, TraceStep

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
    """A linear layer or convolution, and a normalization of its outputs.

    Args:
        layer: Linear layer or convolution.
        normalization: Scales and offsets of the channels or features of its outputs.
    """

    layer: nn.Linear | nn.Conv1d | nn.Conv2d
    normalization: ChannelAffine

    def __init__(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d, normalization: ChannelAffine) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # not a module of this one
        object.__setattr__(self, "normalization", normalization)

    def propagate(self, box: CenteredBox) -> CenteredBox:
        """Return the box of outputs."""
        layer, (scale, offset) = self.layer, (self.normalization.scale, self.normalization.offset)
        if isinstance(layer, nn.Linear) and box.center.dim() > 2:  # its outputs are not the channels
            return _affine(self.normalization, _affine(layer, box))
        affine_map(layer, box.center.shape[1:])  # rejects options without a rule
        weight = layer.weight * scale.view(-1, *[1] * (layer.weight.dim() - 1))
        bias = offset if layer.bias is None else offset + layer.bias * scale
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
    steps = dict(sources)
    for step in traced.steps:
        source = sources.get(step.inputs[0])
        if type(step.layer) is not ChannelAffine or source is None or uses.count(source.output) > 1:
            continue
        layer = source.layer
        has_standard_rule = propagate_layer.dispatch(type(layer)) is rules._affine
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) and type(layer) in MERGED and has_standard_rule:
            steps[step.output] = TraceStep(NormalizedAffine(layer, step.layer), source.inputs, step.output)
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
    return centered_box(propagate_layer(layer, ends if isinstance(layer, Add | Concat) else ends[0]))


def _affine(layer: nn.Module, box: CenteredBox) -> CenteredBox:
    affine = affine_map(layer, box.center.shape[1:])
    assert affine is not None
    return CenteredBox(layer(box.center), affine.apply(box.radius, affine.weight.abs().to(box.radius)))


def _flatten(layer: nn.Flatten, box: CenteredBox) -> CenteredBox:
    check_flatten(layer)
    return CenteredBox(layer(box.center), layer(box.radius))


def _relu(layer: nn.Module, box: CenteredBox) -> CenteredBox:
    factor = layer.factor if isinstance(layer, ShrunkReLU) else 1.0
    return CenteredBox(*_fast_or_plain(_ReLUOfBoxes, _relu_of_boxes, box.center, box.radius, factor))


# By rule for boxes with ends: the same rule for centers and radii. Layers without one use the rule for ends.
RULES: dict[Callable[..., Box], Callable[[Any, CenteredBox], CenteredBox]] = {
    rules._affine: _affine,
    rules._flatten: _flatten,
    rules._relu: _relu,
    rules._shrunk_relu: _relu,
}


def _fast_or_plain(fast: type[torch.autograd.Function], plain: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of C++ kernels where they support the arguments, else that of the formula in plain PyTorch."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    same = all(x.is_cpu and cpu.is_supported(x) and x.shape == tensors[0].shape for x in tensors)
    return fast.apply(*arguments) if same and not derivatives.is_transformed() else plain(*arguments)


def _differentiable_gradients(plain: Callable[..., Any], inputs: Sequence[Tensor], gradients: Any) -> tuple[Any, ...]:
    """Return gradients of a formula that can be differentiated again."""
    return tuple(torch.func.vjp(plain, *inputs)[1](gradients))


def _relu_of_boxes(center: Tensor, radius: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return centers and radii of max(x, 0), with the upper ends of unstable units multiplied by a factor."""
    lower, upper = center - radius, functional.relu(center + radius)
    if factor != 1:
        upper = torch.where(lower < 0, factor * upper, upper)
    lower = functional.relu(lower)
    return (lower + upper) / 2, (upper - lower) / 2


class _ReLUOfBoxes(torch.autograd.Function):
    """`_relu_of_boxes` by C++ kernels."""

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        ctx.factor = factor
        ctx.save_for_backward(center, radius)
        center, radius = center.contiguous(), radius.contiguous()
        outputs = torch.empty_like(center), torch.empty_like(center)
        pointers = [tensor.data_ptr() for tensor in (center, radius, *outputs)]
        assert cpu.KERNELS is not None
        cpu.KERNELS.relu_of_boxes(*pointers, center.numel(), factor, torch.get_num_threads())
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_center: Tensor, grad_radius: Tensor) -> tuple[Tensor | None, ...]:
        given = (*ctx.saved_tensors, grad_center, grad_radius)
        if torch.is_grad_enabled():  # with create_graph=True
            formula = functools.partial(_relu_of_boxes, factor=ctx.factor)
            return *_differentiable_gradients(formula, given[:2], given[2:]), None
        tensors = [tensor.contiguous() for tensor in given]
        gradients = torch.empty_like(tensors[0]), torch.empty_like(tensors[0])
        pointers = [tensor.data_ptr() for tensor in (*tensors, *gradients)]
        assert cpu.KERNELS is not None
        size = tensors[0].numel()
        cpu.KERNELS.relu_of_boxes_backward(*pointers, size, ctx.factor, torch.get_num_threads())
        return *gradients, None


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
    return UnitSums(*_fast_or_plain(_SumsOfBoxes, _sums_of_boxes, *box).unbind())


def _sums_of_boxes(center: Tensor, radius: Tensor) -> Tensor:
    """Return the numbers of `UnitSums` (8,) in float64."""
    radius, active, inactive = radius.double(), center > radius, center + radius < 0
    center = center.double()
    sums = [radius.sum(), center.sum()]
    for chosen in (active, inactive):
        values = torch.where(chosen, center, 0.0)
        sums += [chosen.sum(dtype=torch.float64), values.sum(), values.square().sum()]
    return torch.stack(sums)


class _SumsOfBoxes(torch.autograd.Function):
    """`_sums_of_boxes` by C++ kernels."""

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor) -> Tensor:
        ctx.save_for_backward(center, radius)
        center, radius, sums = center.contiguous(), radius.contiguous(), torch.empty(8, dtype=torch.float64)
        pointers = [tensor.data_ptr() for tensor in (center, radius, sums)]
        assert cpu.KERNELS is not None
        cpu.KERNELS.sums_of_boxes(*pointers, center.numel(), torch.get_num_threads())
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # with create_graph=True
            return _differentiable_gradients(_sums_of_boxes, ctx.saved_tensors, gradient)
        center, radius, gradient = (tensor.contiguous() for tensor in (*ctx.saved_tensors, gradient))
        gradients = torch.empty_like(center), torch.empty_like(center)
        pointers = [tensor.data_ptr() for tensor in (center, radius, gradient, *gradients)]
        assert cpu.KERNELS is not None
        cpu.KERNELS.sums_of_boxes_backward(*pointers, center.numel(), torch.get_num_threads())
        return gradients
