"""The kernels of models/distance/csrc, compiled once per instruction set. Without a compiler the install goes on."""

import hashlib
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

FOLDER = Path("models/distance/csrc")
SOURCES = ("kernels.cpp", "sort.h", "subsets.h", "vector.h")
# the modules say what they were compiled from: models/distance/cpu.py refuses those of other sources
DIGEST = hashlib.sha256(b"".join((FOLDER / name).read_bytes() for name in SOURCES)).hexdigest()

FLAGS = {
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}

setup(
    ext_modules=[
        Pybind11Extension(
            f"linflab.models.distance._kernels_{isa}",
            [str(FOLDER / SOURCES[0])],
            depends=[str(FOLDER / name) for name in SOURCES],
            define_macros=[("MODULE_NAME", f"_kernels_{isa}"), ("SOURCES", f'"{DIGEST} {" ".join(SOURCES)}"')],
            # no contraction: a multiplication and an addition are fused where the source says so, nowhere else
            extra_compile_args=["-O3", "-ffp-contract=off", "-pthread", *flags],
            extra_link_args=["-pthread"],
            cxx_std=17,
            optional=True,
        )
        for isa, flags in FLAGS.items()
    ],
    options={"build_ext": {"parallel": 3}},
)
