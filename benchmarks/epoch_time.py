"""Seconds an epoch of l_inf-dist nets and their rivals on CIFAR-10 (Zhang et al., ICML 2021, Table 4), measured here.

    python benchmarks/epoch_time.py [--turns N] [--steps N] [--threads N] [--batch-size N] [--methods NAME ...]

Every method trains as its recipe says, networks, optimizer and augmentation included, but for the batch, which is the
paper's 512, on random images. Methods take turns, each time in a process of its own, as together they would not fit
into memory; all steps of a method are spread evenly over a training, so that an l_inf-dist net is timed at the
exponents that its p-schedule goes through. Printed are seconds a step, scaled to the 97 steps of an epoch of 50,000
images, and times IBP's, beside the paper's figures, which are of one GPU.

CROWN-IBP is timed with its linear bounds throughout: when eps has grown, the recipes are left with intervals alone.
Where a method's batch would not fit into memory, its steps are with an equal part of one (PARTS), and counted as often.

On 2 cores of an AMD EPYC with AVX-512:

                     s a step  times IBP  paper
    ibp                  9.18       1.00   1.00
    crown_ibp           41.82       4.56   6.46
    crown_ibp_fused     15.19       1.65   2.49
    linf_dist_net        7.66       0.84   1.13

The first three are of one run, 8 steps each, in which the net took 9.55 s (1.04 times IBP); the net's row is of
another, 16 steps beside 16 of IBP, which took 9.12 s, after p beyond 40 had become faster. Its steps take 5.5 s at
p = 8, where powers are multiplications; 17 to 19 s from there to p = 40, by a polynomial for every term; 4 to 5.6 s
beyond, where few terms count and the others are passed over; 2.2 s at p = inf. With the p-schedule's `cheap_exponents`
there are no such powers between.
"""

import argparse
import csv
import resource
import time
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch

from linflab.platform.config import load_experiment
from linflab.platform.datasets import FACTS, Dataset, Split
from linflab.platform.tracking import hardware
from linflab.platform.training import Trainer

IMAGES = 50_000
PAPER = {"ibp": 17.4, "crown_ibp": 112.4, "crown_ibp_fused": 43.3, "linf_dist_net": 19.7, "linf_dist_hybrid": 19.7}
PARTS = {"crown_ibp": 8, "crown_ibp_fused": 2}  # steps that a batch is taken in
OVERRIDES = {name: ["objective.crown_share_end=1"] for name in ("crown_ibp", "crown_ibp_fused")}
LOG = Path(__file__).with_suffix(".csv")


def random_images(count: int) -> Dataset:
    """A data set of CIFAR-10's shape."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count,), dtype=torch.uint8, generator=generator)
    split = Split(images, labels, torch.arange(count), white=255)
    return Dataset("cifar10", FACTS["cifar10"], split, split, split)


def measure(name: str, batch_size: int, threads: int, shares: list[float]) -> tuple[list[tuple[float, float]], float]:
    """p and seconds of a method's steps at these shares of a training; and the memory that it took at most, in GiB."""
    size = batch_size // PARTS.get(name, 1)
    settings = [f"training.batch_size={size}", f"compute.cpus_per_worker={threads}"]
    experiment = load_experiment(f"cifar10_eps8_255_{name}", [*OVERRIDES.get(name, []), *settings])
    data = random_images(size)
    data = replace(data, train=replace(data.train, augmentation=experiment.augmentation))
    cuda = torch.cuda.is_available()
    trainer = Trainer(experiment, data.to(torch.device("cuda" if cuda else "cpu")))
    order, times = trainer.shuffle(1), []
    for share in (shares[0], *shares):  # the first step allocates, and is not counted
        step = int(share * trainer.steps)
        start = time.perf_counter()
        trainer.step(step, *order)
        if cuda:
            torch.cuda.synchronize()
        times.append((trainer.scheduled(step).p, PARTS.get(name, 1) * (time.perf_counter() - start)))
    memory = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return times[1:], memory / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="of each method")
    parser.add_argument("--steps", type=int, default=4, help="in each turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--methods", nargs="+", choices=PAPER, default=list(PAPER))
    arguments = parser.parse_args()
    print(f"{hardware()}; {arguments.threads} threads; torch {torch.__version__}; batches of {arguments.batch_size}")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in arguments.methods}
    memory: dict[str, float] = {}
    count = arguments.turns * arguments.steps
    for turn in range(arguments.turns):
        shares = [(k + 0.5) / count for k in range(turn, count, arguments.turns)]
        for name in arguments.methods:
            with get_context("spawn").Pool(1) as one:
                times, memory[name] = one.apply(measure, (name, arguments.batch_size, arguments.threads, shares))
            found[name] += times
            print(f"turn {turn + 1} {name:16}", "  ".join(f"p {p:g}: {s:.2f} s" for p, s in times), flush=True)
    epochs = {
        name: sum(s for _, s in times) / count * (IMAGES // arguments.batch_size) for name, times in found.items()
    }
    first = arguments.methods[0]
    print(f"\n{'':16} s a step (least to most)  s an epoch  times {first}  paper's s  times ibp  GiB")
    for name, epoch in epochs.items():
        seconds = [s for _, s in found[name]]
        print(
            f"{name:16} {sum(seconds) / count:8.2f} ({min(seconds):6.2f} to {max(seconds):6.2f}) {epoch:11.0f} "
            f"{epoch / epochs[first]:10.2f} {PAPER[name]:10} {PAPER[name] / PAPER['ibp']:10.2f} {memory[name]:4.1f}"
        )
    with LOG.open("a", newline="") as log:
        for name, epoch in epochs.items():
            row = [date.today(), hardware(), arguments.threads, torch.__version__, arguments.batch_size, name]
            csv.writer(log).writerow([*row, count, f"{epoch:.1f}", f"{epoch / epochs[first]:.3f}"])


if __name__ == "__main__":
    main()
