"""Tiles, layouts and launches of the CUDA kernels in `cuda_forward.py`, `cuda_backward.py` and `cuda_sort.py`."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SLICE_INPUTS, STAGES = 8, 4  # inputs per slice of the operands in shared memory, and slices
# Inputs per program, samples per thread, and rows per register tile of the gradient kernels.
GRADIENT_INPUTS, GRADIENT_SAMPLES, GRADIENT_ROWS = 512, 32, 2
OUTPUT_STEP = 16  # gradient programs have a multiple of this many outputs
AUTOTUNE_KEYS = ("M", "N", "K", "EXPONENT", "SCALED", "RATIOS", "RECORD", "TOP")


@dataclass(frozen=True)
class Tile:
    """Tile of outputs (samples x outputs) that one program computes, and the warps of the program.

    Threads hold groups of 4 x 4 outputs, so that they read operands as conflict-free vectors of 4. The groups of
    kernels that keep many values per output are smaller.

    Attributes:
        rows: Samples.
        columns: Outputs.
        warps: Warps along samples and outputs.
        registers: Limit of registers per thread, for at least two programs per multiprocessor.
        group: Outputs per group of a thread, along samples and outputs.
    """

    rows: int
    columns: int
    warps: tuple[int, int]
    registers: int = 128
    group: tuple[int, int] = (4, 4)

    @property
    def num_warps(self) -> int:
        """Number of warps."""
        return math.prod(self.warps)

    @property
    def terms(self) -> int:
        """Number of terms per thread and input."""
        return self.rows * self.columns // (32 * self.num_warps)

    def layouts(self) -> dict[str, Any]:
        """Return the compile-time arguments of a kernel with this tile."""
        from triton.experimental.gluon import language as gl

        return {
            "BM": self.rows,
            "BN": self.columns,
            "BK": SLICE_INPUTS,
            "STAGES": STAGES,
            "L": gl.BlockedLayout(list(self.group), [4, 8], list(self.warps), [1, 0]),
            "COPY": gl.BlockedLayout([1, 1], [4, 8], [2, self.num_warps // 2], [0, 1]),
            "SHARED": gl.SwizzledSharedLayout(1, 1, 1, [1, 0]),
        }


SUM_TILES = (Tile(128, 128, (4, 2)), Tile(64, 64, (2, 2)))
LARGE_TILES = (Tile(64, 64, (2, 2), 255),)  # more registers per output; two programs per multiprocessor
SORT_TILES = (Tile(32, 32, (2, 2), 255, (4, 2)),)
SORT_GRADIENT_TILES = (Tile(16, 32, (2, 2), 255, (2, 2)),)  # a position and a value, or two values, per largest term
GROUP_ALIGNMENT = 32  # a tile has samples of one group
MASKED_TILES = (Tile(GROUP_ALIGNMENT, 128, (2, 2), 255),)


@functools.cache
def has_gluon() -> bool:
    """Return whether a Triton is installed whose Gluon has all that the kernels need."""
    try:
        from triton.experimental.gluon import language as gl

        from linflab.models.distance import cuda_backward, cuda_forward, cuda_sort  # noqa: F401
    except ImportError:
        return False
    return hasattr(gl.shared_memory_descriptor, "atomic_scatter_add")


def is_supported(x: Tensor, *arguments: object) -> bool:
    """Return whether the kernels support an op with these arguments.

    The kernels require compute capability 8.0 for asynchronous copies. Their 32-bit indices limit tensors to fewer than
    2^31 elements.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    return (
        x.dtype == torch.float32
        and all(tensor.numel() < 2**31 for tensor in (x, *tensors))
        and has_gluon()
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def get_kernel(name: str) -> Any:
    """Return a kernel by its name."""
    from linflab.models.distance import cuda_backward, cuda_forward, cuda_sort

    return next(getattr(module, name) for module in (cuda_forward, cuda_backward, cuda_sort) if hasattr(module, name))


@functools.cache
def _autotuned(name: str, tiles: tuple[Tile, ...]) -> Callable[..., Any]:
    """Return a function that launches a kernel on a grid, with the fastest tile for each operand shape."""
    import triton

    if triton.knobs.runtime.interpret:  # autotuning has no benefit in interpreter mode
        layouts = tiles[-1].layouts()
        return lambda grid: lambda *arguments, **named: get_kernel(name)[grid(layouts)](*arguments, **named, **layouts)
    configs = [triton.Config(tile.layouts(), num_warps=tile.num_warps, maxnreg=tile.registers) for tile in tiles]
    tuned = triton.autotune(configs, key=[key for key in AUTOTUNE_KEYS if key in get_kernel(name).arg_names])(
        get_kernel(name)
    )
    return lambda grid: tuned[grid]


def launch_tiles(
    name: str, tiles: tuple[Tile, ...], shape: tuple[int, int], parts: int, *arguments: Any, **named: Any
) -> None:
    """Launch a kernel whose tiles cover outputs of the given shape."""

    def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
        return -(-shape[0] // meta["BM"]), -(-shape[1] // meta["BN"]), parts

    _autotuned(name, tiles)(grid)(*arguments, **named)


def launch(name: str, grid: tuple[int, ...], *arguments: Any, warps: int = 4, **named: Any) -> None:
    """Launch a kernel whose compile-time arguments are fixed."""
    get_kernel(name)[grid](*arguments, **named, WARPS=warps, num_warps=warps)


def gradient_layouts() -> dict[str, Any]:
    """Return the compile-time arguments of `gradients_kernel` that do not depend on the operands."""
    from triton.experimental.gluon import language as gl

    return {
        "LAYERS": GRADIENT_SAMPLES // GRADIENT_ROWS,
        "ROWS": GRADIENT_ROWS,
        "BK": GRADIENT_INPUTS,
        "STEP": OUTPUT_STEP,
        "L": gl.BlockedLayout([GRADIENT_ROWS, 2], [1, 32], [1, 8], [1, 0]),
        "SHARED": gl.SwizzledSharedLayout(1, 1, 1, [1, 0]),
        "COPY": gl.BlockedLayout([1, 1], [4, 8], [2, 4], [0, 1]),
    }
