"""Base classes of attacks, and their shared settings."""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from linflab.models.registry import Kind, KindOf
from linflab.models.robustness.attacks.linf_ball import LinfBall
from linflab.models.robustness.margins import logit_differences


class AttackMethod(Kind, ABC):
    """An attack, or a suite of several, selected by its `kind`.

    A subclass that defines `kind` is accepted wherever attacks are selected.

    Args:
        config: Attack settings; each method uses those that apply to it.
    """

    def __init__(self, config: "AttackConfig") -> None:
        self.config = config

    @abstractmethod
    def describe(self) -> str:
        """Return the method with its settings, as text for table notes."""

    @abstractmethod
    def attacks(self) -> list["Attack"]:
        """Return the attacks of the method, in the order in which they run."""


class Attack(AttackMethod):
    """An attack that runs several times, each time on the images that are still classified correctly.

    Attributes:
        follows_surrogate: True if distance layers use surrogate gradients during the attack.
        effort: Name of the setting that is proportional to the time of a run.
    """

    follows_surrogate: ClassVar[bool] = True
    effort: ClassVar[str] = "steps"

    def describe(self) -> str:
        """Return the attack with its settings, as text for table notes."""
        return f"{self.kind} ({self.steps}, {self.restarts})"

    @property
    def steps(self) -> str:
        """Number of steps, as text."""
        return f"{self.config.steps} step{'s' * (self.config.steps > 1)}"

    @property
    def restarts(self) -> str:
        """Number of restarts, as text."""
        return f"{self.config.restarts} restart{'s' * (self.config.restarts > 1)}"

    def attacks(self) -> list["Attack"]:
        """Return the attack itself, in a list."""
        return [type(self)(self.config.model_copy(update={"methods": (self.kind,)}))]

    def count_runs(self, classes: int) -> int:
        """Return the number of runs on a network with this number of logits."""
        return self.config.restarts

    @abstractmethod
    def run(
        self, network: nn.Module, ball: LinfBall, labels: Tensor, eps: float, generator: torch.Generator, number: int
    ) -> Tensor:
        """Return which images (B,) are misclassified at any point that the attack visited in their ball.

        Args:
            network: Network in evaluation mode.
            ball: Perturbation sets of images (B, C, H, W) or (B, D).
            labels: (B,) true classes.
            eps: Radius of the balls, for pixel values in [0, 1].
            generator: CPU generator for all random draws.
            number: Index of the run, from 0.
        """


class TargetedAttack(Attack):
    """An attack that targets one wrong class after another, in descending order of their logits."""

    @property
    def targets(self) -> str:
        """Number of target classes, as text."""
        return f"up to {self.config.target_classes} class{'es' * (self.config.target_classes > 1)}"

    def count_runs(self, classes: int) -> int:
        """Return the number of runs: target classes times restarts."""
        return min(self.config.target_classes, classes - 1) * self.config.restarts

    def choose_targets(self, network: nn.Module, ball: LinfBall, labels: Tensor, number: int) -> Tensor:
        """Return the target classes (B,) of a run."""
        with torch.no_grad():
            differences = logit_differences(network(ball.center), labels)
        return differences.argsort(dim=1, descending=True)[:, number // self.config.restarts]


class AttackConfig(BaseModel):
    """Settings of attacks: which attacks run, and for how long.

    The tables of Zhang et al. use PGD with step size eps/4: 20 steps in 2021, 100 steps in 2022.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[Annotated[str, KindOf(AttackMethod)], ...] | None = Field(
        None,
        min_length=1,
        description="attacks, each on the images that are still classified correctly; null: [pgd, surrogate_pgd] for "
        "networks with distance layers, [pgd, targeted_apgd] for others",
    )
    steps: int = Field(20, ge=1, description="gradient steps per restart; autoattack always uses 100")
    restarts: int = Field(1, ge=1, description="random starts per attack; one success counts as an adversarial example")
    rel_step_size: float = Field(0.25, gt=0, allow_inf_nan=False, description="step size of PGD, as a fraction of eps")
    surrogate_p: float = Field(
        32,
        ge=1,
        allow_inf_nan=False,
        description="p of the surrogate gradients of distance layers, used by all attacks except pgd and square",
    )
    target_classes: int = Field(
        9, ge=1, description="number of wrong classes tried by targeted attacks and fab, closest first"
    )
    queries: int = Field(1000, ge=1, description="network evaluations per image by square; autoattack always uses 5000")

    @field_validator("methods")
    @classmethod
    def _check_unique(cls, kinds: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if kinds is not None and len(set(kinds)) < len(kinds):
            raise ValueError(f"{', '.join(kinds)}: must contain each attack only once; remove the duplicates")
        return kinds

    def describe(self) -> str:
        """Return the attacks with their settings, as text for table notes."""
        if self.methods is None:
            return "the default attacks of the network's kind"
        return "; ".join(AttackMethod.registry[kind](self).describe() for kind in self.methods)

    def attacks(self) -> list[Attack]:
        """Return the single attacks in the order in which they run; `autoattack` is expanded into four.

        Raises:
            ValueError: If `methods` is None, since the defaults depend on the network.
        """
        if self.methods is None:
            raise ValueError("methods=None: must be a list of attacks; use `default_attacks(network)`")
        return [attack for kind in self.methods for attack in AttackMethod.registry[kind](self).attacks()]
