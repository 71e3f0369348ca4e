"""The l_p-distance operator on CPUs, beside what else could compute it, on the same tensors in one process.

    python benchmarks/distance_cpu.py [--threads N] [--seconds S] [--quick]

Yardstick: the step of an equal nn.Linear (one matrix product forward, three forward and backward). Printed are ratios
to it, medians over runs in turn, so that a machine that others use too disturbs all alike; and for three kernels the
share of what the core reaches with the same arithmetic and all operands in registers. A row for every figure is
appended to distance_cpu.csv beside this file.

Why it stops there. AMD's Zen 4, on which distance_cpu.csv was measured, starts two 512-bit instructions a cycle, at
most one of them an addition or maximum of floats, and at most one a multiplication. For a vector of terms |x_i - w_i|

    matrix product      a multiply-add                                                                1 cycle
    forward, p = inf    of two vectors: subtract, subtract by multiply-add, larger magnitude, larger  1
    forward, p = 8      subtract; square, square, multiply-add                                        3
    backward, p = 8     subtract, 2 additions; 5 multiplications                                      5
    bounds              subtract, subtract by multiply-add, larger magnitude, 3 times the larger      3

so a step of p = 8 costs 8/3 of a linear layer's where both reach their limits. Other p up to 64 that are 2^k or 3 2^k
take more multiplications. Beyond, and for other real p, most goes into what a pair of sample and output needs however
many inputs there are: at p = 1000 and 784 inputs, a forward pass takes 250 cycles a pair, looking at the terms 55.
"""

import argparse
import csv
import math
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from linflab.models.distance import cpu, linf_distance_bounds, lp_distance, lp_distance_conv2d
from linflab.platform.schedules import cheap_exponent
from linflab.platform.tracking import hardware

EXPONENTS = [8.0, 9.7, 24.0, 100.5, 1000.0, math.inf]
SHAPES = [(512, 784, 1024), (512, 5120, 5120), (128, 64, 128)]  # batch, inputs, outputs
CDIST_SHAPE = (512, 784, 512)
TERMS_OF_SLOW = 5e8  # what is slower than 1 G terms/s is left out of larger shapes


def broadcast(x: Tensor, weight: Tensor, p: float) -> Tensor:
    d = (x[:, None] - weight).abs()
    return d.amax(dim=2) if math.isinf(p) else d.pow(p).sum(dim=2).pow(1 / p)


def step_of(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Callable[[], object]:
    """Forward and backward for both arguments."""
    a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
    upstream = torch.randn_like(function(a, b))
    return lambda: torch.autograd.grad(function(a, b), (a, b), upstream)


def in_turn(seconds: float, *candidates: Callable[[], object]) -> list[float]:
    """The median time of each, over rounds in which each runs once (at least 3, until the time is spent)."""
    for candidate in candidates:
        candidate()
    times: list[list[float]] = [[] for _ in candidates]
    end = time.perf_counter() + seconds * len(candidates)
    while len(times[0]) < 3 or time.perf_counter() < end:
        for candidate, seen in zip(candidates, times, strict=True):
            start = time.perf_counter()
            candidate()
            seen.append(time.perf_counter() - start)
    return [median(seen) for seen in times]


class Report:
    """Prints figures, and appends them to the CSV with machine and versions."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        self.common = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.processor() or platform.machine()}, {hardware()}",
            "torch": torch.__version__,
            "isa": cpu.KERNELS.isa if cpu.KERNELS else "none",
            "threads": threads,
        }
        self.rows: list[dict[str, object]] = []

    def add(self, what: str, shape: tuple[int, ...], p: float, quantity: str, value: float) -> None:
        name = "x".join(map(str, shape))
        print(f"{what:34} {name:30} p {p:<7g} {quantity:44} {value:9.2f}", flush=True)
        self.rows.append({**self.common, "what": what, "shape": name, "p": p, "quantity": quantity, "value": value})

    def save(self) -> None:
        if not self.rows:
            return
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(self.rows)


def compare(report: Report, shape: tuple[int, int, int], exponents: list[float], seconds: float, rivals: bool) -> None:
    batch, inputs, outputs = shape
    torch.manual_seed(0)
    x, weight = torch.rand(batch, inputs), torch.randn(outputs, inputs)
    linear = lambda a, b: torch.nn.functional.linear(a, b)  # noqa: E731
    for p in exponents:
        candidates: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"linflab": lambda a, b, p=p: lp_distance(a, b, p)}
        if rivals:
            torch.compiler.reset()
            candidates["torch.cdist"] = lambda a, b, p=p: torch.cdist(a, b, p=p)
            candidates["broadcast and reduce"] = lambda a, b, p=p: broadcast(a, b, p)
            candidates["torch.compile of it"] = torch.compile(candidates["broadcast and reduce"], dynamic=False)
        names = [*candidates, "linear"]
        functions = [*candidates.values(), linear]
        with torch.no_grad():
            forward = in_turn(seconds, *(lambda f=f: f(x, weight) for f in functions))
        both = in_turn(seconds, *(step_of(f, x, weight) for f in functions))
        for name, time_forward, time_both in zip(names[:-1], forward, both, strict=False):
            report.add(name, shape, p, "forward / matrix product", time_forward / forward[-1])
            report.add(name, shape, p, "forward+backward / linear's", time_both / both[-1])


def schedule_means(report: Report, shape: tuple[int, int, int], seconds: float, count: int) -> None:
    """Means over the exponents that a schedule from 8 to 1000 visits, as they are and snapped to cheap ones."""
    batch, inputs, outputs = shape
    torch.manual_seed(0)
    x, weight = torch.rand(batch, inputs), torch.randn(outputs, inputs)
    visited = [8 * (1000 / 8) ** ((k + 0.5) / count) for k in range(count)]
    for name, exponents in (("cheap", [cheap_exponent(p) for p in visited]), ("any real", visited)):
        ratios = []
        for p in exponents:
            ours, linear = in_turn(
                seconds,
                step_of(lambda a, b, p=p: lp_distance(a, b, p), x, weight),
                step_of(torch.nn.functional.linear, x, weight),
            )
            ratios.append(ours / linear)
        report.add(
            f"mean over p of a schedule, {name}", shape, math.nan, "forward+backward / linear's", sum(ratios) / count
        )


def convolution(report: Report, exponents: list[float], seconds: float) -> None:
    batch, channels, size, filters = 128, 64, 16, 128
    torch.manual_seed(0)
    x, weight = torch.rand(batch, channels, size, size), torch.randn(filters, channels, 3, 3)
    for p in exponents:
        ours, dot = in_turn(
            seconds,
            step_of(lambda a, b, p=p: lp_distance_conv2d(a, b, p, 1, 1), x, weight),
            step_of(lambda a, b: torch.nn.functional.conv2d(a, b, padding=1), x, weight),
        )
        report.add("conv 3x3", (batch, channels, size, size, filters), p, "forward+backward / nn.Conv2d's", ours / dot)


def bounds(report: Report, shape: tuple[int, int, int], seconds: float) -> None:
    batch, inputs, outputs = shape
    x, weight = torch.rand(batch, inputs), torch.randn(outputs, inputs)
    ours, product = in_turn(seconds, lambda: linf_distance_bounds(x, x + 0.1, weight), lambda: x @ weight.T)
    report.add("interval bounds, both ends", shape, math.inf, "forward / matrix product", ours / product)


def shares(report: Report, shape: tuple[int, int, int], seconds: float) -> None:
    """Kernels on one thread against the same arithmetic in registers."""
    if cpu.KERNELS is None:
        return
    batch, inputs, outputs = shape
    terms = batch * inputs * outputs
    x, weight = torch.rand(batch, inputs), torch.randn(outputs, inputs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rounds = 4_000_000
    y = lp_distance(x, weight, 8.0)
    backward = torch.ops.linflab.lp_distance_backward
    upstream = torch.randn_like(y)
    for name, p, kernel, limit in (
        ("forward", math.inf, lambda: lp_distance(x, weight, math.inf), cpu.KERNELS.run_in_registers_inf),
        ("forward", 8.0, lambda: lp_distance(x, weight, 8.0), cpu.KERNELS.run_in_registers_8),
        ("backward", 8.0, lambda: backward(upstream, x, weight, y, 8.0), cpu.KERNELS.run_in_registers_8_backward),
    ):
        done = limit(1)
        kernel_time, limit_time = in_turn(seconds, kernel, lambda limit=limit: limit(rounds))
        report.add(f"{name} on one thread", shape, p, "G terms/s", terms / kernel_time / 1e9)
        report.add(
            f"{name} on one thread",
            shape,
            p,
            "share of the limit in registers, %",
            100 * (terms / kernel_time) / (done * rounds / limit_time),
        )
    multiply = cpu.KERNELS.multiply_in_registers
    done = multiply(1)
    product, limit_time = in_turn(seconds, lambda: x @ weight.T, lambda: multiply(rounds))
    report.add("matrix product on one thread", shape, math.nan, "G terms/s", terms / product / 1e9)
    report.add(
        "matrix product on one thread",
        shape,
        math.nan,
        "share of the limit in registers, %",
        100 * (terms / product) / (done * rounds / limit_time),
    )
    torch.set_num_threads(threads)


def resident(what: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most so far. Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def paper_size(report: Report, depth: int = 5, width: int = 5120, batch: int = 512, inputs: int = 3072) -> None:
    """A training step of the paper's network: its time, and its memory beyond inputs, weights, outputs, gradients."""
    torch.manual_seed(0)
    shape, p = (batch, inputs, *[width] * depth), 8.0
    x = torch.rand(batch, inputs)
    weights = [torch.randn(width, i).requires_grad_() for i in [inputs, *[width] * (depth - 1)]]

    def step(layer: Callable[[Tensor, Tensor], Tensor]) -> None:
        y = x
        for weight in weights:
            y = layer(y, weight)
            y = y / y.detach().mean()
        y.backward(torch.ones_like(y))
        for weight in weights:
            weight.grad = None

    outputs = 2 * depth * batch * width  # distances, and these normalised
    tensors = 4 * (2 * sum(weight.numel() for weight in weights) + x.numel() + 2 * outputs)
    before = resident("VmRSS") - 4 * (sum(weight.numel() for weight in weights) + x.numel())
    Path("/proc/self/clear_refs").write_text("5")  # from now on, VmHWM starts anew
    step(lambda a, b: lp_distance(a, b, p))
    peak = resident("VmHWM") - before
    ours, linear = in_turn(0, lambda: step(lambda a, b: lp_distance(a, b, p)), lambda: step(torch.nn.functional.linear))
    report.add("training step", shape, p, "seconds", ours)
    report.add("training step", shape, p, "training step / linear's", ours / linear)
    report.add("training step", shape, p, "peak memory, MB", peak / 1e6)
    report.add("training step", shape, p, "of these inputs, weights, outputs, gradients", tensors / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each candidate of a comparison")
    parser.add_argument("--quick", action="store_true", help="the small shape alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report(Path(__file__).with_suffix(".csv"), arguments.threads)
    print(", ".join(f"{key} {value}" for key, value in report.common.items()))
    try:
        for shape in SHAPES[-1:] if arguments.quick else SHAPES:
            compare(report, shape, EXPONENTS, arguments.seconds, rivals=math.prod(shape) <= TERMS_OF_SLOW)
        if not arguments.quick:
            compare(report, CDIST_SHAPE, [8.0], arguments.seconds, rivals=True)
            schedule_means(report, SHAPES[0], arguments.seconds / 4, 24)
            convolution(report, EXPONENTS, arguments.seconds)
            bounds(report, SHAPES[0], arguments.seconds)
            shares(report, SHAPES[0], arguments.seconds)
            paper_size(report)
    finally:
        report.save()
        print(f"appended to {report.path}")


if __name__ == "__main__":
    main()
