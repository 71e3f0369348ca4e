"""Certifying a whole test set, beside the forward pass of ordinary layers of the same shapes, in one process.

    python benchmarks/certification.py [--threads N] [--width W] [--images N] [--rounds N]

The network is the paper's for Fashion-MNIST, 5 layers of width 5120, with random weights, which take no other time than
trained ones; images are random too. Batches of 1000 go in turn through `nn.Linear` layers, the l_inf-dist net, and the
certifiers, so that all see the same machine; printed is how many times as long as the linear layers' forward pass each
one takes, and the seconds for all images.

`lipschitz` is one forward pass and a subtraction: its ratio is that of the p = inf operator to a matrix product of the
same shape, which `distance_cpu.py` explains. `interval` computes both ends of every box.
"""

import argparse
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from linflab.models.networks.linf_dist import LinfDistMLPConfig
from linflab.models.robustness.certification import certified, certified_radius
from linflab.platform.tracking import hardware

DEPTH, SHAPE, CLASSES, BATCH, EPS = 5, (1, 28, 28), 10, 1000, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--width", type=int, default=5120)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1, help="how often all images are seen")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    net = LinfDistMLPConfig(depth=DEPTH, width=arguments.width).build(SHAPE, CLASSES, (0.2860,), 0.3520).eval()
    widths = [784, *[arguments.width] * (DEPTH - 1), CLASSES]
    linear = nn.Sequential(nn.Flatten(), *(nn.Linear(*sizes) for sizes in pairwise(widths)))
    images = torch.rand(arguments.images, *SHAPE)
    labels = torch.randint(CLASSES, (arguments.images,))

    def forward(network: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], object]:
        return lambda x, y: network(x)

    ways: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
        "nn.Linear, forward": forward(linear),
        "l_inf-dist net, forward": forward(net),
        "lipschitz": lambda x, y: certified_radius(net, x, y, "lipschitz"),
        "lipschitz, sound": lambda x, y: certified_radius(net, x, y, "lipschitz", sound=True),
        "interval": lambda x, y: certified(net, x, y, EPS, "interval"),
        "interval, sound": lambda x, y: certified(net, x, y, EPS, "interval", sound=True),
    }
    print(f"{hardware()}; {arguments.threads} threads; torch {torch.__version__}; {widths}, {arguments.images} images")
    seconds = dict.fromkeys(ways, 0.0)
    with torch.no_grad():
        for way in ways.values():  # to begin with, untimed
            way(images[:BATCH], labels[:BATCH])
        for _ in range(arguments.rounds):
            for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
                for name, way in ways.items():
                    start = time.perf_counter()
                    way(x, y)
                    seconds[name] += time.perf_counter() - start
    for name, total in seconds.items():
        ratio = total / seconds["nn.Linear, forward"]
        print(f"{name:24} {ratio:6.2f}  {total / arguments.rounds:8.2f} s")


if __name__ == "__main__":
    main()
