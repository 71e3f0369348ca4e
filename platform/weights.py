"""Files of trained weights: the network's tensors, and the experiment that builds the network around them."""

import os
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
import yaml
from torch import nn

from linflab.models.networks.layers import Normalize
from linflab.platform.checkpoints import write_partial
from linflab.platform.config import Experiment, build_experiment
from linflab.platform.datasets import Facts, facts_of
from linflab.platform.errors import SettingError


def save_weights(path: Path, network: nn.Module, experiment: Experiment, epoch: int | None) -> None:
    """Write a network's weights, of this epoch of training, if known; the file is put in place by an atomic rename."""
    state = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    content = {"experiment": experiment.to_yaml(), "epoch": epoch, "network": state}
    os.replace(write_partial(path, partial(torch.save, content)), path)


def load_network(path: Path) -> tuple[Experiment, nn.Module]:
    """The experiment of a file of weights, and its network, in evaluation mode.

    Raises:
        SettingError: the file can't be read, or holds no weights of linflab's.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        experiment = build_experiment(yaml.safe_load(saved["experiment"]), {})
        network = network_of(experiment)
        network.load_state_dict(saved["network"])
        if not all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values()):
            raise ValueError("it holds numbers that are not finite")
        if not all(layer.std > 0 for layer in network.modules() if isinstance(layer, Normalize)):
            raise ValueError("its standard deviation is not positive")
    except SettingError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, UnpicklingError):  # torch's own advice, to load it without a check, is not for here
            reason = "it is no file of torch.save, or holds more than tensors and plain data"
        raise SettingError(f"{path}: can't be read as weights of a linflab network ({reason})") from None
    return experiment, network.eval()


def network_of(experiment: Experiment) -> nn.Module:
    """The network of an experiment, with weights as they are before training.

    Raises:
        SettingError: the images are too small for it.
    """
    facts = facts_of(experiment.dataset)
    try:
        return experiment.model.build(image_shape(experiment, facts), facts.classes, facts.mean, facts.std)
    except ValueError as error:
        raise SettingError(str(error)) from None


def image_shape(experiment: Experiment, facts: Facts) -> tuple[int, int, int]:
    """The shape (C, H, W) of the images that the network of an experiment sees."""
    channels, height, width = facts.input_shape
    return (channels, *experiment.augmentation.size(height, width))
