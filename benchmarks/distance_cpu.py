"""Time of the l_p-distance operator on CPUs, compared with alternatives on the same tensors.

    python benchmarks/distance_cpu.py [--threads N] [--seconds S] [--parts PART ...] [--quick]

The baseline is a step of an nn.Linear layer of the same shape: one matrix product in the forward pass, three in the
forward and backward pass together. For convolutions it is a step of nn.Conv2d. The output is the ratio of median times.
Runs are interleaved, so that other load on the machine slows all implementations equally. For some kernels, the output
also includes their speed as a fraction of the speed that a core reaches with the same arithmetic and all operands in
registers. Each figure is appended as a row to distance_cpu.csv in this directory.

`--parts inf conv shares` takes two minutes: steps at p = inf, convolutions, and shares of the limits. AVX2 kernels are
compared with products that also use AVX2 by these variables, which torch, MKL and oneDNN read:

    ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2

Limits of the hardware: AMD's Zen 4 and Intel's server cores start two 512-bit instructions per cycle. On Zen 4 at most
one of them is an addition or maximum of floats, and at most one is a multiplication. On Intel's cores both units run
all of them, but only one computes the maximum of integers. The table has the cycles per vector of terms |x_i - w_i| on
both, and the operations that need them:

                                                                                                      Zen 4  Intel
    matrix product      a multiply-add                                                                1      1/2
    forward, p = inf    two vectors: subtract, subtract by multiply-add, larger magnitude, maximum    1      1
    forward, p = 8      subtract; square, square, multiply-add                                        3      2
    backward, p = 8     subtract, 2 additions; 5 multiplications                                      5      4
    convolution's       subtract; 4 multiplications, 2 multiply-adds                                  6      7/2
    bounds              subtract, subtract by multiply-add, larger magnitude, 3 maxima                3      3

With AVX2, Intel's cores start three instructions per cycle, two of them arithmetic of floats. A vector of p = inf has
three: subtract, clear the sign, maximum. So it also takes one cycle, twice as long as a multiply-add.

The backward pass at p = inf searches the block of 64 inputs that the forward pass recorded, so its time is almost
independent of the number of inputs. If all kernels reach their limits, a step at p = 8 costs 8/3 of a linear layer's
step on Zen 4 and 4 on Intel. A convolution's step then costs 3 and 11/3. Other p = 2^k or 3 * 2^k up to 64 need more
multiplications. For larger or other real p, most of the time is independent of the number of inputs: at p = 1000 and
784 inputs, a forward pass takes 250 cycles per pair of sample and output, of which reading the terms takes 55.

On 2 idle cores of an Intel Xeon (Emerald Rapids), training steps of a convolution (128 x 64 x 16 x 16, 128 outputs of
3 x 3) take this multiple of nn.Conv2d's step, with kernels and products of the same instruction set:

    p         8     9.7   24    100.5  1000  inf
    AVX-512   2.92  6.77  3.72  5.77   3.84  1.56
    AVX2      2.53  8.04  4.07  5.41   3.36  1.65

A step at p = inf takes 1.48 and 1.26 of a linear layer's step for 512 x 784 x 1024, and 0.94 and 0.97 for
512 x 5120 x 5120. The forward kernel at p = inf reaches 75 and 73% of its limit in registers, where the matrix product
of MKL reaches 78 and 90%. At p = 9.7 and 100.5 each term that counts needs a logarithm and an exponential.
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
from linflab.platform.config.schedules import fast_exponent
from linflab.platform.host import describe_hardware

EXPONENTS = [8.0, 9.7, 24.0, 100.5, 1000.0, math.inf]
SHAPES = [(512, 784, 1024), (512, 5120, 5120), (128, 64, 128)]  # batch, inputs, outputs
CDIST_SHAPE = (512, 784, 512)
MAX_SLOW_TERMS = 5e8  # baselines below 1 G terms/s skip larger shapes


def broadcast(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """Return l_p distances by the definition, with all differences in memory."""
    d = (x[:, None] - weight).abs()
    return d.amax(dim=2) if math.isinf(p) else d.pow(p).sum(dim=2).pow(1 / p)


def forward_backward(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Callable[[], object]:
    """Return a function that runs the forward and backward pass for both arguments."""
    a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
    upstream = torch.randn_like(function(a, b))
    return lambda: torch.autograd.grad(function(a, b), (a, b), upstream)


def interleaved_medians(
    seconds: float, *candidates: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Return the median time of each candidate over 3 or more rounds; a round runs each candidate once."""
    for candidate in candidates:
        candidate()
    times: list[list[float]] = [[] for _ in candidates]
    end = time.perf_counter() + seconds * len(candidates)
    while len(times[0]) < 3 or time.perf_counter() < end:
        for candidate, candidate_times in zip(candidates, times, strict=True):
            start = clock()
            candidate()
            candidate_times.append(clock() - start)
    return [median(candidate_times) for candidate_times in times]


class Report:
    """Printer of figures that also appends them to the CSV file, with machine and versions."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        self.common = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.processor() or platform.machine()}, {describe_hardware()}",
            "torch": torch.__version__,
            "isa": cpu.KERNELS.isa if cpu.KERNELS else "none",
            "threads": threads,
        }
        self.rows: list[dict[str, object]] = []

    def add(self, implementation: str, shape: tuple[int, ...], p: float, quantity: str, value: float) -> None:
        """Print a figure and keep it for `save`."""
        name = "x".join(map(str, shape))
        print(f"{implementation:34} {name:30} p {p:<7g} {quantity:44} {value:9.2f}", flush=True)
        self.rows.append(
            {**self.common, "what": implementation, "shape": name, "p": p, "quantity": quantity, "value": value}
        )

    def save(self) -> None:
        """Append all figures to the CSV file."""
        if not self.rows:
            return
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(self.rows)


def compare(
    report: Report, shape: tuple[int, int, int], exponents: list[float], seconds: float, baselines: bool
) -> None:
    """Compare the operator with a linear layer and, if `baselines`, with other implementations."""
    batch, inputs, outputs = shape
    torch.manual_seed(0)
    x, weight = torch.rand(batch, inputs), torch.randn(outputs, inputs)
    linear = lambda a, b: torch.nn.functional.linear(a, b)  # noqa: E731
    for p in exponents:
        candidates: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"linflab": lambda a, b, p=p: lp_distance(a, b, p)}
        if baselines:
            torch.compiler.reset()
            candidates["torch.cdist"] = lambda a, b, p=p: torch.cdist(a, b, p=p)
            candidates["broadcast and reduce"] = lambda a, b, p=p: broadcast(a, b, p)
            candidates["torch.compile of it"] = torch.compile(candidates["broadcast and reduce"], dynamic=False)
        names = [*candidates, "linear"]
        functions = [*candidates.values(), linear]
        with torch.no_grad():
            forward = interleaved_medians(seconds, *(lambda f=f: f(x, weight) for f in functions))
        forward_backward_times = interleaved_medians(seconds, *(forward_backward(f, x, weight) for f in functions))
        for name, time_forward, time_both in zip(names[:-1], forward, forward_backward_times, strict=False):
            report.add(name, shape, p, "forward / matrix product", time_forward / forward[-1])
            report.add(name, shape, p, "forward+backward / linear's", time_both / forward_backward_times[-1])


def schedule_means(report: Report, shape: tuple[int, int, int], seconds: float, count: int) -> None:
    """Report means over a p schedule from 8 to 1000, with its exact exponents and with fast exponents."""
    batch, inputs, outputs = shape
    torch.manual_seed(0)
    x, weight = torch.rand(batch, inputs), torch.randn(outputs, inputs)
    schedule = [8 * (1000 / 8) ** ((k + 0.5) / count) for k in range(count)]
    for name, exponents in (("cheap", [fast_exponent(p) for p in schedule]), ("any real", schedule)):
        ratios = []
        for p in exponents:
            distance_seconds, linear = interleaved_medians(
                seconds,
                forward_backward(lambda a, b, p=p: lp_distance(a, b, p), x, weight),
                forward_backward(torch.nn.functional.linear, x, weight),
            )
            ratios.append(distance_seconds / linear)
        report.add(
            f"mean over p of a schedule, {name}", shape, math.nan, "forward+backward / linear's", sum(ratios) / count
        )


def convolution(report: Report, exponents: list[float], seconds: float) -> None:
    """Compare the distance convolution with a convolution."""
    batch, channels, size, filters = 128, 64, 16, 128
    torch.manual_seed(0)
    x, weight = torch.rand(batch, channels, size, size), torch.randn(filters, channels, 3, 3)
    for p in exponents:
        distance_seconds, convolution_seconds = interleaved_medians(
            seconds,
            forward_backward(lambda a, b, p=p: lp_distance_conv2d(a, b, p, 1, 1), x, weight),
            forward_backward(lambda a, b: torch.nn.functional.conv2d(a, b, padding=1), x, weight),
        )
        report.add(
            "conv 3x3",
            (batch, channels, size, size, filters),
            p,
            "forward+backward / nn.Conv2d's",
            distance_seconds / convolution_seconds,
        )


def bounds(report: Report, shape: tuple[int, int, int], seconds: float) -> None:
    """Compare the bounds of distances with a matrix product."""
    batch, inputs, outputs = shape
    x, weight = torch.rand(batch, inputs), torch.randn(outputs, inputs)
    bounds_seconds, product = interleaved_medians(
        seconds, lambda: linf_distance_bounds(x, x + 0.1, weight), lambda: x @ weight.T
    )
    report.add("interval bounds, both ends", shape, math.inf, "forward / matrix product", bounds_seconds / product)


def shares(report: Report, shape: tuple[int, int, int], seconds: float) -> None:
    """Compare kernels on one thread with the same arithmetic in registers, by the time that the thread ran."""
    if cpu.KERNELS is None:
        return
    batch, inputs, outputs = shape
    terms = batch * inputs * outputs
    x, weight = torch.rand(batch, inputs), torch.randn(outputs, inputs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rounds = 1_000_000
    y = lp_distance(x, weight, 8.0)
    backward = torch.ops.linflab.lp_distance_backward
    upstream = torch.randn_like(y)
    for name, p, kernel, limit in (
        ("forward", math.inf, lambda: lp_distance(x, weight, math.inf), cpu.KERNELS.run_in_registers_inf),
        (
            "forward that records blocks",
            math.inf,
            lambda: torch.ops.linflab.linf_distance_with_blocks(x, weight),
            cpu.KERNELS.run_in_registers_inf,
        ),
        ("forward", 8.0, lambda: lp_distance(x, weight, 8.0), cpu.KERNELS.run_in_registers_8),
        ("backward", 8.0, lambda: backward(upstream, x, weight, y, 8.0), cpu.KERNELS.run_in_registers_8_backward),
    ):
        terms_per_round = limit(1)
        kernel_time, limit_time = interleaved_medians(
            seconds, kernel, lambda limit=limit: limit(rounds), clock=time.thread_time
        )
        report.add(f"{name} on one thread", shape, p, "G terms/s", terms / kernel_time / 1e9)
        report.add(
            f"{name} on one thread",
            shape,
            p,
            "share of the limit in registers, %",
            100 * (terms / kernel_time) / (terms_per_round * rounds / limit_time),
        )
    multiply = cpu.KERNELS.multiply_in_registers
    terms_per_round = multiply(1)
    product, limit_time = interleaved_medians(
        seconds, lambda: x @ weight.T, lambda: multiply(rounds), clock=time.thread_time
    )
    report.add("matrix product on one thread", shape, math.nan, "G terms/s", terms / product / 1e9)
    report.add(
        "matrix product on one thread",
        shape,
        math.nan,
        "share of the limit in registers, %",
        100 * (terms / product) / (terms_per_round * rounds / limit_time),
    )
    torch.set_num_threads(threads)


def read_resident_bytes(field: str) -> int:
    """Return the resident bytes of this process on Linux: current ("VmRSS") or peak ("VmHWM")."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def paper_size(report: Report, depth: int = 5, width: int = 5120, batch: int = 512, inputs: int = 3072) -> None:
    """Measure the time and peak memory of a training step of the paper's network."""
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

    outputs = 2 * depth * batch * width  # distances and normalized distances
    tensors = 4 * (2 * sum(weight.numel() for weight in weights) + x.numel() + 2 * outputs)
    base_bytes = read_resident_bytes("VmRSS") - 4 * (sum(weight.numel() for weight in weights) + x.numel())
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    step(lambda a, b: lp_distance(a, b, p))
    peak = read_resident_bytes("VmHWM") - base_bytes
    distance_seconds, linear = interleaved_medians(
        0, lambda: step(lambda a, b: lp_distance(a, b, p)), lambda: step(torch.nn.functional.linear)
    )
    report.add("training step", shape, p, "seconds", distance_seconds)
    report.add("training step", shape, p, "training step / linear's", distance_seconds / linear)
    report.add("training step", shape, p, "peak memory, MB", peak / 1e6)
    report.add("training step", shape, p, "of these inputs, weights, outputs, gradients", tensors / 1e6)


def layers(report: Report, seconds: float) -> None:
    """Compare the operator with a linear layer and other implementations for all shapes and exponents."""
    for shape in SHAPES:
        compare(report, shape, EXPONENTS, seconds, baselines=math.prod(shape) <= MAX_SLOW_TERMS)
    compare(report, CDIST_SHAPE, [8.0], seconds, baselines=True)


def largest_terms(report: Report, seconds: float) -> None:
    """Compare the operator at p = inf with a linear layer."""
    for shape in SHAPES:
        compare(report, shape, [math.inf], seconds, baselines=False)


PARTS: dict[str, Callable[[Report, float], None]] = {
    "inf": largest_terms,
    "layers": layers,
    "schedule": lambda report, seconds: schedule_means(report, SHAPES[0], seconds / 4, 24),
    "conv": lambda report, seconds: convolution(report, EXPONENTS, seconds),
    "bounds": lambda report, seconds: bounds(report, SHAPES[0], seconds),
    "shares": lambda report, seconds: shares(report, SHAPES[0], seconds),
    "training": lambda report, _: paper_size(report),
}
DEFAULT_PARTS = [part for part in PARTS if part != "inf"]  # which `layers` includes


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="Seconds of timing per compared function")
    parser.add_argument("--quick", action="store_true", help="Run only the smallest shape")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=DEFAULT_PARTS, help="Parts to run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report(Path(__file__).with_suffix(".csv"), arguments.threads)
    print(", ".join(f"{key} {value}" for key, value in report.common.items()))
    try:
        if arguments.quick:
            compare(report, SHAPES[-1], EXPONENTS, arguments.seconds, baselines=True)
        else:
            for part in arguments.parts:
                PARTS[part](report, arguments.seconds)
    finally:
        report.save()
        print(f"appended to {report.path}")


if __name__ == "__main__":
    main()
