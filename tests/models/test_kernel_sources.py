"""Tests of the C++ sources of the distance kernels: the list in setup.py and self-contained headers."""

import ast
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCE_DIR = ROOT / "models" / "distance" / "csrc"
HEADERS = sorted(path.name for path in SOURCE_DIR.glob("[a-z]*.h"))
COMPILER = shutil.which("g++")


def read_setup_constant(name: str) -> Any:
    """Return a literal that setup.py assigns, without importing setup.py, which would run it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py does not assign {name}")


def list_includes(name: str) -> set[str]:
    lines = (SOURCE_DIR / name).read_text().splitlines()
    return {line.split('"')[1] for line in lines if line.startswith('#include "')}


def test_setup_lists_all_sources() -> None:
    assert read_setup_constant("SOURCES") == ("module.cpp", *HEADERS)


def test_header_includes_are_acyclic() -> None:
    graph = {name: list_includes(name) for name in HEADERS}
    while without_includes := [name for name, included in graph.items() if not included & graph.keys()]:
        for header in without_includes:
            del graph[header]
    assert not graph, f"headers with cyclic includes: {sorted(graph)}"


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="requires g++")
@pytest.mark.parametrize("isa", read_setup_constant("FLAGS"))
@pytest.mark.parametrize("header", HEADERS)
def test_headers_are_self_contained(header: str, isa: str) -> None:
    flags = read_setup_constant("FLAGS")[isa]
    if flags and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("requires an x86 processor")
    completed = subprocess.run(
        [str(COMPILER), "-std=c++17", "-fsyntax-only", *flags, "-I", str(SOURCE_DIR), "-x", "c++", "-"],
        input=f'#include "{header}"\n', text=True, capture_output=True,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
