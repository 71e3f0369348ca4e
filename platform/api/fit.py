"""Certified training for any supported `torch.nn.Module`."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import PrivateAttr
from torch import nn

from linflab.models.networks.base import NetworkConfig
from linflab.models.robustness.inputs import (
    check_eps,
    check_image_shape,
    check_images,
    check_labels,
    check_logits,
    compute_logits,
)
from linflab.models.robustness.objectives import ObjectiveConfig
from linflab.platform.api.inputs import (
    BATCH_SIZE,
    build_with_short_errors,
    check_count,
    check_module,
    check_type,
    iter_pairs,
    module_device,
)
from linflab.platform.config.experiment import (
    ComputeConfig,
    EvaluationConfig,
    ExperimentConfig,
    OptimizerConfig,
    TrainingConfig,
)
from linflab.platform.config.schedules import EpsSchedule, PSchedule
from linflab.platform.data.augmentation import AugmentationConfig
from linflab.platform.data.datasets import Dataset, Split
from linflab.platform.data.info import DatasetInfo

if TYPE_CHECKING:
    from linflab.platform.api.inputs import Array, Batches
    from linflab.platform.training.loop import EpochMetrics


@dataclass(frozen=True)
class FitResult:
    """A trained module.

    Attributes:
        network: Copy of the module with the selected weights, on the same device and in evaluation mode.
        epoch: Selected epoch, counted from 1: the epoch with the best certified accuracy on `validation`. Without
            `validation`, the last epoch.
        val_clean: Clean accuracy on `validation`, in [0, 1]; None without `validation`.
        val_certified: Certified accuracy at eps on `validation`, in [0, 1]; None without `validation`.
        seconds: Duration of training and validation.
    """

    network: nn.Module
    epoch: int
    val_clean: float | None
    val_certified: float | None
    seconds: float


def fit(
    module: nn.Module,
    train: "tuple[Array, Array] | Batches",
    *,
    eps: float,
    epochs: int,
    objective: str | ObjectiveConfig = "worst_case_cross_entropy",
    validation: "tuple[Array, Array] | Batches | None" = None,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = 1e-3,
    eps_schedule: EpsSchedule | None = None,
    p_schedule: PSchedule | None = None,
    optimizer: OptimizerConfig | None = None,
    augmentation: AugmentationConfig | None = None,
    seed: int = 0,
    on_epoch: "Callable[[EpochMetrics], None]" = lambda report: None,
) -> FitResult:
    """Train a module to be certifiably robust, with the training loop of linflab's own networks.

    Args:
        module: Network that maps images (N, C, H, W) with pixels in [0, 1] to logits (N, K). The module itself must do
            any normalization. Training changes a copy of the module, on the same device.
        train: Pair of images and labels, or an iterable of such pairs, one per batch. All pairs are loaded into memory.
            Images are tensors or NumPy arrays: uint8 from 0 to 255, or float32 or float64 in [0, 1]. Labels (N) are
            integers from 0.
        eps: Target radius of the l_inf ball, for pixel values in [0, 1].
        epochs: Number of passes over the training images.
        objective: Training method, as a `kind` or as a config. With a `kind`, `eps_train` and `theta` are set to eps,
            and the other settings have their defaults.
        validation: Samples in the form of `train`, used to select the epoch. If None, the last epoch is selected.
        batch_size: Number of images per step, by default 128; at most the number of training images.
        learning_rate: Initial learning rate, which decays to zero by half a cosine. Ignored if `optimizer` is given.
        eps_schedule: Schedule of the objective's eps. By default, eps is 0 for the first tenth of training, and then
            grows for half of training.
        p_schedule: Schedule of p for distance layers; networks without distance layers ignore it.
        optimizer: All settings of the optimizer; if given, they replace `learning_rate` and the other defaults.
        augmentation: Random crops, horizontal flips and gamma correction.
        seed: Seed of the image order and of all other random draws.
        on_epoch: Called with the metrics of each epoch.

    Returns:
        The selected network with its validation accuracies.

    Raises:
        TypeError: If the objective's bounds do not support a layer; the message names the layer.
        ValueError: If images, labels or a setting are invalid, or the objective requires a Lipschitz constant that the
            module lacks.
        TrainingError: If training diverged.
    """
    from linflab.platform.training.fit import fit as fit_experiment

    check_module(module)
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    check_type("eps_schedule", eps_schedule, EpsSchedule)
    check_type("p_schedule", p_schedule, PSchedule)
    check_type("optimizer", optimizer, OptimizerConfig)
    check_type("augmentation", augmentation, AugmentationConfig)
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r:.50}: must be an integer from 0 to 2^32 - 1; use 0")
    eps, device = check_eps(eps), module_device(module)
    data = _dataset(train, validation, augmentation or AugmentationConfig())
    objective_config = _objective(objective, eps)
    _check_trainable(module, data, objective_config)
    settings = optimizer or build_with_short_errors(
        "learning_rate",
        lambda: OptimizerConfig(learning_rate=learning_rate, betas=(0.9, 0.999), adam_epsilon=1e-8, max_grad_norm=10.0),
    )
    if batch_size > len(data.train):
        raise ValueError(
            f"batch_size={batch_size}: must be at most {len(data.train)}, the number of training images; use "
            f"batch_size={len(data.train)}"
        )
    threads = torch.get_num_threads()
    experiment = ExperimentConfig.model_construct(
        method="",
        dataset=data.name,
        eps=eps,
        seed=seed,
        augmentation=augmentation or AugmentationConfig(),
        model=_ModuleConfig.from_module(module),
        objective=objective_config,
        p_schedule=p_schedule or PSchedule(),
        eps_schedule=eps_schedule or EpsSchedule(warmup_fraction=0.1, rampup_fraction=0.5, shape="smooth"),
        optimizer=settings,
        training=TrainingConfig(epochs=epochs, batch_size=batch_size, include_validation=validation is None),
        evaluation=EvaluationConfig(),
        compute=ComputeConfig(cpus_per_worker=threads),
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            result = fit_experiment(experiment, data.to(device), on_epoch)
        finally:
            torch.set_num_threads(threads)
    scores = result.validation
    val_clean, val_certified = (None, None) if scores is None else (scores.clean, scores.certified)
    return FitResult(result.network, result.epoch, val_clean, val_certified, result.seconds)


def _check_trainable(module: nn.Module, data: Dataset, objective: ObjectiveConfig) -> None:
    """Check that a module can be trained on the data with the objective; the module is not changed."""
    parameters = [one for one in module.parameters() if one.requires_grad]
    if not parameters:
        raise ValueError(f"module={type(module).__name__}: has no parameters to train; set requires_grad")
    if other_dtypes := {one.dtype for one in module.parameters()} - {torch.float32}:
        raise TypeError(f"module={other_dtypes.pop()}: must have float32 parameters; use module.float()")
    if objective.needs_lipschitz:
        constant = getattr(module, "lipschitz_constant", None)
        if not isinstance(constant, int | float) or not 0 < constant < math.inf:
            raise ValueError(
                f"objective={objective.kind}: requires a module with a positive lipschitz_constant, but it is "
                f"{constant!r:.50}; use a network that is Lipschitz by construction, or worst_case_cross_entropy"
            )
    image, _ = data.train.batch(torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        logits = compute_logits(copy.deepcopy(module).eval(), image.to(module_device(module)))
    highest = max(int(split.labels.max()) for split in (data.train, data.validation) if len(split.labels))
    check_logits(logits, torch.tensor([highest]))


class _ModuleConfig(NetworkConfig):
    """Network config that wraps a user's module; it has no settings and is not a registered kind."""

    _module: nn.Module = PrivateAttr()

    @classmethod
    def from_module(cls, module: nn.Module) -> "_ModuleConfig":
        config = cls.model_construct(kind=type(module).__name__)
        config._module = module
        return config

    def build(
        self, input_shape: Sequence[int], classes: int, mean: Sequence[float] = (0.0,), std: float = 1.0
    ) -> nn.Module:
        return copy.deepcopy(self._module)


def _objective(objective: str | ObjectiveConfig, eps: float) -> ObjectiveConfig:
    if isinstance(objective, ObjectiveConfig):
        return objective
    kinds = ObjectiveConfig.kinds()
    if objective not in kinds:
        raise ValueError(
            f"objective={objective}: not found; use one of {', '.join(kinds)}, or the config of one (IBP is "
            "worst_case_cross_entropy)"
        )
    config_class = kinds[objective]
    eps_settings = {name: eps for name in ("eps_train", "theta") if name in config_class.model_fields}
    return build_with_short_errors(f"objective={objective}", lambda: config_class(**eps_settings))


def _dataset(
    train: "tuple[Array, Array] | Batches",
    validation: "tuple[Array, Array] | Batches | None",
    augmentation: AugmentationConfig,
) -> Dataset:
    """Return the user's arrays as a dataset without a test split."""
    training = _split(train, "train", augmentation)
    validation_split = training.take(0) if validation is None else _split(validation, "validation", augmentation)
    if training.images.shape[1:] != validation_split.images.shape[1:]:
        raise ValueError(
            f"validation={tuple(validation_split.images.shape)}: must have images of the same size as the training "
            f"images, {tuple(training.images.shape)}; resize them"
        )
    channels, height, width = training.images.shape[1:]
    classes = 1 + max(int(split.labels.max()) for split in (training, validation_split))
    info = DatasetInfo(
        (0.0,) * channels, 1.0, (channels, *augmentation.output_size(height, width)), classes, len(validation_split)
    )
    return Dataset("own", info, training, validation_split, validation_split)


def _split(samples: Any, name: str, augmentation: AugmentationConfig) -> Split:
    """Load samples into memory as a split; uint8 images keep their dtype.

    Raises:
        TypeError: If images or labels have the wrong type or dtype.
        ValueError: If there are no images, or a shape or value is invalid.
    """
    if isinstance(samples, tuple) and len(samples) == 2 and hasattr(samples[0], "shape"):
        images, labels = (torch.as_tensor(part) for part in samples)
    else:
        parts = list(iter_pairs(name, samples))
        if not parts:
            raise ValueError(f"{name}: must contain at least one batch of images and labels; use a non-empty iterable")
        images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    check_image_shape(images.shape, name, (4,))
    if not len(images):
        raise ValueError(f"{name}={tuple(images.shape)}: must have at least one image; use more images")
    if images.dtype != torch.uint8:
        check_images(images)
    max_value = 255 if images.dtype == torch.uint8 else 1
    return Split(images, check_labels(labels, images), torch.arange(len(images)), max_value, augmentation)
