"""Twenty steps of the published recipes in float64, compared with a transcription of the published training.

The transcription is separate code in plain PyTorch. It shares only initial parameters, batches and SortNet's random
input masks with linflab. Sources: Zhang et al., ICML 2021 (v1), ICLR 2022 (v2) and NeurIPS 2022 (SortNet), and the
authors' published training scripts.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from linflab.models.networks.sort_net import sample_masks
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.training import trainer as training
from linflab.platform.training.trainer import Trainer

pytestmark = pytest.mark.integration

STEPS, BATCH, GROUP = 20, 60, 32  # the second group of a batch has 28 samples
CLASSES = 10
MEAN, STD = torch.tensor([0.3053, 0.3761]).double().tolist()  # of digits, rounded to float32 as in networks
SMALL = ["dataset=digits", "augmentation.padding=0", f"training.batch_size={BATCH}", "training.epochs=1"]


@dataclass
class Published:
    """A published training: settings, parameters by their names in linflab, and state of Adam."""

    parameters: dict[str, Tensor]
    depth: int  # distance layers, including the last one of a net
    rate: float
    p_warmup: float
    p_infinity: float
    rate_hold: float = 0.0
    scalar_rate_ratio: float = 1.0
    distance_decay: float = 0.0  # l_p decay of weights, usual decay of biases
    other_decay: float = 0.0
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def p(self, progress: float) -> float:
        if progress >= 1 - self.p_infinity:
            return math.inf
        return 8 * (1000 / 8) ** self.p_growth(progress)

    def p_growth(self, progress: float) -> float:
        return min(max((progress - self.p_warmup) / (1 - self.p_infinity - self.p_warmup), 0), 1)

    def learning_rate(self, progress: float) -> float:
        cosine_progress = max((progress - self.rate_hold) / (1 - self.rate_hold), 0)
        return self.rate / 2 * (1 + math.cos(math.pi * cosine_progress))

    def is_distance(self, name: str) -> bool:
        return name.startswith(("features.distances", "last", "bias"))

    def decay(self, name: str, p: float, rate: float) -> None:
        value = self.parameters[name]
        if not self.is_distance(name):
            value.mul_(1 - rate * self.other_decay)
        elif value.dim() == 1 or not self.distance_decay:
            value.mul_(1 - rate * self.distance_decay)
        else:
            for row in value:
                if math.isinf(p):
                    row[row.abs().argmax()] *= 1 - rate * self.distance_decay
                else:
                    share = row.abs() / norms(row, p)
                    row -= rate * self.distance_decay * share ** (p - 2) * row

    def update(self, gradients: dict[str, Tensor], step: int) -> None:
        """Apply decay, then Adam, as both optimizers of the authors do."""
        p, rate = self.p(step / STEPS), self.learning_rate(step / STEPS)
        for name, gradient in gradients.items():
            scaled_rate = rate * (self.scalar_rate_ratio if name == "scale" else 1)
            self.decay(name, p, scaled_rate)
            first, second = self.moments.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
            first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
            self.moments[name] = first, second
            corrected = second / (1 - 0.99 ** (step + 1))
            self.parameters[name] -= scaled_rate * first / (1 - 0.9 ** (step + 1)) / (corrected.sqrt() + 1e-10)


def norms(differences: Tensor, p: float) -> Tensor:
    """Return l_p norms along the last dimension, computed from terms divided by the largest one."""
    largest = differences.abs().amax(dim=-1)
    if math.isinf(p):
        return largest
    return largest * ((differences.abs() / largest[..., None]) ** p).sum(dim=-1) ** (1 / p)


def expand_mask(mask: Tensor) -> Tensor:
    return torch.stack([mask[sample // GROUP] for sample in range(BATCH)])


def features(parameters: dict[str, Tensor], layers: int, images: Tensor, p: float, masks: list[Tensor]) -> Tensor:
    """Return features of the hidden distance layers; `masks` (G, I) are for SortNet's layers after the first."""
    x = ((images - MEAN) / STD).flatten(1)
    for k in range(layers):
        differences = x[:, None, :] - parameters[f"features.distances.{k}.weight"]
        if masks and k > 0:
            differences = differences * expand_mask(masks[k - 1])[:, None, :]
        y = norms(differences, p)
        if len(masks) > k:  # mean over the samples whose next layer has the feature as input
            is_input = expand_mask(masks[k])
            means = [
                y[is_input[:, f], f].mean() if is_input[:, f].any() else y.new_zeros(()) for f in range(y.shape[1])
            ]
            x = y - torch.stack(means)
        else:
            x = y - y.mean(dim=0)
    return x


def net_logits(parameters: dict[str, Tensor], depth: int, images: Tensor, p: float, masks: list[Tensor]) -> Tensor:
    x = features(parameters, depth - 1, images, p, masks)
    differences = x[:, None, :] - parameters["last.weight"]
    if masks:
        differences = differences * expand_mask(masks[-1])[:, None, :]
    return -(norms(differences, p) + parameters["bias"])


def hybrid_bounds(parameters: dict[str, Tensor], x: Tensor, radius: float, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits of features x, and worst-case logit differences (0 at the label) for changes up to the radius."""
    first, last = (parameters[f"head.{k}.weight"] / math.sqrt(parameters[f"head.{k}.weight"].shape[1]) for k in (0, 2))
    bias, bias_last = parameters["head.0.bias"], parameters["head.2.bias"]
    spread = radius * first.abs().sum(dim=1)
    low, high = torch.tanh(x @ first.T + bias - spread), torch.tanh(x @ first.T + bias + spread)
    rows, shifts = last - last[labels][:, None, :], bias_last - bias_last[labels][:, None]
    worst = (rows.clamp(min=0) * high[:, None] + rows.clamp(max=0) * low[:, None]).sum(dim=2) + shifts
    return torch.tanh(x @ first.T + bias) @ last.T + bias_last, worst


def logit_differences(logits: Tensor, labels: Tensor) -> Tensor:
    """Return z_j - z_y (B, K - 1) of the wrong classes."""
    others = [[j for j in range(CLASSES) if j != label] for label in labels.tolist()]
    return logits.gather(1, torch.tensor(others)) - logits.gather(1, labels[:, None])


def v1_net(run: Published, images: Tensor, labels: Tensor, step: int, masks: list[Tensor]) -> Tensor:
    excess = (
        logit_differences(net_logits(run.parameters, run.depth, images, run.p(step / STEPS), masks), labels)
        + 2 * 0.45 / STD
    )
    hinge = excess.clamp(min=0)
    return (0.75 * hinge.amax(dim=1) + 0.25 * hinge.sum(dim=1) / CLASSES).mean()


def v1_hybrid(run: Published, images: Tensor, labels: Tensor, step: int, masks: list[Tensor]) -> Tensor:
    eps = 0.35 * min(step / STEPS / 0.125, 1)  # ramped over 50 of 400 epochs
    x = features(run.parameters, run.depth, images, run.p(step / STEPS), masks)
    logits, worst = hybrid_bounds(run.parameters, x, eps / STD, labels)
    return 0.5 * cross_entropy(worst, labels) + 0.5 * cross_entropy(logits, labels)


def clipped_loss(run: Published, logits: Tensor, labels: Tensor, step: int, lambdas: tuple[float, float]) -> Tensor:
    threshold = 2 * 0.45 / STD
    hinge = ((logit_differences(logits, labels).amax(dim=1) + threshold) / threshold).clamp(0, 1).mean()
    weight = lambdas[0] * (lambdas[1] / lambdas[0]) ** run.p_growth(step / STEPS)
    return hinge + weight * cross_entropy(run.parameters["scale"] * logits, labels)


def v2_net(run: Published, images: Tensor, labels: Tensor, step: int, masks: list[Tensor]) -> Tensor:
    logits = net_logits(run.parameters, run.depth, images, run.p(step / STEPS), masks)
    return clipped_loss(run, logits, labels, step, (0.05, 0.0002))


def sort_net(run: Published, images: Tensor, labels: Tensor, step: int, masks: list[Tensor]) -> Tensor:
    logits = net_logits(run.parameters, run.depth, images, run.p(step / STEPS), masks)
    return clipped_loss(run, logits, labels, step, (0.02, 0.0002))


def sort_net_hybrid(run: Published, images: Tensor, labels: Tensor, step: int, masks: list[Tensor]) -> Tensor:
    # The ramp takes 500 of 1000 or 3000 epochs: quartic for a fraction of 0.4, then linear.
    ramp = 0.5 if run.p_warmup == 0.1 else 1 / 6
    progress = min(step / STEPS / ramp, 1)
    factor = 1 / ((4 - 3 * 0.4) * 0.4**3)
    grown = factor * progress**4 if progress < 0.4 else (1 - factor * 0.4**4) / 0.6 * (progress - 1) + 1
    x = features(run.parameters, run.depth, images, run.p(step / STEPS), masks)
    logits, worst = hybrid_bounds(run.parameters, x, 0.00431 * grown / STD, labels)
    is_correct = logit_differences(logits, labels).amax(dim=1) < 0
    hinge = is_correct * (logit_differences(worst, labels).amax(dim=1) + 1).clamp(min=0)
    weight = 0.01 ** run.p_growth(step / STEPS)
    return hinge.mean() + weight * cross_entropy(run.parameters["scale"] * logits, labels)


NET = ["model.depth=3", "model.width=24"]
HYBRID = ["model.backbone.depth=3", "model.backbone.width=24", "model.hidden_size=12"]
V1 = {"rate": 0.02, "p_warmup": 0.125, "p_infinity": 0.125, "rate_hold": 0.125}
V1 |= {"distance_decay": 0.005, "other_decay": 0.005}
SORT_NET = {"rate": 0.02, "p_warmup": 1 / 15, "p_infinity": 1 / 30, "other_decay": 0.02}
CASES = {  # recipe, its settings here, loss, distance layers, settings of the transcription
    "v1 Net": ("mnist_eps0.3_linf_dist_net", NET, v1_net, 3, V1),
    "v1 Net+MLP": ("mnist_eps0.3_linf_dist_hybrid", HYBRID, v1_hybrid, 2, V1),
    "v2 Net": (
        "mnist_eps0.3_linf_dist_net_v2",
        NET,
        v2_net,
        3,
        {"rate": 0.03, "p_warmup": 1 / 18, "p_infinity": 1 / 9, "scalar_rate_ratio": 0.2},
    ),
    "SortNet": ("mnist_eps0.3_sort_net", NET, sort_net, 3, SORT_NET),
    "SortNet+MLP": (
        "tiny_imagenet_eps1_255_sort_net_hybrid",
        [*HYBRID, "augmentation.horizontal_flip=false"],
        sort_net_hybrid,
        2,
        {**SORT_NET, "p_warmup": 0.1, "p_infinity": 0.02},
    ),
}


@pytest.mark.parametrize("method", CASES)
def test_steps_follow_the_published_training(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, settings, loss_function, depth, published = CASES[method]
    trainer = Trainer(load_config(recipe, [*SMALL, *settings]), load_dataset("digits"), dtype=torch.float64)
    assert trainer.steps == STEPS
    named = {
        name.removeprefix("network.").removeprefix("objective."): p
        for name, p in trainer.loss_module.named_parameters()
    }
    transcribed = Published({name: p.detach().clone() for name, p in named.items()}, depth, **published)
    drawn_masks = []

    def draw(*arguments: object) -> object:
        drawn_masks.append(sample_masks(*arguments))
        return drawn_masks[-1]

    monkeypatch.setattr(training, "sample_masks", draw)
    order, draws = trainer.epoch_order(1)
    for step in range(STEPS):
        batch = slice(step * BATCH, (step + 1) * BATCH)
        images, labels = trainer.train.batch(order[batch], draws[batch])
        loss = trainer.step(step, order, draws)
        for parameter in transcribed.parameters.values():
            parameter.requires_grad_()
        expected = loss_function(
            transcribed, images.double(), labels, step, drawn_masks[-1].masks if drawn_masks[-1] else []
        )
        gradients = torch.autograd.grad(expected, list(transcribed.parameters.values()))
        assert abs(loss.item() - expected.item()) < 1e-8
        with torch.no_grad():
            for parameter in transcribed.parameters.values():
                parameter.requires_grad_(False)
            transcribed.update(dict(zip(transcribed.parameters, gradients, strict=True)), step)
    for name, parameter in named.items():
        assert parameter.dtype == torch.float64
        assert (parameter - transcribed.parameters[name]).abs().max() < 1e-8, name
