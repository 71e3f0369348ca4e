"""CUDA kernels for the ops of `ops.py`.

Gluon compiles the kernels (`cuda_forward.py`, `cuda_backward.py`, `cuda_sort.py`) at first use. Results are
deterministic. A distance is a single sum, or a fixed number of partial sums. One thread adds the terms of each sum in
order, so the result does not depend on the tile or on the rest of the batch. Gradients are sums in an order that the
shapes and the device determine, so they are bitwise repeatable for the same batch on the same device.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linflab.models.distance.cuda_launch import (
    GRADIENT_INPUTS,
    GRADIENT_SAMPLES,
    GROUP_ALIGNMENT,
    LARGE_TILES,
    MASKED_TILES,
    OUTPUT_STEP,
    SLICE_INPUTS,
    SORT_GRADIENT_TILES,
    SORT_TILES,
    SUM_TILES,
    get_kernel,
    gradient_layouts,
    is_supported,
    launch,
    launch_tiles,
)
from linflab.models.distance.derivatives import sort_coefficients
from linflab.models.distance.ops import Kernel, register_kernel

MULTIPLIED_POWERS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)  # p whose powers are products
MAX_UNSCALED_P = 12  # up to this p, powers of usual distances fit float32
MAX_SCALED_P = 72  # above this p, terms are first divided by the largest one
MAX_PARTS, MIN_PART_INPUTS = 4, 256  # parts of a sum; their number depends on the number of inputs only
MAX_GRADIENT_OUTPUTS = 80  # largest number of outputs per program
HEADROOM, FLOOR = 80.0, -100.0  # log2 of the largest and smallest powers in gradients
MAX_HEADROOM = 1.25  # log2 of the largest scaled distance: log2 is most exact near 0
MAX_PARTIAL_SUMS = 2**29  # partial sums of gradients in x (2 GiB), for 32-bit indices
MAX_FINITE_P = 2.0**28  # above, distances equal those at p = inf up to rounding
MAX_ELEMENTS = 2**31 - 1  # limit of the number of partial sums of distances
MAX_SORTED_TERMS = 2**28  # terms with a slope of SortNet's neurons in memory (2 GiB)
MAX_SCATTER_INPUTS = 8192  # inputs per program, with 64-bit sums in shared memory
FLOAT32_INFO = torch.finfo(torch.float32)


def _multiplied_power(p: float) -> int:
    """Return the compile-time exponent for p: p itself if its powers are products, 0 for infinity, else -1."""
    if math.isinf(p):
        return 0
    return int(p) if p in MULTIPLIED_POWERS else -1


@dataclass(frozen=True)
class _GroupInputs:
    """Inputs that each group of `size` samples uses; `size` is a multiple of GROUP_ALIGNMENT.

    Attributes:
        size: Samples per group.
        mask: Used inputs (groups, K) as 0 and 1, float32.
        row_indices: Used inputs first, in order (groups, K), int32.
        counts: Number of used inputs (groups,), int32.
    """

    size: int
    mask: Tensor
    row_indices: Tensor
    counts: Tensor

    @classmethod
    def of(cls, mask: Tensor, group_size: int) -> "_GroupInputs":
        order = (~mask).to(torch.int8).sort(dim=1, stable=True).indices
        size = -(-group_size // GROUP_ALIGNMENT) * GROUP_ALIGNMENT
        return cls(size, mask.float(), order.to(torch.int32), mask.sum(dim=1).to(torch.int32))


def _pad_groups(x: Tensor, group_size: int, size: int) -> Tensor:
    """Return the samples with each group of `group_size` zero-padded to `size`."""
    if group_size == size:
        return x.contiguous()
    groups = -(-x.shape[0] // group_size)
    padded = x.new_zeros(groups * group_size, x.shape[1])
    padded[: x.shape[0]] = x
    spread = x.new_zeros(groups, size, x.shape[1])
    spread[:, :group_size] = padded.view(groups, group_size, x.shape[1])
    return spread.flatten(0, 1)


def _unpad_groups(y: Tensor, samples: int, group_size: int, size: int) -> Tensor:
    """Invert `_pad_groups`."""
    return y if group_size == size else y.unflatten(0, (-1, size))[:, :group_size].flatten(0, 1)[:samples].contiguous()


def _group_arguments(groups: _GroupInputs | None, stand_in: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return row indices, counts and group size for a kernel, or placeholders if `groups` is None."""
    return (stand_in, stand_in, 1) if groups is None else (groups.row_indices, groups.counts, groups.size)


def _distances(x: Tensor, weight: Tensor, p: float, groups: _GroupInputs | None) -> Tensor:
    """Return the distances (M, N)."""
    x, weight = x.contiguous(), weight.contiguous()
    shape = (M, N, K) = (x.shape[0], weight.shape[0], x.shape[1])
    if M * N == 0:
        return x.new_empty(M, N)
    most = max(1, MAX_ELEMENTS // (MAX_PARTS * N))
    if most < M and groups is None:
        return torch.cat([_distances(x[i : i + most], weight, p, None) for i in range(0, M, most)])
    p = math.inf if p > MAX_FINITE_P else p
    exponent = _multiplied_power(p)
    scaled, ratios = (
        MAX_UNSCALED_P < p <= MAX_SCALED_P or (exponent < 0 and p <= MAX_SCALED_P),
        MAX_SCALED_P < p < math.inf,
    )
    parts = 1 if groups is not None else max(1, min(MAX_PARTS, K // MIN_PART_INPUTS))
    sums = x.new_empty(parts, M, N)
    row_indices, counts, group_size = _group_arguments(groups, sums)
    operand, scales, largest = x, sums, sums
    if scaled:
        operand, scales = torch.empty_like(x), x.new_empty(M)
        margin = math.log2(K) / (2 * p)
        launch("scales_kernel", (M,), x, weight, operand, scales, margin, *shape, SAMPLES=8, BK=1024)
    if ratios:
        largest = _distances(x, weight, math.inf, groups)
    tiles = MASKED_TILES if groups is not None else LARGE_TILES if exponent < 0 else SUM_TILES
    launch_tiles(
        "distance_sums_kernel", tiles, (M, N), parts, operand, weight, scales, largest, sums, sums, row_indices, counts,
        float(p), *shape, -(-K // (SLICE_INPUTS * parts)), group_size,
        EXPONENT=exponent, SCALED=scaled, RATIOS=ratios, MASKED=groups is not None, RECORD=False,
    )  # fmt: skip
    if parts == 1 and exponent == 0:
        return sums[0]
    y = x.new_empty(M, N)
    # Smaller sums may have lost visible precision by underflow.
    least = -1.0 if exponent == 1 else K * FLOAT32_INFO.tiny * 2**24
    launch(
        "distances_kernel", (-(-M * N // 1024),), sums, x, weight, scales, largest, y, row_indices, counts, float(p),
        least, FLOAT32_INFO.max, parts, *shape, group_size,
        EXPONENT=exponent, SCALED=scaled, RATIOS=ratios, MASKED=groups is not None, BLOCK=1024, BK=1024,
    )  # fmt: skip
    return y


def _linf_distances_and_blocks(x: Tensor, weight: Tensor, groups: _GroupInputs | None) -> tuple[Tensor, Tensor]:
    """Return the distances at p = inf and the block of inputs with the first largest term, (M, N) each."""
    x, weight = x.contiguous(), weight.contiguous()
    shape = (M, N, K) = (x.shape[0], weight.shape[0], x.shape[1])
    y, blocks = x.new_empty(M, N), torch.empty(M, N, dtype=torch.int32, device=x.device)
    if M * N:
        launch_tiles(
            "distance_sums_kernel", LARGE_TILES if groups is None else MASKED_TILES, (M, N), 1, x, weight, y, y, y,
            blocks, *_group_arguments(groups, y)[:2], math.inf, *shape, -(-K // SLICE_INPUTS),
            _group_arguments(groups, y)[2],
            EXPONENT=0, SCALED=False, RATIOS=False, MASKED=groups is not None, RECORD=True,
        )  # fmt: skip
    return y, blocks


def _gradients(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, groups: _GroupInputs | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients in x and weight."""
    grad_y, x, weight, y = (tensor.contiguous() for tensor in (grad_y, x, weight, y))
    if 0 in y.shape:
        return torch.zeros_like(x), torch.zeros_like(weight)
    if p > MAX_FINITE_P:
        _, blocks = _linf_distances_and_blocks(x, weight, groups)
        return _linf_gradients(grad_y, x, weight, y, blocks, groups)
    (M, K), N = x.shape, weight.shape[0]
    exponent = _multiplied_power(p)
    outputs = _outputs_per_program(x.device, N, K, exponent < 0)
    parts = -(-N // outputs)
    most = max(GRADIENT_SAMPLES, MAX_PARTIAL_SUMS // (parts * K) // GRADIENT_SAMPLES * GRADIENT_SAMPLES)
    if most < M and groups is None:
        of_slices = [
            _gradients(grad_y[i : i + most], x[i : i + most], weight, y[i : i + most], p, None)
            for i in range(0, M, most)
        ]
        return torch.cat([of_x for of_x, _ in of_slices]), functools.reduce(torch.add, (of_w for _, of_w in of_slices))
    listed = grad_y
    if exponent < 0:
        positive = ~(y <= 0)  # true for NaN
        slopes = torch.where(positive, grad_y, 0.0)
        inverses = torch.where(positive, 1 / y.clamp_min(FLOAT32_INFO.tiny), 0.0)
        scales = x.new_ones(-(-M // GRADIENT_SAMPLES))
    else:
        slopes, listed = torch.empty_like(y), torch.empty_like(y, dtype=torch.int8)
        largest = torch.maximum(*(torch.linalg.vector_norm(operand, math.inf) for operand in (x, weight)))
        inverses, scales = slopes, x.new_empty(-(-M // GRADIENT_SAMPLES))
        tops = y.nan_to_num(0.0, 0.0).amax(dim=1)
        launch(
            "slopes_kernel", (len(scales), -(-N // 64)), y, grad_y, tops, largest, slopes, scales, listed, p - 1,
            FLOOR / max(p - 1, 0.5), min(MAX_HEADROOM, HEADROOM / max(p - 1, 0.5)), M, N, BM=GRADIENT_SAMPLES, BN=64,
        )  # fmt: skip
    of_x, grad_weight = x.new_empty(parts, M, K), torch.empty_like(weight)
    mask, group_size = (slopes, 1) if groups is None else (groups.mask, groups.size)
    get_kernel("gradients_kernel")[parts, -(-K // GRADIENT_INPUTS)](
        x, weight, slopes, inverses, scales, mask, of_x, grad_weight, p - 1, M, N, K, group_size,
        EXPONENT=exponent, MASKED=groups is not None, PART=outputs, **gradient_layouts(), num_warps=8,
    )  # fmt: skip
    grad_x = of_x.sum(dim=0) if parts > 1 else of_x[0]
    if exponent > 1:
        sizes = {"MASKED": groups is not None, "BN": 512, "BK": 512}
        for one, other, gradient, steps in (
            (x, weight, grad_x, (1, N, 1)),
            (weight, x, grad_weight, (0, 1, N)),
        ):
            launch(
                "listed_gradients_kernel", (len(one), -(-K // 512)), one, other, y, grad_y, listed, gradient, mask,
                p - 1, len(other), K, *steps, group_size, **sizes,
            )  # fmt: skip
    return grad_x, grad_weight


@functools.cache
def _outputs_per_program(device: torch.device, outputs: int, inputs: int, any_p: bool) -> int:
    """Return the fastest number of outputs per program of `gradients_kernel` that fits in shared memory."""
    multiprocessors, shared = 4, 2**17
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        multiprocessors, shared = properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # missing in torch's stubs
    bytes_each = 4 * (GRADIENT_INPUTS + 2 * GRADIENT_SAMPLES * (2 if any_p else 1))
    most = max(1, min(MAX_GRADIENT_OUTPUTS, shared // bytes_each) // OUTPUT_STEP)

    def rounds(steps: int) -> int:
        programs = -(-outputs // (steps * OUTPUT_STEP)) * -(-inputs // GRADIENT_INPUTS)
        resident = multiprocessors * max(1, min(2, shared // (bytes_each * steps * OUTPUT_STEP)))
        return -(-programs // resident) * steps

    return OUTPUT_STEP * min(range(1, most + 1), key=lambda steps: (rounds(steps), -steps))


def _linf_gradients(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, blocks: Tensor, groups: _GroupInputs | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients at p = inf, from the blocks of `_linf_distances_and_blocks`."""
    (M, K), N = x.shape, weight.shape[0]
    columns, slopes = torch.empty_like(y, dtype=torch.int32), torch.empty_like(y)
    row_indices, counts, group_size = _group_arguments(groups, y)
    launch(
        "linf_slopes_kernel", (-(-M * N // 32),), x, weight, y, grad_y, blocks, row_indices, counts, columns, slopes,
        M, N, K, group_size, MASKED=groups is not None, BLOCK=32,
    )  # fmt: skip
    return _scatter(columns, slopes, x, weight, 1)


def _scatter(columns: Tensor, slopes: Tensor, x: Tensor, weight: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of neurons with `top` terms each, from the input and slope of each term (M * top, N)."""
    (M, K), N = x.shape, weight.shape[0]
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    size = min(MAX_SCATTER_INPUTS, max(256, 2 ** math.ceil(math.log2(K))))
    for gradient, terms, sign, steps in (
        (grad_x, top * N, 1.0, (top * N, 1)),
        (grad_weight, top * M, -1.0, (1, N)),
    ):
        launch(
            "scatter_kernel", (len(gradient), -(-K // size)), columns, slopes, gradient, sign, terms, K, *steps,
            float(math.ceil(math.log2(terms)) + 1), BK=size, BN=1024, warps=8,
        )  # fmt: skip
    return grad_x, grad_weight


def _register(op: str) -> Callable[[Kernel], Kernel]:
    """Return a decorator that makes a function the CUDA kernel of an op, on the device of its first argument."""

    def register(kernel: Kernel) -> Kernel:
        @functools.wraps(kernel)
        def compute(x: Tensor, *arguments: Any) -> Any:
            with torch.cuda.device(x.device):  # Triton launches kernels on the current device
                return kernel(x, *arguments)

        register_kernel(op, "CUDA", is_supported)(compute)
        return kernel

    return register


@_register("lp_distance")
def forward(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """Compute the op `lp_distance`."""
    return _distances(x, weight, p, None)


@_register("lp_distance_backward")
def backward(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Compute the op `lp_distance_backward`."""
    return _gradients(grad_y, x, weight, y, p, None)


@_register("linf_distance_with_blocks")
def linf_forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the op `linf_distance_with_blocks`."""
    return _linf_distances_and_blocks(x, weight, None)


@_register("linf_distance_backward")
def linf_backward(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the op `linf_distance_backward`."""
    if 0 in y.shape:
        return torch.zeros_like(x), torch.zeros_like(weight)
    return _linf_gradients(
        grad_y.contiguous(), x.contiguous(), weight.contiguous(), y.contiguous(), blocks.contiguous(), None
    )


@_register("linf_distance_bounds")
def bounds(lower: Tensor, upper: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the op `linf_distance_bounds`."""
    lower, upper, weight = (tensor.contiguous() for tensor in (lower, upper, weight))
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    high = torch.empty_like(low)
    if low.numel():
        launch_tiles(
            "linf_distance_bounds_kernel", LARGE_TILES, (low.shape[0], low.shape[1]), 1, lower, upper, weight, low,
            high, *low.shape, lower.shape[1],
        )  # fmt: skip
    return low, high


@_register("masked_lp_distance")
def masked_forward(x: Tensor, weight: Tensor, p: float, mask: Tensor, group_size: int) -> Tensor:
    """Compute the op `masked_lp_distance`."""
    groups = _GroupInputs.of(mask, group_size)
    y = _distances(_pad_groups(x, group_size, groups.size), weight, p, groups)
    return _unpad_groups(y, len(x), group_size, groups.size)


@_register("masked_lp_distance_backward")
def masked_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, mask: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """Compute the op `masked_lp_distance_backward`."""
    groups = _GroupInputs.of(mask, group_size)
    spread: Sequence[Tensor] = [_pad_groups(tensor, group_size, groups.size) for tensor in (grad_y, x, y)]
    grad_x, grad_weight = _gradients(spread[0], spread[1], weight, spread[2], p, groups)
    return _unpad_groups(grad_x, len(x), group_size, groups.size), grad_weight


def _coefficients(x: Tensor, q: float, top_k: int) -> Tensor:
    return torch.tensor(sort_coefficients(q, top_k, x.shape[1]), device=x.device)


@_register("sort_distance")
def sort_forward(x: Tensor, weight: Tensor, q: float, top_k: int) -> Tensor:
    """Compute the op `sort_distance`."""
    x, weight, coefficients = x.contiguous(), weight.contiguous(), _coefficients(x, q, top_k)
    y = x.new_empty(x.shape[0], weight.shape[0])
    if y.numel():
        launch_tiles(
            "sort_distance_kernel", SORT_TILES, (y.shape[0], y.shape[1]), 1, x, weight, coefficients, y, y, y, y,
            *y.shape, x.shape[1], RECORD=False, TOP=len(coefficients),
        )  # fmt: skip
    return y


@_register("sort_distance_backward")
def sort_backward(grad_y: Tensor, x: Tensor, weight: Tensor, q: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Compute the op `sort_distance_backward`."""
    grad_y, x, weight, coefficients = (t.contiguous() for t in (grad_y, x, weight, _coefficients(x, q, top_k)))
    M, N, top = x.shape[0], weight.shape[0], len(coefficients)
    if M * N == 0:
        return torch.zeros_like(x), torch.zeros_like(weight)
    most = max(1, MAX_SORTED_TERMS // (top * N))
    if most < M:
        of_slices = [sort_backward(grad_y[i : i + most], x[i : i + most], weight, q, top_k) for i in range(0, M, most)]
        return torch.cat([of_x for of_x, _ in of_slices]), functools.reduce(torch.add, (of_w for _, of_w in of_slices))
    slopes = x.new_empty(M * top, N)
    columns = torch.empty_like(slopes, dtype=torch.int32)
    launch_tiles(
        "sort_distance_kernel", SORT_GRADIENT_TILES, (M, N), 1, x, weight, coefficients, slopes, grad_y, columns,
        slopes, M, N, x.shape[1], RECORD=True, TOP=top,
    )  # fmt: skip
    return _scatter(columns, slopes, x, weight, top)


@_register("sort_distance_bounds")
def sort_bounds(lower: Tensor, upper: Tensor, weight: Tensor, q: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Compute the op `sort_distance_bounds`."""
    lower, upper, weight, coefficients = (
        t.contiguous() for t in (lower, upper, weight, _coefficients(lower, q, top_k))
    )
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    high = torch.empty_like(low)
    if low.numel():
        launch_tiles(
            "sort_distance_bounds_kernel", SORT_GRADIENT_TILES, (low.shape[0], low.shape[1]), 1, lower, upper, weight,
            coefficients, low, high, *low.shape, lower.shape[1], TOP=len(coefficients),
        )  # fmt: skip
    return low, high
