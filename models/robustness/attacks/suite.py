"""Which attacks run, and what withstands all of them. What they fail to break is not proven robust, only not broken."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from linflab.models.robustness.attacks.apgd import apgd
from linflab.models.robustness.attacks.ball import Ball, ball
from linflab.models.robustness.attacks.pgd import pgd
from linflab.models.robustness.attacks.square import square
from linflab.models.robustness.attacks.surrogate import dense_gradients
from linflab.models.robustness.objectives import margin, wrong_class_margins

Attack = Literal["pgd", "surrogate_pgd", "apgd", "targeted_apgd", "square"]
ATTACKS: tuple[Attack, ...] = get_args(Attack)


class AttackConfig(BaseModel):
    """Which attacks run and how long. The tables of Zhang et al. use PGD of 20 steps of eps/4 (2021), of 100 (2022)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kinds: tuple[Attack, ...] = Field(
        ("pgd", "surrogate_pgd"), min_length=1, description="each attacks what those before it have not broken"
    )
    steps: int = Field(20, ge=1, description="gradient steps of each restart")
    restarts: int = Field(1, ge=1, description="random starts; an image counts as broken when one of them breaks it")
    step_size: float = Field(0.25, gt=0, allow_inf_nan=False, description="length of PGD's steps, as a share of eps")
    surrogate_p: float = Field(
        32, ge=1, allow_inf_nan=False, description="p of the distances whose gradients all but pgd and square follow"
    )
    targets: int = Field(9, ge=1, description="classes that targeted_apgd tries one by one, the closest first")
    queries: int = Field(1000, ge=1, description="points that square looks at")

    @field_validator("kinds")
    @classmethod
    def _each_once(cls, kinds: tuple[Attack, ...]) -> tuple[Attack, ...]:
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"{', '.join(kinds)}: each can be named once")
        return kinds

    def describe(self) -> str:
        """What runs, in words."""
        starts = f"{self.restarts} restart{'s' * (self.restarts > 1)}"
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        ways = {
            "pgd": f"PGD ({steps} of {self.step_size:g} eps, {starts})",
            "surrogate_pgd": f"PGD by gradients at p = {self.surrogate_p:g} ({steps} of "
            f"{self.step_size:g} eps, {starts})",
            "apgd": f"APGD on the margin ({steps}, {starts})",
            "targeted_apgd": f"targeted APGD (up to {self.targets} classes, {steps}, {starts})",
            "square": f"Square ({self.queries} queries)",
        }
        return "; ".join(ways[kind] for kind in self.kinds)


def withstands(
    network: nn.Module, images: Tensor, labels: Tensor, eps: float, config: AttackConfig, generator: torch.Generator
) -> Tensor:
    """Which images keep their right class under all attacks, within eps and [0, 1], at p = inf in evaluation mode.

    Args:
        network: in evaluation mode.
        images: (B, C, H, W) in pixels of [0, 1].
        labels: (B), the right classes.
        eps: radius of the l_inf ball, in pixels.
        config: which attacks, and how long they run.
        generator: what chance decides comes from it, on the CPU.

    Returns:
        (B) bool: True where the right class won at every point visited, the image itself included; a tie is no win.

    Raises:
        ValueError: the network is in training mode, where outputs depend on the batch.
    """
    if any(module.training for module in network.modules()):
        raise ValueError("attacks need the network in evaluation mode: call network.eval() first")
    with torch.no_grad():
        robust = margin(network(images), labels) > 0
    for kind in config.kinds:
        with nullcontext() if kind in ("pgd", "square") else dense_gradients(network, config.surrogate_p):
            for attack in _starts(kind, network, eps, config, generator):
                alive = robust.nonzero()[:, 0]
                if len(alive):
                    robust[alive[attack(ball(images[alive], eps), labels[alive])]] = False
    return robust


def _starts(
    kind: Attack, network: nn.Module, eps: float, config: AttackConfig, generator: torch.Generator
) -> list[Callable[[Ball, Tensor], Tensor]]:
    """An attack from each of its starts: from a ball and its labels to what is broken."""
    if kind == "square":
        return [lambda around, labels: square(network, around, labels, config.queries, generator)]

    def pgd_from(start: int) -> Callable[[Ball, Tensor], Tensor]:
        loss: Literal["cross_entropy", "margin"] = "margin" if start % 2 else "cross_entropy"
        step = config.step_size * eps
        return lambda around, labels: pgd(network, around, labels, loss, config.steps, step, generator)

    def apgd_to(rank: int | None) -> Callable[[Ball, Tensor], Tensor]:
        def attack(around: Ball, labels: Tensor) -> Tensor:
            targets = None
            if rank is not None:
                with torch.no_grad():
                    ahead = wrong_class_margins(network(around.centre), labels)
                if rank >= ahead.shape[1] - 1:  # there are no more wrong classes
                    return torch.zeros_like(labels, dtype=torch.bool)
                targets = ahead.argsort(dim=1, descending=True)[:, rank]
            return apgd(network, around, labels, targets, config.steps, eps, generator)

        return attack

    if kind in ("pgd", "surrogate_pgd"):
        return [pgd_from(start) for start in range(config.restarts)]
    return [
        apgd_to(rank)
        for rank in (range(config.targets) if kind == "targeted_apgd" else [None])
        for _ in range(config.restarts)
    ]
