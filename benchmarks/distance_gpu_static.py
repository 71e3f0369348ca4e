"""Static cost of the CUDA kernels, counted in their machine code without a GPU.

    python benchmarks/distance_gpu_static.py [--targets 80 90 100]

The benchmark compiles every kernel of `cuda_forward.py` and `cuda_backward.py` ahead of time, once for each tile size.
It prints registers, stack bytes (spills), shared memory and occupancy: the warps per multiprocessor with 65,536
registers. It also counts the instructions per term |x_i - w_i| in the hot loop, in total and by class. Counts of a
backward pass are for both gradients.

Classes are float (additions, multiplications, maxima, comparisons), special (MUFU: logarithms, powers of two), load and
other. A multiprocessor of these targets issues float instructions for 128 threads per cycle (64 on sm_80), special ones
for 16. These rates and the instructions per term determine the limit. Each line is appended as a row to
distance_gpu_static.csv.
"""

import argparse
import csv
import math
import re
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from linflab.models.distance import cuda, cuda_backward, cuda_forward, cuda_launch, cuda_sort

TOOLS = Path(nvidia.__file__).parent / "bin"
REGISTERS, MAX_WARPS = 65536, 64
SCALARS = {"p", "exponent", "sign", "least", "most", "margin", "headroom", "log_terms"}
INTEGERS = {"M", "N", "K", "tiles", "parts", "group_size", "x_step", "y_step", "output_step"}
POINTERS = {"blocks": "*i32", "row_indices": "*i32", "counts": "*i32", "columns": "*i32", "listed": "*i8"}
CLASSES = {
    # Operations with the suffix 2 process two terms.
    "float": ("FADD", "FMUL", "FFMA", "FMNMX", "FSETP", "FSEL", "FADD2", "FMUL2", "FFMA2", "FMNMX3"),
    "special": ("MUFU",),
    "load": ("LDG", "LDS", "LDL", "LDC"),
}


@dataclass(frozen=True)
class Case:
    """Kernel with compile-time arguments.

    Attributes:
        name: Name in the output.
        kernel: Gluon kernel.
        constants: Compile-time arguments.
        warps: Warps per program.
        registers: Limit of registers per thread; None for no limit.
        terms: Terms |x_i - w_i| per thread and iteration of the hot loop; 0 for kernels that compute few terms.
        tile: Tile size, as shown in the output.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    registers: int | None
    terms: int
    tile: str = ""


def _sum_cases(name: str, tiles: tuple[cuda_launch.Tile, ...], **constants: Any) -> list[Case]:
    defaults = {"SCALED": False, "RATIOS": False, "MASKED": False, "RECORD": False}
    return [
        Case(
            name, cuda_forward.distance_sums_kernel, {**defaults, **constants, **tile.layouts()}, tile.num_warps,
            tile.registers, tile.terms * cuda_launch.SLICE_INPUTS, f"{tile.rows}x{tile.columns}",
        )
        for tile in tiles
    ]  # fmt: skip


def _gradient_case(name: str, target: int, p: int, masked: bool = False) -> Case:
    outputs = 64 if target == 80 else cuda.MAX_GRADIENT_OUTPUTS  # shared memory: 164 KiB on sm_80, 228 KiB on sm_90
    constants = {"EXPONENT": p, "MASKED": masked, "PART": outputs, **cuda_launch.gradient_layouts()}
    terms = cuda_launch.GRADIENT_SAMPLES * cuda_launch.GRADIENT_INPUTS // 256
    tile = f"{cuda_launch.GRADIENT_SAMPLES}x{cuda_launch.GRADIENT_INPUTS}"
    return Case(name, cuda_backward.gradients_kernel, constants, 8, None, terms, tile)


def cases(target: int) -> list[Case]:
    """Return all kernels that training and certification launch."""
    found = _sum_cases("forward p = inf", cuda_launch.SUM_TILES, EXPONENT=0)
    found += _sum_cases("forward p = inf, with blocks", cuda_launch.LARGE_TILES, EXPONENT=0, RECORD=True)
    for p in cuda.MULTIPLIED_POWERS:
        found += _sum_cases(f"forward p = {p}", cuda_launch.SUM_TILES, EXPONENT=p, SCALED=p > cuda.MAX_UNSCALED_P)
    found += _sum_cases("forward any p <= 72", cuda_launch.LARGE_TILES, EXPONENT=-1, SCALED=True)
    found += _sum_cases("forward any p", cuda_launch.LARGE_TILES, EXPONENT=-1, RATIOS=True)
    found += [_gradient_case(f"backward p = {p}", target, p) for p in cuda.MULTIPLIED_POWERS]
    found.append(_gradient_case("backward any p", target, -1))
    found += _sum_cases("masked forward p = inf", cuda_launch.MASKED_TILES, EXPONENT=0, MASKED=True)
    found += _sum_cases(
        "masked forward p = inf, with blocks", cuda_launch.MASKED_TILES, EXPONENT=0, MASKED=True, RECORD=True
    )
    found += _sum_cases("masked forward p = 8", cuda_launch.MASKED_TILES, EXPONENT=8, MASKED=True)
    found.append(_gradient_case("masked backward p = 8", target, 8, masked=True))
    (tile,) = cuda_launch.LARGE_TILES
    terms = tile.terms * cuda_launch.SLICE_INPUTS
    shape = f"{tile.rows}x{tile.columns}"
    found.append(
        Case(
            "bounds",
            cuda_forward.linf_distance_bounds_kernel,
            tile.layouts(),
            tile.num_warps,
            tile.registers,
            terms,
            shape,
        )
    )
    for name, kernel, (tile,), constants in (
        ("sort forward", cuda_sort.sort_distance_kernel, cuda_launch.SORT_TILES, {"RECORD": False}),
        ("sort backward", cuda_sort.sort_distance_kernel, cuda_launch.SORT_GRADIENT_TILES, {"RECORD": True}),
        ("sort bounds", cuda_sort.sort_distance_bounds_kernel, cuda_launch.SORT_GRADIENT_TILES, {}),
    ):
        terms, shape = tile.terms * cuda_launch.SLICE_INPUTS, f"{tile.rows}x{tile.columns}"
        constants |= {"TOP": 10, **tile.layouts()}
        found.append(Case(name, kernel, constants, tile.num_warps, tile.registers, terms, shape))
    plain = {"SCALED": True, "RATIOS": False, "MASKED": False}
    for name, kernel, warps, constants in (
        ("scales", cuda_forward.scales_kernel, 4, {"SAMPLES": 8, "BK": 1024}),
        ("distances", cuda_forward.distances_kernel, 4, {"EXPONENT": 8, **plain, "BLOCK": 1024, "BK": 1024}),
        ("slopes", cuda_backward.slopes_kernel, 4, {"BM": cuda_launch.GRADIENT_SAMPLES, "BN": 64}),
        ("listed gradients", cuda_backward.listed_gradients_kernel, 4, {"MASKED": False, "BN": 512, "BK": 512}),
        ("slopes p = inf", cuda_backward.linf_slopes_kernel, 4, {"MASKED": False, "BLOCK": 32}),
        ("scatter p = inf", cuda_backward.scatter_kernel, 8, {"BK": cuda.MAX_SCATTER_INPUTS, "BN": 1024}),
    ):
        found.append(Case(name, kernel, {**constants, "WARPS": warps}, warps, None, 0))
    return found


def compiled(case: Case, target: int, ones: tuple[str, ...] = ()) -> Any:
    """Return the kernel compiled for a target and for numbers of inputs that are multiples of 16.

    Args:
        case: Kernel to compile.
        target: Compute capability times 10.
        ones: Names of arguments that equal 1; Triton compiles such values into the kernel.
    """
    names = case.kernel.arg_names
    constants = case.constants | {name: 1 for name in ones if name in names}
    signature = {
        name: "constexpr"
        if name in constants
        else "fp32"
        if name in SCALARS
        else "i32"
        if name in INTEGERS
        else POINTERS.get(name, "*fp32")
        for name in names
    }
    aligned = [
        place
        for place, name in enumerate(names)
        if signature[name][0] == "*" or (signature[name] == "i32" and name == "K")
    ]
    source = GluonASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
    )
    options = {"num_warps": case.warps} | ({"maxnreg": case.registers} if case.registers else {})
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def hot_loop(text: str) -> list[str]:
    """Return the instructions of the longest innermost loop of a disassembly."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops = []
    for line in text.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            back = re.search(r"BRA.*`\(\.(L_x_\d+)\)", instruction[1])
            if back and labels.get(back[1], len(instructions)) < len(instructions) - 1:
                loops.append((labels[back[1]], len(instructions)))
    inner = [
        instructions[start:end]
        for start, end in loops
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in loops)
    ]
    return max(inner, key=len)


def operation(instruction: str) -> str:
    """Return the operation of an instruction, such as FADD of `@!P0 FADD.FTZ R1, R2, R3`."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def measure(case: Case, target: int) -> dict[str, float]:
    """Return the figures of a line of output."""
    kernel = compiled(case, target)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text, usage = (
            subprocess.run([str(TOOLS / tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "--dump-resource-usage"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, stack = int(found[1]), int(found[2])
    figures: dict[str, float] = {
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "warps": min(MAX_WARPS, REGISTERS // (-(-registers // 8) * 8 * 32 * case.warps) * case.warps),
    }
    if not case.terms:
        return figures | dict.fromkeys(("per term", *CLASSES, "other"), math.nan)
    counts = Counter(map(operation, hot_loop(text)))
    by_class = {name: sum(counts[each] for each in kinds) / case.terms for name, kinds in CLASSES.items()}
    per_term = counts.total() / case.terms
    return figures | {"per term": per_term, **by_class, "other": per_term - sum(by_class.values())}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100])
    targets = parser.parse_args().targets
    print(f"triton {triton.__version__}")
    columns = ["registers", "stack", "shared", "warps", "per term", "float", "special", "load", "other"]
    rows = []
    for target in targets:
        print(f"\nsm_{target:<33}{'tile':>9}" + "".join(f"{column:>10}" for column in columns))
        for case in cases(target):
            found = measure(case, target)
            cells = [f"{found[name]:10.2f}" if name in columns[4:] else f"{found[name]:10}" for name in columns]
            print(f"{case.name:36}{case.tile:>9}{''.join(cells)}", flush=True)
            figures = [round(found[name], 3) for name in columns]
            rows.append([time.strftime("%Y-%m-%d"), triton.__version__, f"sm_{target}", case.name, case.tile, *figures])
    path = Path(__file__).with_suffix(".csv")
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(["date", "triton", "target", "kernel", "tile", *columns])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
