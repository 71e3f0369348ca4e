"""Training steps of a config: network, objective, optimizer and schedules."""

import copy
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from linflab.models.networks.base import StoredImagesConfig
from linflab.models.networks.cost import count_parameters
from linflab.models.networks.ensemble import EnsembleConfig
from linflab.models.networks.layers import DistanceLayer, LpDistance, LpDistanceConv2d, SortDistance, lp_weight_decay_
from linflab.models.networks.linf_dist import DistanceNet, InputMasks
from linflab.models.networks.running_statistics import BATCH_NORMS, MEAN_SHIFTS, Kinds, layers_with_statistics
from linflab.models.networks.sort_net import sample_masks
from linflab.models.robustness.objectives import Batch, LambdaDecayConfig, ObjectiveConfig
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.schedules import exponential_interpolation
from linflab.platform.data.datasets import Dataset, Split
from linflab.platform.errors import InputError
from linflab.platform.host import configure_process
from linflab.platform.training.averaging import WeightAverage
from linflab.platform.training.optimizers import build_optimizer, l1_norm, l1_weights

BYTES_PER_PARAMETER = 16  # float32 weight, gradient and Adam's two moments


class ScheduledValues(NamedTuple):
    """Scheduled values of a step."""

    p: float  # inf for networks without distance layers
    learning_rate: float
    cross_entropy_weight: float  # lambda; 0 for objectives without it
    eps: float  # of worst-case loss or attack; 0 for objectives without it
    progress: float = 0.0  # fraction of training that is done, in [0, 1)


class LossModule(nn.Module):
    """Network and objective in one module, so that DistributedDataParallel averages the gradients of both.

    Args:
        network: The network to train.
        config: Settings of the objective.
        input_shape: Shape of an image, (C, H, W).
        l1_weight: Weight of the l_1 norm of linear and convolutional weights in the loss.
        rank: Index of this worker, from 0.
        workers: Number of workers that train together.
    """

    def __init__(
        self,
        network: nn.Module,
        config: ObjectiveConfig,
        input_shape: Sequence[int],
        l1_weight: float = 0.0,
        rank: int = 0,
        workers: int = 1,
    ) -> None:
        super().__init__()
        self.network, self.l1_weight, self.rank, self.workers = network, l1_weight, rank, workers
        # Networks without a Lipschitz constant get NaN; for them, objectives that need the constant are rejected.
        self.objective = config.build(getattr(network, "lipschitz_constant", math.nan))
        self.objective.prepare(network, input_shape)

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        values: ScheduledValues,
        masks: InputMasks | None,
        seed: int,
        starts: Tensor | None,
    ) -> Tensor:
        """Return the loss of a batch (scalar).

        Args:
            images: (B, C, H, W) with pixels in [0, 1].
            labels: (B) correct classes.
            values: Scheduled values of the step.
            masks: Input masks of SortNet; None for other networks.
            seed: Seed of further random draws on the device, equal for all workers.
            starts: (B, ...) random draws in [0, 1] that determine the starting points of attacks; None in steps
                without an attack.
        """
        batch = Batch(
            images,
            labels,
            values.p,
            masks,
            values.cross_entropy_weight,
            values.eps,
            starts,
            values.progress,
            seed,
            self.rank,
            self.workers,
        )
        loss = self.objective.loss(self.network, batch)
        if not self.l1_weight:
            return loss
        frozen = self.objective.frozen_layers(values.progress)
        return loss + self.l1_weight * l1_norm(l1_weights(self.network, frozen))


def _memory() -> int:
    """Return the bytes of the largest memory: main memory, or the memory of a GPU."""
    main = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return max([main, *(torch.cuda.get_device_properties(device).total_memory for device in devices)])


def check_dataset_compatibility(experiment: ExperimentConfig, dataset: Dataset, on_this_machine: bool = True) -> None:
    """Check that a config fits its dataset and the memory of this machine.

    Args:
        experiment: All settings.
        dataset: Its dataset.
        on_this_machine: Whether the network is trained here, so that it must fit into the memory.

    Raises:
        InputError: If a batch is larger than the training set, the images are too small for the network, the objective
            does not support the network, the network is too large for the memory of this machine, or it lacks layers
            that a setting requires.
    """
    info = dataset.info
    if isinstance(experiment.model, EnsembleConfig):
        raise InputError(
            "model.kind=ensemble: is not trained; train its members, and average them with `linflab ensemble RUN RUN`"
        )
    try:
        with torch.device("meta"):
            std = info.select_std(experiment.model.uses_channel_std)
            network = experiment.model.build(info.input_shape, info.classes, info.mean, std)
    except ValueError as error:
        raise InputError(str(error)) from None
    parameters, memory = count_parameters(network), _memory()
    if on_this_machine and BYTES_PER_PARAMETER * parameters > memory:
        width = getattr(experiment.model, "width", None)
        raise InputError(
            f"{f'model.kind={experiment.model.kind}' if width is None else f'model.width={width}'}: requires "
            f"{BYTES_PER_PARAMETER * parameters / 2**30:,.0f} GiB for {parameters:,} parameters, but this machine has "
            f"{memory / 2**30:,.1f} GiB; use a smaller network"
        )
    l1_weight = experiment.optimizer.l1_weight
    if l1_weight and not l1_weights(network):
        raise InputError(
            f"optimizer.l1_weight={l1_weight:g}: requires linear or convolutional layers, but "
            f"model.kind={experiment.model.kind} has none; use 0"
        )
    try:
        experiment.objective.check_network(network, info.input_shape)
    except (TypeError, ValueError) as error:
        raise _network_error(experiment, error) from None
    if experiment.training.recalibrate_batch_norm and not layers_with_statistics(network, BATCH_NORMS):
        raise InputError(
            "training.recalibrate_batch_norm=true: requires batch normalization, but "
            f"model.kind={experiment.model.kind} has none with these settings; use false"
        )
    images = len(dataset.training_split(experiment.training.include_validation))
    stored = experiment.model.num_stored_images if isinstance(experiment.model, StoredImagesConfig) else 0
    if stored > images:
        raise InputError(
            f"model.samples={stored}: must be at most {images}, the number of training images of {dataset.name}; use "
            f"model.samples={images}"
        )
    if experiment.training.batch_size > images:
        raise InputError(
            f"training.batch_size={experiment.training.batch_size}: must be at most {images}, the number of training "
            f"images of {dataset.name}; use a smaller batch"
        )


def _network_error(experiment: ExperimentConfig, error: TypeError | ValueError) -> InputError:
    """Return the error of an objective that does not support a network, with the setting to change."""
    is_of_objective = str(error).partition("=")[0] in type(experiment.objective).model_fields
    return InputError(f"objective.{error}" if is_of_objective else f"model.kind={experiment.model.kind}: {error}")


class Trainer:
    """Network, objective and optimizer of a config, with training steps.

    With several workers, each holds the same network and takes its part of every batch.

    Args:
        experiment: All settings.
        dataset: Dataset to train on; training runs on its device.
        rank: Index of this worker, from 0.
        workers: Number of workers that train together.
        dtype: Dtype of parameters and images; float64 reproduces a run without float32 rounding, on any device.

    Raises:
        InputError: If config and dataset, or objective and network, are incompatible.
    """

    def __init__(
        self,
        experiment: ExperimentConfig,
        dataset: Dataset,
        rank: int = 0,
        workers: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_dataset_compatibility(experiment, dataset)
        torch.set_num_threads(experiment.compute.cpus_per_worker)
        configure_process()
        torch.manual_seed(experiment.seed)
        self.experiment, self.rank, self.workers = experiment, rank, workers
        self.train = dataset.training_split(experiment.training.include_validation)
        self.steps_per_epoch = len(self.train) // experiment.training.batch_size
        self.steps = experiment.training.epochs * self.steps_per_epoch
        info, self.device = dataset.info, dataset.train.images.device
        std = info.select_std(experiment.model.uses_channel_std)
        self.network = experiment.model.build(info.input_shape, info.classes, info.mean, std)
        if experiment.compute.tensor_cores:
            _use_tensor_cores(self.network)
        self.has_sort_layers = any(isinstance(module, SortDistance) for module in self.network.modules())
        try:
            loss_module = LossModule(
                self.network, experiment.objective, info.input_shape, experiment.optimizer.l1_weight, rank, workers
            )
        except (TypeError, ValueError) as error:
            raise _network_error(experiment, error) from None
        self.loss_module = loss_module.to(self.device, dtype)
        self.dtype = dtype
        layers = [layer for layer in self.network.modules() if isinstance(layer, LpDistance | LpDistanceConv2d)]
        self.optimizer = build_optimizer(experiment.optimizer, self._parameter_groups(layers), self.device)
        self.has_distances = bool(layers)
        self.lp_decayed_layers = layers if experiment.optimizer.lp_weight_decay > 0 else []
        averages = experiment.training.averaging_start is not None
        self.average = WeightAverage(self.network, experiment.training, self.steps) if averages else None
        self.parallel: nn.Module = self.loss_module

    def _parameter_groups(self, layers: list[DistanceLayer]) -> list[dict[str, Any]]:
        """Return parameter groups, each with its weight decay and its `ratio`.

        `ratio` is the learning rate of the group divided by the scheduled one. The optimizer does not apply the
        l_p weight decay of distance layers; `step` applies it.
        """
        settings = self.experiment.optimizer
        weights = [layer.weight for layer in layers]
        others = [one for one in self.network.parameters() if not any(one is weight for weight in weights)]
        has_only_distances = self.experiment.model.has_only_distances  # if True, others are biases of distance layers
        decay = settings.lp_weight_decay if has_only_distances else settings.weight_decay
        objective_parameters, ratio = list(self.loss_module.objective.parameters()), settings.objective_lr_scale
        return [
            {"params": weights, "ratio": 1.0, "weight_decay": 0.0},
            {"params": others, "ratio": 1.0, "weight_decay": decay},
            {"params": objective_parameters, "ratio": ratio, "weight_decay": settings.weight_decay},
        ]

    def wrap_ddp(self) -> None:
        """Average gradients over the workers from now on; all workers must already hold the same network."""
        if self.workers > 1:
            self.parallel = DistributedDataParallel(
                self.loss_module,
                broadcast_buffers=False,
                find_unused_parameters=self.experiment.objective.freezes_layers,  # costs time in every step
            )

    def scheduled_values(self, step: int) -> ScheduledValues:
        """Return the scheduled values of a step of the run, counted from 0."""
        progress, experiment = step / self.steps, self.experiment
        p = experiment.p_schedule.value_at(progress) if self.has_distances else math.inf
        objective = experiment.objective
        rate = experiment.optimizer.learning_rate_at(progress) * objective.learning_rate_factor(progress)
        weight = eps = 0.0
        if isinstance(objective, LambdaDecayConfig):
            weight = exponential_interpolation(
                objective.lambda_start, objective.lambda_end, experiment.p_schedule.ramp_progress(progress)
            )
        if eps_train := getattr(objective, "eps_train", 0.0):
            eps = eps_train * experiment.eps_schedule.value_at(progress) * objective.eps_factor(progress)
        return ScheduledValues(p, rate, weight, eps, progress)

    def epoch_order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the order of the training samples in an epoch and their augmentation, equal for all workers."""
        order, draws = _epoch(self.experiment.seed, epoch, self.train)
        return order.to(self.device), draws.to(self.device)

    def copy_network(self) -> nn.Module:
        """Return a copy of the network in evaluation mode, without tensor cores.

        The copy therefore computes exact distances even if it is set to training mode.
        """
        network = copy.deepcopy(self.network).eval()
        _use_tensor_cores(network, enabled=False)
        return network

    def is_averaged(self, epoch: int) -> bool:
        """Return whether the evaluation of this epoch is one of averaged weights."""
        return self.average is not None and self.average.covers(epoch * self.steps_per_epoch - 1)

    def recalibrated_kinds(self, epoch: int) -> Kinds:
        """Return the kinds of layers whose running statistics are recalibrated when this epoch is evaluated."""
        kinds: Kinds = ()
        if self.has_sort_layers or self.is_averaged(epoch):
            kinds += MEAN_SHIFTS
        if self.experiment.training.recalibrate_batch_norm or self.is_averaged(epoch):
            kinds += BATCH_NORMS
        return kinds if layers_with_statistics(self.network, kinds) else ()

    def network_to_evaluate(self, epoch: int) -> nn.Module:
        """Return the network to evaluate after an epoch, in evaluation mode or as in training.

        It is a copy if its weights are averaged, or if recalibration would change the statistics that attacks use in
        training.
        """
        if self.is_averaged(epoch):
            assert self.average is not None
            network = self.copy_network()
            self.average.copy_to(network)
            return network
        return self.copy_network() if BATCH_NORMS[0] in self.recalibrated_kinds(epoch) else self.network

    def step(self, step: int, order: Tensor, draws: Tensor) -> Tensor:
        """Take one optimizer step.

        Args:
            step: Step of the run, counted from 0.
            order: Order of the training samples, from `epoch_order`.
            draws: Augmentation of the training samples, from `epoch_order`.

        Returns:
            This worker's loss (scalar), detached.
        """
        values, batch_size = self.scheduled_values(step), self.experiment.training.batch_size
        for group in self.optimizer.param_groups:
            group["lr"] = values.learning_rate * group["ratio"]
        # Worker `rank` takes every `workers`-th sample, so that the workers together take the whole batch.
        first = step % self.steps_per_epoch * batch_size
        own_samples = slice(first + self.rank, first + batch_size, self.workers)
        images, labels = self.train.batch(order[own_samples], draws[own_samples])
        images = images.to(self.dtype)
        generator = torch.Generator().manual_seed(_derive_seed(self.experiment.seed, -1 - step))
        masks = sample_masks(self.network, batch_size, self.workers, generator)
        starts = (
            self.loss_module.objective.draw_starts((batch_size, *images.shape[1:]), generator)
            if values.eps > 0
            else None
        )
        if starts is not None:  # starts of the whole batch; keep this worker's part
            starts = starts[self.rank :: self.workers].to(images)
        # Last, so that the other draws do not depend on them.
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        own_seeds = torch.randint(2**63 - 1, (self.workers,), generator=generator)
        torch.manual_seed(int(own_seeds[self.rank]))  # for dropout of the user's networks
        loss = self.parallel(images, labels, values, masks, seed, starts)
        self.optimizer.zero_grad()
        loss.backward()
        if (max_norm := self.experiment.optimizer.max_grad_norm) is not None:
            nn.utils.clip_grad_norm_(self.loss_module.parameters(), max_norm)
        for layer in self.lp_decayed_layers:  # before the step, like the decay of AdamW
            lp_weight_decay_(layer, values.p, values.learning_rate * self.experiment.optimizer.lp_weight_decay)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(step)
        return loss.detach()


def _use_tensor_cores(network: nn.Module, enabled: bool = True) -> None:
    """Set whether the hidden dense distance layers of a network use tensor cores in training mode."""
    for layer in network.features.distances if isinstance(network, DistanceNet) else ():
        if isinstance(layer, LpDistance):
            layer.on_tensor_cores = enabled


def _epoch(seed: int, epoch: int, split: Split) -> tuple[Tensor, Tensor]:
    """Return the order of the training samples and their augmentation, which seed and epoch determine."""
    generator = torch.Generator().manual_seed(_derive_seed(seed, epoch))
    return torch.randperm(len(split), generator=generator), split.sample_augmentation(generator)


def _derive_seed(seed: int, number: int) -> int:
    """Return the seed of an epoch (number from 1) or of a step (negative number)."""
    return (seed * 1_000_003 + number) % 2**63
