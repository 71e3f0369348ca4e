"""Four observations that motivate the p schedule and mean shifts of l_inf-dist nets, with a figure of each.

    python examples/training_of_distance_nets.py [gradients | sparsity | training | scale ...] [--dataset NAME]
        [--width W ...] [--steps N] [--output-dir FOLDER]

The claims are from Zhang et al., ICML 2021, Section 4. They were measured on Fashion-MNIST from N(0, 1) weights, with
the networks and training step of this project, on 2 cores of an AMD Zen 4 with AVX-512.

gradients. Claim: training at p = inf from random weights changes less than 1% of the parameters in an epoch. The
measurement counts the distance weights with nonzero gradient in at least one step of the first epoch (107 steps). It
uses the published recipe: depth 5, batch size 512, hinge loss.

    width                           1024    2048    5120
    one step, %                     1.00    0.55    0.23
    at least one of 30 steps, %     2.18    1.22    0.55
    at least one of an epoch's, %   2.90    1.67       -

The result depends on the width. The claim does not hold at widths 1024 and 2048. At 5120, the width of the paper, no
whole epoch was measured: the fraction is 0.42% after 10 steps and 0.55% after 30. In the narrower nets, it grows by a
factor of 1.3 to 1.4 from step 30 to the end of the epoch. With the same growth, it would end at 0.7 to 0.8% at width
5120, and the claim would hold.

At p = inf a distance has a gradient in only one weight, that of its largest |x_i - w_i|. A step changes at most
batch x outputs of the outputs x inputs weights of a layer, a fraction of batch / inputs, which decreases with the
width. In fact it changes far fewer weights: the last layer has 10 outputs, and in each earlier layer only outputs that
determine a distance of the next layer have a gradient. Later steps change mostly the same weights. At p = 8 all weights
have a gradient in the first step.

sparsity. The gradient becomes sparse as p grows. With depth 5, width 256 and 4 epochs of the small recipe, all weights
have a gradient at p = 8, 98.7 to 99.2% at p = 32, and 2.8 to 3.0% at p = inf. The weights that hold 90% of its l_1 norm
are 5 to 8% at p = 8, 1.0 to 1.3% at p = 32, and 0.3 to 0.4% at p = inf.

training. Claim: training at p = inf fails. With depth 5, width 256 and 4 epochs of the small recipe, validation
accuracy is 43.0% clean and 36.9% certified at eps 0.1. With the recipe's p schedule, it is 82.1% and 74.9%. So training
at p = inf learns, but stays far below. Both runs use the learning rate 0.04.

scale. Claim: outputs are distances, never negative, so without mean shift they grow from layer to layer. The claim
holds. In a random net of depth 8 and width 1024, the mean output grows from 5.4 to 2619 at p = 8, by a factor of 2.4
per layer (about I^(1/p) for I inputs). At p = inf it grows from 4.3 to 29.5, an increase of 3.6 per layer. With mean
shift, from the second layer on, it stays at 4.2 to 4.5 for p = 8 and at 3.5 to 3.7 for p = inf.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from linflab.models.networks.linf_dist import LinfDistMLPConfig, LinfDistNet
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.training.fit import fit
from linflab.platform.training.loop import EpochMetrics
from linflab.platform.training.trainer import Trainer
from linflab.reports.figures import DARK, FIGURE_SIZE, LIGHT, make_axes, style_axes

PUBLISHED, SMALL = "fashion_mnist_eps0.1_linf_dist_net", "fashion_mnist_eps0.1_linf_dist_net_cpu"
ALWAYS_LINF = ("p_schedule.warmup_fraction=0", "p_schedule.inf_fraction=1")


def build_experiment(recipe: str, arguments: argparse.Namespace, *overrides: str) -> ExperimentConfig:
    """Return the config of a recipe on the selected dataset, with N(0, 1) weights."""
    common = [f"dataset={arguments.dataset}", "model.initialization=normal", f"compute.cpus_per_worker={THREADS}"]
    return load_config(recipe, [*common, *overrides])


def gradients(arguments: argparse.Namespace) -> Figure:
    """Count the weights with a gradient in the first epoch at p = inf, and in the first step at p = 8."""
    figure, axes = make_axes(f"{arguments.dataset}, first epoch at p = inf")
    print(f"\nDistance weights with a gradient, in % ({arguments.dataset}; layers from the first to the last)")
    print("width      p  first steps   per step  at most     in any step  by layer")
    for width in arguments.width:
        for p, overrides, steps in ((8.0, (), 1), (math.inf, ALWAYS_LINF, arguments.steps)):
            experiment = build_experiment(PUBLISHED, arguments, f"model.width={width}", *overrides)
            trainer = Trainer(experiment, load_dataset(experiment.dataset, experiment.augmentation))
            assert trainer.scheduled_values(0).p == p
            curve = count_gradients(trainer, width, p, min(steps or trainer.steps_per_epoch, trainer.steps_per_epoch))
            if math.isinf(p):
                style = LINES[arguments.width.index(width) % len(LINES)]
                axes.plot(range(1, len(curve) + 1), curve, style, color=DARK, lw=1.3, label=f"width {width}")
    axes.set(xlabel="step", ylabel="weights with a gradient so far (%)", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    return figure


def distance_weights(trainer: Trainer) -> list[nn.Parameter]:
    """Return the weights of all distance layers, from the first to the last."""
    network = trainer.network
    assert isinstance(network, LinfDistNet)
    return [layer.weight for layer in (*network.features.distances, network.last)]


def count_gradients(trainer: Trainer, width: int, p: float, steps: int) -> list[float]:
    """Print and return the percentage of weights with a nonzero gradient in any of the first steps."""
    weights, batch_size = distance_weights(trainer), trainer.experiment.training.batch_size
    total = sum(weight.numel() for weight in weights)
    pairs = sum(min(batch_size * len(weight), weight.numel()) for weight in weights)
    max_percent = 100 if math.isfinite(p) else 100 * pairs / total
    had_gradient = [torch.zeros_like(weight, dtype=torch.bool) for weight in weights]
    num_nonzero, order, curve = 0, trainer.epoch_order(1), []
    for step in range(steps):
        trainer.step(step, *order)
        for weight, had_gradient_in_layer in zip(weights, had_gradient, strict=True):
            assert weight.grad is not None
            nonzero = weight.grad != 0
            num_nonzero += int(nonzero.sum())
            had_gradient_in_layer |= nonzero
        num_steps = step + 1
        curve.append(100 * sum(int(one.sum()) for one in had_gradient) / total)
        if num_steps in (1, 10, 30, steps):
            percent_per_step, percent_of_any_step = 100 * num_nonzero / num_steps / total, curve[-1]
            by_layer = " ".join(f"{100 * one.float().mean():7.3f}" for one in had_gradient)
            print(
                f"{width:5} {p:6g} {num_steps:12} {percent_per_step:10.3f} {max_percent:8.1f} "
                f"{percent_of_any_step:15.3f}  {by_layer}",
                flush=True,
            )
    return curve


def sparsity(arguments: argparse.Namespace) -> Figure:
    """Print, over the p schedule, the share of weights with a gradient, and of those that hold most of it."""
    experiment = build_small_experiment(arguments)
    trainer = Trainer(experiment, load_dataset(experiment.dataset, experiment.augmentation))
    every = max(1, trainer.steps // arguments.points)
    print(f"\nWeights with a nonzero gradient, and weights that hold {MASS:.0%} of its l_1 norm, in %")
    print("step      p  nonzero    mass")
    rows = []
    for epoch in range(1, arguments.epochs + 1):
        order = trainer.epoch_order(epoch)
        for step in range((epoch - 1) * trainer.steps_per_epoch, epoch * trainer.steps_per_epoch):
            trainer.step(step, *order)
            if step % every == 0 or step == trainer.steps - 1:
                rows.append((step, trainer.scheduled_values(step).p, *gradient_shares(distance_weights(trainer))))
                print("{:4} {:6.4g} {:8.3f} {:7.3f}".format(*rows[-1]), flush=True)
    figure, axes = make_axes(f"{arguments.dataset}, depth {arguments.depth}, width {arguments.small_width}")
    steps, p, nonzero, mass = zip(*rows, strict=True)
    axes.plot(steps, nonzero, color=DARK, lw=1.3, label="nonzero gradient")
    axes.plot(steps, mass, "--", color=DARK, lw=1.3, label=f"{MASS:.0%} of the l_1 norm")
    first = next((at for at, exponent in zip(steps, p, strict=True) if math.isinf(exponent)), None)
    if first is not None:
        axes.axvspan(first, steps[-1], color="0.92", zorder=0)
    axes.set(xlabel=f"step (p from {p[0]:g} to {max(filter(math.isfinite, p)):.0f}, then inf in gray)", yscale="log")
    axes.set_ylabel("weights (%)")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def gradient_shares(weights: Sequence[nn.Parameter]) -> tuple[float, float]:
    """Return the percentage of weights with a nonzero gradient, and of the largest that hold `MASS` of its l_1 norm."""
    sizes = torch.cat([weight.grad.abs().flatten() for weight in weights if weight.grad is not None])
    sums = sizes.sort(descending=True).values.double().cumsum(dim=0)
    return 100 * float((sizes != 0).double().mean()), 100 * int((sums < MASS * sums[-1]).sum() + 1) / len(sums)


def build_small_experiment(arguments: argparse.Namespace, *overrides: str) -> ExperimentConfig:
    """Return the config of the small recipe with the depth, width and epochs of the arguments."""
    sizes = (f"model.depth={arguments.depth}", f"model.width={arguments.small_width}")
    epochs = f"training.epochs={arguments.epochs}"
    rate = f"optimizer.learning_rate={arguments.learning_rate}"
    return build_experiment(SMALL, arguments, *sizes, epochs, rate, *overrides)


def training(arguments: argparse.Namespace) -> Figure:
    """Print validation accuracy of training at p = inf throughout, and with the p schedule."""
    figure, axes = make_axes(f"{arguments.dataset}, depth {arguments.depth}, width {arguments.small_width}")
    print(f"\nTraining of depth {arguments.depth} and width {arguments.small_width}: validation, in % (eps = 0.1)")
    print("p                  epoch   at p     loss    clean  certified")
    for name, overrides, color in (("inf throughout", ALWAYS_LINF, LIGHT), ("schedule, then inf", (), DARK)):
        experiment = build_small_experiment(arguments, *overrides)
        curve: list[tuple[float, float]] = []

        def show(report: EpochMetrics, name: str = name, curve: list[tuple[float, float]] = curve) -> None:
            assert report.validation is not None
            clean, certified = 100 * report.validation.clean, 100 * report.validation.certified
            curve.append((clean, certified))
            print(
                f"{name:19} {report.epoch:4} {report.at.p:6g} {report.train_loss:8.3f} {clean:8.2f} {certified:10.2f}",
                flush=True,
            )

        fit(experiment, load_dataset(experiment.dataset, experiment.augmentation), on_epoch=show)
        for values, style, metric in zip(zip(*curve, strict=True), ("o-", "s--"), ("clean", "certified"), strict=True):
            label = f"p {name}: {metric}"
            axes.plot(range(1, len(values) + 1), values, style, color=color, ms=4, lw=1.3, label=label)
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 100), xticks=range(1, arguments.epochs + 1))
    axes.legend(frameon=False, fontsize=7, loc="lower right")
    return figure


def scale(arguments: argparse.Namespace) -> Figure:
    """Print statistics of the outputs of every distance layer of a random net."""
    figure = Figure(figsize=(1.7 * FIGURE_SIZE[0], FIGURE_SIZE[1]), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2)
    dataset = load_dataset(arguments.dataset)
    images, _ = dataset.train.batch(torch.arange(512))
    config, info = LinfDistMLPConfig(depth=8, width=1024, initialization="normal"), dataset.info
    print("\nOutputs of the distance layers of a random net: mean, std over all values, mean std over images")
    print("    p  mean shift  layer       mean        std  std over images")
    for p, axes in zip((8.0, math.inf), panels, strict=True):
        style_axes(axes)
        for with_shift in (False, True):
            torch.manual_seed(0)
            network = config.build(info.input_shape, info.classes, info.mean, info.std)
            if not with_shift:
                network.features.shifts = nn.ModuleList(nn.Identity() for _ in network.features.shifts)
            means, name = [], "with" if with_shift else "without"
            for layer, y in enumerate(outputs(network, images, p), start=1):
                means.append(y.mean().item())
                print(f"{p:5g}  {name:10}  {layer:5} {means[-1]:10.4g} {y.std():10.4g} {y.std(dim=0).mean():16.4g}")
            style = "o-" if with_shift else "s--"
            axes.plot(range(1, len(means) + 1), means, style, color=DARK, ms=4, lw=1.3, label=f"{name} mean shift")
        axes.set_title(f"random net, p = {p:g}", fontsize=9)
        axes.set(xlabel="layer", ylabel="mean output", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def outputs(network: LinfDistNet, images: Tensor, p: float) -> list[Tensor]:
    """Return the outputs of every distance layer."""
    outputs_by_layer: list[Tensor] = []
    for layer in (*network.features.distances, network.last):
        layer.register_forward_hook(lambda module, inputs, output: outputs_by_layer.append(output))
    with torch.no_grad():
        network(images, p)
    return outputs_by_layer


OBSERVATIONS = {"gradients": gradients, "sparsity": sparsity, "training": training, "scale": scale}
LINES = ("-", "--", ":", "-.")
MASS = 0.9  # part of the l_1 norm of the gradient
THREADS = torch.get_num_threads()


def main() -> None:
    """Run the selected measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("observations", nargs="*", help=f"Any of {', '.join(OBSERVATIONS)} (default: all)")
    parser.add_argument("--dataset", default="fashion_mnist", help="Dataset; other settings remain for Fashion-MNIST")
    parser.add_argument("--width", type=int, nargs="+", default=[1024, 2048], help="Widths for gradients")
    parser.add_argument("--steps", type=int, help="Number of steps for gradients (default: one epoch)")
    parser.add_argument("--depth", type=int, default=5, help="Depth of the nets for training and sparsity")
    parser.add_argument("--small-width", type=int, default=256, help="Width of the nets for training and sparsity")
    parser.add_argument("--epochs", type=int, default=4, help="Epochs for training and sparsity")
    parser.add_argument("--learning-rate", type=float, default=0.04, help="Learning rate for both")
    parser.add_argument("--points", type=int, default=60, help="Steps that sparsity prints")
    parser.add_argument("--output-dir", type=Path, help="Folder for a figure of each observation, as SVG")
    arguments = parser.parse_args()
    for unknown in set(arguments.observations) - set(OBSERVATIONS):
        parser.error(f"{unknown}: must be one of {', '.join(OBSERVATIONS)}")
    start = time.perf_counter()
    for name in arguments.observations or OBSERVATIONS:
        figure = OBSERVATIONS[name](arguments)
        if arguments.output_dir is not None:
            arguments.output_dir.mkdir(parents=True, exist_ok=True)
            figure.savefig(arguments.output_dir / f"training_{name}.svg", metadata={"Date": None})
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
