"""Settings that earlier versions lack: their configs and runs do not contain them."""

from collections.abc import Mapping
from typing import Any

# Values that correspond to the behavior of earlier versions, as plain data. A path can lead to a section; its value is
# then null or a mapping.
ADDED_SETTINGS: Mapping[str, Any] = {
    "augmentation.gamma_range": 0.0,
    "compute.tensor_cores": False,
    "evaluation.time_limit": 30.0,
    "model.mirror": [],
    "model.per_channel_std": False,
    "model.weights": [],
    "model.variant": "xu2020",
    "optimizer.algorithm": "adamw",
    "optimizer.l1_weight": 0.0,
    "optimizer.milestone_factor": 0.2,
    "optimizer.milestones": [],
    "optimizer.momentum": 0.9,
    "training.averaging_interval": 10,
    "training.validation_interval": 1,
    "training.averaging_start": None,
    "training.recalibrate_batch_norm": False,
}


def _texts(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    texts: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            texts |= _texts(value, f"{prefix}{name}.")
        else:
            texts[f"{prefix}{name}"] = str(value)
    return texts


# Texts that runs of earlier versions would have logged as parameters, by dotted path.
ADDED_TEXTS: Mapping[str, str] = _texts(ADDED_SETTINGS)
