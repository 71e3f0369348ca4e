"""Seconds per epoch of l_inf-dist nets and baselines on CIFAR-10 (Zhang et al., ICML 2021, Table 4).

    python benchmarks/epoch_time.py [--turns N] [--steps N] [--threads N] [--batch-size N] [--methods NAME ...]

Every method uses its recipe with the batch size of the paper, 512, on random images. Methods since 2022, COLT and PVT
use the network of the IBP recipe, so that times differ by the objective only. Methods alternate, each in its own
process, since together they do not fit in memory. The steps of a method are spread evenly over a training run, so that
an l_inf-dist net is timed at the exponents of its p schedule. The output is seconds per step, scaled to the 97 steps of
an epoch of 50,000 images, and multiples of IBP's time. It also includes the figures of the paper, which were measured
on one GPU.

CROWN-IBP is timed with linear bounds in all steps; the recipes use only IBP once eps has grown. If the batch of a
method does not fit in memory, MICROBATCHES has the number of equal parts into which it is divided. Each step then uses
one part, and its time is multiplied by this number.

On 2 cores of an AMD EPYC with AVX-512:

                     s / step  times IBP  paper
    ibp                  9.18       1.00   1.00
    crown_ibp           41.82       4.56   6.46
    crown_ibp_fused     15.19       1.65   2.49
    linf_dist_net        7.66       0.84   1.13

The first three rows are from one run with 8 steps per method. In that run, a step of the net took 9.55 s (1.04 times
IBP). The row of the net is from a later run with 16 steps of the net and 16 of IBP, after the kernels for p above 40
had become faster. In the later run, a step of IBP took 9.12 s.

Batches of 64 on 2 idle cores of an Intel Xeon with AVX-512, two turns of two steps, before and after eps has grown:

                     s / step (min to max)   times IBP
    ibp                  1.39 (1.31 to 1.52)      1.00
    crown_ibp_fused      3.40 (2.76 to 4.05)      2.44
    sabr                 2.97 (2.36 to 3.62)      2.14
    mtl_ibp              1.50 (1.26 to 1.87)      1.08
    cc_ibp               1.65 (1.24 to 2.22)      1.18
    exp_ibp              1.54 (1.24 to 1.86)      1.10
    taps                 8.71 (1.76 to 16.1)      6.26
    staps               10.80 (3.83 to 17.7)      7.76
    colt                 9.70 (2.66 to 16.7)      6.97
    pvt                  3.48 (2.44 to 5.40)      2.50

Once eps has grown, TAPS and STAPS attack the latent box for each wrong class, with 20 steps each.

A step of the net takes 5.5 s at p = 8, where powers are computed by multiplication. Between p = 8 and p = 40 it takes
17 to 19 s, since every term needs a polynomial. For p above 40 it takes 4 to 5.6 s, since few terms count and the
others are skipped. At p = inf it takes 2.2 s. With `p_schedule.fast_exponents`, the slow exponents between 8 and 40 do
not occur.
"""

import argparse
import csv
import math
import resource
import time
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch

from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import DATASETS, Dataset, Split
from linflab.platform.host import describe_hardware
from linflab.platform.training.trainer import Trainer

IMAGES = 50_000
PAPER_SECONDS = {
    "ibp": 17.4,
    "crown_ibp": 112.4,
    "crown_ibp_fused": 43.3,
    "linf_dist_net": 19.7,
    "linf_dist_hybrid": 19.7,
}
NEWER_METHODS = ("sabr", "mtl_ibp", "cc_ibp", "exp_ibp", "taps", "staps", "colt", "pvt")
MICROBATCHES = {"crown_ibp": 8, "crown_ibp_fused": 2, "taps": 4, "staps": 4, "colt": 4}  # steps per batch
OVERRIDES = {
    **{name: ["objective.crown_weight_end=1"] for name in ("crown_ibp", "crown_ibp_fused")},
    **{
        name: ["model.kind=conv_net", "model.size=large", "training.recalibrate_batch_norm=false"]
        for name in NEWER_METHODS
    },
}
LOG = Path(__file__).with_suffix(".csv")


def random_images(count: int) -> Dataset:
    """Return a dataset of random images in the shape of CIFAR-10."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count,), dtype=torch.uint8, generator=generator)
    split = Split(images, labels, torch.arange(count), max_value=255)
    return Dataset("cifar10", DATASETS["cifar10"], split, split, split)


def measure(name: str, batch_size: int, threads: int, shares: list[float]) -> tuple[list[tuple[float, float]], float]:
    """Return p and seconds of a method's steps at these fractions of training, and the peak memory in GiB."""
    size = batch_size // MICROBATCHES.get(name, 1)
    settings = [f"training.batch_size={size}", f"compute.cpus_per_worker={threads}"]
    experiment = load_config(f"cifar10_eps8_255_{name}", [*OVERRIDES.get(name, []), *settings])
    data = random_images(size)
    data = replace(data, train=replace(data.train, augmentation=experiment.augmentation))
    cuda = torch.cuda.is_available()
    trainer = Trainer(experiment, data.to(torch.device("cuda" if cuda else "cpu")))
    order, times = trainer.epoch_order(1), []
    for share in (shares[0], *shares):  # the first step allocates and is not counted
        step = int(share * trainer.steps)
        start = time.perf_counter()
        trainer.step(step, *order)
        if cuda:
            torch.cuda.synchronize()
        times.append((trainer.scheduled_values(step).p, MICROBATCHES.get(name, 1) * (time.perf_counter() - start)))
    memory = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return times[1:], memory / 2**30


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="Turns of each method")
    parser.add_argument("--steps", type=int, default=4, help="Steps in each turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--methods", nargs="+", choices=[*PAPER_SECONDS, *NEWER_METHODS], default=list(PAPER_SECONDS))
    arguments = parser.parse_args()
    print(
        f"{describe_hardware()}; {arguments.threads} threads; torch {torch.__version__}; "
        f"batches of {arguments.batch_size}"
    )
    step_times: dict[str, list[tuple[float, float]]] = {name: [] for name in arguments.methods}
    memory: dict[str, float] = {}
    count = arguments.turns * arguments.steps
    for turn in range(arguments.turns):
        shares = [(k + 0.5) / count for k in range(turn, count, arguments.turns)]
        for name in arguments.methods:
            with get_context("spawn").Pool(1) as one:
                times, memory[name] = one.apply(measure, (name, arguments.batch_size, arguments.threads, shares))
            step_times[name] += times
            print(f"turn {turn + 1} {name:16}", "  ".join(f"p {p:g}: {s:.2f} s" for p, s in times), flush=True)
    epochs = {
        name: sum(s for _, s in times) / count * (IMAGES // arguments.batch_size) for name, times in step_times.items()
    }
    first = arguments.methods[0]
    print(f"\n{'':16} s / step (min to max)      s / epoch  times {first}  paper's s  times ibp  GiB")
    for name, epoch in epochs.items():
        seconds = [s for _, s in step_times[name]]
        print(
            f"{name:16} {sum(seconds) / count:8.2f} ({min(seconds):6.2f} to {max(seconds):6.2f}) {epoch:11.0f} "
            f"{epoch / epochs[first]:10.2f} {PAPER_SECONDS.get(name, math.nan):10} "
            f"{PAPER_SECONDS.get(name, math.nan) / PAPER_SECONDS['ibp']:10.2f} {memory[name]:4.1f}"
        )
    with LOG.open("a", newline="") as log:
        for name, epoch in epochs.items():
            row = [date.today(), describe_hardware(), arguments.threads, torch.__version__, arguments.batch_size, name]
            csv.writer(log).writerow([*row, count, f"{epoch:.1f}", f"{epoch / epochs[first]:.3f}"])


if __name__ == "__main__":
    main()
