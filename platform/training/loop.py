"""Training loop: steps, validation after each epoch, and reports of both."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn

from linflab.platform.data.datasets import Dataset
from linflab.platform.errors import RunInterrupted, TrainingError
from linflab.platform.training.evaluation import Accuracies, BatchResult, evaluate, evaluation_spec, recalibrate
from linflab.platform.training.trainer import ScheduledValues, Trainer

# A float32 weight larger than this does not change if a pixel value in [0, 1] is added to it. A network with such a
# weight has diverged, and its output is constant.
MAX_WEIGHT = 2.0**25


@dataclass(frozen=True)
class EpochMetrics:
    """Metrics of one epoch.

    Attributes:
        epoch: Number of the epoch, from 1.
        at: Scheduled values of the last step.
        train_loss: Mean training loss.
        validation: Validation accuracies; None if the epoch is not validated.
        best_certified: Best validation certified accuracy so far, which is that of the selected network; None if no
            epoch was validated so far.
        seconds: Duration of training and validation.
    """

    epoch: int
    at: ScheduledValues
    train_loss: float
    validation: Accuracies | None
    best_certified: float | None
    seconds: float


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step."""

    step: int  # from 1
    steps: int  # of the whole run
    p: float
    loss: Tensor  # scalar on the device, for this worker's part of the batch


@dataclass(frozen=True)
class TrainingResult:
    """Network of the epoch with the best validation certified accuracy; the latest epoch in case of a tie.

    If training includes the validation images, the network of the last epoch is selected, and `validation` is None.
    `seconds` is the training time until this object was created.
    """

    network: nn.Module
    epoch: int
    validation: Accuracies | None
    seconds: float


@dataclass
class TrainingState:
    """State of a training run: epoch, next batch, losses and time of the epoch, best network so far."""

    epoch: int
    batch: int
    seconds: float
    elapsed_before: float  # seconds of all previous epochs
    losses: Tensor  # (steps per epoch)
    best: TrainingResult | None


def train_epochs(
    trainer: Trainer,
    dataset: Dataset,
    state: TrainingState,
    on_epoch: Callable[[EpochMetrics], None],
    on_step: Callable[[StepMetrics], None],
    save: Callable[[], None],
    should_stop: Callable[[], bool],
) -> None:
    """Take all remaining steps, and validate the network every `validation_interval` epochs and after the last one.

    Args:
        trainer: Trainer that takes the steps.
        dataset: Dataset of the trainer, with the validation images.
        state: State to continue from; updated in place.
        on_epoch: Called after each epoch.
        on_step: Called after each step.
        save: Writes a checkpoint of `state`.
        should_stop: Called after each step and batch of validation images; True stops training.

    Raises:
        TrainingError: If a loss or weight is not finite or too large; the state is not saved.
        RunInterrupted: If `should_stop` returned True; the state is saved.
    """
    settings, spec = trainer.experiment, evaluation_spec(trainer.experiment, trainer.network, with_attacks=False)
    epochs, selects_epoch = settings.training.epochs, not settings.training.include_validation

    def stop_validation(part: BatchResult) -> None:
        if should_stop():  # a resumed run repeats the validation, but not the epoch
            save()
            raise RunInterrupted(f"stopped during the validation after epoch {state.epoch} of {epochs}")

    while state.epoch <= epochs:
        start = time.perf_counter() - state.seconds
        order_and_draws = trainer.epoch_order(state.epoch)
        while state.batch < trainer.steps_per_epoch:
            step = (state.epoch - 1) * trainer.steps_per_epoch + state.batch
            loss = trainer.step(step, *order_and_draws)
            state.losses[state.batch] = loss
            state.batch += 1
            state.seconds = time.perf_counter() - start
            if trainer.device.type == "cpu" and not math.isfinite(loss):  # a check on a GPU would have to synchronize
                check_finite(state, trainer)
            on_step(StepMetrics(step + 1, trainer.steps, trainer.scheduled_values(step).p, loss))
            if should_stop():
                check_finite(state, trainer)
                save()
                raise RunInterrupted(f"stopped after step {step + 1} of {trainer.steps}")
        check_finite(state, trainer)
        mean_loss = state.losses.mean()
        if trainer.workers > 1:
            dist.all_reduce(mean_loss)
        validation = None
        if selects_epoch and settings.training.is_validated(state.epoch):
            network = trainer.network_to_evaluate(state.epoch)
            recalibrate(
                network,
                dataset.train,
                settings.evaluation.calibration_images,
                settings.training.batch_size,
                trainer.recalibrated_kinds(state.epoch),
            )
            (validation,) = evaluate(network, dataset.validation, spec, settings.evaluation.batch_size, stop_validation)
            previous_best = state.best.validation if state.best is not None else None
            if previous_best is None or validation.certified >= previous_best.certified:
                state.best = _select_network(trainer, state, network, validation)
        elif state.epoch == epochs:
            state.best = _select_network(trainer, state, trainer.network_to_evaluate(epochs), None)
        best = state.best.validation.certified if state.best is not None and state.best.validation is not None else None
        seconds = time.perf_counter() - start
        last = trainer.scheduled_values(state.epoch * trainer.steps_per_epoch - 1)
        on_epoch(EpochMetrics(state.epoch, last, mean_loss.item() / trainer.workers, validation, best, seconds))
        state.elapsed_before += seconds
        state.epoch, state.batch, state.seconds = state.epoch + 1, 0, 0.0
        # Save after the last epoch too, since the evaluation that follows can be interrupted.
        if state.epoch > epochs or (state.epoch - 1) % settings.training.checkpoint_interval == 0:
            save()


def _select_network(
    trainer: Trainer, state: TrainingState, network: nn.Module, validation: Accuracies | None
) -> TrainingResult:
    """Return the evaluated network as the selected one, or a copy if training changes it."""
    selected = trainer.copy_network() if network is trainer.network else network
    return TrainingResult(selected, state.epoch, validation, state.elapsed_before + state.seconds)


def check_finite(state: TrainingState, trainer: Trainer) -> None:
    """Check the losses of the epoch so far, and everything that a checkpoint would contain.

    Raises:
        TrainingError: If a loss or weight is not finite, or a weight is at least `MAX_WEIGHT`.
    """
    experiment = trainer.experiment
    invalid_steps = (~state.losses[: state.batch].isfinite()).nonzero()
    first = int(invalid_steps[0]) if len(invalid_steps) else state.batch - 1
    largest = max(float(parameter.detach().abs().max()) for parameter in trainer.loss_module.parameters())
    finite = all(bool(tensor.isfinite().all()) for tensor in trainer.loss_module.state_dict().values())
    if not len(invalid_steps) and finite and largest < MAX_WEIGHT:
        return
    problem = (
        f"the loss became {state.losses[first].item()}" if len(invalid_steps) else "a weight became infinite or NaN"
    )
    if not len(invalid_steps) and finite:
        problem = f"a weight grew to {largest:.2g}, too large for float32 to resolve the images,"
    step = (state.epoch - 1) * trainer.steps_per_epoch + first
    raise TrainingError(
        f"{problem} at step {step + 1} of {trainer.steps}, in epoch {state.epoch} of {experiment.training.epochs}"
        f"{f' (p = {trainer.scheduled_values(step).p:g})' if trainer.has_distances else ''}; "
        f"use a smaller optimizer.learning_rate than {experiment.optimizer.learning_rate:g}"
    )
