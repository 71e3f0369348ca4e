"""Operations of a forward pass, each with a handler that records equivalent layers.

`LAYER_FOR_OPERATION` maps names of torch functions and methods to handlers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from linflab.models.robustness.bounds.steps import (
    Add,
    AddConstant,
    Clamp,
    Concat,
    Negate,
    Quotient,
    Rearrangement,
    Reshape,
    Scale,
)


@dataclass(frozen=True, eq=False)
class Value:
    """A value of the forward pass that depends on the input.

    Attributes:
        name: Name in the trace.
        example: The value for the example inputs of the trace, (B, *shape).
    """

    name: str
    example: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape without the batch."""
        return self.example.shape[1:]


class Recorder(Protocol):
    """Interface through which handlers record layers; `training` is True if the network is in training mode."""

    training: bool

    def record(self, layer: nn.Module, *values: Value) -> Value:
        """Add a step to the trace, and return its output."""
        ...


Handler = Callable[..., Value | list[Value] | None]  # returns None if the arguments are not supported


def _add(recorder: Recorder, x: Any, y: Any, *, alpha: float = 1) -> Value | None:
    if alpha != 1:
        return None
    if isinstance(x, Value) and isinstance(y, Value):
        return recorder.record(Add(), x, y) if x.shape == y.shape else None
    return recorder.record(AddConstant(y), x) if isinstance(x, Value) else recorder.record(AddConstant(x), y)


def _subtract(recorder: Recorder, x: Any, y: Any, *, alpha: float = 1) -> Value | None:
    if isinstance(y, Value):
        return _add(recorder, x, recorder.record(Negate(), y), alpha=alpha)
    if isinstance(y, Tensor) and not y.is_floating_point():  # negation of unsigned integers wraps around
        y = y.to(x.example.dtype)
    return _add(recorder, x, -y, alpha=alpha)


def _subtract_from(recorder: Recorder, x: Any, y: Any, *, alpha: float = 1) -> Value | None:
    return _subtract(recorder, y, x, alpha=alpha)


def _multiply(recorder: Recorder, x: Any, y: Any) -> Value | None:
    if isinstance(x, Value) and isinstance(y, Value):
        return None
    return recorder.record(Scale(y), x) if isinstance(x, Value) else recorder.record(Scale(x), y)


def _divide(recorder: Recorder, x: Any, y: Any, *, rounding_mode: None = None) -> Value | None:
    if isinstance(y, Value) or rounding_mode is not None:
        return None
    return recorder.record(Quotient(y), x)


def _activation(layer: Callable[..., nn.Module], *options: str) -> Handler:
    """Return a handler that records a call f(x, *options, inplace) of an elementwise function as `layer(*options)`."""

    def handler(recorder: Recorder, x: Value, *args: Any, inplace: bool = False, **kwargs: Any) -> Value:
        arguments = dict(zip((*options, "inplace"), args, strict=False))
        arguments.pop("inplace", None)
        return recorder.record(layer(**arguments, **kwargs), x)

    return handler


def _clamp(recorder: Recorder, x: Value, min: float | None = None, max: float | None = None) -> Value | None:
    low, high = -math.inf if min is None else min, math.inf if max is None else max
    if isinstance(low, Tensor | Value) or isinstance(high, Tensor | Value):
        return None
    return recorder.record(Clamp(float(low), float(high)), x)


def _hardtanh(recorder: Recorder, x: Value, min_val: float = -1, max_val: float = 1, inplace: bool = False) -> Value:
    return recorder.record(Clamp(min_val, max_val), x)


def _pooling(layer: type[nn.Module], *options: str) -> Handler:
    """Return a handler that records a call f(x, *options) of a pooling function as `layer(*options)`."""

    def handler(recorder: Recorder, x: Value, *args: Any, **kwargs: Any) -> Value | None:
        arguments = {**dict(zip(options, args, strict=False)), **kwargs}
        if not arguments.get("stride", True):  # an empty list means the default stride
            arguments.pop("stride")
        if x.example.dim() != (3 if "1d" in layer.__name__ else 4) or arguments.get("return_indices"):
            return None
        return recorder.record(layer(**arguments), x)

    return handler


_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_MAXIMUM = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def _reduced_dims(x: Value, dim: Any) -> list[int]:
    """Return the dimensions that a reduction removes; empty if it does not leave the samples apart."""
    rank = x.example.dim()
    dims = () if dim is None or isinstance(dim, Tensor | Value) else (dim,) if isinstance(dim, int) else dim
    reduced = sorted({d % rank for d in dims})
    return reduced if 0 not in reduced else []


def _gather_groups(x: Value, dims: Sequence[int]) -> Tensor:
    """Return the indices (groups, count) of the values of each sample that a reduction over `dims` combines."""
    others = [d for d in range(1, x.example.dim()) if d not in dims]
    index = torch.arange(x.shape.numel(), device=x.example.device).view(x.shape)
    count = math.prod(x.example.shape[d] for d in dims)
    return index.permute([d - 1 for d in (*others, *dims)]).reshape(-1, count)


def _reshape_reduced(recorder: Recorder, x: Value, result: Value, dims: Sequence[int], keepdim: bool) -> Value:
    """Return the result of a reduction of `x` over `dims` in the shape of torch's output."""
    sizes = [(d, 1 if d in dims else x.example.shape[d]) for d in range(1, x.example.dim())]
    shape = torch.Size(size for d, size in sizes if keepdim or d not in dims)
    return result if result.shape == shape else recorder.record(Reshape(shape), result)


def _mean(recorder: Recorder, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: None = None) -> Value | None:
    dims = _reduced_dims(x, dim)
    if not dims or dtype is not None:
        return None
    if x.example.dim() == 4 and dims == [2, 3]:
        mean = recorder.record(nn.AdaptiveAvgPool2d(1), x)
    else:
        groups = recorder.record(Rearrangement(_gather_groups(x, dims)), x)
        mean = recorder.record(nn.AdaptiveAvgPool1d(1), groups)
    return _reshape_reduced(recorder, x, mean, dims, keepdim)


def _maximum(recorder: Recorder, x: Value, dim: Any = None, keepdim: bool = False) -> Value | None:
    """Record the largest values along dimensions as max pooling with one window per output."""
    dims = _reduced_dims(x, dim)
    if not dims:
        return None
    index = _gather_groups(x, dims)
    groups = recorder.record(Rearrangement(index[None]), x)
    return _reshape_reduced(recorder, x, recorder.record(nn.MaxPool2d((1, index.shape[1])), groups), dims, keepdim)


def _minimum(recorder: Recorder, x: Value, dim: Any = None, keepdim: bool = False) -> Value | None:
    largest = _maximum(recorder, recorder.record(Negate(), x), dim, keepdim)
    return None if largest is None else recorder.record(Negate(), largest)


def _with_indices(handler: Handler) -> Handler:
    """Return a handler of a function that also returns indices, which the recorder rejects by their dtype if used."""

    def handle(recorder: Recorder, *args: Any, **kwargs: Any) -> list[Value] | None:
        value = handler(recorder, *args, **kwargs)
        return [value, value] if isinstance(value, Value) else None

    return handle


def _with_constants(layer: nn.Module, **constants: Tensor | None) -> nn.Module:
    """Replace parameters of a new layer by tensors of the network, or by None, and return the layer."""
    for name, constant in constants.items():
        del layer._parameters[name]
        object.__setattr__(layer, name, constant)
    return layer


def _linear(recorder: Recorder, x: Any, weight: Any, bias: Any = None) -> Value | None:
    if isinstance(weight, Value) or isinstance(bias, Value) or weight.dim() != 2:
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    return recorder.record(_with_constants(layer, weight=weight, bias=bias), x)


def _matmul(recorder: Recorder, x: Any, y: Any) -> Value | None:
    if not isinstance(x, Value) or isinstance(y, Value) or y.dim() != 2 or x.example.dim() < 2:
        return None
    return _linear(recorder, x, y.mT)


def _convolution(kind: type[nn.Conv1d | nn.Conv2d]) -> Handler:
    def handler(
        recorder: Recorder,
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Value | None:
        if isinstance(weight, Value) or isinstance(bias, Value) or x.example.dim() != weight.dim():
            return None
        size, outputs, inputs = weight.shape[2:], weight.shape[0], weight.shape[1] * groups
        layer = kind(inputs, outputs, tuple(size), stride, padding, dilation, groups, device="meta")
        return recorder.record(_with_constants(layer, weight=weight, bias=bias), x)

    return handler


def _dropout(layer: type[nn.Module]) -> Handler:
    def handler(
        recorder: Recorder, x: Value, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Value | None:
        if training and not recorder.training:
            raise TypeError("training=True is random in evaluation mode too; pass training=self.training")
        return recorder.record(layer(p).train(training), x)

    return handler


def _concatenate(recorder: Recorder, tensors: Sequence[Any], dim: int = 0) -> Value | None:
    if not all(isinstance(value, Value) for value in tensors):
        return None
    dim = dim % tensors[0].example.dim()
    return recorder.record(Concat(dim), *tensors) if dim > 0 else None


def _identity(recorder: Recorder, x: Value, *args: Any, **kwargs: Any) -> Value:
    return x


def _detach(recorder: Recorder, x: Value) -> Value | None:
    return None if recorder.training else x


LAYER_FOR_OPERATION: dict[str, Handler] = {
    "neg": lambda recorder, x: recorder.record(Negate(), x),
    "negative": lambda recorder, x: recorder.record(Negate(), x),
    "add": _add,
    "radd": _add,
    "sub": _subtract,
    "subtract": _subtract,
    "rsub": _subtract_from,
    "mul": _multiply,
    "rmul": _multiply,
    "multiply": _multiply,
    "div": _divide,
    "divide": _divide,
    "true_divide": _divide,
    "truediv": _divide,
    "relu": _activation(nn.ReLU),
    "leaky_relu": _activation(nn.LeakyReLU, "negative_slope"),
    "abs": lambda recorder, x: recorder.record(nn.LeakyReLU(-1.0), x),
    "tanh": _activation(nn.Tanh),
    "sigmoid": _activation(nn.Sigmoid),
    "elu": _activation(nn.ELU, "alpha"),
    "softplus": _activation(nn.Softplus, "beta", "threshold"),
    "silu": _activation(nn.SiLU),
    "gelu": _activation(nn.GELU),
    "hardtanh": _hardtanh,
    "relu6": lambda recorder, x, inplace=False: recorder.record(Clamp(0.0, 6.0), x),
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": lambda recorder, x, min: _clamp(recorder, x, min=min),
    "clamp_max": lambda recorder, x, max: _clamp(recorder, x, max=max),
    "max_pool1d": _pooling(nn.MaxPool1d, *_MAXIMUM),
    "max_pool2d": _pooling(nn.MaxPool2d, *_MAXIMUM),
    "adaptive_max_pool2d": _pooling(nn.AdaptiveMaxPool2d, "output_size", "return_indices"),
    "avg_pool1d": _pooling(nn.AvgPool1d, *_AVERAGE),
    "avg_pool2d": _pooling(nn.AvgPool2d, *_AVERAGE, "divisor_override"),
    "adaptive_avg_pool1d": _pooling(nn.AdaptiveAvgPool1d, "output_size"),
    "adaptive_avg_pool2d": _pooling(nn.AdaptiveAvgPool2d, "output_size"),
    "mean": _mean,
    "amax": _maximum,
    "amin": _minimum,
    "max": _with_indices(_maximum),
    "min": _with_indices(_minimum),
    "linear": _linear,
    "matmul": _matmul,
    "conv1d": _convolution(nn.Conv1d),
    "conv2d": _convolution(nn.Conv2d),
    "dropout": _dropout(nn.Dropout),
    "dropout1d": _dropout(nn.Dropout1d),
    "dropout2d": _dropout(nn.Dropout2d),
    "cat": _concatenate,
    "concat": _concatenate,
    "concatenate": _concatenate,
    "clone": _identity,
    "contiguous": _identity,
    "to": _identity,
    "float": _identity,
    "double": _identity,
    "type_as": _identity,
    "detach": _detach,
}
DEFAULT_ADVICE = (
    "use an operation that docs/how-to/own-networks.md lists, or a layer of your own with a rule registered by "
    "`propagate_layer.register(MyLayer, rule)` of linflab.models.robustness.bounds"
)
ADVICE = {
    "softmax": "remove it: certificates compare logits, and it does not change the largest one",
    "log_softmax": "remove it: certificates compare logits, and it does not change the largest one",
    "group_norm": "use BatchNorm, whose statistics are constant in evaluation mode",
    "layer_norm": "use BatchNorm, whose statistics are constant in evaluation mode",
    "instance_norm": "use BatchNorm, whose statistics are constant in evaluation mode",
    "batch_norm": "use nn.BatchNorm1d or nn.BatchNorm2d, which keep running statistics",
    "detach": "use it in evaluation mode only, since it removes gradients of the bounds",
    "mul": "use products with constants: products of two values that depend on the input have no bounds",
}
