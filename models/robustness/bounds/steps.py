"""Steps of a traced network, and layers that represent operations of its forward pass."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

FORWARD_PARTS = ("forward", "_conv_forward")  # methods that decide what a layer with a rule computes


class TraceStep(NamedTuple):
    """A layer, and the names of its inputs and output.

    Attributes:
        layer: Module that computes the output.
        inputs: Names of its inputs.
        output: Name of its output.
    """

    layer: nn.Module
    inputs: tuple[str, ...]
    output: str


class Trace(NamedTuple):
    """A network as a sequence of steps.

    Attributes:
        input: Name of the input.
        steps: Steps in order of computation.
        output: Name of the output.
        has_constants: True if steps hold tensors of the forward pass, with their values at the time of tracing.
    """

    input: str
    steps: list[TraceStep]
    output: str
    has_constants: bool = False


class _Constant(nn.Module):
    """Base class of layers that use a constant of the network without registering it as a parameter."""

    constant: Tensor | float

    def __init__(self, constant: Tensor | float) -> None:
        super().__init__()
        object.__setattr__(self, "constant", constant)


class Negate(nn.Module):
    """Layer that computes -x."""

    def forward(self, x: Tensor) -> Tensor:
        """Return -x."""
        return -x


class AddConstant(_Constant):
    """Layer that adds a constant."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the constant."""
        return x + self.constant


class Scale(_Constant):
    """Layer that multiplies by a constant."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the constant."""
        return x * self.constant


class Quotient(_Constant):
    """Layer that divides by a constant."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x divided by the constant."""
        return x / self.constant


class Masking(_Constant):
    """Layer that multiplies x (B, *shape) by nonnegative factors (B, *shape)."""

    constant: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the factors."""
        return x * self.constant


class Clamp(nn.Module):
    """Layer that clamps x to [low, high], whose ends may be infinite."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        """Return x clamped to [low, high]."""
        return x.clamp(self.low, self.high)


class ChannelAffine(nn.Module):
    """Layer that scales and shifts each feature or channel."""

    scale: Tensor
    offset: Tensor

    def __init__(self, scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "scale", scale)  # not a parameter of this module
        object.__setattr__(self, "offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the scales, plus the offsets."""
        shape = (-1, *[1] * (x.dim() - 2))
        return torch.addcmul(self.offset.view(shape), x, self.scale.view(shape))


class ShrunkReLU(nn.ReLU):
    """ReLU whose box, if it is unstable, has the upper bound multiplied by a factor below 1.

    The box does not contain all outputs, so only training losses may use it. Source: Mueller et al., "Certified
    Training: Small Boxes Are All You Need", ICLR 2023 (ReLU shrinking).
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor


class Add(nn.Module):
    """Layer that adds two values of the same shape."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return x + y."""
        return x + y


class Concat(nn.Module):
    """Layer that concatenates values along a dimension other than the batch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *values: Tensor) -> Tensor:
        """Return the concatenation of values."""
        return torch.cat(values, self.dim)


class Reshape(nn.Module):
    """Layer that reshapes the values of each sample, in the same order."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, ...) as (B, *shape)."""
        return x.reshape(x.shape[0], *self.shape)


class Rearrangement(nn.Module):
    """Layer that gathers flattened values of each sample at `index` (*shape); zero where an index is -1."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "index", index)

    index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return the gathered values (B, *shape)."""
        return functional.pad(x.flatten(1), (0, 1))[:, self.index.flatten()].view(x.shape[0], *self.index.shape)


class OwnLayer(nn.Module):
    """A layer whose forward pass the user has written.

    Only rules for exactly this forward pass hold for it. Code that asks for the class of a layer must not take it for
    a class that it extends.
    """

    layer: nn.Module

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # not a module of this one

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the layer."""
        outputs: Tensor = self.layer(x)
        return outputs


def hide_class(layer: nn.Module) -> nn.Module:
    """Return an `OwnLayer` if the user has written the forward pass of a layer, else the layer."""
    return layer if is_library_layer(layer) else OwnLayer(layer)


def unwrap(layer: nn.Module) -> nn.Module:
    """Return the layer that an `OwnLayer` holds; other layers are returned as they are."""
    return layer.layer if isinstance(layer, OwnLayer) else layer


def is_library_layer(layer: nn.Module) -> bool:
    """Return True if torch or linflab defines what a layer computes, also if the user has extended its class."""
    if isinstance(layer, OwnLayer):
        return False
    # Parametrizations of torch give a layer a class of torch, which has no forward pass of its own.
    classes = (next((kind for kind in type(layer).__mro__ if part in vars(kind)), nn.Module) for part in FORWARD_PARTS)
    return all(kind.__module__.partition(".")[0] in ("torch", "linflab") for kind in classes)


def has_exact_rule(function: Any, layer: nn.Module) -> bool:
    """Return True if a single-dispatch function has a rule for what a layer computes.

    A rule of a base class is not exact if the layer's class has another forward.
    """
    kind = next((kind for kind in type(layer).__mro__ if kind in function.registry), object)
    return kind is not object and _computes_as(layer, kind)


def _computes_as(layer: nn.Module, kind: type) -> bool:
    return all(getattr(type(layer), part, None) is getattr(kind, part, None) for part in FORWARD_PARTS)


VIEW_LAYERS = (
    nn.Flatten,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    Reshape,
)  # in evaluation mode: the same values
MASKS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d)  # in training mode: values times random factors


def make_out_of_place(layer: nn.Module) -> nn.Module:
    """Return a layer with the same parameters that does not overwrite its input."""
    if not getattr(layer, "inplace", False):
        return layer
    copied_layer = copy.copy(layer)
    vars(copied_layer)["inplace"] = False
    return copied_layer


def run_steps(steps: Sequence[TraceStep], values: Mapping[str, Tensor], copies: int = 1) -> dict[str, Tensor]:
    """Return given values, and the outputs of steps that follow from them, by name.

    Args:
        steps: Steps, in order of computation.
        values: (copies * B, ...) values: several of each of B samples, where values of the same rank are adjacent.
        copies: Number of values of each sample.
    """
    results = dict(values)
    for step in steps:
        inputs = [results[name] for name in step.inputs]
        if isinstance(step.layer, Masking):  # its factors belong to the samples
            results[step.output] = step.layer(inputs[0].unflatten(0, (copies, -1))).flatten(0, 1)
        else:
            results[step.output] = step.layer(*inputs)
    return results


def compute_output(traced: Trace, x: Tensor, copies: int = 1) -> Tensor:
    """Return the output (copies * B, ...) of a network or a part of one, for inputs (copies * B, ...)."""
    return run_steps(traced.steps, {traced.input: x}, copies)[traced.output]
