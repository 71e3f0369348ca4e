"""Conversion between the state of a training run and the content of a checkpoint."""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.errors import InputError, WorkerLostError
from linflab.platform.training.evaluation import Accuracies
from linflab.platform.training.loop import TrainingResult, TrainingState
from linflab.platform.training.optimizers import check_state
from linflab.platform.training.trainer import Trainer
from linflab.reports.renames import current_fields, current_tree
from linflab.search_spaces.strict_yaml import parse_mapping


def state_dict(state: TrainingState, trainer: Trainer) -> dict[str, Any]:
    """Return everything that is required to resume training, as tensors and plain data."""
    best = None
    if state.best is not None:
        validation = None if state.best.validation is None else dataclasses.asdict(state.best.validation)
        network = state.best.network.state_dict()
        best = {"epoch": state.best.epoch, "validation": validation, "network": network, "seconds": state.best.seconds}
    return {
        "experiment": trainer.experiment.to_yaml(),
        "epoch": state.epoch,
        "batch": state.batch,
        "seconds": state.seconds,
        "earlier": state.elapsed_before,
        "losses": state.losses,
        "best": best,
        "loss": trainer.loss_module.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "average": None if trainer.average is None else trainer.average.state_dict(),
    }


def restore(state: dict[str, Any], trainer: Trainer) -> TrainingState:
    """Restore network, objective and optimizer of a trainer from a checkpoint.

    Args:
        state: Content of the checkpoint.
        trainer: Trainer to restore, in place.

    Returns:
        State to continue from.

    Raises:
        InputError: If the checkpoint is damaged or has another config; the message names a setting that differs.
    """
    try:
        return _restore(state, trainer)
    except InputError:
        raise
    except Exception as error:  # damaged content can raise almost any exception
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"resume: invalid checkpoint ({reason}); run without --resume to start over") from None


def _restore(state: dict[str, Any], trainer: Trainer) -> TrainingState:
    _check_config_matches(state["experiment"], trainer.experiment)
    trainer.loss_module.load_state_dict(state["loss"])
    groups = trainer.optimizer.param_groups
    config_settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    trainer.optimizer.load_state_dict(state["optimizer"])
    for group, settings in zip(trainer.optimizer.param_groups, config_settings, strict=True):
        group.update(settings)  # settings come from the config, not from the checkpoint
    check_state(trainer.experiment.optimizer, trainer.optimizer)
    for parameter, tensors in trainer.optimizer.state.items():
        if "step" in tensors and trainer.optimizer.defaults.get("fused"):  # the checkpoint may be of another device
            tensors["step"] = tensors["step"].to(parameter.device)
    best = None
    if state["best"] is not None:
        network = trainer.copy_network()
        network.load_state_dict(state["best"]["network"])
        epoch, seconds, scores = state["best"]["epoch"], state["best"]["seconds"], state["best"]["validation"]
        best = TrainingResult(network, _integer(epoch, 1, trainer.experiment.training.epochs), None, _number(seconds))
        if scores is not None:
            scores = current_fields("accuracies", scores)
            numbers: dict[str, Any] = {name: None if one is None else _number(one) for name, one in scores.items()}
            best = dataclasses.replace(best, validation=Accuracies(**numbers))
    epoch = _integer(state["epoch"], 1, trainer.experiment.training.epochs + (best is not None))
    batch = _integer(state["batch"], 0, trainer.steps_per_epoch)
    if trainer.average is not None:
        trainer.average.load_state_dict(state["average"], (epoch - 1) * trainer.steps_per_epoch + batch)
    losses = state["losses"].to(trainer.device)
    if losses.shape != (trainer.steps_per_epoch,) or losses.dtype != torch.float32:
        raise ValueError(f"losses have the shape {tuple(losses.shape)} and type {losses.dtype}")
    return TrainingState(epoch, batch, _number(state["seconds"]), _number(state["earlier"]), losses, best)


def _integer(value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{value!r:.50} must be an integer from {low} to {high}")
    return value


def _number(value: object) -> Any:
    if type(value) not in (int, float):
        raise ValueError(f"{value!r:.50} must be a number")
    return value


def check_workers_agree(state: TrainingState, device: torch.device) -> None:
    """Check that all workers resume from the same checkpoint; otherwise they would silently diverge.

    Raises:
        WorkerLostError: If the workers read different checkpoints; restarting all workers fixes this.
    """
    position = torch.tensor([state.epoch, state.batch], device=device)
    lowest, highest = position.clone(), position.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    if not torch.equal(lowest, highest):
        raise WorkerLostError(f"workers read different checkpoints, of epochs {int(lowest[0])} to {int(highest[0])}")


def _check_config_matches(stored_yaml: str, experiment: ExperimentConfig) -> None:
    """Check that the YAML config of a checkpoint equals this config.

    Raises:
        InputError: If the configs differ; the message names the first setting that differs.
    """
    stored = ExperimentConfig.model_validate(current_tree(parse_mapping(stored_yaml))).to_flat_dict()
    for name, value in experiment.to_flat_dict().items():
        if stored.get(name) != value:
            raise InputError(f"{name}={value}: the checkpoint was made with {name}={stored.get(name)}; use that value")
