"""Hardware and package versions of this machine, and memory and cuDNN settings of this process."""

import ctypes
import os
import platform as machine
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch


def describe_hardware() -> str:
    """Return the CPU cores and GPUs that this process can use, as text."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{cores} CPU cores ({machine.machine()}, {torch.backends.cpu.get_cpu_capability()})", *devices])


def allocated_cpus() -> int | None:
    """Return the number of CPUs that Slurm gave this job on this node; None outside of a Slurm job."""
    number = os.environ.get("SLURM_CPUS_ON_NODE", "") if "SLURM_JOB_ID" in os.environ else ""
    return int(number) if number.isdecimal() and int(number) > 0 else None


def package_versions(*others: str) -> str:
    """Return the versions of Python, of the installed packages that affect results, and of others, as text."""
    versions = [f"python {machine.python_version()}"]
    for name in ("linflab", "torch", "ray", "optuna", "mlflow", *others):
        with suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    return ", ".join(versions)


def configure_process() -> None:
    """Retain freed memory for the next step and disable TF32 convolutions; idempotent."""
    _retain_freed_memory()
    _disable_tf32()


def _retain_freed_memory() -> None:
    """Make glibc keep freed memory for tensors of the next step.

    By default, glibc returns large blocks to the system, which then zeroes every page of the next allocation. On 2
    cores, this took more than two fifths of the step time with CAP dual bounds or with a small l_inf-dist net.
    """
    with suppress(OSError, AttributeError):  # the C library is not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def _disable_tf32() -> None:
    """Make cuDNN convolutions deterministic and float32; the default, TF32, would invalidate certificates."""
    # Use the older settings, since PyTorch's export fails after the newer ones have been used.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
