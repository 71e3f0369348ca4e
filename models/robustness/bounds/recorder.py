"""Recorder of a network's forward pass: every operation on values that depend on the input.

Functions may hide operations, write values into constants, or take sizes from values. The recorder therefore also
watches the kernels that run. It rejects the results of kernels that use values outside a recorded function.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from linflab.models.robustness.bounds.moves import MOVES, record_move
from linflab.models.robustness.bounds.operations import ADVICE, DEFAULT_ADVICE, LAYER_FOR_OPERATION, Value
from linflab.models.robustness.bounds.steps import Trace, TraceStep, hide_class, make_out_of_place

METADATA = {  # methods that the trace can ignore
    *("size", "dim", "ndimension", "numel", "nelement", "__len__", "stride", "storage_offset", "is_contiguous"),
    *("is_floating_point", "is_complex", "is_signed", "element_size", "get_device", "data_ptr", "__hash__"),
    *("__repr__", "__str__", "has_names", "is_shared", "is_pinned"),
}
CONSTANTS = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_tensor"}  # use the shape
FORMS = {"to", "type_as", "expand_as", "view_as", "reshape_as"}  # use the dtype or shape of another tensor


class UnsupportedError(TypeError):
    """A layer or operation of a network that has no rule."""


@dataclass(frozen=True)
class _Unsupported:
    """Placeholder for a value without a rule, with the reason."""

    reason: str


class _TrackedTensor(NamedTuple):
    """A tensor of the forward pass.

    Attributes:
        tensor: The tensor.
        version: Its version counter when it was computed; in-place operations increase the counter.
        value: Its value in the trace, or the reason why it has none.
    """

    tensor: Tensor
    version: int
    value: Value | _Unsupported


class ForwardRecorder(TorchFunctionMode):
    """Recorder of operations on values that depend on an example.

    Args:
        network: Network whose forward pass is recorded.
        has_rule: Function that returns True for modules to record as layers.
        example: Example of inputs, (B, *shape).
    """

    def __init__(self, network: nn.Module, has_rule: Callable[[nn.Module], bool], example: Tensor) -> None:
        super().__init__()
        self.network, self.thread = network, threading.get_ident()
        self.training = any(module.training for module in network.modules())
        self.paths = {id(module): name for name, module in network.named_modules()}
        self.layers = {id(module) for module in network.modules() if has_rule(module)}
        self.steps: list[TraceStep] = []
        self.tracked: dict[int, _TrackedTensor] = {}
        self.calls: list[tuple[nn.Module, Value | _Unsupported | None, bool]] = []  # modules in execution
        self.pause_depth = 0  # above 0 in layers with rules and in the recorder
        self.constants: list[tuple[Tensor, int]] = []
        float_tensors = [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()]
        self.parameters = {self._storage_key(tensor) for tensor in float_tensors} - {None}
        self.storages: dict[int, tuple[Tensor, str]] = {}  # memory of values, and why to reject others in it
        self.call: Value | _Unsupported | list[Value] | None = None  # result of the function in execution
        self.failure = ""  # message of an error that cannot be raised yet
        self._bind(example, Value("images", example.clone()))

    def recording(self) -> ExitStack:
        """Return a context in which the operations of the network are recorded."""
        stack = ExitStack()
        for module in self.network.modules():
            before = module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
            after = module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        stack.callback(self._restore)
        stack.enter_context(self)
        stack.enter_context(_Kernels(self))
        return stack

    def build_trace(self, output: Any) -> Trace:
        """Return the trace that computes an output of the recorded forward pass.

        Raises:
            UnsupportedError: If the output is not a tensor, or is computed by an operation without a rule.
        """
        name = type(self.network).__name__
        if not isinstance(output, Tensor):
            raise UnsupportedError(
                f"bounds: {name} must return one tensor, not {type(output).__name__}; use the logits"
            )
        if self.failure:
            raise UnsupportedError(self.failure)
        if not self._depends(output):
            raise UnsupportedError(
                f"bounds: the output of {name} does not depend on its input by traceable operations; use those of torch"
            )
        value = self._current_value(output)
        if isinstance(value, _Unsupported):
            raise UnsupportedError(f"bounds: {value.reason}")
        if any(tensor._version != version for tensor, version in self.constants):
            raise UnsupportedError(f"bounds: {name} overwrites in place a constant that it has used; use a new tensor")
        return Trace("images", self.steps, value.name, bool(self.constants))

    def record(self, layer: nn.Module, *values: Value, example: Tensor | None = None) -> Value:
        """Add a step to the trace, and return its output."""
        with torch.no_grad():
            example = layer(*(value.example for value in values)) if example is None else example.detach().clone()
        name = f"v{len(self.steps)}"
        self.steps.append(TraceStep(layer, tuple(value.name for value in values), name))
        return Value(name, example)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        base = getattr(function, "__name__", "")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self.pause_depth or not any(self._depends(tensor) for tensor in tensors):
            return function(*args, **kwargs)
        other_tensors = [leaf for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, Tensor)]
        if (
            base in METADATA
            or (base in CONSTANTS and not any(self._depends(tensor) for tensor in other_tensors))
            or (base in FORMS and args and isinstance(args[0], Tensor) and not self._depends(args[0]))
        ):
            with self._pause():  # printing reads values
                return function(*args, **kwargs)
        full = resolve_name(function) or base
        if base == "__get__":
            output = function(*args, **kwargs)
            if isinstance(output, Tensor):
                self._bind(output, _Unsupported(self._rejection_message(full, full.split(".")[-2])))
            return output
        if base == "__set__":
            raise UnsupportedError(f"bounds: {self._rejection_message(full, base)}")
        name = base.strip("_")
        result = self._record_call(function, full, name, args, kwargs, tensors)
        self.call = result
        try:
            output = function(*args, **kwargs)
        finally:
            self.call = None
        if output is not None and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
            raise UnsupportedError(
                f"bounds: the forward pass of {self._owner()} cannot be traced, since it branches on values or reads "
                f"them ({full}); use operations on whole tensors, such as torch.relu"
            )
        parts, values = tree_leaves(output), result if isinstance(result, list) else [result] * len(tree_leaves(output))
        for part, value in zip(parts, values, strict=True):
            if isinstance(part, Tensor):
                if isinstance(value, Value) and (part.shape, part.dtype) != (value.example.shape, value.example.dtype):
                    value = _Unsupported(self._rejection_message(full, name, "with these arguments"))
                self._bind(part, value)
        return output

    def _record_call(
        self, function: Any, full: str, name: str, args: Any, kwargs: Any, tensors: list[Tensor]
    ) -> Value | _Unsupported | list[Value]:
        """Record the steps of a call before it runs, and return its result in the trace."""
        inputs = {id(tensor): self._current_value(tensor) for tensor in tensors if self._depends(tensor)}
        unsupported = next((value for value in inputs.values() if isinstance(value, _Unsupported)), None)
        if unsupported is not None:
            return unsupported
        values = {key: value for key, value in inputs.items() if isinstance(value, Value)}
        steps = len(self.steps)
        reason = ""
        self.pause_depth += 1
        try:
            result: Value | list[Value] | None = None
            if name in MOVES:
                result = record_move(self, function, name, args, kwargs, values)
            elif name in LAYER_FOR_OPERATION:
                new_args = tree_map(lambda x: values.get(id(x), x) if isinstance(x, Tensor) else x, args)
                new_kwargs = tree_map(lambda x: values.get(id(x), x) if isinstance(x, Tensor) else x, kwargs)
                result = LAYER_FOR_OPERATION[name](self, *new_args, **new_kwargs)
                reason = "with these arguments"
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = f"with these arguments ({str(error).splitlines()[0]})"
        finally:
            self.pause_depth -= 1
        if result is None:
            del self.steps[steps:]
            return _Unsupported(self._rejection_message(full, name, reason))
        self.constants += [(tensor, tensor._version) for tensor in tensors if id(tensor) not in values]
        return result

    def watch(self, kernel: torch._ops.OpOverload, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        """Check what a kernel did to values, since a function may be unrecorded or write to constants."""
        if self.pause_depth or threading.get_ident() != self.thread:
            return
        with self._pause():
            if torch.Tag.nondeterministic_seeded in kernel.tags and not self.training:
                if isinstance(self.call, _Unsupported):
                    self.failure = self.failure or f"bounds: {self.call.reason}"
                self._fail("draws random numbers", kernel, "make evaluation mode deterministic")
            written_tensors = [
                tensor
                for argument, value in zip(kernel._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
                for tensor in tree_leaves(value)
                if isinstance(tensor, Tensor)
            ]
            if not self.training and any(self._storage_key(tensor) in self.parameters for tensor in written_tensors):
                self._fail("changes a parameter or buffer", kernel, "use the same ones for all images")
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            values = [tensor for tensor in tensors if self._depends(tensor)]
            if not values:
                return
            masks = kernel.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put)
            if torch.Tag.data_dependent_output in kernel.tags:
                self._fail("reads values", kernel, "use operations on whole tensors, such as torch.relu")
            elif torch.Tag.dynamic_output_shape in kernel.tags and not (
                masks and not any(tensor.dtype in (torch.bool, torch.uint8) for tensor in values)
            ):
                self._fail("makes a tensor whose size depends on values", kernel, "use tensors of one size")
            if isinstance(self.call, _Unsupported):
                reason = self.call.reason
            elif self.call is not None:
                reason = f"writing values into a part of a tensor in {self._owner()} is not supported; use torch.cat"
            else:
                reason = (
                    f"a function that hides its operations ({kernel}) in the forward pass of {self._owner()} is not "
                    "supported; use plain torch operations instead of torch.jit.script or torch.vmap"
                )
            outs = [leaf for leaf in tree_leaves(kwargs) if any(leaf is part for part in tree_leaves(outputs))]
            for tensor in (*written_tensors, *outs):
                self._reject_overwritten(tensor, reason)
            if self.call is None:
                for part in tree_leaves(outputs):
                    if isinstance(part, Tensor) and id(part) not in self.tracked:
                        self._bind(part, _Unsupported(reason))

    def _reject_overwritten(self, tensor: Any, reason: str) -> None:
        """Reject all tensors in the memory of an overwritten tensor; skip values, which have versions."""
        if not isinstance(tensor, Tensor) or isinstance(self._recorded_value(tensor), Value):
            return
        key = self._storage_key(tensor)
        if key is not None:
            self.storages[key] = tensor, reason
        for entry in [
            entry for entry in self.tracked.values() if key is not None and self._storage_key(entry.tensor) == key
        ]:
            self._bind(entry.tensor, _Unsupported(reason))

    def _recorded_value(self, tensor: Tensor) -> Value | _Unsupported | None:
        entry = self.tracked.get(id(tensor))
        return None if entry is None else entry.value

    def _depends(self, tensor: Tensor) -> bool:
        """Return True if a tensor is a value, or shares memory with one."""
        return id(tensor) in self.tracked or self._storage_key(tensor) in self.storages

    def _storage_key(self, tensor: Tensor) -> int | None:
        """Return the identity of a tensor's memory; None for tensors without memory, as in torch.vmap."""
        with self._pause():
            try:
                return tensor.untyped_storage()._cdata
            except (NotImplementedError, RuntimeError):
                return None

    def _fail(self, problem: str, kernel: torch._ops.OpOverload, advice: str) -> None:
        self.failure = self.failure or (
            f"bounds: the forward pass of {self._owner()} cannot be traced, since it {problem} ({kernel}); {advice}"
        )

    @contextmanager
    def _pause(self) -> Iterator[None]:
        self.pause_depth += 1
        try:
            yield
        finally:
            self.pause_depth -= 1

    def _bind(self, tensor: Tensor, value: Value | _Unsupported) -> None:
        self.tracked[id(tensor)] = _TrackedTensor(tensor, tensor._version, value)
        key = self._storage_key(tensor)
        if key is not None:
            reason = (
                f"accessing the memory of a value by an unrecorded operation in {self._owner()} is not supported; "
                "use the value itself"
            )
            self.storages.setdefault(key, (tensor, reason))

    def _current_value(self, tensor: Tensor) -> Value | _Unsupported:
        entry = self.tracked.get(id(tensor))
        if entry is None:
            key = self._storage_key(tensor)
            assert key is not None
            return _Unsupported(self.storages[key][1])
        if tensor._version != entry.version:
            return _Unsupported(
                f"using a value that was overwritten in place in {self._owner()} is not supported; use the "
                "out-of-place operation"
            )
        return entry.value

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self.thread:
            return  # another thread runs the same module
        value, training = None, module.training
        if not self.pause_depth and id(module) in self.layers:
            value = self._layer_input(module, args, kwargs)
        self.calls.append((module, value, training))
        if value is not None:
            self.pause_depth += 1
            module.training = False

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        _, value, training = self.calls.pop()
        if value is None:
            return
        module.training = training
        if isinstance(output, Tensor):  # otherwise the layer failed
            if isinstance(value, Value) and output.dtype != value.example.dtype:
                value = _Unsupported(
                    f"{type(module).__name__} (layer '{self.paths[id(module)]}') with {output.dtype} outputs for "
                    f"{value.example.dtype} inputs is not supported; use a forward pass without autocast"
                )
            elif isinstance(value, Value):
                value = self.record(hide_class(make_out_of_place(module)), value, example=output)
            self._bind(output, value)
        self.pause_depth -= 1

    def _restore(self) -> None:
        for module, value, training in self.calls:
            if value is not None:
                module.training = training

    def _layer_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Value | _Unsupported | None:
        """Return the value that a layer is called with; None if it is called with constants."""
        arguments = [*args, *kwargs.values()]
        inputs = [leaf for leaf in arguments if isinstance(leaf, Tensor) and self._depends(leaf)]
        if not inputs:
            return None
        others = [leaf for leaf in arguments if leaf is not inputs[0]]
        if any(other is not None and not (isinstance(other, float) and other == math.inf) for other in others):
            name = type(module).__name__
            return _Unsupported(
                f"{name} (layer '{self.paths[id(module)]}') with arguments {others} is not supported; use it without"
            )
        return self._current_value(inputs[0])

    def _owner(self) -> str:
        """Return the name of the innermost user-defined module in execution."""
        for module, _, _ in reversed(self.calls):
            if not type(module).__module__.startswith("torch.nn."):
                path = self.paths[id(module)]
                return type(module).__name__ + (f" (layer '{path}')" if path else "")
        return type(self.network).__name__

    def _rejection_message(self, full: str, name: str, reason: str = "") -> str:
        """Return the message that rejects an operation by its public name, with an alternative."""
        module = self.calls[-1][0] if self.calls else self.network
        if type(module).__module__.startswith("torch.nn.") and self.paths[id(module)]:
            subject = f"{type(module).__name__} (layer '{self.paths[id(module)]}')"
        elif type(module).__module__.startswith("torch.nn."):
            subject = type(module).__name__
        else:
            subject = f"{full} in the forward pass of {self._owner()}"
        subject += f" {reason}" if reason else ""
        return f"{subject} is not supported; {ADVICE.get(name, DEFAULT_ADVICE)}"


class _Kernels(TorchDispatchMode):
    """Mode that reports all kernels to a recorder, including those outside of torch functions."""

    def __init__(self, recorder: ForwardRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self.recorder._pause():  # the network did not call this function
            outputs = func(*args, **kwargs)
        self.recorder.watch(func, args, kwargs, outputs)
        return outputs
