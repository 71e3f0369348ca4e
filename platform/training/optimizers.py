"""Optimizers of a config, checks of their stored state, and the l_1 norm of weights."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linflab.platform.config.experiment import OptimizerConfig

ADAM_VARIANTS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "radam": torch.optim.RAdam}


def build_optimizer(
    settings: OptimizerConfig, groups: list[dict[str, Any]], device: torch.device
) -> torch.optim.Optimizer:
    """Return the optimizer of a config.

    Args:
        settings: Algorithm and its settings.
        groups: Parameter groups, each with its weight decay.
        device: Device of the parameters.
    """
    # Multi-tensor steps need memory for copies of all parameters. On a GPU, a fused step is one kernel instead of many
    # small ones per parameter; PyTorch has none for RAdam.
    options: dict[str, Any] = {"foreach": False}
    if settings.algorithm != "radam":
        options["fused"] = device.type == "cuda"
    if settings.algorithm == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, **options)
    return ADAM_VARIANTS[settings.algorithm](groups, betas=settings.betas, eps=settings.adam_epsilon, **options)


def state_shapes(settings: OptimizerConfig, parameter: Tensor) -> dict[str, torch.Size]:
    """Return the shapes of the tensors that the optimizer stores for a parameter, by name."""
    if settings.algorithm == "sgd":
        return {"momentum_buffer": parameter.shape} if settings.momentum else {}
    return {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}


def check_state(settings: OptimizerConfig, optimizer: torch.optim.Optimizer) -> None:
    """Check the state of an optimizer that was read from a checkpoint.

    Raises:
        ValueError: If its tensors do not match the parameters, or its number of steps is impossible.
    """
    for parameter, tensors in optimizer.state.items():
        shapes = {name: tensor.shape for name, tensor in tensors.items() if tensor.is_floating_point()}
        if shapes != state_shapes(settings, parameter) or len(tensors) != len(shapes):
            raise ValueError("the optimizer's moments do not match the network")
        if "step" in shapes and (not (steps := float(tensors["step"])).is_integer() or steps < 1):
            raise ValueError(f"the optimizer has taken {steps:g} steps")


def l1_weights(network: nn.Module, frozen: Collection[nn.Module] = ()) -> list[Tensor]:
    """Return the weights in the l_1 norm: those of linear and convolutional layers, without biases.

    Args:
        network: The network.
        frozen: Layers to leave out.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)]
    return [layer.weight for layer in layers if layer not in frozen]


def l1_norm(weights: Sequence[Tensor]) -> Tensor:
    """Return the l_1 norm of all elements of some tensors (scalar)."""
    return torch.stack([torch.linalg.vector_norm(weight, 1) for weight in weights]).sum()
