"""Tracing: a network as a list of layers, recorded from its forward pass on an example.

Layers with rules are recorded as they are. All other operations on values that depend on the input are looked up in
`operations` and `moves`. Operations that are not found there are rejected by name, unless the output does not depend on
them.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from linflab.models.robustness.bounds.recorder import ForwardRecorder, UnsupportedError
from linflab.models.robustness.bounds.steps import Trace

OWN_MODULES = ("torch.nn.", "linflab.")
_ONE_AT_A_TIME = threading.RLock()  # modules have hooks during tracing


def has_only_own_modules(network: nn.Module) -> bool:
    """Return whether all modules of a network are classes of PyTorch or of this package."""
    return all(type(module).__module__.startswith(OWN_MODULES) for module in network.modules())


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Inside a context, all modules of a network are in evaluation mode; afterwards each is in its previous mode."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def trace(network: nn.Module, has_rule: Callable[[nn.Module], bool], images: Tensor) -> Trace:
    """Return the trace of a network at p = inf, in its current mode.

    The forward pass runs on two gray images. Layers with rules compute as in evaluation mode, so running statistics do
    not change; the trace holds the layers in their current mode.

    Args:
        network: Network that takes images only.
        has_rule: Function that returns True for modules to record as layers, without tracing their forward.
        images: (B, *shape) images of the shape, dtype and device to trace with.

    Raises:
        TypeError: If a layer or operation has no rule (the message names it).
        ValueError: If the network fails on images of this shape.
    """
    hooks, gradients = torch.nn.modules.module, torch.is_grad_enabled()
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        raise TypeError("bounds: global forward hooks are not supported; remove them first")
    scripted = next((name for name, module in network.named_modules() if isinstance(module, torch.jit.ScriptModule)), 0)
    if scripted != 0:
        location = f" (layer '{scripted}')" if scripted else ""
        raise TypeError(f"bounds: a TorchScript module{location} cannot be traced; use the original module")
    with ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        if any(type(module).__name__ == "OptimizedModule" for module in network.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        example = torch.full((2, *images.shape[1:]), 0.5, dtype=images.dtype, device=images.device)
        recorder = ForwardRecorder(network, has_rule, example)
        try:
            with recorder.recording():
                output = network(example)
        except UnsupportedError:
            raise
        except Exception as error:
            if recorder.failure:  # the exception may be a consequence of this failure
                raise UnsupportedError(recorder.failure) from error
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            shape = tuple(example.shape)
            raise ValueError(
                f"images={shape}: {type(network).__name__} fails on them ({reason}); use images of the shape that the "
                "network expects"
            ) from error
        return recorder.build_trace(output)
