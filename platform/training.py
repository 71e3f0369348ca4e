"""The training loop. It knows no Ray: under torch.distributed it is one worker of several, else the only one."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from linflab.models.networks.layers import LpDistance
from linflab.platform.checkpoints import Checkpoints
from linflab.platform.config import Experiment
from linflab.platform.datasets import Dataset, Split
from linflab.platform.errors import Interrupted, SettingError, TrainingError
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
    """The network as it was after its best epoch by certified accuracy on validation (the latest among equals).

    `seconds` are those of the whole training up to where this was made.
    """

    network: nn.Module
    epoch: int
    validation: Accuracy
    seconds: float


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
    checkpoints: Checkpoints | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train the experiment's network on the device of the data set.

    Same experiment, machine and number of workers: the same bits, also where the training was cut and goes on from its
    `checkpoints`. Every worker holds the same network throughout. Where `should_stop` says so, at the end of a step, a
    checkpoint is written and training ends.

    Raises:
        SettingError: see `check_fits`; or the checkpoint can't be read, or is of another experiment.
        TrainingError: the loss is not finite.
        Interrupted: `should_stop` said so.
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
    decayed = experiment.optimizer.lp_weight_decay > 0
    distances = [layer for layer in network.modules() if decayed and isinstance(layer, LpDistance)]
    at = _Position(epoch=1, batch=0, seconds=0.0, earlier=0.0, losses=torch.zeros((), device=device), best=None)
    if checkpoints is not None and checkpoints.exist():
        at = _restore(checkpoints.load(), experiment, loss_of, optimizer)
    parallel = DistributedDataParallel(loss_of, broadcast_buffers=False) if workers > 1 else loss_of

    def save() -> None:
        if checkpoints is not None and rank == 0:
            checkpoints.save(_state(at, experiment, loss_of, optimizer))

    while at.epoch <= epochs:
        start = time.perf_counter() - at.seconds
        order, draws = (t.to(device) for t in _epoch(experiment.seed, at.epoch, dataset.train))
        while at.batch < steps_per_epoch:
            step = (at.epoch - 1) * steps_per_epoch + at.batch
            p, rate, weight = _scheduled(experiment, step / (epochs * steps_per_epoch))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["ratio"]
            # a worker takes every workers-th sample of the batch, so that together they take all of it
            mine = slice(at.batch * batch_size + rank, (at.batch + 1) * batch_size, workers)
            images, labels = dataset.train.batch(order[mine], draws[mine])
            loss = parallel(images, labels, p, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for layer in distances:
                layer.decay(p, rate * experiment.optimizer.lp_weight_decay)
            at.losses += loss.detach()
            at.batch += 1
            at.seconds = time.perf_counter() - start
            on_step(StepReport(step + 1, epochs * steps_per_epoch, p))
            if should_stop():
                save()
                raise Interrupted(f"stopped after step {step + 1} of {epochs * steps_per_epoch}")
        p, rate, weight = _scheduled(experiment, (at.epoch * steps_per_epoch - 1) / (epochs * steps_per_epoch))
        losses = at.losses.clone()
        if workers > 1:
            dist.all_reduce(losses)
        train_loss = losses.item() / (steps_per_epoch * workers)
        if not math.isfinite(train_loss):
            raise TrainingError(
                f"the loss became {train_loss} in epoch {at.epoch} of {epochs} (p = {p:g}); "
                f"try a smaller optimizer.learning_rate than {experiment.optimizer.learning_rate:g}"
            )
        validation = evaluate(network, dataset.validation, experiment.eps, experiment.evaluation.batch_size)
        if at.best is None or validation.certified >= at.best.validation.certified:
            at.best = Trained(copy.deepcopy(network).eval(), at.epoch, validation, at.earlier + at.seconds)
        seconds = time.perf_counter() - start
        on_epoch(EpochReport(at.epoch, p, rate, weight, train_loss, validation, at.best.validation.certified, seconds))
        at.earlier += seconds
        at.epoch, at.batch, at.seconds, at.losses = at.epoch + 1, 0, 0.0, torch.zeros((), device=device)
        if at.epoch <= epochs and (at.epoch - 1) % experiment.training.checkpoint_epochs == 0:
            save()
    assert at.best is not None  # there is at least one epoch
    return dataclasses.replace(at.best, seconds=at.earlier)


@dataclass
class _Position:
    """Where a training is: the epoch, its next batch, its losses and seconds so far, and the best network yet."""

    epoch: int
    batch: int
    seconds: float
    earlier: float  # seconds of the epochs before
    losses: Tensor
    best: Trained | None


def _state(
    at: _Position, experiment: Experiment, loss_of: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """All that training goes on from, as tensors and plain data."""
    best = None
    if at.best is not None:
        validation = dataclasses.asdict(at.best.validation)
        network = at.best.network.state_dict()
        best = {"epoch": at.best.epoch, "validation": validation, "network": network, "seconds": at.best.seconds}
    return {
        "experiment": experiment.to_yaml(),
        "epoch": at.epoch,
        "batch": at.batch,
        "seconds": at.seconds,
        "earlier": at.earlier,
        "losses": at.losses,
        "best": best,
        "loss": loss_of.state_dict(),
        "optimizer": optimizer.state_dict(),
    }


def _restore(
    state: dict[str, Any], experiment: Experiment, loss_of: "_Loss", optimizer: torch.optim.Optimizer
) -> _Position:
    """Bring network, objective and optimizer to where a checkpoint left them.

    Raises:
        SettingError: the checkpoint is of another experiment; names a setting that differs.
    """
    _check_same(state["experiment"], experiment)
    loss_of.load_state_dict(state["loss"])
    optimizer.load_state_dict(state["optimizer"])
    best = None
    if state["best"] is not None:
        network = copy.deepcopy(loss_of.network).eval()
        network.load_state_dict(state["best"]["network"])
        epoch, seconds = state["best"]["epoch"], state["best"]["seconds"]
        best = Trained(network, epoch, Accuracy(**state["best"]["validation"]), seconds)
    losses = state["losses"].to(next(loss_of.parameters()).device)
    return _Position(state["epoch"], state["batch"], state["seconds"], state["earlier"], losses, best)


def _check_same(written: str, experiment: Experiment) -> None:
    """Check that a checkpoint's experiment, in YAML, is this one.

    Raises:
        SettingError: it is not; names the first setting that differs.
    """
    then = Experiment.model_validate(yaml.safe_load(written)).settings()
    for name, value in experiment.settings().items():
        if then.get(name) != value:
            raise SettingError(f"{name}={value}: the checkpoint was made with {name}={then.get(name)}; use that value")


def _scheduled(experiment: Experiment, progress: float) -> tuple[float, float, float]:
    """p, the learning rate, and lambda, which falls exponentially while p grows; 0 for objectives without one."""
    rate = experiment.optimizer.learning_rate * cosine_after(experiment.optimizer.hold_share, progress)
    objective, weight = experiment.objective, 0.0
    if objective.kind == "clipped_hinge_cross_entropy":
        weight = exponential(objective.lambda_start, objective.lambda_end, experiment.p_schedule.growth(progress))
    return experiment.p_schedule.at(progress), rate, weight


def _epoch(seed: int, epoch: int, split: Split) -> tuple[Tensor, Tensor]:
    """Order of the training samples, and their augmentation: of seed and epoch alone, the same for every worker."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(len(split), generator=generator), split.draws(generator)
