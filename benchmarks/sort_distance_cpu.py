"""Time of SortNet's operators on CPUs, compared with l_p distances on the same tensors.

    python benchmarks/sort_distance_cpu.py [--threads N] [--seconds S] [--quick]

The output is ratios of median times over interleaved runs, for three comparisons:

- SortNet neurons (forward, backward, bounds) with l_inf distances
- masked distances with unmasked distances over the same number of inputs
- a plain PyTorch version of SortNet neurons, which uses torch.topk, with the kernel
"""

import argparse
import math
import platform

import torch
from distance_cpu import forward_backward, interleaved_medians
from torch import Tensor

from linflab.models.distance import (
    cpu,
    linf_distance_bounds,
    lp_distance,
    masked_lp_distance,
    sort_distance,
    sort_distance_bounds,
)
from linflab.platform.host import describe_hardware

BATCH, WIDTHS, SMALL = 512, [512, 1024, 5120], 256
Q, KEEP_PROBABILITY, GROUP = 0.3, 0.5, 32


def show(name: str, width: int, ratio: float, seconds: float) -> None:
    """Print a ratio of median times, and the time of linflab's SortNet operator."""
    print(f"{name:58} {BATCH}x{width}x{width}  {ratio:7.2f}  ({seconds * 1e3:.1f} ms)", flush=True)


def neuron(width: int, seconds: float) -> None:
    """Compare SortNet neurons with l_inf distances."""
    x, weight = torch.rand(BATCH, width), torch.randn(width, width)
    sort, distance = interleaved_medians(seconds, lambda: sort_distance(x, weight, Q), lambda: lp_distance(x, weight))
    show("sort_distance / l_inf distance, forward", width, sort / distance, sort)
    sort, distance = interleaved_medians(
        seconds,
        forward_backward(lambda a, b: sort_distance(a, b, Q), x, weight),
        forward_backward(lp_distance, x, weight),
    )
    show("sort_distance / l_inf distance, fwd+bwd", width, sort / distance, sort)
    sort, distance = interleaved_medians(
        seconds,
        lambda: sort_distance_bounds(x, x + 0.1, weight, Q),
        lambda: linf_distance_bounds(x, x + 0.1, weight),
    )
    show("sort_distance_bounds / linf_distance_bounds", width, sort / distance, sort)


def masked_distance(width: int, seconds: float) -> None:
    """Compare masked distances with unmasked distances over the same number of inputs."""
    x, weight = torch.rand(BATCH, width), torch.randn(width, width)
    masks = torch.rand(BATCH // GROUP, width) < KEEP_PROBABILITY
    inputs = round(float(masks.sum(dim=1).double().mean()))
    contiguous = x[:, :inputs].contiguous(), weight[:, :inputs].contiguous()
    for p in (8.0, math.inf):
        forward = interleaved_medians(
            seconds,
            lambda p=p: masked_lp_distance(x, weight, p, masks, GROUP),
            lambda p=p: lp_distance(*contiguous, p),
        )
        show(f"masked / unmasked on {inputs} inputs, p = {p:g}, forward", width, forward[0] / forward[1], forward[0])
        times = interleaved_medians(
            seconds,
            forward_backward(lambda a, b, p=p: masked_lp_distance(a, b, p, masks, GROUP), x, weight),
            forward_backward(lambda a, b, p=p: lp_distance(a, b, p), *contiguous),
        )
        show(f"masked / unmasked on {inputs} inputs, p = {p:g}, fwd+bwd", width, times[0] / times[1], times[0])


def plain(x: Tensor, weight: Tensor) -> Tensor:
    """Return the outputs of SortNet neurons in plain PyTorch."""
    largest = (x[:, None] - weight).abs().topk(10, dim=2).values
    powers = (1 - Q) ** torch.arange(10)
    return largest @ (powers / powers.sum())


def baseline(width: int, seconds: float) -> None:
    """Compare a plain PyTorch version of SortNet neurons with the kernel."""
    x, weight = torch.rand(BATCH, width), torch.randn(width, width)
    topk, linflab_seconds = interleaved_medians(seconds, lambda: plain(x, weight), lambda: sort_distance(x, weight, Q))
    show("torch.topk / sort_distance, forward", width, topk / linflab_seconds, linflab_seconds)
    topk, linflab_seconds = interleaved_medians(
        seconds, forward_backward(plain, x, weight), forward_backward(lambda a, b: sort_distance(a, b, Q), x, weight)
    )
    show("torch.topk / sort_distance, fwd+bwd", width, topk / linflab_seconds, linflab_seconds)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="Seconds of timing per compared function")
    parser.add_argument("--quick", action="store_true", help="Run only the smallest width")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    isa = cpu.KERNELS.isa if cpu.KERNELS else "none"
    print(f"{platform.processor() or platform.machine()}, {describe_hardware()}, torch {torch.__version__}, isa {isa}")
    print(
        f"{arguments.threads} threads; batch x inputs x outputs; q = {Q}, top_k = 10; masks keep "
        f"{KEEP_PROBABILITY:.0%} of the inputs"
    )
    baseline(SMALL, arguments.seconds)
    for width in WIDTHS[:1] if arguments.quick else WIDTHS:
        neuron(width, arguments.seconds)
        masked_distance(width, arguments.seconds)


if __name__ == "__main__":
    main()
