"""Base classes of training objectives: settings, and the loss of a batch.

Notation: z are the logits (B, K), and L is the Lipschitz constant of the network in the l_inf norm of the pixel values.
m_j = z_j - z_y are the logit differences. The margin -max_j m_j certifies the radius -max_j m_j / (2 L), for pixel
values in [0, 1]. The hinge threshold theta is the target certified radius: m_j + 2 L theta is positive while the
certified radius is below theta. The worst-case logit differences M_j bound m_j from above over the eps-ball.

lambda is the weight of the cross entropy. eps is the current radius of the eps schedule, which ends at `eps_train`.
"""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from linflab.models.networks.linf_dist import InputMasks, logits_at
from linflab.models.numbers import AsFraction
from linflab.models.registry import KindConfig

PositiveFiniteFloat = Annotated[float, AsFraction, Field(gt=0, allow_inf_nan=False)]
EpsValue = Annotated[float, AsFraction, Field(gt=0, le=1)]
UnitInterval = Annotated[float, AsFraction, Field(ge=0, le=1)]


class Batch(NamedTuple):
    """Inputs of a training step.

    Attributes:
        images: (B, C, H, W), pixel values in [0, 1].
        labels: (B,) true classes.
        p: Exponent of the distance layers.
        masks: Input masks of SortNet's neurons; None for other networks.
        cross_entropy_weight: lambda; 0 for objectives that do not use it.
        eps: Radius of the attack or of the worst case, for pixel values in [0, 1]; 0 for objectives without either.
        starts: (B, ...) random numbers in [0, 1] that select starting points of attacks, such as (B, C, H, W), or (B,
            R, C, H, W) for R restarts; None without attacks, and if eps is 0.
        progress: Fraction of training that is done, in [0, 1).
        seed: Seed of further random draws, which are made on the device of the images; equal for all workers.
        rank: Index of this data-parallel worker, from 0. Its images are every `workers`-th sample from this one on.
        workers: Number of data-parallel workers that share the batch equally.
    """

    images: Tensor
    labels: Tensor
    p: float
    masks: InputMasks | None
    cross_entropy_weight: float
    eps: float
    starts: Tensor | None
    progress: float = 0.0
    seed: int = 0
    rank: int = 0
    workers: int = 1

    def draw_uniform(self, shape: Sequence[int]) -> Tensor:
        """Return uniform random numbers (B, *shape) in [0, 1] by the seed, on the device of the images.

        Numbers of the whole batch are drawn, and those of this worker's samples returned, in the dtype of the images.
        """
        images, size = self.images, (len(self.images) * self.workers, *shape)
        generator = torch.Generator(images.device).manual_seed(self.seed)
        numbers = torch.rand(size, generator=generator, dtype=torch.float32, device=images.device)
        return numbers[self.rank :: self.workers].to(images.dtype)


class Objective(nn.Module):
    """Training loss; by default, subclasses define it as a function `forward` (logits, labels, lambda)."""

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a network in training mode, a scalar.

        Args:
            network: Network in training mode.
            batch: Inputs of the training step.
        """
        return self(logits_at(network, batch.images, batch.p, batch.masks), batch.labels, batch.cross_entropy_weight)

    def prepare(self, network: nn.Module, input_shape: Sequence[int]) -> None:
        """Create the parameters that depend on the network, before the optimizer is created; none by default.

        Args:
            network: The network to train.
            input_shape: Shape of an image, (C, H, W).
        """

    def frozen_layers(self, progress: float) -> Collection[nn.Module]:
        """Return the layers of the network that get no gradients at this fraction of training; none by default."""
        return ()

    def draw_starts(self, shape: Sequence[int], generator: torch.Generator) -> Tensor | None:
        """Return `Batch.starts`, random numbers that select starting points; None for objectives without attacks.

        Args:
            shape: Shape of the batch, (B, C, H, W).
            generator: CPU generator.
        """
        return None


class ObjectiveConfig(KindConfig):
    """Settings of an objective.

    A subclass that defines `kind` is accepted wherever an objective is selected.

    Attributes:
        needs_lipschitz: True if the loss requires a network that is Lipschitz by construction.
        needs_relu: True if the loss requires a network with ReLUs.
        attacks: True if the loss is computed on adversarial examples.
        freezes_layers: True if some parameters get no gradients in some steps.
    """

    needs_lipschitz: ClassVar[bool] = False
    needs_relu: ClassVar[bool] = False
    attacks: ClassVar[bool] = False
    freezes_layers: ClassVar[bool] = False

    def check_network(self, network: nn.Module, input_shape: Sequence[int]) -> None:
        """Check that the objective supports a network, before training; by default, nothing is checked.

        Args:
            network: The network to train, possibly on the device `meta`.
            input_shape: Shape of an image, (C, H, W).

        Raises:
            TypeError: If the objective's bounds do not support a layer.
            ValueError: If a setting of the objective does not fit the network; the message starts with the setting.
        """

    def learning_rate_factor(self, progress: float) -> float:
        """Return the factor of the scheduled learning rate at this fraction of training; 1 by default."""
        return 1.0

    def eps_factor(self, progress: float) -> float:
        """Return the factor of the scheduled eps at this fraction of training; 1 by default."""
        return 1.0

    @abstractmethod
    def build(self, lipschitz_constant: float) -> Objective:
        """Build the objective.

        Args:
            lipschitz_constant: Lipschitz constant of the network in the l_inf norm of the pixel values; NaN for
                networks without one.
        """


class LambdaDecayConfig(ObjectiveConfig):
    """Settings of the cross-entropy weight lambda, which decays exponentially along the p schedule."""

    lambda_start: PositiveFiniteFloat = Field(
        0.05, description="cross-entropy weight lambda at the start of the p schedule"
    )
    lambda_end: PositiveFiniteFloat = Field(
        0.0005, description="cross-entropy weight lambda at the end of the p schedule"
    )
