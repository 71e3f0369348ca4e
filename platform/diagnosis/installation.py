"""Checks of the installed packages and of the compiled kernels."""

import importlib.metadata
import math
import platform as machine
import shutil
import time
import warnings
from collections.abc import Iterator

from packaging.requirements import Requirement

from linflab.platform.diagnosis.checks import Check, Status
from linflab.platform.extras import EXTRAS, install_command
from linflab.platform.source import git_commit, linflab_version

SHOWN = ("torch", "triton", "numpy", "ray", "mlflow", "optuna")  # packages whose versions are shown
TIMED_SHAPE = (128, 512, 784)  # samples, outputs and inputs of the timed distances
INSTRUCTION_SETS = {"avx512": "AVX-512", "avx2": "AVX2", "portable": "any processor"}
WIDEST = {"AVX512": "avx512", "AVX2": "avx2"}  # by torch's name of the CPU's instruction set


def check_versions() -> Check:
    """Return the versions of Python, linflab and the packages that affect results."""
    versions = {"python": machine.python_version(), "linflab": linflab_version()}
    for name in SHOWN:
        if (found := installed_version(name)) is not None:
            versions[name] = found
    if commit := git_commit():
        versions["commit"] = commit
    return Check("versions", Status.OK, ", ".join(f"{name} {one}" for name, one in versions.items()), values=versions)


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages() -> Iterator[Check]:
    """Compare the installed packages with the requirements of linflab and of each of its extras."""
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("linflab") or []]
    except importlib.metadata.PackageNotFoundError:
        advice = "install it with `pip install linflab`, or `pip install --editable .` in a checkout"
        yield Check("packages", Status.NOTE, "linflab is not installed, so its requirements are unknown", advice)
        return
    yield _compare_packages("", [one for one in requirements if one.marker is None or one.marker.evaluate()])
    for extra in EXTRAS:
        own = [one for one in requirements if one.marker and one.marker.evaluate({"extra": extra})]
        yield _compare_packages(extra, [one for one in own if one.marker and not one.marker.evaluate()])


def _compare_packages(extra: str, requirements: list[Requirement]) -> Check:
    missing, unsuitable = [], []
    for requirement in requirements:
        found = installed_version(requirement.name)
        if requirement.name == "linflab":  # another extra, which has its own check
            continue
        if found is None:
            missing.append(requirement.name)
        elif not requirement.specifier.contains(found, prereleases=True):
            unsuitable.append(f"{requirement.name} {found} (must be {requirement.specifier})")
    name = f"extra {extra}" if extra else "packages"
    parts = [f"missing: {', '.join(missing)}"] if missing else []
    parts += [f"unsuitable: {', '.join(unsuitable)}"] if unsuitable else []
    if not parts:
        return Check(name, Status.OK, f"{len(requirements)} packages", values={"missing": [], "unsuitable": []})
    status = Status.FAILED if unsuitable or not extra else Status.NOTE
    advice = f"run `{install_command(extra)}`"
    return Check(name, status, "; ".join(parts), advice, {"missing": missing, "unsuitable": unsuitable})


def check_kernels() -> Check:
    """Return which compiled CPU kernels are used, and their speed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # missing kernels are reported here
        try:
            from linflab.models.distance import cpu
        except ImportError as error:
            reason = "kernels were compiled from other sources"
            return Check("CPU kernels", Status.FAILED, reason, str(error), {"instruction_set": None})
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    rate = _measure_terms_per_second()
    values = {"instruction_set": None, "cpu": capability, "terms_per_second": rate}
    speed = f"{rate / 1e9:.2g} billion terms |x - w| per second and thread"
    if cpu.KERNELS is None:
        with_compiler = "" if shutil.which("c++") or shutil.which("g++") else "install a C++ compiler, and "
        return Check(
            "CPU kernels", Status.SLOW, f"none; l_p distances run in plain PyTorch: {speed}",
            f"install a wheel of linflab, or {with_compiler}run `pip install --editable .` in a checkout", values,
        )  # fmt: skip
    used = cpu.KERNELS.isa
    found = f"compiled for {INSTRUCTION_SETS.get(used, used)}, {speed}"
    widest = WIDEST.get(capability, "portable")
    values["instruction_set"] = used
    if used != widest:
        advice = f"install linflab again: this CPU has {INSTRUCTION_SETS[widest]}, whose kernels are missing"
        return Check("CPU kernels", Status.SLOW, found, advice, values)
    return Check("CPU kernels", Status.OK, found, values=values)


def _measure_terms_per_second() -> float:
    """Return the rate of l_inf distances with one thread, from the fastest of three calls."""
    import torch

    from linflab.models.distance import lp_distance

    samples, outputs, inputs = TIMED_SHAPE
    x, weight = torch.rand(samples, inputs), torch.rand(outputs, inputs)
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # other processes delay several threads more than one
    try:
        for _ in range(3):
            start = time.perf_counter()
            lp_distance(x, weight, p=math.inf)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return samples * outputs * inputs / min(times)
