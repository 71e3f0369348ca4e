"""The ops of `operators.py` on CUDA devices, but for sorting: Gluon kernels (`cuda_kernels.py`), compiled at first use.

Results are deterministic. Every distance has one thread, which adds in the order of the terms, whatever its tile and
the rest of the batch. Gradients have the same bits again for the same batch on the same device: there is one tile for
them. At p = inf they go to one input each, which is found by a second pass; PyTorch's deterministic `index_put_` adds
them up.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, library

from linflab.models.distance import operators  # noqa: F401  # defines what is implemented here

MULTIPLIED = 8  # powers up to this one are taken by multiplication where p is an integer
WHOLE = 128  # operands are padded to a multiple of it: all tiles fit
UNROLL, PAIR = 4, 2  # rows of the operands that the forward and the backward pass take at a time
FLOAT = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a tile, how many of these a thread, a row of threads and a row of warps have, and warps."""

    rows: int
    columns: int
    thread: tuple[int, int]
    threads: tuple[int, int]
    warps: tuple[int, int]

    @property
    def terms(self) -> int:
        """Of a thread, for each row of the operands."""
        return self.thread[0] * self.thread[1]


LARGEST = (Tile(128, 128, (8, 8), (4, 8), (4, 2)), Tile(64, 64, (4, 8), (4, 8), (4, 1)))
POWERS = (Tile(64, 128, (4, 8), (4, 8), (4, 2)), Tile(64, 64, (4, 4), (4, 8), (4, 2)))  # which take more registers
# sums stay in a warp; one tile, since the order of a sum is the tile's, and it is not to be chosen by timing
GRADIENTS = (Tile(32, 128, (8, 4), (4, 8), (1, 4)),)
GROUPED = (Tile(32, 128, (4, 8), (8, 4), (1, 4)), Tile(32, 64, (4, 4), (4, 8), (2, 2)))  # rows of one group alone
GROUP_ROWS = 32
MOST_PARTIAL = 2**29  # partial sums of gradients in x held at a time, 2 GiB: their places are 32-bit integers


@functools.cache
def kernels() -> ModuleType | None:
    """The module of the kernels; None where there is no Triton that has Gluon."""
    try:
        from linflab.models.distance import cuda_kernels
    except ImportError:
        return None
    return cuda_kernels


def serves(x: Tensor) -> bool:
    """Whether these kernels compute for tensors like x."""
    return x.device.type == "cuda" and x.dtype == torch.float32 and kernels() is not None


@functools.cache
def _tuned(name: str, tiles: tuple[Tile, ...]) -> Callable[..., Any]:
    """A kernel that tries the tiles for each new shape of operands, if there are several, and keeps the fastest."""
    import triton
    from triton.experimental.gluon import language as gl

    kernel = getattr(kernels(), name)
    settings = [
        {
            "BM": tile.rows,
            "BN": tile.columns,
            "L": gl.BlockedLayout(list(tile.thread), list(tile.threads), list(tile.warps), [1, 0]),
        }
        for tile in tiles
    ]
    if triton.knobs.runtime.interpret:  # nothing is to be gained there
        return lambda grid: lambda *arguments, **named: kernel[grid(settings[-1])](*arguments, **named, **settings[-1])
    configs = [triton.Config(one, num_warps=math.prod(tile.warps)) for one, tile in zip(settings, tiles, strict=True)]
    tuned = triton.autotune(configs, key=["M", "N", "K"])(kernel)
    return lambda grid: tuned[grid]


def _launch(name: str, tiles: tuple[Tile, ...], shape: torch.Size, *arguments: Any, **named: Any) -> None:
    """Launch a kernel whose outputs have this shape."""

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return -(-shape[0] // meta["BM"]), -(-shape[1] // meta["BN"])

    if 0 not in shape:
        _tuned(name, tiles)(grid)(*arguments, **named, UNROLL=UNROLL)


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix with zeros below and to the right of it."""
    padded = matrix.new_zeros(rows, columns)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


def _whole(size: int, part: int = WHOLE) -> int:
    return -(-size // part) * part


def _columns(x: Tensor) -> Tensor:
    """x (M, K) as (K and more, M and more): what the forward kernels read. A row of zeros at least follows the K."""
    return _padded(x.t(), _whole(x.shape[1] + 1, UNROLL), _whole(x.shape[0]))


def _exponent(p: float) -> int:
    """p as the kernels are compiled for it."""
    if math.isinf(p):
        return 0
    return int(p) if p == int(p) and p <= MULTIPLIED else -1


@dataclass(frozen=True)
class _Groups:
    """Which rows of the operands each group of samples uses; a group has `size` samples, of GROUP_ROWS a multiple."""

    size: int
    steps: Tensor
    counts: Tensor

    @classmethod
    def of(cls, kept: Tensor, group: int) -> "_Groups":
        inputs = kept.shape[1]
        order = (~kept).to(torch.int8).sort(dim=1, stable=True).indices  # what is kept first, each in order
        counts = kept.sum(dim=1)
        past = torch.arange(inputs, device=kept.device) >= counts[:, None]
        steps = torch.full((len(kept), inputs + UNROLL), inputs, dtype=torch.int32, device=kept.device)
        steps[:, :inputs] = order.masked_fill(past, inputs)  # the row of zeros
        return cls(_whole(group, GROUP_ROWS), steps, counts.to(torch.int32))


def _spread(x: Tensor, group: int, size: int) -> Tensor:
    """Samples in groups of `group` as samples in groups of `size`, zeros between."""
    if group == size:
        return x
    groups = -(-x.shape[0] // group)
    spread = x.new_zeros(groups, size, x.shape[1])
    spread[:, :group] = _padded(x, groups * group, x.shape[1]).view(groups, group, -1)
    return spread.flatten(0, 1)


def _gathered(y: Tensor, samples: int, group: int, size: int) -> Tensor:
    """What `_spread` undoes."""
    return y if group == size else y.unflatten(0, (-1, size))[:, :group].flatten(0, 1)[:samples].contiguous()


def _distances(x: Tensor, weight: Tensor, p: float, groups: _Groups | None) -> Tensor:
    exponent, inputs = _exponent(p), x.shape[1]
    y = x.new_empty(x.shape[0], weight.shape[0])
    columns, of_weight = _columns(x), _columns(weight)
    # below, so much could have been lost that it would be seen; above, something was infinite
    low = -1.0 if exponent == 1 else inputs * FLOAT.tiny * 2**24
    tiles = GROUPED if groups is not None else POWERS if exponent else LARGEST
    _launch(
        "distances", tiles, y.shape, columns, of_weight, y,
        *_lists(groups, y), float(p), low, FLOAT.max, *y.shape, inputs, columns.shape[1], of_weight.shape[1],
        1 if groups is None else groups.size, EXPONENT=exponent, INDIRECT=groups is not None,
    )  # fmt: skip
    return y


def _lists(groups: _Groups | None, stand_in: Tensor) -> tuple[Tensor, Tensor]:
    return (stand_in, stand_in) if groups is None else (groups.steps, groups.counts)


def _gradients(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, groups: _Groups | None, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients in x and weight; `kept` (groups, I) says which inputs each group of samples uses, None: all."""
    if math.isinf(p):
        return _gradients_at_infinity(grad_y, x, weight, y, groups)
    if 0 in y.shape:
        return torch.zeros_like(x), torch.zeros_like(weight)
    exponent = _exponent(p)
    inverses = torch.where(y > 0, 1 / y.clamp_min(FLOAT.tiny), 0.0)
    slopes, unsafe = torch.where(y > 0, grad_y, 0.0), torch.zeros(1, dtype=torch.int32, device=x.device)
    if exponent > 1:
        most = 2.0 ** (60 / (exponent - 1))
        # beside the padding differences are as large as the operands: their powers must be finite, too
        largest = torch.maximum(*(torch.linalg.vector_norm(operand, math.inf) for operand in (x, weight)))
        safe = ((y == 0) | ((y > 1 / most) & (y < most))).all() & (largest < most**2)
        slopes = torch.where(safe, slopes * inverses ** (exponent - 1), slopes)
        unsafe = (~safe).to(torch.int32).view(1)
    rows, inputs = _whole(x.shape[0]), _whole(x.shape[1])
    slabs = inputs // GRADIENTS[0].columns
    parts = max(1, min(weight.shape[0] // PAIR, _programs(x.device) // slabs, MOST_PARTIAL // (rows * inputs)))
    part = _whole(-(-weight.shape[0] // parts), PAIR)
    a, c = _padded(x, rows, inputs), _padded(weight, parts * part, inputs)
    slopes, inverses = _padded(slopes.t(), parts * part, rows), _padded(inverses.t(), parts * part, rows)
    of_x, of_weight = x.new_empty(parts, rows, inputs), torch.empty_like(c)
    group = 1 if groups is None else groups.size
    mask = a if kept is None else _padded(kept.float(), -(-rows // group), inputs)
    _tuned("gradients", GRADIENTS)(lambda meta: (parts, inputs // meta["BN"]))(
        a, c, slopes, inverses, mask, of_x, of_weight, unsafe, p - 1, rows, inputs, part, inputs, rows, group,
        EXPONENT=exponent, MASKED=kept is not None,
    )  # fmt: skip
    grad_x = of_x.sum(dim=0)[: x.shape[0], : x.shape[1]].contiguous()
    return grad_x, of_weight[: weight.shape[0], : weight.shape[1]].contiguous()


@functools.cache
def _programs(device: torch.device) -> int:
    """How many programs of `gradients` a device runs at a time: three on each multiprocessor, by their registers."""
    return 3 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _gradients_at_infinity(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, groups: _Groups | None
) -> tuple[Tensor, Tensor]:
    columns, of_weight, inputs = _columns(x), _columns(weight), x.shape[1]
    index = torch.empty_like(y, dtype=torch.int32)
    _launch(
        "first_largest", LARGEST if groups is None else GROUPED, y.shape, columns, of_weight, y, index,
        *_lists(groups, y), *y.shape, inputs, columns.shape[1], of_weight.shape[1],
        1 if groups is None else groups.size, INDIRECT=groups is not None,
    )  # fmt: skip
    place = index.long().clamp_max(inputs - 1)
    samples = torch.arange(len(x), device=x.device)[:, None].expand_as(place)
    outputs = torch.arange(len(weight), device=x.device)[None, :].expand_as(place)
    sign = (x[samples, place] - weight[outputs, place]).sign()
    slope = torch.where(y > 0, grad_y * sign, 0.0)
    grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
    grad_x.index_put_((samples, place), slope, accumulate=True)
    grad_weight.index_put_((outputs, place), -slope, accumulate=True)
    return grad_x, grad_weight


def forward(x: Tensor, weight: Tensor, p: float) -> Tensor:
    return _distances(x, weight, p, None)


def backward(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return _gradients(grad_y, x, weight, y, p, None, None)


def bounds(lower: Tensor, upper: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    high = torch.empty_like(low)
    below, above, of_weight = _columns(lower), _columns(upper), _columns(weight)
    _launch(
        "bounds", POWERS, low.shape, below, above, of_weight, low, high, *low.shape, lower.shape[1],
        below.shape[1], of_weight.shape[1],
    )  # fmt: skip
    return low, high


def forward_on_subsets(x: Tensor, weight: Tensor, p: float, kept: Tensor, group: int) -> Tensor:
    groups = _Groups.of(kept, group)
    y = _distances(_spread(x, group, groups.size), weight, p, groups)
    return _gathered(y, len(x), group, groups.size)


def backward_on_subsets(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, kept: Tensor, group: int
) -> tuple[Tensor, Tensor]:
    groups = _Groups.of(kept, group)
    spread: Sequence[Tensor] = [_spread(tensor, group, groups.size) for tensor in (grad_y, x, y)]
    grad_x, grad_weight = _gradients(spread[0], spread[1], weight, spread[2], p, groups, kept)
    return _gathered(grad_x, len(x), group, groups.size), grad_weight


library.impl("linflab::lp_distance", "CUDA", forward)
library.impl("linflab::lp_distance_backward", "CUDA", backward)
library.impl("linflab::linf_distance_bounds", "CUDA", bounds)
library.impl("linflab::lp_distance_on_subsets", "CUDA", forward_on_subsets)
library.impl("linflab::lp_distance_on_subsets_backward", "CUDA", backward_on_subsets)
