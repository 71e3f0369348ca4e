"""Checks of the arguments of the Python API."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np

    Array = Tensor | np.ndarray
    Batches = Iterable[tuple[Array, Array]]  # a DataLoader, for example

BATCH_SIZE = 128
Result = TypeVar("Result")


def check_module(module: object) -> nn.Module:
    """Return the module after a check of its type.

    Raises:
        TypeError: If the module is not an `nn.Module`.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module={type(module).__name__}: must be a torch.nn.Module; use a module with a forward method"
        )
    return module


def module_device(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer; the CPU if the module has neither."""
    return next((tensor.device for tensor in [*module.parameters(), *module.buffers()]), torch.device("cpu"))


def module_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of a module's first floating-point parameter or buffer; float32 if the module has neither."""
    tensors = (tensor for tensor in [*module.parameters(), *module.buffers()] if tensor.is_floating_point())
    return next((tensor.dtype for tensor in tensors), torch.float32)


def check_count(name: str, value: object) -> int:
    """Return an argument after checking that it is a positive integer.

    Raises:
        TypeError: If the argument is not an integer.
        ValueError: If the argument is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r:.50}: must be an integer; use 1 or more")
    if value < 1:
        raise ValueError(f"{name}={value}: must be at least 1; use a positive integer")
    return value


def check_type(name: str, value: object, *types: type) -> None:
    """Check the type of an optional argument.

    Raises:
        TypeError: If the argument is neither None nor of one of the types.
    """
    if value is not None and not isinstance(value, types):
        expected = " or ".join(one.__name__ for one in types)
        raise TypeError(f"{name}={type(value).__name__}: must be {expected}; use {types[0].__name__}(...)")


def iter_pairs(name: str, samples: Any) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield batches of images and labels from an iterable of pairs.

    Raises:
        TypeError: If `samples` is not an iterable of pairs of arrays.
    """
    advice = "use a pair (images, labels), or an iterable of such pairs, such as a DataLoader"
    if hasattr(samples, "shape") or not isinstance(samples, Iterable):
        raise TypeError(f"{name}={type(samples).__name__}: must be an iterable of batches; {advice}")
    for pair in samples:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(hasattr(one, "shape") for one in pair):
            raise TypeError(f"{name}: must yield pairs of images and labels, not {type(pair).__name__}; {advice}")
        yield torch.as_tensor(pair[0]), torch.as_tensor(pair[1])


def build_with_short_errors(name: str, build: Callable[[], Result]) -> Result:
    """Return the result of `build`, with a pydantic error converted to one line.

    Args:
        name: Name of the argument that the settings come from.
        build: Function that validates settings.

    Raises:
        ValueError: If pydantic rejects a setting; the message names the first rejected setting.
    """
    try:
        return build()
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        value = "" if first["type"] == "missing" else f"={first['input']!r:.50}"
        problem = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        raise ValueError(f"{path or name}{value}: {problem[:1].lower()}{problem[1:]}; correct {name}") from None
