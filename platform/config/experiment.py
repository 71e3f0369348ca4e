"""Validated settings of a run, by section."""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from linflab.models.networks import NetworkConfig
from linflab.models.numbers import AsFraction
from linflab.models.registry import KindOf
from linflab.models.robustness.attacks import AttackConfig
from linflab.models.robustness.certification import Certifier
from linflab.models.robustness.objectives import ObjectiveConfig
from linflab.platform.config.schedules import EpsSchedule, PSchedule, UnitInterval, constant_then_cosine, step_decay
from linflab.platform.data.augmentation import AugmentationConfig
from linflab.reports.added_settings import ADDED_SETTINGS

PositiveFiniteFloat = Annotated[float, AsFraction, Field(gt=0, allow_inf_nan=False)]
NonNegativeFiniteFloat = Annotated[float, AsFraction, Field(ge=0, allow_inf_nan=False)]
DecayRate = Annotated[float, AsFraction, Field(ge=0, lt=1)]


class FrozenConfig(BaseModel):
    """Immutable section of the config that rejects unknown settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OptimizerConfig(FrozenConfig):
    """Optimizer, learning rate and penalties on weights.

    The learning rate is constant at first. Then it decays to zero by half a cosine, or by a factor at each milestone.
    """

    algorithm: Literal["adamw", "adam", "radam", "sgd"] = Field(
        "adamw", description="AdamW, Adam, RAdam, or stochastic gradient descent with momentum"
    )
    learning_rate: PositiveFiniteFloat = Field(0.03, description="initial learning rate")
    constant_lr_fraction: UnitInterval = Field(
        0.0, description="fraction of training with constant learning rate, before cosine decay; 1: no decay"
    )
    milestones: tuple[UnitInterval, ...] = Field(
        (),
        description="fractions of training after which the learning rate is multiplied by milestone_factor, in "
        "ascending order; replaces cosine decay",
    )
    milestone_factor: Annotated[float, AsFraction, Field(gt=0, le=1)] = Field(
        0.2, description="factor of the learning rate at each milestone"
    )
    objective_lr_scale: PositiveFiniteFloat = Field(
        0.2, description="learning rate of the objective's parameters, as a multiple of learning_rate"
    )
    lp_weight_decay: DecayRate = Field(
        0.0,
        description="weight decay of distance layers, multiplied by the learning rate: l_p weight decay for weights; "
        "biases have it as others have weight_decay",
    )
    weight_decay: DecayRate = Field(
        0.0,
        description="weight decay of all other parameters, multiplied by the learning rate: decoupled for adamw, else "
        "added to gradients (l_2 regularization)",
    )
    l1_weight: NonNegativeFiniteFloat = Field(
        0.0, description="weight of the l_1 norm of all weights of linear and convolutional layers in the loss"
    )
    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.99),
        description="decay rates of the running averages of gradients and of squared gradients; for all except sgd",
    )
    adam_epsilon: PositiveFiniteFloat = Field(
        1e-10, description="Adam's epsilon, added to the denominator; for all except sgd"
    )
    momentum: DecayRate = Field(0.9, description="momentum of sgd")
    max_grad_norm: PositiveFiniteFloat | None = Field(
        None, description="gradient clipping: upper limit of the l_2 norm over all parameters; null: no clipping"
    )

    @model_validator(mode="after")
    def _one_decay(self) -> Self:
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones={list(self.milestones)}: must be in ascending order; sort them")
        if self.milestones and self.constant_lr_fraction:
            raise ValueError(
                f"constant_lr_fraction={self.constant_lr_fraction:g}: not supported with "
                f"milestones={list(self.milestones)}, which replace cosine decay; use constant_lr_fraction=0 or "
                "milestones=[]"
            )
        return self

    @property
    def num_moments(self) -> int:
        """Number of values that the optimizer stores per parameter, such as Adam's two moments."""
        return (1 if self.momentum else 0) if self.algorithm == "sgd" else 2

    def learning_rate_at(self, progress: float) -> float:
        """Return the learning rate at this fraction of training."""
        if self.milestones:
            return self.learning_rate * step_decay(self.milestones, self.milestone_factor, progress)
        return self.learning_rate * constant_then_cosine(self.constant_lr_fraction, progress)


class TrainingConfig(FrozenConfig):
    """Length of training, batch size and checkpoints."""

    epochs: int = Field(ge=1, description="number of passes over the training images")
    batch_size: int = Field(ge=1, description="samples per step, over all workers")
    checkpoint_interval: int = Field(5, ge=1, description="epochs between checkpoints")
    validation_interval: int = Field(
        1, ge=1, description="epochs between validations, which select the epoch; the last epoch is always validated"
    )
    include_validation: bool = Field(
        False, description="also train on the validation images and select the last epoch; for final runs, after tuning"
    )
    averaging_start: DecayRate | None = Field(
        None,
        description="stochastic weight averaging: fraction of training after which weights are averaged; the averaged "
        "network, with recalibrated running statistics, is validated, selected and certified; null: no averaging",
    )
    averaging_interval: int = Field(10, ge=1, description="steps between two weights that are averaged")
    recalibrate_batch_norm: bool = Field(
        False,
        description="batch normalization in evaluation; false: running averages of training; true: average of the "
        "statistics of batches of clean training images, each normalized by its own, recalibrated for each validation "
        "and for the selected network",
    )

    def is_validated(self, epoch: int) -> bool:
        """Return True if an epoch, from 1, is followed by a validation."""
        return epoch == self.epochs or epoch % self.validation_interval == 0

    @property
    def num_validations(self) -> int:
        """Number of validations of the whole training."""
        return -(-self.epochs // self.validation_interval)


class EvaluationConfig(FrozenConfig):
    """Certifier, attacks and batch size of evaluations."""

    certifier: Annotated[str, KindOf(Certifier, "auto")] = Field(
        "auto", description="certifier; auto: lipschitz for networks with a Lipschitz constant, else ibp"
    )
    sound: bool = Field(
        True, description="true: certificates account for float32 rounding; false: they hold for real arithmetic"
    )
    time_limit: float = Field(
        30.0,
        gt=0,
        description="seconds per image of the certifiers complete and cascade; undecided images count as not certified",
    )
    attack: AttackConfig = AttackConfig()
    batch_size: int = Field(1000, ge=1, description="samples per batch of an evaluation")
    calibration_images: int = Field(
        5000,
        ge=1,
        description="number of training images that recalibrate running statistics before each validation, as SortNet "
        "requires; the selected network is recalibrated on all training images",
    )


class ComputeConfig(FrozenConfig):
    """Workers, CPUs, GPUs and device of a run."""

    workers: int = Field(1, ge=1, le=10_000, description="Ray Train workers; each takes an equal part of every batch")
    cpus_per_worker: int = Field(
        1, ge=1, le=10_000, description="CPUs and threads per worker; bitwise reproducibility depends on it"
    )
    gpus_per_worker: float = Field(
        1.0, gt=0, le=1, description="fraction of a GPU per worker, if there are GPUs; 0.25: four runs share each GPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device; auto: cuda if available, else cpu")
    tensor_cores: bool = Field(
        False,
        description="train hidden dense distance layers at p = 8 and 12 by fp16 matrix products, except SortNet's; "
        "root mean square of relative errors: 1e-5 to 1e-3 in distances, 5e-4 to 2e-2 in gradients; "
        "emulated on CPUs: slower, for tests",
    )


class ExperimentConfig(FrozenConfig):
    """All settings of a run; eps, theta and radii are for pixel values in [0, 1]."""

    method: str = Field(
        "", description="method name in result tables; by default derived from network, objective and bound"
    )
    dataset: str = Field(description="name of the dataset")
    eps: Annotated[float, AsFraction, Field(ge=0, le=1)] = Field(
        description="l_inf radius of attacks and certificates, for pixel values in [0, 1]"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of all random draws: weights, image order, augmentation")
    augmentation: AugmentationConfig = AugmentationConfig()
    model: NetworkConfig
    objective: ObjectiveConfig
    p_schedule: PSchedule = PSchedule()
    eps_schedule: EpsSchedule = EpsSchedule()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    compute: ComputeConfig = ComputeConfig()

    def to_flat_dict(self) -> dict[str, Any]:
        """Return all settings by dotted path, in the order of their definition."""
        return dict(flatten(self.model_dump(mode="json")))

    def descriptions(self) -> dict[str, str]:
        """Return the description of each setting by dotted path, in the order of `to_flat_dict`."""
        return dict(_descriptions(self))

    def to_yaml(self) -> str:
        """Return all settings as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def config_hash(self) -> str:
        """Return a hash of 32 hexadecimal digits that identifies these settings.

        The hash leaves out each setting of `ADDED_SETTINGS` that has the value given there, so that runs of earlier
        versions can be resumed.
        """
        tree = self.model_dump(mode="json")
        for path, value in ADDED_SETTINGS.items():
            *sections, name = path.split(".")
            node: Any = tree
            for section in sections:  # not all kinds of networks and objectives have the setting
                node = node.get(section) if isinstance(node, Mapping) else None
            if isinstance(node, dict) and name in node and node[name] == value:
                del node[name]
        return hashlib.sha256(yaml.safe_dump(tree, sort_keys=False).encode()).hexdigest()[:32]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested settings as pairs of dotted path and value; sections in lists have their position in the path."""
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, list | tuple) and value and all(isinstance(one, Mapping) for one in value):
            value = {str(index): one for index, one in enumerate(value)}
        pairs += flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return pairs


def _descriptions(section: BaseModel, prefix: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        sections = value if isinstance(value, tuple) else ()
        if isinstance(value, BaseModel):
            pairs += _descriptions(value, f"{prefix}{name}.")
        elif sections and all(isinstance(one, BaseModel) for one in sections):
            for index, one in enumerate(sections):
                pairs += _descriptions(one, f"{prefix}{name}.{index}.")
        else:
            pairs.append((prefix + name, field.description or ""))
    return pairs
