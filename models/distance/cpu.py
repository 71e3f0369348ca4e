"""The ops of `operators.py` on CPUs in float32: C++ kernels.

`csrc/kernels.cpp` is compiled once per instruction set when linflab is installed; the widest that this machine has is
loaded. The ops use `torch.get_num_threads()` threads; their results do not depend on that number.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import warnings
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor, library

from linflab.models.distance import operators  # noqa: F401  # defines what is implemented here
from linflab.models.distance.reference import sort_coefficients

FOLDER = Path(__file__).resolve().parent
STALE = "kernels of other sources"  # the name of the ImportError where these are
# what torch calls the machine's instructions -> compiled modules that run there, fastest first
MODULES = {"AVX512": ("avx512", "avx2", "portable"), "AVX2": ("avx2", "portable")}


def _load_kernels() -> ModuleType | None:
    """The compiled module for this machine; None, with a warning, where linflab was installed without a compiler.

    Raises:
        ImportError: it was compiled from other sources than those beside this file.
    """
    for isa in MODULES.get(torch.backends.cpu.get_cpu_capability(), ("portable",)):
        module = _compiled_for(isa)
        if module is not None:
            _check_sources(module)
            return module
    warnings.warn(
        "linflab was installed without its C++ kernels, so the l_p-distance operator runs in plain PyTorch, many times "
        "slower; with a C++ compiler on the machine, in linflab's folder: pip install --no-deps --editable .",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _compiled_for(isa: str) -> ModuleType | None:
    """The module beside this file, or, for code that was sent here without, that of the linflab installed here."""
    name = f"linflab.models.distance._kernels_{isa}"
    with suppress(ImportError):
        return importlib.import_module(name)
    for installed in importlib.metadata.distributions(name="linflab"):
        origin = json.loads(installed.read_text("direct_url.json") or "{}")  # there where pip installed it
        editable = origin.get("dir_info", {}).get("editable", False)
        root = (
            Path(url2pathname(urlsplit(origin["url"]).path))
            if editable
            else Path(str(installed.locate_file("linflab")))
        )
        folder = (root / "models" / "distance").resolve()
        spec = PathFinder.find_spec(name, [str(folder)]) if folder != FOLDER else None
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            with suppress(ImportError):
                spec.loader.exec_module(module)
                return module
    return None


def _check_sources(module: ModuleType) -> None:
    if not (FOLDER / "csrc").exists():  # an installed package without them
        return
    digest, *names = getattr(module, "sources", "unknown").split()
    sources = [FOLDER / "csrc" / name for name in names]
    here = b"".join(source.read_bytes() for source in sources if source.exists())
    if hashlib.sha256(here).hexdigest() != digest:
        raise ImportError(
            f"linflab's C++ kernels ({module.__name__}) were not compiled from the sources in {FOLDER / 'csrc'}; "
            "`pip install --editable .` in linflab's folder compiles them, on a cluster `ray up` does",
            name=STALE,
        )


KERNELS = _load_kernels()
MOST_SORTED = 2**24  # inputs whose positions the sorting kernels can tell apart: they hold them as floats


def _compiled() -> ModuleType:
    assert KERNELS is not None  # callers have asked
    return KERNELS


def _shape(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    return x.shape[0], weight.shape[0], x.shape[1]


@library.impl("linflab::lp_distance", "CPU")
def _forward(x: Tensor, weight: Tensor, p: float) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0])
    pointers = (x.data_ptr(), weight.data_ptr(), y.data_ptr())
    _compiled().forward(*pointers, *_shape(x, weight), p, torch.get_num_threads())
    return y


@library.impl("linflab::lp_distance_backward", "CPU")
def _backward(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    grad_y, x, weight, y = grad_y.contiguous(), x.contiguous(), weight.contiguous(), y.contiguous()
    grad_x, grad_weight, scratch = x.new_zeros(x.shape), weight.new_zeros(weight.shape), torch.empty_like(y)
    tensors = (x, weight, y, grad_y, grad_x, grad_weight, scratch)
    pointers = (tensor.data_ptr() for tensor in tensors)
    _compiled().backward(*pointers, *_shape(x, weight), p, torch.get_num_threads())
    return grad_x, grad_weight


@library.impl("linflab::linf_distance_bounds", "CPU")
def _bounds(lower: Tensor, upper: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    lower, upper, weight = lower.contiguous(), upper.contiguous(), weight.contiguous()
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    high = torch.empty_like(low)
    pointers = (tensor.data_ptr() for tensor in (lower, upper, weight, low, high))
    _compiled().bounds(*pointers, *_shape(lower, weight), torch.get_num_threads())
    return low, high


@library.impl("linflab::lp_distance_on_subsets", "CPU")
def _forward_on_subsets(x: Tensor, weight: Tensor, p: float, kept: Tensor, group: int) -> Tensor:
    x, weight, kept = x.contiguous(), weight.contiguous(), kept.contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0])
    pointers = (tensor.data_ptr() for tensor in (x, weight, y, kept))
    _compiled().forward_on_subsets(*pointers, *_shape(x, weight), p, group, torch.get_num_threads())
    return y


@library.impl("linflab::lp_distance_on_subsets_backward", "CPU")
def _backward_on_subsets(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, kept: Tensor, group: int
) -> tuple[Tensor, Tensor]:
    grad_y, x, weight, y, kept = (tensor.contiguous() for tensor in (grad_y, x, weight, y, kept))
    grad_x, grad_weight, scratch = x.new_zeros(x.shape), weight.new_zeros(weight.shape), torch.empty_like(y)
    tensors = (x, weight, y, grad_y, grad_x, grad_weight, scratch, kept)
    pointers = (tensor.data_ptr() for tensor in tensors)
    _compiled().backward_on_subsets(*pointers, *_shape(x, weight), p, group, torch.get_num_threads())
    return grad_x, grad_weight


def _coefficients(x: Tensor, q: float, terms: int) -> Tensor:
    return torch.tensor(sort_coefficients(q, terms, x.shape[1]), dtype=torch.float32)


@library.impl("linflab::sort_distance", "CPU")
def _sort_forward(x: Tensor, weight: Tensor, q: float, terms: int) -> Tensor:
    x, weight, coefficients = x.contiguous(), weight.contiguous(), _coefficients(x, q, terms)
    y = x.new_empty(x.shape[0], weight.shape[0])
    pointers = (tensor.data_ptr() for tensor in (x, weight, y, coefficients))
    _compiled().sort_forward(*pointers, *_shape(x, weight), len(coefficients), torch.get_num_threads())
    return y


@library.impl("linflab::sort_distance_backward", "CPU")
def _sort_backward(grad_y: Tensor, x: Tensor, weight: Tensor, q: float, terms: int) -> tuple[Tensor, Tensor]:
    grad_y, x, weight, coefficients = (
        grad_y.contiguous(),
        x.contiguous(),
        weight.contiguous(),
        _coefficients(x, q, terms),
    )
    grad_x, grad_weight = x.new_zeros(x.shape), weight.new_zeros(weight.shape)
    pointers = (tensor.data_ptr() for tensor in (x, weight, grad_y, grad_x, grad_weight, coefficients))
    _compiled().sort_backward(*pointers, *_shape(x, weight), len(coefficients), torch.get_num_threads())
    return grad_x, grad_weight


@library.impl("linflab::sort_distance_bounds", "CPU")
def _sort_bounds(lower: Tensor, upper: Tensor, weight: Tensor, q: float, terms: int) -> tuple[Tensor, Tensor]:
    lower, upper, weight = lower.contiguous(), upper.contiguous(), weight.contiguous()
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    high, coefficients = torch.empty_like(low), _coefficients(lower, q, terms)
    pointers = (tensor.data_ptr() for tensor in (lower, upper, weight, low, high, coefficients))
    _compiled().sort_bounds(*pointers, *_shape(lower, weight), len(coefficients), torch.get_num_threads())
    return low, high


def serves(x: Tensor) -> bool:
    """Whether these kernels compute for tensors like x."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and KERNELS is not None
