"""SortNet's operators on CPUs, beside the l_p-distance ones that they extend, on the same tensors in one process.

    python benchmarks/sort_distance_cpu.py [--threads N] [--seconds S] [--quick]

Printed are ratios of medians over runs in turn: how many times as long the neuron (forward, gradients, interval bounds)
takes as the l_inf distance; a step on subsets as one on the same number of inputs that lie together, without the rest;
and plain PyTorch with torch.topk as the kernel.
"""

import argparse
import math
import platform

import torch
from distance_cpu import in_turn, step_of
from torch import Tensor

from linflab.models.distance import (
    cpu,
    linf_distance_bounds,
    lp_distance,
    lp_distance_on_subsets,
    sort_distance,
    sort_distance_bounds,
)
from linflab.platform.tracking import hardware

BATCH, WIDTHS, SMALL = 512, [512, 1024, 5120], 256
Q, KEPT, GROUP = 0.3, 0.5, 32


def show(what: str, width: int, ratio: float, seconds: float) -> None:
    print(f"{what:58} {BATCH}x{width}x{width}  {ratio:7.2f}  ({seconds * 1e3:.1f} ms)", flush=True)


def neuron(width: int, seconds: float) -> None:
    x, weight = torch.rand(BATCH, width), torch.randn(width, width)
    sort, distance = in_turn(seconds, lambda: sort_distance(x, weight, Q), lambda: lp_distance(x, weight))
    show("sort_distance / l_inf distance", width, sort / distance, sort)
    sort, distance = in_turn(
        seconds, step_of(lambda a, b: sort_distance(a, b, Q), x, weight), step_of(lp_distance, x, weight)
    )
    show("forward+backward of the same", width, sort / distance, sort)
    sort, distance = in_turn(
        seconds,
        lambda: sort_distance_bounds(x, x + 0.1, weight, Q),
        lambda: linf_distance_bounds(x, x + 0.1, weight),
    )
    show("sort_distance_bounds / linf_distance_bounds", width, sort / distance, sort)


def subsets(width: int, seconds: float) -> None:
    x, weight = torch.rand(BATCH, width), torch.randn(width, width)
    kept = torch.rand(BATCH // GROUP, width) < KEPT
    inputs = round(float(kept.sum(dim=1).double().mean()))
    together = x[:, :inputs].contiguous(), weight[:, :inputs].contiguous()
    for p in (8.0, math.inf):
        forward = in_turn(
            seconds,
            lambda p=p: lp_distance_on_subsets(x, weight, p, kept, GROUP),
            lambda p=p: lp_distance(*together, p),
        )
        show(f"on subsets / on {inputs} inputs, p = {p:g}, forward", width, forward[0] / forward[1], forward[0])
        both = in_turn(
            seconds,
            step_of(lambda a, b, p=p: lp_distance_on_subsets(a, b, p, kept, GROUP), x, weight),
            step_of(lambda a, b, p=p: lp_distance(a, b, p), *together),
        )
        show(f"on subsets / on {inputs} inputs, p = {p:g}, forward+backward", width, both[0] / both[1], both[0])


def plain(x: Tensor, weight: Tensor) -> Tensor:
    largest = (x[:, None] - weight).abs().topk(10, dim=2).values
    powers = (1 - Q) ** torch.arange(10)
    return largest @ (powers / powers.sum())


def rival(width: int, seconds: float) -> None:
    x, weight = torch.rand(BATCH, width), torch.randn(width, width)
    topk, ours = in_turn(seconds, lambda: plain(x, weight), lambda: sort_distance(x, weight, Q))
    show("torch.topk / sort_distance", width, topk / ours, ours)
    topk, ours = in_turn(seconds, step_of(plain, x, weight), step_of(lambda a, b: sort_distance(a, b, Q), x, weight))
    show("forward+backward of the same", width, topk / ours, ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each candidate of a comparison")
    parser.add_argument("--quick", action="store_true", help="the smallest width alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    isa = cpu.KERNELS.isa if cpu.KERNELS else "none"
    print(f"{platform.processor() or platform.machine()}, {hardware()}, torch {torch.__version__}, isa {isa}")
    print(f"{arguments.threads} threads; batch x inputs x outputs; q = {Q}, 10 terms; subsets of {KEPT:.0%}")
    rival(SMALL, arguments.seconds)
    for width in WIDTHS[:1] if arguments.quick else WIDTHS:
        neuron(width, arguments.seconds)
        subsets(width, arguments.seconds)


if __name__ == "__main__":
    main()
