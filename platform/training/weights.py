"""Weights files: the tensors of a trained network, its config, and the info of its dataset."""

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linflab.models.networks.layers import Normalize
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import build_config
from linflab.platform.config.own_parts import is_module_name, missing_modules_hint, used_modules
from linflab.platform.data.datasets import MAX_CLASSES, Dataset, dataset_info, load_dataset
from linflab.platform.data.info import DatasetInfo
from linflab.platform.errors import InputError
from linflab.platform.exchange.manifest import verify_file
from linflab.platform.exchange.torch_formats import read_safetensors
from linflab.platform.training.tensors import load_tensors
from linflab.reports.outputs import write_whole
from linflab.reports.renames import current_tree
from linflab.search_spaces.strict_yaml import parse_mapping

MAX_PIXELS = 2**24  # per image; a larger number indicates a damaged file


@dataclass(frozen=True)
class Weights:
    """Content of a weights file.

    Attributes:
        experiment: Config of the training run.
        network: The network, on the CPU and in evaluation mode.
        info: Info of the dataset that the network was trained on; using the network does not require the dataset.
        modules: Names of the modules outside linflab with parts that the training used.
    """

    experiment: ExperimentConfig
    network: nn.Module
    info: DatasetInfo
    modules: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the network's input images."""
        return image_shape(self.experiment, self.info)


def save_weights(path: Path, network: nn.Module, experiment: ExperimentConfig, epoch: int | None) -> None:
    """Write a weights file atomically.

    Args:
        path: File to write.
        network: Trained network.
        experiment: Config of the training run.
        epoch: Selected epoch, if known.

    Raises:
        OSError: If the file cannot be written, or the path exists and is not a regular file.
        InputError: If the dataset is missing, so that its info is not available.
    """
    info = dataset_info(experiment.dataset)
    content = {
        "experiment": experiment.to_yaml(),
        "epoch": epoch,
        "network": {name: tensor.cpu() for name, tensor in network.state_dict().items()},
        "dataset": describe_dataset(experiment.dataset, info),
        "modules": used_modules(experiment),
    }
    write_whole(path, partial(torch.save, content))


def describe_dataset(name: str, info: DatasetInfo) -> dict[str, Any]:
    """Return the info of a dataset that a network needs, as `load_weights` reads it."""
    return {
        "name": name,
        "input_shape": list(info.input_shape),
        "classes": info.classes,
        "mean": list(info.mean),
        "std": info.std,
        "channel_std": list(info.channel_std),
    }


def load_network(path: Path) -> tuple[ExperimentConfig, nn.Module]:
    """Return config and network of a weights file, with the checks of `load_weights`."""
    weights = load_weights(path)
    return weights.experiment, weights.network


def load_weights(path: Path) -> Weights:
    """Read a weights file: `weights.pt` of a run, or an exported `model.safetensors`.

    The dataset is not needed, except for files of earlier versions, which do not contain its info. The objective may
    be of an unknown kind. If the folder of a safetensors file has a manifest, the file must have the manifest's hash.

    Args:
        path: Weights file.

    Raises:
        InputError: If the file cannot be read, differs from its manifest, or is not a weights file of linflab.
        ModuleNotFoundError: If `safetensors` is needed and not installed.
    """
    modules: tuple[str, ...] = ()
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path)
        modules = _read_modules(content.get("modules", []))
        experiment = build_config(current_tree(parse_mapping(content["experiment"])), {}, for_evaluation=True)
        info = _read_dataset_info(content["dataset"]) if "dataset" in content else dataset_info(experiment.dataset)
        with torch.device("meta"):  # the file is untrusted: compare shapes before allocation
            shapes = {name: tensor.shape for name, tensor in build_network(experiment, info).state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in content["network"].items()}:
            raise ValueError("its tensors do not match the network of its config")
        network = build_network(experiment, info)
        network.load_state_dict(content["network"])
        if not all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values()):
            raise ValueError("it has values that are not finite")
        if not all(bool((layer.std > 0).all()) for layer in network.modules() if isinstance(layer, Normalize)):
            raise ValueError("its standard deviation is not positive")
    except InputError as error:
        raise InputError(f"{error}{missing_modules_hint(modules)}") from None
    except ModuleNotFoundError:
        raise
    except Exception as error:  # a damaged file can raise almost any exception
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{path}: must be a weights file of linflab ({reason}); use weights.pt of a run, or an exported "
            "model.safetensors"
        ) from None
    return Weights(experiment, network.eval(), info, modules)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Return the content of an exported file in the form of `weights.pt`."""
    verify_file(path)
    tensors, metadata = read_safetensors(path)
    header = json.loads(metadata["linflab"])
    if "dataset" not in header:
        raise ValueError("it lacks the info of its dataset; export the network again")
    return {
        "experiment": header["config"],
        "dataset": header["dataset"],
        "network": tensors,
        "modules": header.get("modules", []),
    }


def _read_modules(content: Any) -> tuple[str, ...]:
    """Return the valid names of modules in a weights file, which is untrusted; they only serve a hint in messages."""
    return tuple(name for name in content if is_module_name(name)) if isinstance(content, list) else ()


def _read_dataset_info(content: Any) -> DatasetInfo:
    """Return the validated dataset info of a weights file, which is untrusted.

    Raises:
        ValueError: If the content does not describe a dataset.
    """
    shape, classes = tuple(content["input_shape"]), content["classes"]
    mean, std = tuple(map(float, content["mean"])), float(content["std"])
    channel_std = tuple(map(float, content.get("channel_std", ())))  # files of earlier versions lack it
    sizes = (*shape, classes)
    if len(shape) != 3 or not all(type(size) is int and 1 <= size <= MAX_CLASSES for size in sizes):
        raise ValueError(f"images of shape {shape} in {classes} classes are not valid")
    if (
        math.prod(shape) > MAX_PIXELS
        or len(mean) != shape[0]
        or not (std > 0 and all(map(math.isfinite, (*mean, std))))
    ):
        raise ValueError(f"images of shape {shape} with mean {mean} and std {std} are not valid")
    if channel_std and not (len(channel_std) == shape[0] and all(0 <= one < math.inf for one in channel_std)):
        raise ValueError(f"channels with std {channel_std} are not valid")
    info = DatasetInfo(mean, std, (shape[0], shape[1], shape[2]), classes, validation_size=0)
    return dataclasses.replace(info, channel_std=channel_std)


def build_network(experiment: ExperimentConfig, info: DatasetInfo | None = None) -> nn.Module:
    """Build the network of a config, with initial weights.

    Args:
        experiment: All settings.
        info: Info of the config's dataset; None to look it up.

    Raises:
        InputError: If the images are too small for the network, or the dataset is not found.
    """
    info = info or dataset_info(experiment.dataset)
    std = info.select_std(experiment.model.uses_channel_std)
    try:
        return experiment.model.build(image_shape(experiment, info), info.classes, info.mean, std)
    except ValueError as error:
        raise InputError(str(error)) from None


def image_shape(experiment: ExperimentConfig, info: DatasetInfo) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of the network's input images, after augmentation."""
    channels, height, width = info.input_shape
    return (channels, *experiment.augmentation.output_size(height, width))


def load_matching_dataset(weights: Weights) -> Dataset:
    """Return the dataset of a run, whose images must be like those of training.

    Raises:
        InputError: If they are not.
    """
    experiment = weights.experiment
    dataset = load_dataset(experiment.dataset, experiment.augmentation)
    form, expected = (dataset.info.input_shape, dataset.info.classes), (weights.image_shape, weights.info.classes)
    if form != expected:
        raise InputError(
            f"dataset={experiment.dataset}: must have images of shape {expected[0]} and {expected[1]} classes, like "
            f"the training data of the network, not {form[0]} and {form[1]}; use the dataset of the training run"
        )
    return dataset
