"""What the kernels for CUDA devices cost by their machine code; needs no GPU.

    python benchmarks/distance_gpu_static.py [--targets 80 90 100]

Compiles every kernel of linflab.models.distance.cuda_kernels ahead of time, with each of its tiles, and prints from the
disassembly: registers, bytes of the stack (spills), shared memory, warps that a multiprocessor holds by its 65,536
registers (occupancy), and the instructions per term |x_i - w_i| in the hot loop, in all and by class. Those of a
backward pass are for both gradients.

Classes: float (additions, multiplications, maxima, comparisons), special (MUFU: logarithms, powers of two), load,
other. A multiprocessor of these targets issues a float instruction for 128 threads a cycle (64 on sm_80), a special one
for 16: that, over a term's instructions, is the limit. Appends a row for each line to distance_gpu_static.csv.
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
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from linflab.models.distance import cuda, cuda_kernels

TOOLS = Path(nvidia.__file__).parent / "bin"
REGISTERS, MOST_WARPS = 65536, 64
INTEGERS = {"M", "N", "K", "x_step", "w_step", "group", "part", "step", "slopes_step"}
POINTERS_TO_INTEGERS = {"steps", "counts", "unsafe", "index"}
CLASSES = {
    "float": ("FADD", "FMUL", "FFMA", "FMNMX", "FSETP", "FSEL", "FADD2", "FMUL2", "FFMA2", "FMNMX3"),  # 2: two terms
    "special": ("MUFU",),
    "load": ("LDG", "LDS", "LDL", "LDC"),
}


@dataclass(frozen=True)
class Case:
    """A kernel as it is compiled for one use.

    Attributes:
        hot: which of its innermost loops are hot: "powers", those that multiply; else all.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    tiles: tuple[cuda.Tile, ...]
    hot: str = "all"

    @property
    def unroll(self) -> int:
        return cuda.PAIR if self.kernel is cuda_kernels.gradients else cuda.UNROLL


def cases() -> list[Case]:
    """All that training and certification launch."""
    forward, backward = cuda_kernels.distances, cuda_kernels.gradients
    found = [Case("forward p = inf", forward, {"EXPONENT": 0, "INDIRECT": False}, cuda.LARGEST)]
    for p in range(1, cuda.MULTIPLIED + 1):
        found.append(Case(f"forward p = {p}", forward, {"EXPONENT": p, "INDIRECT": False}, cuda.POWERS, "powers"))
    found.append(Case("forward any p", forward, {"EXPONENT": -1, "INDIRECT": False}, cuda.POWERS))
    for p in range(1, cuda.MULTIPLIED + 1):
        constants = {"EXPONENT": p, "MASKED": False}
        found.append(Case(f"backward p = {p}", backward, constants, cuda.GRADIENTS, "powers"))
    return [
        *found,
        Case("backward any p", backward, {"EXPONENT": -1, "MASKED": False}, cuda.GRADIENTS),
        Case("backward p = inf", cuda_kernels.first_largest, {"INDIRECT": False}, cuda.LARGEST),
        Case("bounds", cuda_kernels.bounds, {}, cuda.POWERS),
        Case("subsets forward p = inf", forward, {"EXPONENT": 0, "INDIRECT": True}, cuda.GROUPED),
        Case("subsets forward any p", forward, {"EXPONENT": -1, "INDIRECT": True}, cuda.GROUPED),
        Case("subsets backward any p", backward, {"EXPONENT": -1, "MASKED": True}, cuda.GRADIENTS),
        Case("subsets backward p = inf", cuda_kernels.first_largest, {"INDIRECT": True}, cuda.GROUPED),
    ]


def compiled(case: Case, tile: cuda.Tile, target: int) -> Any:
    """The kernel for a target, as a launch with operands of whole tiles would compile it."""
    names = case.kernel.arg_names
    layout = gl.BlockedLayout(list(tile.thread), list(tile.threads), list(tile.warps), [1, 0])
    constants = {**case.constants, "UNROLL": case.unroll, "BM": tile.rows, "BN": tile.columns, "L": layout}
    constants = {name: value for name, value in constants.items() if name in names}
    in_forward = case.kernel is cuda_kernels.distances
    signature = {}
    for name in names:
        scalar = name in ("p", "exponent") or (in_forward and name in ("low", "high"))
        pointer = "*i32" if name in POINTERS_TO_INTEGERS else "*fp32"
        signature[name] = (
            "constexpr" if name in constants else "fp32" if scalar else "i32" if name in INTEGERS else pointer
        )
    whole = [
        place
        for place, name in enumerate(names)
        if signature[name][0] == "*" or name.endswith("step") or name in ("M", "K")
    ]
    source = GluonASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place in whole},
    )
    options = {"num_warps": math.prod(tile.warps)}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def hot_loops(case: Case, text: str) -> list[list[str]]:
    """The instructions of the innermost loops that count, from a disassembly."""
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
    if case.hot == "powers":
        inner = [loop for loop in inner if not any("MUFU" in each or "FMNMX" in each for each in loop)]
    assert inner, f"{case.name}: no loop found"
    return inner


def operation(instruction: str) -> str:
    """FADD of `@!P0 FADD.FTZ R1, R2, R3`."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def measure(case: Case, tile: cuda.Tile, target: int) -> dict[str, float]:
    """The figures of a line."""
    kernel = compiled(case, tile, target)
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
    counts: Counter[str] = Counter()
    for loop in hot_loops(case, text):
        counts.update(map(operation, loop))
    terms = tile.terms * case.unroll
    by_class = {name: sum(counts[each] for each in kinds) / terms for name, kinds in CLASSES.items()}
    warps = math.prod(tile.warps)
    return {
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "warps": min(MOST_WARPS, REGISTERS // (-(-registers // 8) * 8 * 32 * warps) * warps),
        "per term": counts.total() / terms,
        **by_class,
        "other": counts.total() / terms - sum(by_class.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100])
    targets = parser.parse_args().targets
    print(f"triton {triton.__version__}")
    columns = ["registers", "stack", "shared", "warps", "per term", "float", "special", "load", "other"]
    rows = []
    for target in targets:
        print(f"\nsm_{target:<24}{'tile':>9}" + "".join(f"{column:>10}" for column in columns))
        for case in cases():
            for tile in case.tiles:
                found = measure(case, tile, target)
                cells = [f"{found[name]:10.2f}" if name in columns[4:] else f"{found[name]:10}" for name in columns]
                shape = f"{tile.rows}x{tile.columns}"
                print(f"{case.name:27}{shape:>9}{''.join(cells)}", flush=True)
                figures = [round(found[name], 3) for name in columns]
                rows.append([time.strftime("%Y-%m-%d"), triton.__version__, f"sm_{target}", case.name, shape, *figures])
    path = Path(__file__).with_suffix(".csv")
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(["date", "triton", "target", "kernel", "tile", *columns])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
