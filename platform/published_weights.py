"""The weights that the authors of l_inf-dist nets and SortNet published, as files of weights of linflab.

Their files are `state_dict`s, possibly under the key `state_dict` and with names that begin with `module.`; those of
2021 (v1) name layers otherwise than those of 2022 (v2 and SortNet). The learnt scalar that multiplies logits in their
training belongs to the objective, and is left out.
"""

import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from linflab.models.networks.layers import DistanceLayer
from linflab.platform.config import DISTANCE_NETS, Experiment
from linflab.platform.errors import SettingError
from linflab.platform.weights import network_of, save_weights

HIDDEN = [  # their names (K counts layers) -> ours
    (r"(?:fc_dist|feature\.fc)\.(\d+)\.weight", r"features.distances.\1.weight"),
    (r"fc_dist\.(\d+)\.mean_shift\.running_mean", r"features.shifts.\1.running_mean"),
    (r"feature\.fc\.(\d+)\.normalize\.running_mean", r"features.shifts.\1.running_mean"),
]
LAST = [
    (r"feature\.fc_last\.(weight|bias)", r"last.\1"),
    (r"(?:fc_linear\.0|predictor\.fc1)\.(weight|bias)", r"head.0.\1"),
    (r"(?:fc_final|predictor\.fc2)\.(weight|bias)", r"head.2.\1"),
]
LEFT_OUT = r"scalar|.*num_batches_tracked"


def import_weights(file: Path, experiment: Experiment, output: Path) -> int:
    """Write published weights as those of the network of an experiment; returns the number of tensors read.

    Raises:
        SettingError: the file can't be read, or its tensors are not those of the network; names what differs.
    """
    if experiment.model.kind not in DISTANCE_NETS:
        raise SettingError(
            f"recipe: its model.kind={experiment.model.kind}; weights can be read of {', '.join(DISTANCE_NETS)}"
        )
    network = network_of(experiment)
    wanted = network.state_dict()
    hybrid = experiment.model.kind == "linf_dist_hybrid"
    last = None if hybrid else sum(isinstance(layer, DistanceLayer) for layer in network.modules()) - 1
    found = _renamed(_read(file), last)
    given = [name for name in wanted if not name.startswith("features.normalize.")]
    missing = [name for name in given if name not in found]
    unknown = [name for name in found if name not in given]
    if missing or unknown:
        raise SettingError(
            f"{file}: is not of such a network (model.kind={experiment.model.kind}): it lacks {_few(missing)} and has "
            f"{_few(unknown)} besides; another --recipe, or another model.depth, may fit"
        )
    for name in given:
        tensor = found[name]
        if tensor.numel() != wanted[name].numel() or tensor.shape[0] != (wanted[name].shape or (1,))[0]:
            raise SettingError(
                f"{file}: {name} is {tuple(tensor.shape)}, and {tuple(wanted[name].shape)} in the recipe's network"
            )
        if not tensor.isfinite().all():
            raise SettingError(f"{file}: {name} holds numbers that are not finite")
        wanted[name].copy_(tensor.view_as(wanted[name]))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError("it is a folder")
        save_weights(output, network, experiment, epoch=None)
    except (OSError, RuntimeError) as error:  # torch's own for files
        raise SettingError(f"output={output}: can't be written ({error})") from None
    return len(given)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # a damaged file can raise nearly anything
        reason = " ".join(str(error).split()).split(". ")[0]
        if isinstance(error, UnpicklingError):  # torch's own advice, to load it without a check, is not for here
            reason = "it is no file of torch.save, or holds more than tensors"
        raise SettingError(f"{file}: can't be read as a state_dict ({reason})") from None
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _renamed(tensors: dict[str, Tensor], last: int | None) -> dict[str, Tensor]:
    """The tensors by our names; `last` is the number of the net's last distance layer, None for hybrids."""
    rules = LAST + HIDDEN
    if last is not None:
        rules = [(rf"fc_dist\.{last}\.(weight|bias)", r"last.\1"), *rules]
    found = {}
    for name, tensor in tensors.items():
        if re.fullmatch(LEFT_OUT, name):
            continue
        ours = next((re.sub(theirs, to, name) for theirs, to in rules if re.fullmatch(theirs, name)), name)
        found["bias" if ours == "last.bias" else ours] = tensor
    return found


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing"
