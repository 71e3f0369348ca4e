"""Schemas, fake kernels, gradients and reference kernels of the torch ops `linflab::...`.

Fake kernels and gradients allow `torch.compile` to trace the ops. The reference supports all devices and dtypes.
`cpu.py` and `cuda.py` register faster kernels with `register_kernel`. Torch selects a kernel by the device of the
arguments.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, library

from linflab.models.distance import convolution, derivatives, reference

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

library.define("linflab::lp_distance", "(Tensor x, Tensor weight, float p) -> Tensor")
library.define(
    "linflab::lp_distance_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor y, float p) -> (Tensor, Tensor)",
)
# Gradients at p = inf require the input with the largest term. The kernels for CPUs and CUDA devices also return the
# block of inputs that contains it, so that the backward pass searches only this block.
library.define("linflab::linf_distance_with_blocks", "(Tensor x, Tensor weight) -> (Tensor, Tensor)")
library.define(
    "linflab::linf_distance_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor y, Tensor blocks) -> (Tensor, Tensor)",
)
library.define("linflab::linf_distance_bounds", "(Tensor lower, Tensor upper, Tensor weight) -> (Tensor, Tensor)")
library.define(
    "linflab::masked_lp_distance", "(Tensor x, Tensor weight, float p, Tensor mask, int group_size) -> Tensor"
)
library.define(
    "linflab::masked_lp_distance_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor y, float p, Tensor mask, int group_size) -> (Tensor, Tensor)",
)
# Exported graphs store operators and arguments by name, so `sort_distance` and `terms` keep their names.
library.define("linflab::sort_distance", "(Tensor x, Tensor weight, float q, int terms) -> Tensor")
library.define(
    "linflab::sort_distance_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, float q, int terms) -> (Tensor, Tensor)",
)
library.define(
    "linflab::sort_distance_bounds",
    "(Tensor lower, Tensor upper, Tensor weight, float q, int terms) -> (Tensor, Tensor)",
)
library.define("linflab::lp_distance_conv2d", "(Tensor x, Tensor weight, float p, int stride, int padding) -> Tensor")
library.define(
    "linflab::lp_distance_conv2d_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor y, float p, int stride, int padding, bool needs_grad_x) -> "
    "(Tensor, Tensor)",
)


@library.register_fake("linflab::lp_distance")
def _fake_forward(x: Tensor, weight: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@library.register_fake("linflab::lp_distance_backward")
def _fake_backward(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@library.register_fake("linflab::linf_distance_with_blocks")
def _fake_forward_with_blocks(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y, dtype=torch.int32)


@library.register_fake("linflab::linf_distance_backward")
def _fake_linf_backward(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@library.register_fake("linflab::linf_distance_bounds")
def _fake_bounds(lower: Tensor, upper: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    return low, torch.empty_like(low)


@library.register_fake("linflab::masked_lp_distance")
def _fake_masked_forward(x: Tensor, weight: Tensor, p: float, mask: Tensor, group_size: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@library.register_fake("linflab::masked_lp_distance_backward")
def _fake_masked_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, mask: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@library.register_fake("linflab::sort_distance")
def _fake_sort_forward(x: Tensor, weight: Tensor, q: float, terms: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@library.register_fake("linflab::sort_distance_backward")
def _fake_sort_backward(grad_y: Tensor, x: Tensor, weight: Tensor, q: float, terms: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@library.register_fake("linflab::sort_distance_bounds")
def _fake_sort_bounds(lower: Tensor, upper: Tensor, weight: Tensor, q: float, terms: int) -> tuple[Tensor, Tensor]:
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    return low, torch.empty_like(low)


@library.register_fake("linflab::lp_distance_conv2d")
def _fake_conv2d_forward(x: Tensor, weight: Tensor, p: float, stride: int, padding: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *convolution.output_size(x, weight, stride, padding))


@library.register_fake("linflab::lp_distance_conv2d_backward")
def _fake_conv2d_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, stride: int, padding: int, needs_grad_x: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x if needs_grad_x else x[:0]), torch.empty_like(weight)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    x, weight, ctx.p = inputs
    ctx.save_for_backward(x, weight, output)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, y = ctx.saved_tensors
    formula = functools.partial(derivatives.lp_distance, p=ctx.p)
    compute = functools.partial(torch.ops.linflab.lp_distance_backward, grad_y, x, weight, y, ctx.p)
    return *derivatives.gradients(formula, compute, grad_y, x, weight), None


def _save_for_linf_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _linf_gradients(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    x, weight, y, blocks = ctx.saved_tensors
    formula = functools.partial(derivatives.lp_distance, p=math.inf)
    compute = functools.partial(torch.ops.linflab.linf_distance_backward, grad_y, x, weight, y, blocks)
    return derivatives.gradients(formula, compute, grad_y, x, weight)


def _save_for_masked_backward(ctx: Any, inputs: tuple[Tensor, Tensor, float, Tensor, int], output: Tensor) -> None:
    x, weight, ctx.p, mask, ctx.group_size = inputs
    ctx.save_for_backward(x, weight, output, mask)


def _masked_gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    x, weight, y, mask = ctx.saved_tensors
    formula = functools.partial(derivatives.masked_lp_distance, p=ctx.p, mask=mask, group_size=ctx.group_size)
    backward = torch.ops.linflab.masked_lp_distance_backward
    compute = functools.partial(backward, grad_y, x, weight, y, ctx.p, mask, ctx.group_size)
    return *derivatives.gradients(formula, compute, grad_y, x, weight), None, None, None


def _save_for_sort_backward(ctx: Any, inputs: tuple[Tensor, Tensor, float, int], output: Tensor) -> None:
    x, weight, ctx.q, ctx.top_k = inputs
    ctx.save_for_backward(x, weight)


def _sort_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
    x, weight = ctx.saved_tensors
    formula = functools.partial(derivatives.sort_distance, q=ctx.q, top_k=ctx.top_k)
    compute = functools.partial(torch.ops.linflab.sort_distance_backward, grad_y, x, weight, ctx.q, ctx.top_k)
    return *derivatives.gradients(formula, compute, grad_y, x, weight), None, None


def _save_for_conv2d_backward(ctx: Any, inputs: tuple[Tensor, Tensor, float, int, int], output: Tensor) -> None:
    x, weight, ctx.p, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, weight, output)


def _conv2d_gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
    x, weight, y = ctx.saved_tensors
    # Differentiating the gradients again requires both of them.
    needs_grad_x = ctx.needs_input_grad[0] or torch.is_grad_enabled()
    settings = {"p": ctx.p, "stride": ctx.stride, "padding": ctx.padding}
    formula = functools.partial(derivatives.lp_distance_conv2d, **settings)
    compute = functools.partial(
        torch.ops.linflab.lp_distance_conv2d_backward, grad_y, x, weight, y, **settings, needs_grad_x=needs_grad_x
    )
    grad_x, grad_weight = derivatives.gradients(formula, compute, grad_y, x, weight)
    return grad_x if ctx.needs_input_grad[0] else None, grad_weight, None, None, None


def _no_second_gradients(ctx: Any, *gradients: Tensor) -> None:
    """Raise an error: backward ops cannot be differentiated, unlike `derivatives.gradients`."""
    raise RuntimeError(
        "torch.ops.linflab: differentiating backward ops is not supported; use the functions of "
        "linflab.models.distance with create_graph=True"
    )


library.register_autograd("linflab::lp_distance", _gradients, setup_context=_save_for_backward)
library.register_autograd("linflab::lp_distance_backward", _no_second_gradients)
library.register_autograd("linflab::linf_distance_with_blocks", _linf_gradients, setup_context=_save_for_linf_backward)
library.register_autograd("linflab::linf_distance_backward", _no_second_gradients)
library.register_autograd("linflab::masked_lp_distance", _masked_gradients, setup_context=_save_for_masked_backward)
library.register_autograd("linflab::masked_lp_distance_backward", _no_second_gradients)
library.register_autograd("linflab::sort_distance", _sort_backward, setup_context=_save_for_sort_backward)
library.register_autograd("linflab::sort_distance_backward", _no_second_gradients)
library.register_autograd("linflab::lp_distance_conv2d", _conv2d_gradients, setup_context=_save_for_conv2d_backward)
library.register_autograd("linflab::lp_distance_conv2d_backward", _no_second_gradients)

REFERENCE: dict[str, Callable[..., Any]] = {
    "lp_distance": reference.lp_distance,
    "lp_distance_backward": reference.lp_distance_backward,
    "linf_distance_with_blocks": reference.linf_distance_with_blocks,
    "linf_distance_backward": reference.linf_distance_backward,
    "linf_distance_bounds": reference.linf_distance_bounds,
    "masked_lp_distance": reference.masked_lp_distance,
    "masked_lp_distance_backward": reference.masked_lp_distance_backward,
    "sort_distance": reference.sort_distance,
    "sort_distance_backward": reference.sort_distance_backward,
    "sort_distance_bounds": reference.sort_distance_bounds,
    "lp_distance_conv2d": convolution.lp_distance_conv2d,
    "lp_distance_conv2d_backward": convolution.lp_distance_conv2d_backward,
}
DIFFERENTIABLE = (
    "lp_distance",
    "linf_distance_with_blocks",
    "masked_lp_distance",
    "sort_distance",
    "lp_distance_conv2d",
)


def register_kernel(op: str, device: str, supports: Callable[..., bool]) -> Callable[[Kernel], Kernel]:
    """Return a decorator that makes a function the kernel of an op on a device.

    Args:
        op: Name of the op, without `linflab::`.
        device: Dispatch key of torch, such as CPU or CUDA.
        supports: Returns whether the kernel supports the arguments of a call; if not, the reference kernel runs.
    """

    def register(kernel: Kernel) -> Kernel:
        def compute(*arguments: Any) -> Any:
            if op in DIFFERENTIABLE:
                derivatives.refuse_tangents()
            return (kernel if supports(*arguments) else REFERENCE[op])(*arguments)

        library.impl(f"linflab::{op}", device, compute)
        return kernel

    return register


for _op, _reference in REFERENCE.items():
    register_kernel(_op, "CompositeExplicitAutograd", lambda *arguments: True)(_reference)
