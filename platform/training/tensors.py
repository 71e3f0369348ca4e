"""Safe reading of untrusted torch.save files, which may hold only plain data and dense tensors.

The content must not be larger than the file.
"""

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from linflab.platform.files import open_regular


def load_tensors(path: Path) -> Any:
    """Return the content of a torch.save file, with tensors on the CPU.

    Raises:
        ValueError: If the file cannot be read or has other objects than tensors and plain data. Also if a tensor is not
            dense, has no data, or has more elements than its data. The message does not name the file.
    """
    try:
        with open_regular(path) as file:
            _check_compression(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
        for tensor in _tensors(content, depth=0):
            if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
                raise ValueError(f"it contains a tensor that is not dense: {tensor.layout} on {tensor.device}")
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is larger than its data")
    except UnpicklingError:  # torch's message suggests unsafe loading
        raise ValueError(
            "it was not written by torch.save, or contains other objects than tensors and plain data"
        ) from None
    except Exception as error:  # a damaged file can raise almost any exception
        message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(" ".join(message.split())[:200] or type(error).__name__) from None
    return content


def _check_compression(file: BinaryIO) -> None:
    """Check that a ZIP archive is not compressed, since torch.save never compresses."""
    if zipfile.is_zipfile(file):
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > os.fstat(file.fileno()).st_size:
            raise ValueError("its content is compressed; torch.save never compresses")
    file.seek(0)


def _tensors(content: Any, depth: int) -> Iterator[Tensor]:
    if depth > 50:
        raise ValueError("it is nested deeper than 50 levels")
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple | set):
        for one in content.values() if isinstance(content, dict) else content:
            yield from _tensors(one, depth + 1)
