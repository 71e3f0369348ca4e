"""Time of the l_p-distance operator on a CUDA device, compared with baselines and the hardware limit.

    python benchmarks/distance_gpu.py [--batch 512] [--width 5120] [--by linflab tensor_cores torch.cdist torch.compile]
        [--p P ...] [--csv FILE]

For each p, the benchmark times a forward pass, and a forward and backward pass, in milliseconds. --by selects the
implementations: linflab, its approximation by fp16 matrix products (`tensor_cores`, only for the p that it supports),
`torch.cdist`, and `torch.compile`. The last one compiles the definition of the distance, in tiles, because B x O x I
tensors do not fit in memory. A matrix product of the same shape is timed for comparison. The limit is the time in which
the device can issue all instructions. It follows from the clock, the number of multiprocessors, and the instructions
per term that distance_gpu_static.py counts. For real p, the limit is set by two special instructions per term, since a
multiprocessor executes only 16 of them per cycle. The last column is the fraction of the limit that a forward pass
reaches. At the end, SortNet's neurons with the 10 largest terms are timed. Each line is appended as a row to
distance_gpu.csv, or to FILE.
"""

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from linflab.models.distance import lp_distance, sort_distance, tensor_cores
from linflab.platform.host import describe_hardware, package_versions

# By p: all instructions per term, and the special ones among them (logarithms, powers of two), as counted by
# distance_gpu_static.py.
TERMS = {
    math.inf: (2.2, 0), 8.0: (4.2, 0), 12.0: (5.2, 0), 16.0: (5.2, 0), 24.0: (6.2, 0), 32.0: (6.2, 0), 48.0: (7.2, 0),
    64.0: (7.2, 0), 9.7: (6.3, 2), 100.5: (8.5, 2), 1000.0: (8.5, 2),
}  # fmt: skip
SORT_INSTRUCTIONS = 21  # per term of a forward pass of SortNet's neurons
SPECIAL_LANES = 16
IMPLEMENTATIONS = ("linflab", "tensor_cores", "torch.cdist", "torch.compile")
TILE = 2**26  # terms per tile of the definition


def milliseconds(run: Callable[[], object], min_seconds: float = 0.5) -> float:
    """Return the median time of runs over at least `min_seconds`, after three warm-up runs."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times, loop_start = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - loop_start < min_seconds:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def definition(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """Return ||x - w||_p by its definition, in tiles of outputs."""
    columns = max(1, TILE // x.numel())
    return torch.cat(
        [torch.linalg.vector_norm(x[:, None] - part[None], p, dim=2) for part in weight.split(columns)], dim=1
    )


def forward_backward(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, upstream: Tensor
) -> object:
    """Run the forward and backward pass for both arguments."""
    return torch.autograd.grad(function(x, weight), (x, weight), upstream)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--width", type=int, default=5120)
    parser.add_argument("--by", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS)
    parser.add_argument(
        "--p", nargs="+", type=float, default=list(TERMS), choices=list(TERMS), help="exponents to time"
    )
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"), help="file to append rows to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("distance_gpu: no CUDA device found; use distance_gpu_static.py, which requires none")
    batch, width = arguments.batch, arguments.width
    device = torch.cuda.get_device_properties(0)
    # A multiprocessor has 64 float lanes on sm_80, and 128 on sm_86, sm_90 and sm_100. The clock rate is in kHz.
    lanes = 64 if (device.major, device.minor) == (8, 0) else 128
    cycles_per_second = 1e3 * device.clock_rate * device.multi_processor_count
    print(f"{describe_hardware()}; {package_versions()}; {batch} x {width} inputs, {width} outputs")
    x = torch.randn(batch, width, device="cuda", requires_grad=True)
    weight = torch.randn(width, width, device="cuda", requires_grad=True)
    upstream = torch.randn(batch, width, device="cuda")
    product = milliseconds(lambda: x.detach() @ weight.detach().t())
    print(f"matrix product (TF32: {torch.backends.cuda.matmul.allow_tf32}): {product:.2f} ms")
    print(f"{'p':>7}{'by':>16}{'forward ms':>12}{'and backward':>14}{'of the limit':>14}")
    rows: list[list[object]] = [[math.nan, "matrix product", round(product, 3), math.nan, math.nan]]
    for p in arguments.p:
        instructions, special = TERMS[p]
        cycles = batch * width * width * max(instructions / lanes, special / SPECIAL_LANES)
        limit = 1e3 * cycles / cycles_per_second
        compiled_definition = torch.compile(definition, dynamic=False)
        implementations: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "linflab": lambda a, b, p=p: lp_distance(a, b, p),
            "tensor_cores": lambda a, b, p=p: tensor_cores.lp_distance(a, b, p),
            "torch.cdist": lambda a, b, p=p: torch.cdist(a, b, p=p),
            "torch.compile": lambda a, b, p=p, compiled_definition=compiled_definition: compiled_definition(a, b, p),
        }
        for name in arguments.by:
            if name == "tensor_cores" and p not in tensor_cores.EXPONENTS:
                continue
            function = implementations[name]
            forward = milliseconds(lambda function=function: function(x.detach(), weight.detach()))
            training = milliseconds(lambda function=function: forward_backward(function, x, weight, upstream))
            share = limit / forward if name == "linflab" else math.nan
            print(f"{p:7g}{name:>16}{forward:12.2f}{training:14.2f}{share:14.2f}", flush=True)
            rows.append([p, name, round(forward, 3), round(training, 3), round(share, 3)])
    forward = milliseconds(lambda: sort_distance(x.detach(), weight.detach(), 0.3))
    training = milliseconds(lambda: forward_backward(lambda a, b: sort_distance(a, b, 0.3), x, weight, upstream))
    share = 1e3 * batch * width * width * SORT_INSTRUCTIONS / lanes / cycles_per_second / forward
    print(f"{'':>7}{'sort_distance':>16}{forward:12.2f}{training:14.2f}{share:14.2f}")
    rows.append([math.nan, "sort_distance", round(forward, 3), round(training, 3), round(share, 3)])
    path = arguments.csv
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            columns = ["batch", "width", "p", "by", "forward_ms", "training_ms", "of_limit"]
            writer.writerow(["date", "machine", "torch", "triton", *columns])
        run = [time.strftime("%Y-%m-%d"), describe_hardware(), torch.__version__, triton.__version__, batch, width]
        writer.writerows([*run, *row] for row in rows)


if __name__ == "__main__":
    main()
