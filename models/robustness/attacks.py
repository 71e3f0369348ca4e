"""Attacks: perturbations found by search. What they fail to break is not proven robust, only not broken."""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.robustness.objectives import margin


class PGDConfig(BaseModel):
    """Settings of `pgd`. The tables of Zhang et al. use 20 steps of eps/4 (2021) and 100 steps (2022)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(20, ge=1, description="gradient steps of each restart")
    restarts: int = Field(1, ge=1, description="random starts; an image counts as broken when one of them breaks it")
    step_size: float = Field(0.25, gt=0, allow_inf_nan=False, description="length of a step, as a share of eps")


def pgd(
    network: nn.Module, images: Tensor, labels: Tensor, eps: float, config: PGDConfig, generator: torch.Generator
) -> Tensor:
    """Projected gradient descent at p = inf (Madry et al. 2018): which images withstand it.

    Restarts alternate between ascending the cross entropy and the margin max_j z_j - z_y; each begins at a random
    point of the ball and keeps to the ball and to [0, 1]. The network is attacked as it is certified: at p = inf, in
    evaluation mode.

    Args:
        network: in evaluation mode.
        images: (B, C, H, W) in pixels of [0, 1].
        labels: (B), the right classes.
        eps: radius of the l_inf ball, in pixels.
        config: steps, restarts and step size.
        generator: the source of the random starts, on the CPU, so that every device draws the same.

    Returns:
        (B) bool: True where the right class won at every point visited, the image itself included; a tie is no win.

    Raises:
        ValueError: the network is in training mode, where outputs depend on the batch.
    """
    if network.training:
        raise ValueError("attacks need the network in evaluation mode: call network.eval() first")
    with torch.no_grad():
        robust = margin(network(images), labels) > 0
    for restart in range(config.restarts):
        alive = robust.nonzero()[:, 0]
        if len(alive) == 0:
            break
        clean, target = images[alive], labels[alive]
        low, high = (_within(clean, shift).clamp(0, 1) for shift in (-eps, eps))
        noise = torch.rand(clean.shape, generator=generator).to(clean)
        attacked = low + (high - low) * noise
        broken = torch.zeros_like(target, dtype=torch.bool)
        for step in range(config.steps + 1):
            attacked = attacked.detach().requires_grad_()
            logits = network(attacked)
            broken |= margin(logits.detach(), target) <= 0
            if step == config.steps or bool(broken.all()):
                break
            if restart % 2 == 0:
                gain = functional.cross_entropy(logits, target, reduction="sum")
            else:
                gain = -margin(logits, target).sum()
            (gradient,) = torch.autograd.grad(gain, attacked)
            attacked = attacked.detach() + config.step_size * eps * gradient.sign()
            attacked = torch.clamp(attacked, min=low, max=high)
        robust[alive[broken]] = False
    return robust


def _within(images: Tensor, shift: float) -> Tensor:
    """images + shift, rounded towards the images: no further from them than |shift|, exactly."""
    exact = images.double() + shift
    nearest = exact.to(images.dtype)
    beyond = (nearest.double() - exact) * shift > 0
    return torch.where(beyond, torch.nextafter(nearest, images), nearest)
