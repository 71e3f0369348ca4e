"""Build of the C++ kernels, one module per instruction set of the target processor; skipped if there is no compiler.

With LINFLAB_REQUIRE_KERNELS=1, as for released wheels, a failed compilation fails the build.
"""

import copy
import hashlib
import os
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

FOLDER = Path("models/distance/csrc")
SOURCES = (
    "module.cpp",
    "backward.h",
    "bounds.h",
    "boxes.h",
    "forward.h",
    "limits.h",
    "outer.h",
    "patches.h",
    "powers.h",
    "sort.h",
    "subsets.h",
    "threads.h",
    "tiles.h",
    "vector.h",
)
# Each module stores the hash of its sources; models/distance/cpu.py rejects modules compiled from other sources.
DIGEST = hashlib.sha256(b"".join((FOLDER / name).read_bytes() for name in SOURCES)).hexdigest()

FLAGS = {
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}
X86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))
ISAS = FLAGS if X86 else {"portable": FLAGS["portable"]}


class BuildEachApart(build_ext):
    """Build step with one directory per module, since modules are compiled in parallel from one source."""

    def build_extension(self, ext: Extension) -> None:
        """Compile one module."""
        apart = copy.copy(self)
        apart.build_temp = str(Path(self.build_temp, ext.name))
        super(BuildEachApart, apart).build_extension(ext)


setup(
    ext_modules=[
        Pybind11Extension(
            f"linflab.models.distance._kernels_{isa}",
            [str(FOLDER / SOURCES[0])],
            depends=[str(FOLDER / name) for name in SOURCES],
            define_macros=[("MODULE_NAME", f"_kernels_{isa}"), ("SOURCES", f'"{DIGEST} {" ".join(SOURCES)}"')],
            # Without contraction, multiplications and additions are fused only where the source does so explicitly.
            extra_compile_args=["-O3", "-ffp-contract=off", "-pthread", *flags],
            extra_link_args=["-pthread"],
            cxx_std=17,
            optional=os.environ.get("LINFLAB_REQUIRE_KERNELS", "0") in ("", "0"),
        )
        for isa, flags in ISAS.items()
    ],
    cmdclass={"build_ext": BuildEachApart},
    options={"build_ext": {"parallel": 3}},
)
