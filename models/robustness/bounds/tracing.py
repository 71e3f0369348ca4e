"""A network as a list of layers: traced by torch.fx, its operations written as layers too, and nothing left out."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional


class Step(NamedTuple):
    """A layer, and the names of the values that it takes and of the one that it makes."""

    layer: nn.Module
    inputs: tuple[str, ...]
    output: str


class Trace(NamedTuple):
    """What a network computes of one input, step after step."""

    input: str
    steps: list[Step]
    output: str


class Negation(nn.Module):
    """-x."""

    def forward(self, x: Tensor) -> Tensor:
        return -x


class Shift(nn.Module):
    """x plus a constant."""

    constant: Tensor | float

    def __init__(self, constant: Tensor | float) -> None:
        super().__init__()
        object.__setattr__(self, "constant", constant)  # the network's own: no parameter of this module

    def forward(self, x: Tensor) -> Tensor:
        return x + self.constant


class Scaling(nn.Module):
    """x times one factor for each feature or channel, plus another number."""

    scale: Tensor
    offset: Tensor

    def __init__(self, scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "scale", scale)  # made of the network's own: no parameter of this module
        object.__setattr__(self, "offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        return torch.addcmul(self.offset.view(shape), x, self.scale.view(shape))


class Sum(nn.Module):
    """x + y, of one shape."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Concatenation(nn.Module):
    """Several values, side by side along a dimension that is not the batch's."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *values: Tensor) -> Tensor:
        return torch.cat(values, self.dim)


class Relation(NamedTuple):
    """What is known of an operation: the layer that does the same, and which of its arguments are values."""

    layer: nn.Module
    values: Sequence[Any]


def _elementwise(layer: nn.Module) -> Callable[..., Relation]:
    return lambda x, inplace=False: Relation(layer, [x])


def _sum(x: Any, y: Any) -> Relation:
    if isinstance(x, fx.Node) and isinstance(y, fx.Node):
        return Relation(Sum(), [x, y])
    return Relation(Shift(y), [x]) if isinstance(x, fx.Node) else Relation(Shift(x), [y])


def _flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Relation:
    return Relation(nn.Flatten(start_dim, end_dim), [x])


def _concatenation(tensors: Sequence[Any], dim: int = 0) -> Relation:
    return Relation(Concatenation(dim), tensors)


OPERATIONS: dict[Callable[..., Any] | str, Callable[..., Relation]] = {
    operator.neg: lambda x: Relation(Negation(), [x]),
    operator.add: _sum,
    operator.iadd: _sum,
    torch.add: _sum,
    torch.flatten: _flatten,
    "flatten": _flatten,
    torch.relu: _elementwise(nn.ReLU()),
    functional.relu: _elementwise(nn.ReLU()),
    "relu": _elementwise(nn.ReLU()),
    torch.tanh: _elementwise(nn.Tanh()),
    "tanh": _elementwise(nn.Tanh()),
    torch.cat: _concatenation,
}
VIEWS = (nn.Flatten, nn.Identity, nn.Dropout)  # in evaluation their outputs are their inputs, in the same memory


class _Value(fx.Proxy):
    """A value on its way through the network; torch.fx would take x += y for x = x + y."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    def __init__(self, has_rule: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.has_rule = has_rule

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return self.has_rule(module) or super().is_leaf_module(module, name)


class _OfImages(nn.Module):
    """A network as a function of images alone: its other arguments are those by default, p = inf."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


def trace(network: nn.Module, has_rule: Callable[[nn.Module], bool]) -> Trace:
    """The steps of a network in evaluation mode at p = inf.

    Args:
        network: in evaluation mode.
        has_rule: whether a module is a layer, and not to be looked into.

    Raises:
        ValueError: the network is in training mode.
        TypeError: a layer or operation of the network has no rule, or overwrites what is still needed; names it.
    """
    if any(module.training for module in network.modules()):
        raise ValueError("bounds need the network in evaluation mode: call network.eval() first")
    hooks = torch.nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        raise TypeError("bounds: there is no rule for what global forward hooks do")
    root = _OfImages(network)
    constants: dict[fx.Node, Any] = {}
    names: dict[fx.Node, str] = {}
    steps: list[Step] = []
    for node in _Tracer(has_rule).trace(root).nodes:
        if node.op == "placeholder":
            names[node] = input_name = node.name
        elif node.op == "get_attr":
            constants[node] = operator.attrgetter(str(node.target))(root)
        elif node.op == "output":
            if node.args[0] not in names:
                raise TypeError(f"bounds: {type(network).__name__} has several outputs; there is a rule for one")
            output = names[node.args[0]]
        else:
            layer, values = _layer_of(root, node, has_rule) if node.op == "call_module" else _known(node, constants)
            if not all(isinstance(value, fx.Node) and value in names for value in values):
                raise TypeError(f"bounds: there is no rule for {node.target} of constants")
            _refuse_overwriting(node, layer, values, steps, names)
            names[node] = node.name
            steps.append(Step(layer, tuple(names[value] for value in values), node.name))
    return Trace(input_name, steps, output)


def _layer_of(root: nn.Module, node: fx.Node, has_rule: Callable[[nn.Module], bool]) -> Relation:
    layer = root.get_submodule(str(node.target))
    if not has_rule(layer):
        raise TypeError(f"bounds: there is no rule for layers of type {type(layer).__name__}")
    others = [*node.args[1:], *node.kwargs.values()]
    if any(other is not None and other != math.inf for other in others):  # p = inf is what the rules are for
        raise TypeError(f"bounds: {type(layer).__name__} is called with {others}; the rule is for none")
    return Relation(layer, node.args[:1])


def _known(node: fx.Node, constants: dict[fx.Node, Any]) -> Relation:
    """The layer that does the same as a call of a function or method."""

    def value(argument: Any) -> Any:
        return constants.get(argument, argument) if isinstance(argument, fx.Node) else argument

    try:
        return OPERATIONS[node.target](*map(value, node.args), **node.kwargs)
    except (KeyError, TypeError):
        raise TypeError(f"bounds: there is no rule for the operation {node.target} {node.kwargs or ''}") from None


def _refuse_overwriting(
    node: fx.Node, layer: nn.Module, values: Sequence[fx.Node], steps: list[Step], names: dict[fx.Node, str]
) -> None:
    """Refuse an operation in place where something else still looks at the memory that it overwrites."""
    if not (node.kwargs.get("inplace") or getattr(layer, "inplace", False) or node.target is operator.iadd):
        return
    makers = {step.output: step for step in steps}
    nodes = {name: node for node, name in names.items()}
    overwritten = values[0]
    while len(overwritten.users) == 1:
        maker = makers.get(names[overwritten])
        if maker is None or not isinstance(maker.layer, VIEWS):
            return
        overwritten = nodes[maker.inputs[0]]
    raise TypeError(f"bounds: {node.name} works in place, and what it overwrites is used again")
