"""The training loop. It knows no Ray: under torch.distributed it is one worker of several, else the only one."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from linflab.platform.config import Experiment
from linflab.platform.datasets import Dataset, Split
from linflab.platform.errors import SettingError, TrainingError
from linflab.platform.evaluation import Accuracy, evaluate
from linflab.platform.schedules import cosine_after, exponential


@dataclass(frozen=True)
class EpochReport:
    """What one epoch came to; p, learning rate and lambda are those of its last step."""

    epoch: int  # from 1
    p: float
    learning_rate: float
    cross_entropy_weight: float
    train_loss: float
    validation: Accuracy
    best_certified: float  # the best certified accuracy on validation up to here: that of the network kept
    seconds: float


@dataclass(frozen=True)
class StepReport:
    step: int  # from 1
    steps: int  # of the whole run
    p: float


@dataclass(frozen=True)
class Trained:
    """The network as it was after its best epoch by certified accuracy on validation (the latest among equals)."""

    network: nn.Module
    epoch: int
    validation: Accuracy


class _Loss(nn.Module):
    """Network and objective as one module, so that DistributedDataParallel averages the gradients of both."""

    def __init__(self, network: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.objective = objective

    def forward(self, images: Tensor, labels: Tensor, p: float, cross_entropy_weight: float) -> Tensor:
        return self.objective(self.network(images, p), labels, cross_entropy_weight)


def check_fits(experiment: Experiment, dataset: Dataset) -> None:
    """Check what the settings ask of the data.

    Raises:
        SettingError: a batch is larger than the training set.
    """
    if experiment.training.batch_size > len(dataset.train):
        raise SettingError(
            f"training.batch_size={experiment.training.batch_size}: {dataset.name} has {len(dataset.train)} "
            "training images; a batch can hold no more"
        )


def fit(
    experiment: Experiment,
    dataset: Dataset,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> Trained:
    """Train the experiment's network on the device of the data set.

    Same experiment, machine and number of workers: the same bits. Every worker holds the same network throughout.

    Raises:
        SettingError: see `check_fits`.
        TrainingError: the loss is not finite.
    """
    check_fits(experiment, dataset)
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batch_size, epochs = experiment.training.batch_size, experiment.training.epochs
    steps_per_epoch = len(dataset.train) // batch_size
    torch.set_num_threads(experiment.compute.cpus_per_worker)
    torch.manual_seed(experiment.seed)

    facts, device = dataset.facts, dataset.train.images.device
    network = experiment.model.build(facts.input_shape, facts.classes, facts.mean, facts.std)
    objective = experiment.objective.build(network.lipschitz_constant)
    loss_of = _Loss(network, objective).to(device)
    optimizer = torch.optim.Adam(
        [
            {"params": list(network.parameters()), "ratio": 1.0},
            {"params": list(objective.parameters()), "ratio": experiment.optimizer.objective_rate_ratio},
        ],
        betas=experiment.optimizer.betas,
        eps=experiment.optimizer.epsilon,
        foreach=False,  # one parameter at a time: the multi-tensor form needs memory for copies of all of them
    )
    parallel = DistributedDataParallel(loss_of, broadcast_buffers=False) if workers > 1 else loss_of

    best: Trained | None = None
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        order, draws = (t.to(device) for t in _epoch(experiment.seed, epoch, dataset.train))
        losses = torch.zeros((), device=device)
        for batch in range(steps_per_epoch):
            step = (epoch - 1) * steps_per_epoch + batch
            progress = step / (epochs * steps_per_epoch)
            p = experiment.p_schedule.at(progress)
            weight = _cross_entropy_weight(experiment, progress)
            rate = experiment.optimizer.learning_rate * cosine_after(experiment.optimizer.hold_share, progress)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["ratio"]
            # a worker takes every workers-th sample of the batch, so that together they take all of it
            mine = slice(batch * batch_size + rank, (batch + 1) * batch_size, workers)
            images, labels = dataset.train.batch(order[mine], draws[mine])
            loss = parallel(images, labels, p, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += loss.detach()
            on_step(StepReport(step + 1, epochs * steps_per_epoch, p))
        if workers > 1:
            dist.all_reduce(losses)
        train_loss = losses.item() / (steps_per_epoch * workers)
        if not math.isfinite(train_loss):
            raise TrainingError(
                f"the loss became {train_loss} in epoch {epoch} of {epochs} (p = {p:g}); "
                f"try a smaller optimizer.learning_rate than {experiment.optimizer.learning_rate:g}"
            )
        validation = evaluate(network, dataset.validation, experiment.eps, experiment.evaluation.batch_size)
        if best is None or validation.certified >= best.validation.certified:
            best = Trained(copy.deepcopy(network).eval(), epoch, validation)
        seconds = time.perf_counter() - start
        on_epoch(EpochReport(epoch, p, rate, weight, train_loss, validation, best.validation.certified, seconds))
    assert best is not None  # there is at least one epoch
    return best


def _cross_entropy_weight(experiment: Experiment, progress: float) -> float:
    """Lambda, which falls exponentially while p grows; 0 for objectives without one."""
    objective = experiment.objective
    if objective.kind != "clipped_hinge_cross_entropy":
        return 0.0
    return exponential(objective.lambda_start, objective.lambda_end, experiment.p_schedule.growth(progress))


def _epoch(seed: int, epoch: int, split: Split) -> tuple[Tensor, Tensor]:
    """Order of the training samples, and their augmentation: of seed and epoch alone, the same for every worker."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(len(split), generator=generator), split.draws(generator)
