"""Seconds an epoch of l_inf-dist nets and their rivals on CIFAR-10 (Zhang et al., ICML 2021, Table 4), measured here.

    python benchmarks/epoch_time.py [--rounds N] [--threads N] [--batch-size N] [--methods NAME ...] [--profile]

Every method trains as its recipe says, networks, optimizer and augmentation included, but for the batch, which is the
paper's 512, on random images. Steps are taken in turn, one of each method a round, so that all see the same machine;
rounds are spread evenly over a training, so that an l_inf-dist net is timed at the exponents that its p-schedule goes
through. Printed are seconds a step, scaled to the 97 steps of an epoch of 50,000 images, and times IBP's, beside the
paper's figures, which are of one GPU.

CROWN-IBP is timed with its linear bounds throughout, as in the paper: when eps has grown, the recipes are left with
intervals alone. Its coefficients do not fit into memory for a whole batch: it takes its steps with an eighth of one,
counted eight times.

    TABLE
"""

import argparse
import csv
import resource
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from linflab.platform.config import load_experiment
from linflab.platform.datasets import FACTS, Dataset, Split
from linflab.platform.tracking import hardware
from linflab.platform.training import Trainer

IMAGES = 50_000
PAPER = {"ibp": 17.4, "crown_ibp": 112.4, "crown_ibp_fused": 43.3, "linf_dist_net": 19.7, "linf_dist_hybrid": 19.7}
PARTS = {"crown_ibp": 8}  # steps that a batch is taken in
OVERRIDES = {name: ["objective.crown_share_end=1"] for name in ("crown_ibp", "crown_ibp_fused")}
LOG = Path(__file__).with_suffix(".csv")


def random_images(count: int) -> Dataset:
    """A data set of CIFAR-10's shape."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count,), dtype=torch.uint8, generator=generator)
    split = Split(images, labels, torch.arange(count), white=255)
    return Dataset("cifar10", FACTS["cifar10"], split, split, split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="steps of each method")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--methods", nargs="+", choices=PAPER, default=list(PAPER))
    parser.add_argument(
        "--profile", action="store_true", help="print what the steps of each method spend their time in"
    )
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainers: dict[str, Trainer] = {}
    for name in arguments.methods:
        size = arguments.batch_size // PARTS.get(name, 1)
        settings = [f"training.batch_size={size}", f"compute.cpus_per_worker={arguments.threads}"]
        experiment = load_experiment(f"cifar10_eps8_255_{name}", [*OVERRIDES.get(name, []), *settings])
        data = random_images(size)
        train = replace(data.train, augmentation=experiment.augmentation)
        trainers[name] = Trainer(experiment, replace(data, train=train).to(device))
    print(f"{hardware()}; {arguments.threads} threads; torch {torch.__version__}; batches of {arguments.batch_size}")

    def step(name: str, share: float) -> float:
        """Seconds of the step at this share of a training."""
        trainer = trainers[name]
        order = trainer.shuffle(1)
        start = time.perf_counter()
        trainer.step(int(share * trainer.steps), *order)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for name in trainers:
        step(name, 0.5)  # the first one allocates
    for number in range(arguments.rounds):
        for name in trainers:
            seconds[name].append(PARTS.get(name, 1) * step(name, (number + 0.5) / arguments.rounds))
    epochs = {name: sum(times) / len(times) * (IMAGES // arguments.batch_size) for name, times in seconds.items()}
    reference, reference_name = next(iter(epochs.values())), next(iter(epochs))
    print(f"{'':18} s a step  (least to most)   s an epoch  times {reference_name}   paper: s  times ibp")
    for name, epoch in epochs.items():
        times = seconds[name]
        print(
            f"{name:18} {sum(times) / len(times):8.2f}  ({min(times):6.2f} to {max(times):6.2f}) {epoch:10.0f} "
            f"{epoch / reference:9.2f} {PAPER[name]:12} {PAPER[name] / PAPER['ibp']:9.2f}"
        )
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB of memory at most")
    with LOG.open("a", newline="") as log:
        for name, epoch in epochs.items():
            row = [date.today(), hardware(), arguments.threads, torch.__version__, arguments.batch_size, name]
            csv.writer(log).writerow([*row, arguments.rounds, f"{epoch:.1f}", f"{epoch / reference:.3f}"])
    if arguments.profile:
        for name in trainers:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                step(name, 0.5)
            print(f"\n{name}\n{profile.key_averages().table(sort_by='self_cpu_time_total', row_limit=12)}")


if __name__ == "__main__":
    main()
