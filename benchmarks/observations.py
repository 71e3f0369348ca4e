"""Why l_inf-dist nets are trained along a p-schedule and with mean shifts: three observations, measured.

    python benchmarks/observations.py [gradients | training | scale ...] [--dataset NAME] [--width W ...] [--steps N]

The claims are those of Zhang et al., ICML 2021, Section 4. They were measured on Fashion-MNIST, from N(0, 1) weights,
by the networks and the training step of this project, on 2 cores of an AMD Zen 4 with AVX-512.

gradients. Claim: trained at p = inf from random weights, less than 1 % of the parameters change in an epoch. Counted
are the distance weights whose gradient is not zero in at least one step of the first epoch (107 steps), with the
published recipe: depth 5, batch 512, hinge.

    width                           1024    2048    5120
    one step, %                     1.00    0.55    0.23
    at least one of 30 steps, %     2.18    1.22    0.55
    at least one of an epoch's, %   2.90    1.67       -

So it depends on the width. At 1024 and 2048 it does not hold. At 5120, the paper's, no whole epoch was measured: after
10 steps it is 0.42 %, after 30 0.55 %, and were it to grow from there as in the narrower nets, by a factor of 1.3 to
1.4, it would end at 0.7 to 0.8 %, so that it would hold.
At p = inf a distance has a gradient in one weight alone, that of its largest |x_i - w_i|. A step can reach at most
batch x outputs of a layer's outputs x inputs weights, a share of batch / inputs: the wider, the less. It reaches far
fewer, as only outputs that a distance of the next layer picked have a gradient, beginning with the 10 of the last
layer, and later steps reach mostly the same weights. At p = 8 all weights have a gradient in the first step.

training. Claim: such training fails. With depth 5, width 256 and 4 epochs of the small recipe, validation accuracy
comes to 61.1 % clean and 53.8 % certified at eps 0.1, and hardly moves after the first epoch (59.7 and 51.3); along the
p-schedule from 8 to 1000, then inf, it comes to 81.5 % and 74.3 %. So it learns something, gets stuck, and stays 20
points behind. With --learning-rate 0.01 and 0.12 (0.04 in the recipe) it comes to 47.2 and 40.1, 57.1 and 48.7.

scale. Claim: outputs are distances, never negative, so that without mean shift they grow from layer to layer. Holds. In
a random net of depth 8 and width 1024 their mean grows from 5.4 to 2619 at p = 8, by a factor of 2.4 a layer (that is
about I^(1/p) for I inputs), and from 4.3 to 29.5 at p = inf, by 3.6 a layer. With mean shift it stays at 4.2 to 4.5
and 3.5 to 3.7 from the second layer on.
"""

import argparse
import math
import time

import torch
from torch import Tensor, nn

from linflab.models.networks.linf_dist import LinfDistMLPConfig, LinfDistNet
from linflab.platform.config import Experiment, load_experiment
from linflab.platform.datasets import load_dataset
from linflab.platform.training import EpochReport, Trainer, fit

PUBLISHED, SMALL = "fashion_mnist_eps0.1_linf_dist_net", "fashion_mnist_eps0.1_linf_dist_net_cpu"
THROUGHOUT_AT_INFINITY = ("p_schedule.warmup_share=0", "p_schedule.infinity_share=1")


def experiment_of(recipe: str, arguments: argparse.Namespace, *overrides: str) -> Experiment:
    """A recipe on the data set asked for, from N(0, 1) weights."""
    common = [f"dataset={arguments.dataset}", "model.initialization=normal", f"compute.cpus_per_worker={THREADS}"]
    return load_experiment(recipe, [*common, *overrides])


def gradients(arguments: argparse.Namespace) -> None:
    """Which weights get a gradient in the first epoch, at p = inf; and in its first step, at p = 8."""
    print(f"\nDistance weights with a gradient, in % ({arguments.dataset}; layers from the first to the last)")
    print("width      p  first steps  in a step  at most  in any of them  by layer")
    for width in arguments.width:
        for p, overrides, steps in ((8.0, (), 1), (math.inf, THROUGHOUT_AT_INFINITY, arguments.steps)):
            experiment = experiment_of(PUBLISHED, arguments, f"model.width={width}", *overrides)
            trainer = Trainer(experiment, load_dataset(experiment.dataset, experiment.augmentation))
            assert trainer.scheduled(0).p == p
            count_gradients(trainer, width, p, min(steps or trainer.steps_per_epoch, trainer.steps_per_epoch))


def count_gradients(trainer: Trainer, width: int, p: float, steps: int) -> None:
    network, batch_size = trainer.network, trainer.experiment.training.batch_size
    assert isinstance(network, LinfDistNet)
    weights = [layer.weight for layer in (*network.features.distances, network.last)]
    total = sum(weight.numel() for weight in weights)
    pairs = sum(min(batch_size * len(weight), weight.numel()) for weight in weights)
    at_most = 100 if math.isfinite(p) else 100 * pairs / total
    seen = [torch.zeros_like(weight, dtype=torch.bool) for weight in weights]
    in_steps, order = 0, trainer.shuffle(1)
    for step in range(steps):
        trainer.step(step, *order)
        for weight, so_far in zip(weights, seen, strict=True):
            assert weight.grad is not None
            nonzero = weight.grad != 0
            in_steps += int(nonzero.sum())
            so_far |= nonzero
        done = step + 1
        if done in (1, 10, 30, steps):
            in_a_step, in_any = 100 * in_steps / done / total, 100 * sum(int(one.sum()) for one in seen) / total
            by_layer = " ".join(f"{100 * one.float().mean():7.3f}" for one in seen)
            print(f"{width:5} {p:6g} {done:12} {in_a_step:10.3f} {at_most:8.1f} {in_any:15.3f}  {by_layer}", flush=True)


def training(arguments: argparse.Namespace) -> None:
    """Accuracy on validation, trained at p = inf from the start and along the p-schedule."""
    print(f"\nTraining of depth {arguments.depth} and width {arguments.small_width}: validation, in % (eps = 0.1)")
    print("p                  epoch   at p     loss    clean  certified")
    for name, overrides in (("inf throughout", THROUGHOUT_AT_INFINITY), ("8 to 1000, then inf", ())):
        sizes = (f"model.depth={arguments.depth}", f"model.width={arguments.small_width}")
        epochs = f"training.epochs={arguments.epochs}"
        rate = f"optimizer.learning_rate={arguments.learning_rate}"
        experiment = experiment_of(SMALL, arguments, *sizes, epochs, rate, *overrides)

        def show(report: EpochReport, name: str = name) -> None:
            assert report.validation is not None
            clean, certified = 100 * report.validation.clean, 100 * report.validation.certified
            print(
                f"{name:19} {report.epoch:4} {report.at.p:6g} {report.train_loss:8.3f} {clean:8.2f} {certified:10.2f}",
                flush=True,
            )

        fit(experiment, load_dataset(experiment.dataset, experiment.augmentation), on_epoch=show)


def scale(arguments: argparse.Namespace) -> None:
    """Outputs of every distance layer of a random net: over all, and how far they differ between images."""
    dataset = load_dataset(arguments.dataset)
    images, _ = dataset.train.batch(torch.arange(512))
    config, facts = LinfDistMLPConfig(depth=8, width=1024, initialization="normal"), dataset.facts
    print("\nOutputs of the distance layers of a random net: mean, standard deviation, and that over images alone")
    print("    p  mean shift  layer       mean        std  std over images")
    for p in (8.0, math.inf):
        for shifted in (False, True):
            torch.manual_seed(0)
            network = config.build(facts.input_shape, facts.classes, facts.mean, facts.std)
            if not shifted:
                network.features.shifts = nn.ModuleList(nn.Identity() for _ in network.features.shifts)
            for layer, y in enumerate(outputs(network, images, p), start=1):
                figures = f"{y.mean():10.4g} {y.std():10.4g} {y.std(dim=0).mean():16.4g}"
                print(f"{p:5g}  {'with' if shifted else 'without':10}  {layer:5} {figures}")


def outputs(network: LinfDistNet, images: Tensor, p: float) -> list[Tensor]:
    seen: list[Tensor] = []
    for layer in (*network.features.distances, network.last):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        network(images, p)
    return seen


OBSERVATIONS = {"gradients": gradients, "training": training, "scale": scale}
THREADS = torch.get_num_threads()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("observations", nargs="*", help=f"of {', '.join(OBSERVATIONS)}; all by default")
    parser.add_argument("--dataset", default="fashion_mnist", help="the other settings stay those of Fashion-MNIST")
    parser.add_argument("--width", type=int, nargs="+", default=[1024, 2048], help="widths whose gradients to count")
    parser.add_argument("--steps", type=int, help="count the gradients of so many steps; default: of an epoch")
    parser.add_argument("--depth", type=int, default=5, help="of the nets trained")
    parser.add_argument("--small-width", type=int, default=256, help="of the nets trained")
    parser.add_argument("--epochs", type=int, default=4, help="that they are trained for")
    parser.add_argument("--learning-rate", type=float, default=0.04, help="that they are trained with")
    arguments = parser.parse_args()
    for unknown in set(arguments.observations) - set(OBSERVATIONS):
        parser.error(f"{unknown}: must be one of {', '.join(OBSERVATIONS)}")
    start = time.perf_counter()
    for name in arguments.observations or OBSERVATIONS:
        OBSERVATIONS[name](arguments)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
