"""The operator on CPUs in float32: C++ kernels behind custom ops of `torch.library`.

`csrc/kernels.cpp` is compiled once per instruction set when linflab is installed; the widest that this machine has is
loaded. The ops `linflab::lp_distance`, `linflab::lp_distance_backward` and `linflab::linf_distance_bounds` have
fake kernels, and the first has a gradient, so that `torch.compile` can trace them. They use `torch.get_num_threads()`
threads; their results do not depend on that number.
"""

import importlib
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# what torch calls the machine's instructions -> compiled modules that run there, fastest first
MODULES = {"AVX512": ("avx512", "avx2", "portable"), "AVX2": ("avx2", "portable")}


def _load_kernels() -> ModuleType | None:
    """The compiled module for this machine; None, with a warning, where linflab was installed without a compiler."""
    for isa in MODULES.get(torch.backends.cpu.get_cpu_capability(), ("portable",)):
        try:
            return importlib.import_module(f"linflab.models.distance._kernels_{isa}")
        except ImportError:
            continue
    warnings.warn(
        "linflab was installed without its C++ kernels, so the l_p-distance operator runs in plain PyTorch, many times "
        "slower; with a C++ compiler on the machine, in linflab's folder: pip install --force-reinstall --no-deps .",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


KERNELS = _load_kernels()


torch.library.define("linflab::lp_distance", "(Tensor x, Tensor weight, float p) -> Tensor")
torch.library.define(
    "linflab::lp_distance_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor y, float p) -> (Tensor, Tensor)",
)
torch.library.define("linflab::linf_distance_bounds", "(Tensor lower, Tensor upper, Tensor weight) -> (Tensor, Tensor)")


def _compiled() -> ModuleType:
    assert KERNELS is not None  # callers have asked
    return KERNELS


def _shape(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    return x.shape[0], weight.shape[0], x.shape[1]


@torch.library.impl("linflab::lp_distance", "CPU")
def _forward(x: Tensor, weight: Tensor, p: float) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0])
    pointers = (x.data_ptr(), weight.data_ptr(), y.data_ptr())
    _compiled().forward(*pointers, *_shape(x, weight), p, torch.get_num_threads())
    return y


@torch.library.impl("linflab::lp_distance_backward", "CPU")
def _backward(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    grad_y, x, weight, y = grad_y.contiguous(), x.contiguous(), weight.contiguous(), y.contiguous()
    grad_x, grad_weight, scratch = x.new_zeros(x.shape), weight.new_zeros(weight.shape), torch.empty_like(y)
    tensors = (x, weight, y, grad_y, grad_x, grad_weight, scratch)
    pointers = (tensor.data_ptr() for tensor in tensors)
    _compiled().backward(*pointers, *_shape(x, weight), p, torch.get_num_threads())
    return grad_x, grad_weight


@torch.library.impl("linflab::linf_distance_bounds", "CPU")
def _bounds(lower: Tensor, upper: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    lower, upper, weight = lower.contiguous(), upper.contiguous(), weight.contiguous()
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    high = torch.empty_like(low)
    pointers = (tensor.data_ptr() for tensor in (lower, upper, weight, low, high))
    _compiled().bounds(*pointers, *_shape(lower, weight), torch.get_num_threads())
    return low, high


@torch.library.register_fake("linflab::lp_distance")
def _fake_forward(x: Tensor, weight: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("linflab::lp_distance_backward")
def _fake_backward(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@torch.library.register_fake("linflab::linf_distance_bounds")
def _fake_bounds(lower: Tensor, upper: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    return low, torch.empty_like(low)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    x, weight, ctx.p = inputs
    ctx.save_for_backward(x, weight, output)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, y = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.linflab.lp_distance_backward(grad_y, x, weight, y, ctx.p)
    return grad_x, grad_weight, None


def _no_second_gradients(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("lp_distance is differentiable once; gradients of its gradients are not implemented")


torch.library.register_autograd("linflab::lp_distance", _gradients, setup_context=_save_for_backward)
torch.library.register_autograd("linflab::lp_distance_backward", _no_second_gradients)


def serves(x: Tensor) -> bool:
    """Whether these kernels compute for tensors like x."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and KERNELS is not None


def lp_distance(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """See `linflab.models.distance.lp_distance`, which also checks the arguments; float32 only."""
    return torch.ops.linflab.lp_distance(x, weight, p)


def lp_distance_backward(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Gradients in x and weight, given the output y and its gradient."""
    return torch.ops.linflab.lp_distance_backward(grad_y, x, weight, y, p)


def linf_distance_bounds(lower: Tensor, upper: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `linflab.models.distance.linf_distance_bounds`, which also checks the arguments; float32 only."""
    return torch.ops.linflab.linf_distance_bounds(lower, upper, weight)
