"""An emulation of Gluon on the CPU that maps its functions to those of Triton's interpreter.

Triton's interpreter runs Triton kernels, but no Gluon kernels. A Gluon tile also has a layout, which assigns elements
to threads and does not change values. Shared memory is an array of NaN at first. Asynchronous copies arrive when a
kernel waits for their group, and their targets are NaN until then, so a kernel that reads too early fails its tests.
Import this module before the kernels, with TRITON_INTERPRET=1 set.
"""

from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"

Copies = list[tuple[np.ndarray, np.ndarray]]
open_group: Copies = []
groups: list[Copies] = []


class SliceLayout:
    def __init__(self, *arguments: object) -> None: ...


class BlockedLayout(SliceLayout): ...


class SwizzledSharedLayout(SliceLayout): ...


def _to_tensor(data: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    return tl.tensor(TensorHandle(data.copy(), dtype), tl.block_type(dtype, list(data.shape)))


def _to_int(value: object) -> int:
    return int(value.handle.data.item()) if isinstance(value, tl.tensor) else int(value)  # type: ignore[call-overload]


class SharedMemory:
    """A view of an array, with the methods of Gluon's descriptors that the kernels use."""

    def __init__(self, data: np.ndarray, dtype: tl.dtype) -> None:
        self.data, self.dtype = data, dtype

    def index(self, index: object) -> "SharedMemory":
        place = _to_int(index)
        assert 0 <= place < len(self.data), "index outside of shared memory"
        return SharedMemory(self.data[place], self.dtype)

    def slice(self, start: int, length: int, dim: int = 0) -> "SharedMemory":
        assert start + length <= self.data.shape[dim]
        return SharedMemory(np.take(self.data, np.arange(start, start + length), dim), self.dtype)

    def permute(self, order: list[int]) -> "SharedMemory":
        return SharedMemory(self.data.transpose(order), self.dtype)

    def _reinterpret(self, dtype: tl.dtype, shape: list[object], layout: object) -> "SharedMemory":
        return SharedMemory(self.data.reshape([_to_int(size) for size in shape]), dtype)

    def load(self, layout: object) -> tl.tensor:
        return _to_tensor(self.data, self.dtype)

    def store(self, value: tl.tensor) -> None:
        self.data[...] = value.handle.data

    def atomic_scatter_add(self, values: tl.tensor, indices: tl.tensor, axis: int, mask: tl.tensor) -> None:
        used = mask.handle.data.astype(bool)
        np.add.at(self.data, indices.handle.data[used], values.handle.data[used])


def _async_load(tile: SharedMemory, pointer: tl.tensor, mask: tl.tensor) -> None:
    assert tile.data.shape == tuple(pointer.shape), "tile and pointers must have the same shape"
    open_group.append((tile.data, tl.load(pointer, mask=mask, other=0.0).handle.data))
    tile.data[...] = np.nan


def _commit_group() -> None:
    groups.append(open_group.copy())
    open_group.clear()


def _wait_group(num_outstanding: int) -> None:
    while len(groups) > num_outstanding:
        for target, data in groups.pop(0):
            target[...] = data


async_copy = SimpleNamespace(
    async_copy_global_to_shared=_async_load, commit_group=_commit_group, wait_group=_wait_group
)


def _allocate(dtype: tl.dtype, shape: list[object], layout: object, value: tl.tensor | None = None) -> SharedMemory:
    assert not open_group
    groups.clear()  # of the program before
    sizes = [_to_int(size) for size in shape]
    data = np.full(sizes, np.nan, np.float32) if value is None else value.handle.data.copy()
    return SharedMemory(data, dtype)


def _evaluate_assembly(text: str, constraints: str, arguments: list[tl.tensor], **options: object) -> tl.tensor:
    functions = {
        "lg2.approx.ftz.f32 $0, $1;": tl.log2,
        "ex2.approx.ftz.f32 $0, $1;": tl.exp2,
        "rcp.approx.ftz.f32 $0, $1;": lambda x: 1 / x,
    }
    return functions[text](*arguments)


class _GluonLanguage(ModuleType):
    """A module that looks up other names in Triton on use, since the interpreter patches Triton."""

    SliceLayout, BlockedLayout, SwizzledSharedLayout = SliceLayout, BlockedLayout, SwizzledSharedLayout
    inline_asm_elementwise = staticmethod(_evaluate_assembly)
    allocate_shared_memory = staticmethod(_allocate)

    @staticmethod
    def barrier() -> None: ...

    @staticmethod
    def arange(start: int, end: int, layout: object) -> tl.tensor:
        return tl.arange(start, end)

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: tl.dtype, layout: object) -> tl.tensor:
        return tl.zeros(shape, dtype)

    def __getattr__(self, name: str) -> object:
        return getattr(tl, name)


def install() -> None:
    """Import the CUDA kernels with this emulation in place of Gluon."""
    from triton.experimental import gluon

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gluon, "jit", triton.jit)
        patch.setattr(gluon, "language", _GluonLanguage("language"))
        from linflab.models.distance import cuda_backward, cuda_forward, cuda_sort
    for module in (cuda_forward, cuda_backward, cuda_sort):
        module.tl = tl  # type: ignore[attr-defined]  # the interpreter patches `tl` of a kernel's module
        module.async_copy = async_copy  # type: ignore[attr-defined]
