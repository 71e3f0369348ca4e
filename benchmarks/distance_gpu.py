"""The operator on a GPU: times, against `torch.cdist`, `torch.compile` and the device's own limit. Needs a CUDA device.

    python benchmarks/distance_gpu.py [--batch 512] [--width 5120] [--by linflab torch.cdist torch.compile]

For each p: milliseconds of a forward pass, and of a forward and backward pass, by linflab and, in the same run and as
--by says, by `torch.cdist` and by `torch.compile` of the definition (in tiles: of whole tensors B x O x I there is no
room for); and of a matrix product of the same shape for scale. The limit is what the device can issue, by its clock and
number of multiprocessors and by the instructions per term that distance_gpu_static.py counts; for real p that is the
special units' two a term, of which a multiprocessor does 16 a cycle. The last column is the share of it that a forward
pass reaches. Appends a row for each line to distance_gpu.csv.
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

from linflab.models.distance import lp_distance
from linflab.platform.tracking import hardware, versions

# instructions a term in all, and special ones (logarithms, powers of two), by distance_gpu_static.py
TERMS = {math.inf: (2.2, 0), 8.0: (4.3, 0), 9.7: (8.6, 2), 100.5: (8.6, 2), 1000.0: (8.6, 2)}
SPECIAL_LANES = 16
BY = ("linflab", "torch.cdist", "torch.compile")
TILE = 2**26  # terms that the definition holds at a time


def milliseconds(run: Callable[[], object], least: float = 0.5) -> float:
    """The median of runs over half a second at least, after three to warm up."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times, began = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - began < least:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def definition(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """||x - w||_p as it is written, a tile of outputs at a time."""
    columns = max(1, TILE // x.numel())
    return torch.cat(
        [torch.linalg.vector_norm(x[:, None] - part[None], p, dim=2) for part in weight.split(columns)], dim=1
    )


def both(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, upstream: Tensor) -> object:
    return torch.autograd.grad(function(x, weight), (x, weight), upstream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--width", type=int, default=5120)
    parser.add_argument("--by", nargs="+", default=BY, choices=BY)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("distance_gpu: there is no CUDA device here; distance_gpu_static.py needs none")
    batch, width = arguments.batch, arguments.width
    device = torch.cuda.get_device_properties(0)
    # kHz; 128 float lanes a multiprocessor since sm_86, and on sm_90 and sm_100; 64 on sm_80
    lanes = 64 if (device.major, device.minor) == (8, 0) else 128
    cycles_per_second = 1e3 * device.clock_rate * device.multi_processor_count
    print(f"{hardware()}; {versions()}; {batch} x {width} inputs, {width} outputs")
    x = torch.randn(batch, width, device="cuda", requires_grad=True)
    weight = torch.randn(width, width, device="cuda", requires_grad=True)
    upstream = torch.randn(batch, width, device="cuda")
    product = milliseconds(lambda: x.detach() @ weight.detach().t())
    print(f"matrix product (TF32: {torch.backends.cuda.matmul.allow_tf32}): {product:.2f} ms")
    print(f"{'p':>7}{'by':>16}{'forward ms':>12}{'and backward':>14}{'of the limit':>14}")
    rows: list[list[object]] = [[math.nan, "matrix product", round(product, 3), math.nan, math.nan]]
    for p, (instructions, special) in TERMS.items():
        cycles = batch * width * width * max(instructions / lanes, special / SPECIAL_LANES)
        limit = 1e3 * cycles / cycles_per_second
        compiled = torch.compile(definition, dynamic=False)
        by: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "linflab": lambda a, b, p=p: lp_distance(a, b, p),
            "torch.cdist": lambda a, b, p=p: torch.cdist(a, b, p=p),
            "torch.compile": lambda a, b, p=p, compiled=compiled: compiled(a, b, p),
        }
        for name in arguments.by:
            function = by[name]
            forward = milliseconds(lambda function=function: function(x.detach(), weight.detach()))
            training = milliseconds(lambda function=function: both(function, x, weight, upstream))
            share = limit / forward if name == "linflab" else math.nan
            print(f"{p:7g}{name:>16}{forward:12.2f}{training:14.2f}{share:14.2f}", flush=True)
            rows.append([p, name, round(forward, 3), round(training, 3), round(share, 3)])
    path = Path(__file__).with_suffix(".csv")
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            columns = ["batch", "width", "p", "by", "forward_ms", "training_ms", "of_limit"]
            writer.writerow(["date", "machine", "torch", "triton", *columns])
        run = [time.strftime("%Y-%m-%d"), hardware(), torch.__version__, triton.__version__, batch, width]
        writer.writerows([*run, *row] for row in rows)


if __name__ == "__main__":
    main()
