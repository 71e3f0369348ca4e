"""The training loop. It knows no Ray: under torch.distributed it is one worker of several, else the only one."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from linflab.models.networks.hybrid import LinfDistHybrid
from linflab.models.networks.layers import LpDistance, LpDistanceConv2d, SortDistance, decay_distances
from linflab.models.networks.linf_dist import LinfDistNet, Subsets
from linflab.models.networks.sort_net import draw_subsets
from linflab.models.robustness.attacks.ball import ball
from linflab.models.robustness.attacks.pgd import adversarial_images
from linflab.models.robustness.bounds.worst_case import WorstCaseBounds
from linflab.models.robustness.objectives import (
    AdversarialCrossEntropyConfig,
    DecayingCrossEntropyConfig,
    ObjectiveConfig,
    WorstCaseCrossEntropy,
)
from linflab.platform.checkpoints import Checkpoints
from linflab.platform.config import Experiment
from linflab.platform.datasets import Dataset, Split
from linflab.platform.errors import Interrupted, SettingError, TrainingError, WorkerDied
from linflab.platform.evaluation import Accuracy, evaluate, recompute_means, scoring_of
from linflab.platform.process import settle_process
from linflab.platform.schedules import cosine_after, exponential


class Scheduled(NamedTuple):
    """What schedules set for a step."""

    p: float  # inf for networks without distances
    learning_rate: float
    cross_entropy_weight: float  # lambda; 0 for objectives without one
    eps: float  # of the worst case, or the attack, in training; 0 for objectives without one


@dataclass(frozen=True)
class EpochReport:
    """What one epoch came to. Without validation images, when all are trained on, there are no accuracies."""

    epoch: int  # from 1
    at: Scheduled  # of the last step
    train_loss: float
    validation: Accuracy | None
    best_certified: float | None  # the best certified accuracy on validation up to here: that of the network kept
    seconds: float


@dataclass(frozen=True)
class StepReport:
    step: int  # from 1
    steps: int  # of the whole run
    p: float
    loss: Tensor  # a scalar on the device: of this worker's part of the batch


@dataclass(frozen=True)
class Trained:
    """The network that is kept: that of the best epoch by certified accuracy on validation (the latest among equals).

    Where the validation images were trained on, it is that of the last epoch, and `validation` is None. `seconds` are
    those of the whole training up to where this was made.
    """

    network: nn.Module
    epoch: int
    validation: Accuracy | None
    seconds: float


class _Loss(nn.Module):
    """Network and objective as one module, so that DistributedDataParallel averages the gradients of both."""

    def __init__(self, network: nn.Module, config: ObjectiveConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config
        # a hybrid has no constant, and objectives that need one are refused with it
        self.objective: nn.Module = config.build(getattr(network, "lipschitz_constant", math.nan))
        if self.objective.worst_case:
            self.bounds = WorstCaseBounds(network, getattr(config, "bound", "interval"))

    def forward(
        self, images: Tensor, labels: Tensor, at: Scheduled, subsets: Subsets | None, starts: Tensor | None
    ) -> Tensor:
        """The loss of images; `starts` (B, C, H, W) in [0, 1] say where attacks begin."""
        if not self.objective.worst_case:
            if starts is not None:
                images = self._attacked(images, labels, at, starts)
            return self.objective(self._logits(images, at.p, subsets), labels, at.cross_entropy_weight)
        share, penalized = 1.0, False
        if isinstance(self.objective, WorstCaseCrossEntropy):
            share, penalized = self.objective.crown_share(at.eps), self.objective.config.penalty > 0
        worst = self.bounds(images, labels, at.eps, at.p, subsets, share, penalized)
        return self.objective(worst, labels, at.cross_entropy_weight, at.eps)

    def _logits(self, images: Tensor, p: float, subsets: Subsets | None = None) -> Tensor:
        if isinstance(self.network, LinfDistNet | LinfDistHybrid):
            return self.network(images, p, subsets)
        return self.network(images)

    def _attacked(self, images: Tensor, labels: Tensor, at: Scheduled, starts: Tensor) -> Tensor:
        """The images that PGD finds; in evaluation mode, so that running statistics stay those of the data."""
        assert isinstance(self.config, AdversarialCrossEntropyConfig)
        around, step = ball(images, at.eps), self.config.step_size * at.eps
        self.network.eval()
        try:
            return adversarial_images(
                lambda x: self._logits(x, at.p), around, labels, around.point(starts), self.config.steps, step
            )
        finally:
            self.network.train()


def check_fits(experiment: Experiment, dataset: Dataset) -> None:
    """Check what the settings ask of the data.

    Raises:
        SettingError: a batch is larger than the training set, or the images are too small for the network.
    """
    facts = dataset.facts
    try:
        with torch.device("meta"):
            experiment.model.build(facts.input_shape, facts.classes, facts.mean, facts.std)
    except ValueError as error:
        raise SettingError(str(error)) from None
    images = len(dataset.training(experiment.training.include_validation))
    if experiment.training.batch_size > images:
        raise SettingError(
            f"training.batch_size={experiment.training.batch_size}: {dataset.name} has {images} training images; a "
            "batch can hold no more"
        )


class Trainer:
    """Network, objective and optimizer of an experiment, and one training step after another.

    Of several workers each holds the same network, and takes its part of every batch.
    """

    def __init__(self, experiment: Experiment, dataset: Dataset, rank: int = 0, workers: int = 1) -> None:
        """Raises SettingError: see `check_fits`."""
        check_fits(experiment, dataset)
        torch.set_num_threads(experiment.compute.cpus_per_worker)
        settle_process()
        torch.manual_seed(experiment.seed)
        self.experiment, self.rank, self.workers = experiment, rank, workers
        self.train = dataset.training(experiment.training.include_validation)
        self.steps_per_epoch = len(self.train) // experiment.training.batch_size
        self.steps = experiment.training.epochs * self.steps_per_epoch
        facts, self.device = dataset.facts, dataset.train.images.device
        self.network = experiment.model.build(facts.input_shape, facts.classes, facts.mean, facts.std)
        self.has_sort_layers = any(isinstance(module, SortDistance) for module in self.network.modules())
        self.loss_of = _Loss(self.network, experiment.objective).to(self.device)
        layers = [layer for layer in self.network.modules() if isinstance(layer, LpDistance | LpDistanceConv2d)]
        weights = [layer.weight for layer in layers]
        others = [one for one in self.network.parameters() if not any(one is weight for weight in weights)]
        decay, ratio = experiment.optimizer.weight_decay, experiment.optimizer.objective_rate_ratio
        self.optimizer = torch.optim.AdamW(
            [
                {"params": weights, "ratio": 1.0, "weight_decay": 0.0},
                {"params": others, "ratio": 1.0, "weight_decay": decay},
                {"params": list(self.loss_of.objective.parameters()), "ratio": ratio, "weight_decay": decay},
            ],
            betas=experiment.optimizer.betas,
            eps=experiment.optimizer.epsilon,
            foreach=False,  # the multi-tensor form needs memory for copies of all parameters: one at a time,
            fused=self.device.type == "cuda",  # or on a GPU, where each would be many small kernels, one kernel
        )
        self.has_distances = bool(layers)
        self.decayed = layers if experiment.optimizer.lp_weight_decay > 0 else []
        self.parallel: nn.Module = self.loss_of

    def connect(self) -> None:
        """From here on, average gradients over the workers, which must hold the same network by now."""
        if self.workers > 1:
            self.parallel = DistributedDataParallel(self.loss_of, broadcast_buffers=False)

    def scheduled(self, step: int) -> Scheduled:
        """What the schedules set for this step of the run, from 0."""
        progress, experiment = step / self.steps, self.experiment
        p = experiment.p_schedule.at(progress) if self.has_distances else math.inf
        objective = experiment.objective
        rate = experiment.optimizer.learning_rate * cosine_after(experiment.optimizer.hold_share, progress)
        weight = eps = 0.0
        if isinstance(objective, DecayingCrossEntropyConfig):
            weight = exponential(objective.lambda_start, objective.lambda_end, experiment.p_schedule.growth(progress))
        if eps_train := getattr(objective, "eps_train", 0.0):
            eps = eps_train * experiment.eps_ramp.at(progress)
        return Scheduled(p, rate, weight, eps)

    def shuffle(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Order of the training samples in an epoch, and their augmentation: the same for every worker."""
        order, draws = _epoch(self.experiment.seed, epoch, self.train)
        return order.to(self.device), draws.to(self.device)

    def step(self, step: int, order: Tensor, draws: Tensor) -> Tensor:
        """Take a step of the run, from 0, in an epoch so shuffled; returns this worker's loss."""
        at, batch_size = self.scheduled(step), self.experiment.training.batch_size
        for group in self.optimizer.param_groups:
            group["lr"] = at.learning_rate * group["ratio"]
        # a worker takes every workers-th sample of the batch, so that together they take all of it
        first = step % self.steps_per_epoch * batch_size
        mine = slice(first + self.rank, first + batch_size, self.workers)
        images, labels = self.train.batch(order[mine], draws[mine])
        chance = torch.Generator().manual_seed(_mixed(self.experiment.seed, -1 - step))
        subsets = draw_subsets(self.network, batch_size, self.workers, chance)
        starts = None
        if isinstance(self.experiment.objective, AdversarialCrossEntropyConfig) and at.eps > 0:
            # those of the whole batch, of which this worker takes its part
            starts = torch.rand(batch_size, *images.shape[1:], generator=chance)[self.rank :: self.workers].to(images)
        loss = self.parallel(images, labels, at, subsets, starts)
        self.optimizer.zero_grad()
        loss.backward()
        if (largest := self.experiment.optimizer.largest_gradient) is not None:
            nn.utils.clip_grad_norm_(self.loss_of.parameters(), largest)
        self.optimizer.step()
        for layer in self.decayed:
            decay_distances(layer, at.p, at.learning_rate * self.experiment.optimizer.lp_weight_decay)
        return loss.detach()


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
        TrainingError: a loss or a weight is not finite; the checkpoints are those of before.
        Interrupted: `should_stop` said so.
    """
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    epochs, selects = experiment.training.epochs, not experiment.training.include_validation
    trainer = Trainer(experiment, dataset, rank, workers)
    network = trainer.network
    scoring = scoring_of(experiment, network, attacked=False)
    at = _Position(1, 0, 0.0, 0.0, torch.zeros(trainer.steps_per_epoch, device=trainer.device), best=None)
    if checkpoints is not None and checkpoints.exist():
        at = _restore(checkpoints.load(), trainer)
    if workers > 1:
        _check_agreement(at, trainer.device)
    trainer.connect()

    def check() -> None:
        """That all is finite: what has happened since the epoch began, and what would go into a checkpoint."""
        wrong = (~at.losses[: at.batch].isfinite()).nonzero()
        first = int(wrong[0]) if len(wrong) else at.batch - 1
        if not len(wrong) and all(bool(tensor.isfinite().all()) for tensor in trainer.loss_of.state_dict().values()):
            return
        what = f"the loss became {at.losses[first].item()}" if len(wrong) else "a weight became infinite or NaN"
        step = (at.epoch - 1) * trainer.steps_per_epoch + first
        raise TrainingError(
            f"{what} at step {step + 1} of {trainer.steps}, in epoch {at.epoch} of {epochs}"
            f"{f' (p = {trainer.scheduled(step).p:g})' if trainer.has_distances else ''}; "
            f"try a smaller optimizer.learning_rate than {experiment.optimizer.learning_rate:g}"
        )

    def save() -> None:
        if checkpoints is not None and rank == 0:
            checkpoints.save(_state(at, trainer))

    while at.epoch <= epochs:
        start = time.perf_counter() - at.seconds
        shuffled = trainer.shuffle(at.epoch)
        while at.batch < trainer.steps_per_epoch:
            step = (at.epoch - 1) * trainer.steps_per_epoch + at.batch
            loss = trainer.step(step, *shuffled)
            at.losses[at.batch] = loss
            at.batch += 1
            at.seconds = time.perf_counter() - start
            if trainer.device.type == "cpu" and not math.isfinite(loss):  # elsewhere it would be waited for
                check()
            on_step(StepReport(step + 1, trainer.steps, trainer.scheduled(step).p, loss))
            if should_stop():
                check()
                save()
                raise Interrupted(f"stopped after step {step + 1} of {trainer.steps}")
        check()
        mean_loss = at.losses.mean()
        if workers > 1:
            dist.all_reduce(mean_loss)
        validation = best = None
        if selects:
            if trainer.has_sort_layers:
                recompute_means(
                    network, dataset.train, experiment.evaluation.mean_images, experiment.training.batch_size
                )
            (validation,) = evaluate(network, dataset.validation, scoring, experiment.evaluation.batch_size)
            before = at.best.validation if at.best is not None else None
            if before is None or validation.certified >= before.certified:
                at.best = Trained(copy.deepcopy(network).eval(), at.epoch, validation, at.earlier + at.seconds)
            best = validation.certified if before is None else max(validation.certified, before.certified)
        elif at.epoch == epochs:
            at.best = Trained(copy.deepcopy(network).eval(), at.epoch, None, at.earlier + at.seconds)
        seconds = time.perf_counter() - start
        last = trainer.scheduled(at.epoch * trainer.steps_per_epoch - 1)
        on_epoch(EpochReport(at.epoch, last, mean_loss.item() / workers, validation, best, seconds))
        at.earlier += seconds
        at.epoch, at.batch, at.seconds = at.epoch + 1, 0, 0.0
        # at the end too: what comes then, the scoring, can be cut as well
        if at.epoch > epochs or (at.epoch - 1) % experiment.training.checkpoint_epochs == 0:
            save()
    assert at.best is not None  # there is at least one epoch
    return _finished(at.best, trainer, dataset, at.earlier)


def _finished(best: Trained, trainer: Trainer, dataset: Dataset, seconds: float) -> Trained:
    """The network that is kept; SortNet's with the running means of all training images."""
    validation, experiment = best.validation, trainer.experiment
    if trainer.has_sort_layers:
        recompute_means(best.network, trainer.train, len(trainer.train), experiment.training.batch_size)
        if validation is not None:
            scoring = scoring_of(experiment, best.network, attacked=False)
            (validation,) = evaluate(best.network, dataset.validation, scoring, experiment.evaluation.batch_size)
    return dataclasses.replace(best, validation=validation, seconds=seconds)


@dataclass
class _Position:
    """Where a training is: the epoch, its next batch, its losses and seconds so far, and the best network yet."""

    epoch: int
    batch: int
    seconds: float
    earlier: float  # seconds of the epochs before
    losses: Tensor  # of every step of the epoch
    best: Trained | None


def _state(at: _Position, trainer: Trainer) -> dict[str, Any]:
    """All that training goes on from, as tensors and plain data."""
    best = None
    if at.best is not None:
        validation = None if at.best.validation is None else dataclasses.asdict(at.best.validation)
        network = at.best.network.state_dict()
        best = {"epoch": at.best.epoch, "validation": validation, "network": network, "seconds": at.best.seconds}
    return {
        "experiment": trainer.experiment.to_yaml(),
        "epoch": at.epoch,
        "batch": at.batch,
        "seconds": at.seconds,
        "earlier": at.earlier,
        "losses": at.losses,
        "best": best,
        "loss": trainer.loss_of.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
    }


def _restore(state: dict[str, Any], trainer: Trainer) -> _Position:
    """Bring network, objective and optimizer to where a checkpoint left them.

    Raises:
        SettingError: the checkpoint is of another experiment; names a setting that differs.
    """
    _check_same(state["experiment"], trainer.experiment)
    trainer.loss_of.load_state_dict(state["loss"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    best = None
    if state["best"] is not None:
        network = copy.deepcopy(trainer.network).eval()
        network.load_state_dict(state["best"]["network"])
        epoch, seconds, scores = state["best"]["epoch"], state["best"]["seconds"], state["best"]["validation"]
        best = Trained(network, epoch, None if scores is None else Accuracy(**scores), seconds)
    losses = state["losses"].to(trainer.device)
    return _Position(state["epoch"], state["batch"], state["seconds"], state["earlier"], losses, best)


def _check_agreement(at: _Position, device: torch.device) -> None:
    """Check that all workers go on from one place: else each would train something else, and none would say so.

    Raises:
        WorkerDied: they read different checkpoints; to start again will do.
    """
    mine = torch.tensor([at.epoch, at.batch], device=device)
    least, most = mine.clone(), mine.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if not torch.equal(least, most):
        raise WorkerDied(f"workers read different checkpoints, of epochs {int(least[0])} to {int(most[0])}")


def _check_same(written: str, experiment: Experiment) -> None:
    """Check that a checkpoint's experiment, in YAML, is this one.

    Raises:
        SettingError: it is not; names the first setting that differs.
    """
    then = Experiment.model_validate(yaml.safe_load(written)).settings()
    for name, value in experiment.settings().items():
        if then.get(name) != value:
            raise SettingError(f"{name}={value}: the checkpoint was made with {name}={then.get(name)}; use that value")


def _epoch(seed: int, epoch: int, split: Split) -> tuple[Tensor, Tensor]:
    """Order of the training samples, and their augmentation: of seed and epoch alone."""
    generator = torch.Generator().manual_seed(_mixed(seed, epoch))
    return torch.randperm(len(split), generator=generator), split.draws(generator)


def _mixed(seed: int, number: int) -> int:
    """A seed for the epoch of this number, from 1; for steps the numbers are negative."""
    return (seed * 1_000_003 + number) % 2**63
