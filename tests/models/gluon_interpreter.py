"""Gluon's language on the CPU: its names with the meaning that Triton's interpreter gives to those of Triton.

Triton interprets kernels in its own language, not in Gluon. The two differ in that a Gluon tile has a layout, which
says which thread holds what and changes no value. Import this before the kernels, with TRITON_INTERPRET=1 set.
"""

from types import ModuleType

import pytest
import triton
import triton.language as tl

assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"


class SliceLayout:
    def __init__(self, *what: object) -> None: ...


class BlockedLayout(SliceLayout): ...


def _assembly(text: str, constraints: str, arguments: list[tl.tensor], **rest: object) -> tl.tensor:
    meaning = {"lg2.approx.ftz.f32 $0, $1;": tl.log2, "ex2.approx.ftz.f32 $0, $1;": tl.exp2}
    return meaning[text](*arguments)


class _Language(ModuleType):
    """What is not here is Triton's, looked up when it is used: the interpreter changes it while a kernel runs."""

    SliceLayout, BlockedLayout = SliceLayout, BlockedLayout
    inline_asm_elementwise = staticmethod(_assembly)

    @staticmethod
    def arange(start: int, end: int, layout: object) -> tl.tensor:
        return tl.arange(start, end)

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: tl.dtype, layout: object) -> tl.tensor:
        return tl.zeros(shape, dtype)

    def __getattr__(self, name: str) -> object:
        return getattr(tl, name)


def install() -> None:
    """Import the kernels in this language."""
    from triton.experimental import gluon

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gluon, "jit", triton.jit)
        patch.setattr(gluon, "language", _Language("language"))
        from linflab.models.distance import cuda_kernels
    cuda_kernels.tl = tl  # type: ignore[attr-defined]  # the interpreter changes the language of a kernel's module
