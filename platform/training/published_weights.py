"""Conversion of the published weights of l_inf-dist nets and SortNet to linflab's weights files.

The published files are `state_dict`s, possibly under the key `state_dict` and with the prefix `module.`. The files of
2021 (v1, dense and convolutional) name layers differently from the files of 2022 (v2 and SortNet). The learned scalar
that multiplies logits during training belongs to the objective and is ignored.
"""

import re
from pathlib import Path

from torch import Tensor

from linflab.models.networks import NetworkConfig
from linflab.models.networks.layers import DistanceLayer, LpDistanceConv2d
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.errors import InputError
from linflab.platform.training.tensors import load_tensors
from linflab.platform.training.weights import build_network, save_weights

# Groups of the pattern: kind of layer; index among layers of this kind (optional for the dense layer after
# convolutions); name of the tensor.
HIDDEN_RULES = r"(?:fc_dist|feature\.(conv|fc))(?:\.([0-9]{1,4}))?\.(weight|(?:mean_shift|normalize)\.running_mean)"
LAST_RULES = [
    (r"feature\.fc_last\.(weight|bias)", r"last.\1"),
    (r"(?:fc_linear\.0|predictor\.fc1)\.(weight|bias)", r"head.0.\1"),
    (r"(?:fc_final|predictor\.fc2)\.(weight|bias)", r"head.2.\1"),
]
IGNORED_KEYS = r"scalar|.*num_batches_tracked"


def import_weights(file: Path, experiment: ExperimentConfig, output: Path) -> int:
    """Convert published weights to a weights file of linflab.

    Args:
        file: Published file.
        experiment: Config of the network.
        output: Weights file to write.

    Returns:
        Number of tensors read.

    Raises:
        InputError: If the file cannot be read, its tensors do not match the network, or `output` cannot be written.
            The message names the difference.
    """
    if not experiment.model.has_distances:
        kinds = [kind for kind, config in NetworkConfig.kinds().items() if config.has_distances]
        raise InputError(f"model.kind={experiment.model.kind}: must be one of {', '.join(kinds)}; use another --recipe")
    network = build_network(experiment)
    state = network.state_dict()
    hybrid = experiment.model.kind == "linf_dist_hybrid"
    last = None if hybrid else sum(isinstance(layer, DistanceLayer) for layer in network.modules()) - 1
    convolutions = sum(isinstance(layer, LpDistanceConv2d) for layer in network.modules())
    tensors = _rename_keys(_read(file), last, convolutions)
    names = [name for name in state if not name.startswith("features.normalize.")]
    missing = [name for name in names if name not in tensors]
    unknown = [name for name in tensors if name not in names]
    if missing or unknown:
        raise InputError(
            f"{file}: must match the network of model.kind={experiment.model.kind} (missing: {_abbreviate(missing)}; "
            f"unknown: {_abbreviate(unknown)}); use another --recipe or model.depth"
        )
    for name in names:
        tensor = tensors[name]
        if not _is_shaped_like(tensor, state[name]):
            raise InputError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, but the network of the recipe requires "
                f"{tuple(state[name].shape)}; use another --recipe or model.width"
            )
        if not tensor.is_floating_point():
            raise InputError(
                f"{file}: {name} has dtype {tensor.dtype}; must have floating-point numbers; use another file"
            )
        state[name].copy_(tensor.reshape(state[name].shape))
        if not state[name].isfinite().all():
            raise InputError(f"{file}: {name} has values that are not finite in float32; use another file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError("it is a directory")
        save_weights(output, network, experiment, epoch=None)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError
        raise InputError(f"output={output}: cannot be written ({error}); use another path") from None
    return len(names)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        state = load_tensors(file)
        state = state.get("state_dict", state)
        tensors = {str(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    except (ValueError, AttributeError) as error:
        reason = "it is not a mapping" if isinstance(error, AttributeError) else error
        raise InputError(f"{file}: must be a state_dict written by torch.save ({reason}); use another file") from None
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _is_shaped_like(tensor: Tensor, target: Tensor) -> bool:
    """Return True if shapes are equal, except for dimensions of size 1 and flattened filters."""
    sizes = [size for size in tensor.shape if size != 1]
    flat = target.flatten(1) if target.dim() > 1 else target
    return any(sizes == [size for size in shape if size != 1] for shape in (target.shape, flat.shape))


def _rename_keys(tensors: dict[str, Tensor], last: int | None, convolutions: int) -> dict[str, Tensor]:
    """Return the tensors under linflab's names.

    Args:
        tensors: Tensors under the authors' names.
        last: Index of the net's last distance layer; None for networks of kind `linf_dist_hybrid`.
        convolutions: Number of distance convolutions before the dense layers.
    """
    rules = LAST_RULES if last is None else [(rf"fc_dist\.{last}\.(weight|bias)", r"last.\1"), *LAST_RULES]
    new_tensors = {}
    for name, tensor in tensors.items():
        if re.fullmatch(IGNORED_KEYS, name):
            continue
        new_name = next(
            (re.sub(pattern, replacement, name) for pattern, replacement in rules if re.fullmatch(pattern, name)), name
        )
        if new_name == name and (parts := re.fullmatch(HIDDEN_RULES, name)):
            number = int(parts[2] or 0) + (0 if parts[1] == "conv" else convolutions)
            template = "distances.{}.weight" if parts[3] == "weight" else "shifts.{}.running_mean"
            new_name = f"features.{template.format(number)}"
        new_name = "bias" if new_name == "last.bias" else new_name
        new_tensors[name if new_name in new_tensors else new_name] = (
            tensor  # a duplicate keeps its name and is reported as unknown
        )
    return new_tensors


def _abbreviate(names: list[str]) -> str:
    suffix = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + suffix if names else "nothing"
