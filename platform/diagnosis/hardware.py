"""Checks of processors, memory and GPUs."""

import os
import shutil
from pathlib import Path

from linflab.platform.diagnosis.checks import Check, Status
from linflab.platform.diagnosis.installation import installed_version

CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # CPU time of a container: microseconds per period, and the period
SHARED_MEMORY = Path("/dev/shm")
MIN_SHARED_MEMORY = 2**30  # bytes; Ray's object store falls back to the disk if it has less
GIB = 2**30


def check_threads() -> Check:
    """Return the number of CPU cores that this process can use, and what limits its threads."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, threads = cpu_quota(), torch.get_num_threads()
    usable = cores if quota is None else min(float(cores), quota)
    load = os.getloadavg()[0]
    values = {"cores": cores, "quota": quota, "threads": threads, "load": load}
    limits = f", limited to {quota:g} by the container" if quota is not None and quota < cores else ""
    found = f"{cores} CPU cores{limits}, {threads} threads in PyTorch, load {load:.1f}"
    if threads > max(1.0, usable):
        advice = f"set OMP_NUM_THREADS={max(1, int(usable))}: more threads than cores wait for each other"
        return Check("threads", Status.SLOW, found, advice, values)
    if load > cores + 0.5:
        advice = "stop other processes, or wait for them: more processes than cores are running"
        return Check("threads", Status.SLOW, found, advice, values)
    advice = (
        f"a run uses one thread; set compute.cpus_per_worker={int(usable)} for a run that has the machine to itself"
    )
    return Check("threads", Status.OK, found, advice if usable >= 2 else "", values)


def cpu_quota(path: Path = CGROUP_LIMIT) -> float | None:
    """Return the CPU cores that a container may use; None without a limit."""
    try:
        quota, period = path.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no such file, or the quota is `max`
        return None


def check_shared_memory(folder: Path = SHARED_MEMORY) -> Check:
    """Return the size of shared memory, which Ray needs for sweeps and several workers."""
    try:
        size = shutil.disk_usage(folder).total
    except OSError:
        return Check("shared memory", Status.NOTE, f"no {folder}")
    found, values = f"{size / GIB:.1f} GiB in {folder}", {"bytes": size}
    if size < MIN_SHARED_MEMORY:
        advice = "Ray uses the disk instead; give the container more, as with `docker run --shm-size=4g`"
        return Check("shared memory", Status.SLOW, found, advice, values)
    return Check("shared memory", Status.OK, found, values=values)


def check_gpu(driver: Path = Path("/proc/driver/nvidia/version")) -> Check:
    """Return the GPUs that PyTorch can use, or why it can use none."""
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = [f"{one.name} ({one.total_memory / GIB:.0f} GiB)" for one in devices]
        values = {"devices": [one.name for one in devices], "cuda": torch.version.cuda}
        return Check("GPU", Status.OK, f"{', '.join(names)}, CUDA {torch.version.cuda}", values=values)
    values = {"devices": [], "cuda": torch.version.cuda}
    if not driver.exists():
        advice = "training runs on the CPU; published recipes need a GPU, those that end in _cpu do not"
        return Check("GPU", Status.NOTE, "none: no NVIDIA driver", advice, values)
    if torch.version.cuda is None:
        advice = "install the PyTorch build for CUDA, as described on pytorch.org"
        return Check("GPU", Status.SLOW, "not used: PyTorch was built without CUDA", advice, values)
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return Check("GPU", Status.SLOW, "hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES", values)
    advice = f"update the NVIDIA driver to one for CUDA {torch.version.cuda}, and check it with `nvidia-smi`"
    return Check("GPU", Status.SLOW, "not used: PyTorch cannot start CUDA", advice, values)


def check_triton() -> Check:
    """Return whether the GPU kernels can be compiled; on a GPU, compile and run one."""
    import torch

    version = installed_version("triton")
    values = {"version": version}
    if not torch.cuda.is_available():
        found = f"version {version}, not used without a GPU" if version else "not installed, not needed without a GPU"
        return Check("Triton", Status.OK, found, values=values)
    if version is None:
        advice = "l_p distances run in plain PyTorch on the GPU; run `pip install triton`"
        return Check("Triton", Status.SLOW, "not installed", advice, values)
    return _run_gpu_kernel(version)


def _run_gpu_kernel(version: str) -> Check:
    import torch

    from linflab.models.distance import lp_distance
    from linflab.models.distance.cuda_launch import is_supported

    x, weight, values = torch.rand(8, 32), torch.rand(8, 32), {"version": version}
    if not is_supported(x.cuda()):
        advice = "use a GPU of compute capability 8.0 or newer, and the Triton that PyTorch installs"
        return Check("Triton", Status.SLOW, f"version {version}: kernels do not support this GPU", advice, values)
    try:
        with torch.no_grad():
            difference = (lp_distance(x.cuda(), weight.cuda(), p=8.0).cpu() - lp_distance(x, weight, p=8.0)).abs().max()
    except Exception as error:  # the compiler, the driver or the kernel, each with its own exceptions
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        advice = "reinstall PyTorch with its own Triton, and update the NVIDIA driver"
        return Check("Triton", Status.FAILED, f"version {version}: a kernel fails ({reason})", advice, values)
    if not difference < 1e-4:
        advice = "do not use this GPU, and report its name with these versions"
        return Check("Triton", Status.FAILED, f"version {version}: a kernel is wrong by {difference:g}", advice, values)
    return Check("Triton", Status.OK, f"version {version}, a kernel was compiled and run", values=values)
