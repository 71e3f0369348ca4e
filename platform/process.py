"""What a process that trains or scores settles first: its memory, and how its convolutions round."""

import ctypes
from contextlib import suppress

import torch


def settle_process() -> None:
    """Keep memory for the next step, and convolve in float32; again changes nothing."""
    _keep_memory()
    _settle_convolutions()


def _keep_memory() -> None:
    """Where the C library is glibc, keep memory that tensors leave for those of the next step.

    By default it gives large pieces back at once, and the system fills every page with zeros when they are asked for
    again: measured on 2 cores, more than two fifths of a step by CAP's bounds, and as much of a small l_inf-dist net's.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing in a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def _settle_convolutions() -> None:
    """Have cuDNN convolve in float32, and repeat its bits: by default it rounds to TF32, and certificates with it."""
    # by these names: where the newer ones have been used, PyTorch's own export fails
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
