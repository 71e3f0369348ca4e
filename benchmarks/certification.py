"""Certification time of a whole test set, relative to a forward pass of linear layers.

    python benchmarks/certification.py [--threads N] [--width W] [--images N] [--rounds N]

The network is the l_inf-dist net for Fashion-MNIST of Zhang et al. (ICML 2021), 5 layers of width 5120. Weights and
images are random; trained weights take the same time. Batches of 1000 are processed alternately by `nn.Linear` layers,
the l_inf-dist net and the certifiers, so that other load on the machine slows all of them equally. The output is the
ratio of each time to that of the linear layers' forward pass, and the seconds for all images.

`lipschitz` is one forward pass and a subtraction. Like the ratios of `distance_cpu.py`, its ratio compares the p = inf
operator with a matrix product of the same shape. `ibp` computes the lower and upper bounds of every box.
"""

import argparse
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from linflab.models.networks.linf_dist import LinfDistMLPConfig
from linflab.models.robustness.certification import certified_radius, certify
from linflab.platform.host import describe_hardware

DEPTH, SHAPE, CLASSES, BATCH, EPS = 5, (1, 28, 28), 10, 1000, 0.1


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--width", type=int, default=5120)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1, help="Number of passes over all images")
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

    functions: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
        "nn.Linear, forward": forward(linear),
        "l_inf-dist net, forward": forward(net),
        "lipschitz": lambda x, y: certified_radius(net, x, y, "lipschitz", sound=False),
        "lipschitz, sound": lambda x, y: certified_radius(net, x, y, "lipschitz"),
        "ibp": lambda x, y: certify(net, x, y, EPS, "ibp", sound=False),
        "ibp, sound": lambda x, y: certify(net, x, y, EPS, "ibp"),
    }
    print(
        f"{describe_hardware()}; {arguments.threads} threads; torch {torch.__version__}; {widths}, "
        f"{arguments.images} images"
    )
    seconds = dict.fromkeys(functions, 0.0)
    with torch.no_grad():
        for function in functions.values():  # untimed warm-up
            function(images[:BATCH], labels[:BATCH])
        for _ in range(arguments.rounds):
            for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
                for name, function in functions.items():
                    start = time.perf_counter()
                    function(x, y)
                    seconds[name] += time.perf_counter() - start
    for name, total in seconds.items():
        ratio = total / seconds["nn.Linear, forward"]
        print(f"{name:24} {ratio:6.2f}  {total / arguments.rounds:8.2f} s")


if __name__ == "__main__":
    main()
