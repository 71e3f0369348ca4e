"""Safe reading of untrusted files in NumPy's .npy format.

The header is checked against the file size before anything is mapped or allocated. Pickles are never read.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from linflab.platform.errors import InputError
from linflab.platform.files import open_regular

MAGIC = b"\x93NUMPY"
ZIP = b"PK\x03\x04"


def map_array(path: Path) -> np.ndarray[Any, np.dtype[Any]]:
    """Map an array of numbers copy-on-write, so that processes share its pages until one of them writes.

    Args:
        path: File in .npy format.

    Returns:
        Array of any shape without empty axes, of integers, booleans or floating-point numbers.

    Raises:
        InputError: If the file cannot be read as such an array; the message names the file.
    """
    try:
        with open_regular(path) as file:
            _check_magic(file.read(len(MAGIC)))
            file.seek(0)
            version = npy.read_magic(file)
            read_header = {
                (1, 0): npy.read_array_header_1_0,
                (2, 0): npy.read_array_header_2_0,
                (3, 0): npy.read_array_header_2_0,  # differs from 2.0 only in the encoding of field names
            }.get(version)
            if read_header is None:
                raise ValueError(f"format version {version[0]}.{version[1]} is not supported; use 1.0, as np.save does")
            shape, is_fortran, dtype = read_header(file)
            offset, size = file.tell(), os.fstat(file.fileno()).st_size
            _check_header(shape, dtype, size - offset)
            return np.memmap(file, dtype, "c", offset, shape, "F" if is_fortran else "C")
    except Exception as error:  # a damaged header can raise almost any exception
        message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(message.split())[:200] or type(error).__name__
        raise InputError(f"{path}: must be an array in .npy format ({reason}); write it with numpy.save") from None


def _check_magic(start: bytes) -> None:
    if start.startswith(ZIP):
        raise ValueError("it is a zip archive, as written by numpy.savez")
    if not start.startswith(MAGIC):
        raise ValueError("it lacks the magic bytes of a .npy file")


def _check_header(shape: tuple[int, ...], dtype: np.dtype[Any], size_left: int) -> None:
    """Check that a header describes an array of numbers that fits into the rest of the file."""
    if dtype.kind not in "uifb":
        raise ValueError(f"its dtype is {dtype}; must be integers or floating-point numbers")
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape):
        raise ValueError(f"its shape is {shape}; must be positive numbers")
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes > size_left:
        raise ValueError(f"an array of shape {shape} requires {num_bytes} bytes, but the file has {size_left}")
