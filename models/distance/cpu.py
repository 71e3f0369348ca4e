"""C++ kernels on CPUs, in float32: those of the ops of `ops.py`, and those of boxes in IBP training.

The installation compiles `csrc/module.cpp` once per instruction set. The module for the widest instruction set of this
machine is loaded. The ops use `torch.get_num_threads()` threads; their results do not depend on that number.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import warnings
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor

from linflab.models.distance import convolution
from linflab.models.distance.derivatives import sort_coefficients
from linflab.models.distance.ops import register_kernel

PACKAGE_DIR = Path(__file__).resolve().parent
OUTDATED_KERNELS = "kernels of other sources"  # `name` of the ImportError for outdated kernels
# Maps torch's name of the CPU's instruction set to the compiled modules that run there, fastest first.
KERNEL_MODULES = {"AVX512": ("avx512", "avx2", "portable"), "AVX2": ("avx2", "portable")}


def _load_kernels() -> ModuleType | None:
    """Return the compiled module for this machine, or warn and return None if there is none.

    Raises:
        ImportError: If the module was compiled from other sources than those in `csrc`.
    """
    for isa in KERNEL_MODULES.get(torch.backends.cpu.get_cpu_capability(), ("portable",)):
        module = _import_kernels(isa)
        if module is not None:
            _check_source_hash(module)
            return module
    warnings.warn(
        "linflab's C++ kernels are not installed, so l_p distances run in plain PyTorch, many times slower, and IBP "
        "training takes longer; install a C++ compiler and run `pip install --no-deps --editable .` in linflab's "
        "directory",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _import_kernels(isa: str) -> ModuleType | None:
    """Return the compiled module for an instruction set, or None if it is missing.

    The module is in this directory. Code that was shipped without kernels uses the module of the installed linflab.
    """
    name = f"linflab.models.distance._kernels_{isa}"
    with suppress(ImportError):
        return importlib.import_module(name)
    for distribution in importlib.metadata.distributions(name="linflab"):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")  # pip writes this file
        editable = origin.get("dir_info", {}).get("editable", False)
        root = (
            Path(url2pathname(urlsplit(origin["url"]).path))
            if editable
            else Path(str(distribution.locate_file("linflab")))
        )
        folder = (root / "models" / "distance").resolve()
        spec = PathFinder.find_spec(name, [str(folder)]) if folder != PACKAGE_DIR else None
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            with suppress(ImportError):
                spec.loader.exec_module(module)
                return module
    return None


def _check_source_hash(module: ModuleType) -> None:
    if not (PACKAGE_DIR / "csrc").exists():  # installed packages contain no sources
        return
    digest, *names = getattr(module, "sources", "unknown").split()
    sources = [PACKAGE_DIR / "csrc" / name for name in names]
    contents = b"".join(source.read_bytes() for source in sources if source.exists())
    if hashlib.sha256(contents).hexdigest() != digest:
        raise ImportError(
            f"linflab's C++ kernels ({module.__name__}) were not compiled from the sources in {PACKAGE_DIR / 'csrc'}; "
            "run `pip install --editable .` in linflab's directory, or `ray up` for a cluster",
            name=OUTDATED_KERNELS,
        )


KERNELS = _load_kernels()
MAX_SORT_INPUTS = 2**24  # the sorting kernels store positions as floats


def _require_kernels() -> ModuleType:
    assert KERNELS is not None  # `is_supported` has checked this
    return KERNELS


def is_supported(x: Tensor, *_: object) -> bool:
    """Return whether the kernels support an op whose first argument is x."""
    return x.dtype == torch.float32 and KERNELS is not None


def is_sort_supported(_: Tensor, x: Tensor, *__: object) -> bool:
    """Return whether the sorting kernels support an op whose second argument is x (B or O, I)."""
    return is_supported(x) and x.shape[1] <= MAX_SORT_INPUTS


def _shape(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    return x.shape[0], weight.shape[0], x.shape[1]


@register_kernel("lp_distance", "CPU", is_supported)
def _forward(x: Tensor, weight: Tensor, p: float) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0])
    pointers = (x.data_ptr(), weight.data_ptr(), y.data_ptr())
    _require_kernels().forward(*pointers, *_shape(x, weight), p, torch.get_num_threads())
    return y


@register_kernel("lp_distance_backward", "CPU", is_supported)
def _backward(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    grad_y, x, weight, y = grad_y.contiguous(), x.contiguous(), weight.contiguous(), y.contiguous()
    grad_x, grad_weight, scratch = x.new_zeros(x.shape), weight.new_zeros(weight.shape), torch.empty_like(y)
    tensors = (x, weight, y, grad_y, grad_x, grad_weight, scratch)
    pointers = (tensor.data_ptr() for tensor in tensors)
    _require_kernels().backward(*pointers, *_shape(x, weight), p, torch.get_num_threads())
    return grad_x, grad_weight


@register_kernel("linf_distance_with_blocks", "CPU", is_supported)
def _forward_with_blocks(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0])
    blocks = torch.empty_like(y, dtype=torch.int32)
    pointers = (tensor.data_ptr() for tensor in (x, weight, y, blocks))
    _require_kernels().forward_with_blocks(*pointers, *_shape(x, weight), torch.get_num_threads())
    return y, blocks


@register_kernel("linf_distance_backward", "CPU", lambda grad_y, x, *_: is_supported(x))
def _linf_backward(grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    grad_y, x, weight, y, blocks = (tensor.contiguous() for tensor in (grad_y, x, weight, y, blocks))
    grad_x, grad_weight = x.new_zeros(x.shape), weight.new_zeros(weight.shape)
    pointers = (tensor.data_ptr() for tensor in (x, weight, y, grad_y, grad_x, grad_weight, blocks))
    _require_kernels().largest_backward(*pointers, *_shape(x, weight), torch.get_num_threads())
    return grad_x, grad_weight


@register_kernel("linf_distance_bounds", "CPU", is_supported)
def _bounds(lower: Tensor, upper: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    lower, upper, weight = lower.contiguous(), upper.contiguous(), weight.contiguous()
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    high = torch.empty_like(low)
    pointers = (tensor.data_ptr() for tensor in (lower, upper, weight, low, high))
    _require_kernels().bounds(*pointers, *_shape(lower, weight), torch.get_num_threads())
    return low, high


@register_kernel("masked_lp_distance", "CPU", is_supported)
def _masked_forward(x: Tensor, weight: Tensor, p: float, mask: Tensor, group_size: int) -> Tensor:
    x, weight, mask = x.contiguous(), weight.contiguous(), mask.contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0])
    pointers = (tensor.data_ptr() for tensor in (x, weight, y, mask))
    _require_kernels().forward_on_subsets(*pointers, *_shape(x, weight), p, group_size, torch.get_num_threads())
    return y


@register_kernel("masked_lp_distance_backward", "CPU", is_supported)
def _masked_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, mask: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    grad_y, x, weight, y, mask = (tensor.contiguous() for tensor in (grad_y, x, weight, y, mask))
    grad_x, grad_weight, scratch = x.new_zeros(x.shape), weight.new_zeros(weight.shape), torch.empty_like(y)
    tensors = (x, weight, y, grad_y, grad_x, grad_weight, scratch, mask)
    pointers = (tensor.data_ptr() for tensor in tensors)
    _require_kernels().backward_on_subsets(*pointers, *_shape(x, weight), p, group_size, torch.get_num_threads())
    return grad_x, grad_weight


def _coefficients(x: Tensor, q: float, top_k: int) -> Tensor:
    return torch.tensor(sort_coefficients(q, top_k, x.shape[1]), dtype=torch.float32)


@register_kernel("sort_distance", "CPU", is_sort_supported)
def _sort_forward(x: Tensor, weight: Tensor, q: float, top_k: int) -> Tensor:
    x, weight, coefficients = x.contiguous(), weight.contiguous(), _coefficients(x, q, top_k)
    y = x.new_empty(x.shape[0], weight.shape[0])
    pointers = (tensor.data_ptr() for tensor in (x, weight, y, coefficients))
    _require_kernels().sort_forward(*pointers, *_shape(x, weight), len(coefficients), torch.get_num_threads())
    return y


@register_kernel("sort_distance_backward", "CPU", is_sort_supported)
def _sort_backward(grad_y: Tensor, x: Tensor, weight: Tensor, q: float, top_k: int) -> tuple[Tensor, Tensor]:
    grad_y, x, weight, coefficients = (
        grad_y.contiguous(),
        x.contiguous(),
        weight.contiguous(),
        _coefficients(x, q, top_k),
    )
    grad_x, grad_weight = x.new_zeros(x.shape), weight.new_zeros(weight.shape)
    pointers = (tensor.data_ptr() for tensor in (x, weight, grad_y, grad_x, grad_weight, coefficients))
    _require_kernels().sort_backward(*pointers, *_shape(x, weight), len(coefficients), torch.get_num_threads())
    return grad_x, grad_weight


@register_kernel("sort_distance_bounds", "CPU", is_sort_supported)
def _sort_bounds(lower: Tensor, upper: Tensor, weight: Tensor, q: float, top_k: int) -> tuple[Tensor, Tensor]:
    lower, upper, weight = lower.contiguous(), upper.contiguous(), weight.contiguous()
    low = lower.new_empty(lower.shape[0], weight.shape[0])
    high, coefficients = torch.empty_like(low), _coefficients(lower, q, top_k)
    pointers = (tensor.data_ptr() for tensor in (lower, upper, weight, low, high, coefficients))
    _require_kernels().sort_bounds(*pointers, *_shape(lower, weight), len(coefficients), torch.get_num_threads())
    return low, high


def _sizes(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, ...]:
    return *x.shape, len(weight), *weight.shape[2:], stride, padding


@register_kernel("lp_distance_conv2d", "CPU", is_supported)
def _convolution(x: Tensor, weight: Tensor, p: float, stride: int, padding: int) -> Tensor:
    x, filters = x.contiguous(), weight.permute(0, 2, 3, 1).contiguous()
    y = x.new_empty(len(x), len(weight), *convolution.output_size(x, weight, stride, padding))
    pointers = (tensor.data_ptr() for tensor in (x, filters, y))
    _require_kernels().convolution(*pointers, *_sizes(x, weight, stride, padding), p, torch.get_num_threads())
    return y


@register_kernel("lp_distance_conv2d_backward", "CPU", is_supported)
def _convolution_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, p: float, stride: int, padding: int, needs_grad_x: bool
) -> tuple[Tensor, Tensor]:
    channels_last = not math.isinf(p)
    filters = (weight.permute(0, 2, 3, 1) if channels_last else weight).contiguous()
    grad_y, x, y = grad_y.contiguous(), x.contiguous(), y.contiguous()
    grad_x, grad_filters = torch.zeros_like(x if needs_grad_x else x[:0]), torch.zeros_like(filters)
    pointers = [tensor.data_ptr() for tensor in (x, filters, y, grad_y)]
    pointers += [grad_x.data_ptr() if needs_grad_x else 0, grad_filters.data_ptr()]
    sizes = _sizes(x, weight, stride, padding)
    _require_kernels().convolution_backward(*pointers, *sizes, p, torch.get_num_threads())
    return grad_x, grad_filters.permute(0, 3, 1, 2).contiguous() if channels_last else grad_filters
