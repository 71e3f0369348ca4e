"""CPU kernels on ARM: compiled by a cross compiler with the flags of the wheel, run in an emulator, and compared."""

import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from linflab.models.distance import lp_distance_conv2d, reference
from linflab.models.distance.derivatives import sort_coefficients

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"
SHAPES = [(3, 2, 5), (9, 35, 130)]  # samples, outputs and inputs: less than a vector, and several tiles

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, (COMPILER, EMULATOR))),
        reason="requires the Debian packages g++-aarch64-linux-gnu and qemu-user",
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels as a program for aarch64, with the compiler flags of `setup.py`."""
    (flags,) = re.findall(r"extra_compile_args=\[(.*), \*flags\]", (ROOT / "setup.py").read_text())
    path = tmp_path_factory.mktemp("arm") / "kernels"
    command = [COMPILER, "-std=c++17", *re.findall(r'"([^"]+)"', flags), "-I", ROOT / "models" / "distance" / "csrc"]
    source = ROOT / "tests" / "models" / "kernel_program.cpp"
    done = subprocess.run([*map(str, command), source, "-o", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


def run(program: Path, kernel: str, p: float, sizes: Sequence[int], *operands: Tensor) -> Tensor:
    """Return the results of a kernel in the emulator, as one float64 vector."""
    content = b"".join(operand.to(torch.float32).numpy().tobytes() for operand in operands)
    command = [EMULATOR, "-L", LIBRARIES, str(program), kernel, str(p), *map(str, sizes)]
    done = subprocess.run(command, input=content, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.from_numpy(np.frombuffer(done.stdout, dtype=np.float32).copy()).double()


def assert_close(found: Tensor, *expected: Tensor, tolerance: float = 1e-5) -> None:
    """Compare with results in float64, relative to the largest one."""
    flat = torch.cat([one.flatten() for one in expected])
    assert found.shape == flat.shape
    assert (found - flat).abs().max() <= tolerance * flat.abs().max()


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return numbers that float32 represents exactly, in float64."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_arm_kernels_are_vectorized(program: Path) -> None:
    assert subprocess.check_output([EMULATOR, "-L", LIBRARIES, program, "isa"], text=True).strip() == "portable"
    listing = subprocess.check_output(["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", program], text=True)
    vectors = {name: len(re.findall(rf"\t{name}\tv\d+\.4s", listing)) for name in ("fsub", "fadd", "fmul", "fabs|fabd")}
    assert min(vectors.values()) > 100, vectors


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [1.0, 2.0, 2.5, 8.0, 30.0, 1000.0, math.inf])
def test_arm_distances_and_gradients_are_those_of_the_reference(
    program: Path, p: float, shape: tuple[int, int, int]
) -> None:
    samples, outputs, inputs = shape
    x, weight, grad_y = draw(samples, inputs), draw(outputs, inputs, seed=1), draw(samples, outputs, seed=2)
    y = reference.lp_distance(x, weight, p)
    assert_close(run(program, "forward", p, shape, x, weight), y)
    if math.isinf(p):
        _, blocks = reference.linf_distance_with_blocks(x, weight)
        expected = reference.linf_distance_backward(grad_y, x, weight, y, blocks)
    else:
        expected = reference.lp_distance_backward(grad_y, x, weight, y, p)
    assert_close(run(program, "backward", p, shape, x, weight, grad_y), *expected, tolerance=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_arm_bounds_are_those_of_the_reference(program: Path, shape: tuple[int, int, int]) -> None:
    samples, outputs, inputs = shape
    lower, weight = draw(samples, inputs), draw(outputs, inputs, seed=1)
    upper = (lower + 0.25 * draw(samples, inputs, seed=2)).float().double()
    low, high = reference.linf_distance_bounds(lower, upper, weight)
    assert_close(run(program, "bounds", 0, shape, lower, weight, upper), high, low)


@pytest.mark.parametrize("shape", SHAPES)
def test_arm_sorted_distances_are_those_of_the_reference(program: Path, shape: tuple[int, int, int]) -> None:
    samples, outputs, inputs = shape
    x, weight, coefficients = draw(samples, inputs), draw(outputs, inputs, seed=1), sort_coefficients(0.3, 10, inputs)
    found = run(program, "sort", 0, (*shape, len(coefficients)), x, weight, torch.tensor(coefficients))
    assert_close(found, reference.sort_distance(x, weight, 0.3, 10))


@pytest.mark.parametrize("p", [8.0, math.inf])
def test_arm_masked_distances_are_those_of_the_reference(program: Path, p: float) -> None:
    samples, outputs, inputs, group_size = 9, 35, 130, 4
    x, weight, mask = draw(samples, inputs), draw(outputs, inputs, seed=1), draw(3, inputs, seed=2) < 0.7
    found = run(program, "subsets", p, (samples, outputs, inputs, group_size), x, weight, mask)
    assert_close(found, reference.masked_lp_distance(x, weight, p, mask, group_size))


@pytest.mark.parametrize("p", [8.0, math.inf])
def test_arm_convolutions_are_those_of_the_reference(program: Path, p: float) -> None:
    samples, channels, size, filters, kernel, stride, padding = 2, 3, 9, 5, 3, 2, 1
    x, weight = draw(samples, channels, size, size), draw(filters, channels, kernel, kernel, seed=1)
    sizes = (samples, channels, size, filters, kernel, stride, padding)
    found = run(program, "convolution", p, sizes, x, weight.permute(0, 2, 3, 1).contiguous())
    assert_close(found, lp_distance_conv2d(x, weight, p, stride=stride, padding=padding))
