"""Complete training run without Ray, by the only worker or by one of several in torch.distributed."""

import dataclasses
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from linflab.models.networks.base import StoredImagesConfig
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.data.datasets import Dataset
from linflab.platform.errors import InputError
from linflab.platform.training.checkpoints import CheckpointStore
from linflab.platform.training.evaluation import evaluate, evaluation_spec, recalibrate
from linflab.platform.training.loop import EpochMetrics, StepMetrics, TrainingResult, TrainingState, train_epochs
from linflab.platform.training.resume import check_workers_agree, restore, state_dict
from linflab.platform.training.trainer import Trainer


def fit(
    experiment: ExperimentConfig,
    dataset: Dataset,
    on_epoch: Callable[[EpochMetrics], None] = lambda report: None,
    on_step: Callable[[StepMetrics], None] = lambda report: None,
    checkpoints: CheckpointStore | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train the network of a config on the device of the dataset, or store training images in it.

    Training is bitwise reproducible for the same config, machine and number of workers, also after an interruption and
    resumption from `checkpoints`. All workers hold the same network at all times.

    Args:
        experiment: All settings.
        dataset: Dataset to train on.
        on_epoch: Called after each epoch.
        on_step: Called after each step.
        checkpoints: Store to resume from and to write checkpoints to; None for a run without checkpoints.
        should_stop: Called after each step and batch of validation images. If it returns True, a checkpoint is written
            and training ends.

    Returns:
        The selected network, with the total training time.

    Raises:
        InputError: If config and dataset are incompatible, or the checkpoint is unreadable or of another config.
        TrainingError: If a loss or weight is not finite or too large; existing checkpoints are unchanged.
        WorkerLostError: If workers read different checkpoints.
        RunInterrupted: If `should_stop` returned True.
    """
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    trainer = Trainer(experiment, dataset, rank, workers)
    if isinstance(experiment.model, StoredImagesConfig):
        return _store_images(experiment.model, trainer, dataset)
    losses = torch.zeros(trainer.steps_per_epoch, device=trainer.device)
    state = TrainingState(1, 0, 0.0, 0.0, losses, best=None)
    if checkpoints is not None and checkpoints.exist():
        state = restore(checkpoints.load(), trainer)
    if workers > 1:
        check_workers_agree(state, trainer.device)
    trainer.wrap_ddp()

    def save() -> None:
        if checkpoints is not None and rank == 0:
            checkpoints.save(state_dict(state, trainer))

    train_epochs(trainer, dataset, state, on_epoch, on_step, save, should_stop)
    assert state.best is not None  # there is at least one epoch
    return _finalize(state.best, trainer, dataset, state.elapsed_before)


def _store_images(model: StoredImagesConfig, trainer: Trainer, dataset: Dataset) -> TrainingResult:
    """Return a network that stores training images; the seed determines which ones, if it does not store all."""
    start, experiment, train = time.perf_counter(), trainer.experiment, trainer.train
    generator = torch.Generator().manual_seed(experiment.seed)
    positions = torch.randperm(len(train), generator=generator)[: model.num_stored_images].sort().values
    try:
        model.store_images(trainer.network, *train.batch(positions.to(trainer.device)))
    except ValueError as error:
        raise InputError(f"model.{error}") from None
    network = trainer.network.eval()
    validation = None
    if not experiment.training.include_validation:
        spec = evaluation_spec(experiment, network, with_attacks=False)
        (validation,) = evaluate(network, dataset.validation, spec, experiment.evaluation.batch_size)
    return TrainingResult(network, 1, validation, time.perf_counter() - start)


def _finalize(best: TrainingResult, trainer: Trainer, dataset: Dataset, seconds: float) -> TrainingResult:
    """Return the selected network; recalibrate its running statistics on all training images if its config requires."""
    validation, experiment = best.validation, trainer.experiment
    if kinds := trainer.recalibrated_kinds(best.epoch):
        recalibrate(best.network, trainer.train, len(trainer.train), experiment.training.batch_size, kinds)
        if validation is not None:
            spec = evaluation_spec(experiment, best.network, with_attacks=False)
            (validation,) = evaluate(best.network, dataset.validation, spec, experiment.evaluation.batch_size)
    return dataclasses.replace(best, validation=validation, seconds=seconds)
