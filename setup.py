"""The kernels of models/distance/csrc, compiled once per instruction set. Without a compiler the install goes on."""

import hashlib
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

SOURCES = sorted(Path("models/distance/csrc").iterdir())
# the modules say what they were compiled from: models/distance/cpu.py refuses those of other sources
DIGEST = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()

FLAGS = {
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}

setup(
    ext_modules=[
        Pybind11Extension(
            f"linflab.models.distance._kernels_{isa}",
            ["models/distance/csrc/kernels.cpp"],
            depends=[str(source) for source in SOURCES],
            define_macros=[("MODULE_NAME", f"_kernels_{isa}"), ("SOURCES", f'"{DIGEST}"')],
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
