"""Training of recipes, and access to logged runs."""

import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from linflab.platform.extras import naming_extras

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from linflab.platform.training.loop import EpochMetrics

    Array = Tensor | np.ndarray
    Batches = Iterable[tuple[Array, Array]]  # a DataLoader, for example


@dataclass(frozen=True)
class TrainingResult:
    """A finished training run.

    Attributes:
        network: The selected network, on the CPU and in evaluation mode.
        metrics: Metrics by their MLflow names, such as `test/certified_accuracy`.
        run_id: MLflow run id, accepted by `load` and `linflab evaluate`.
        certificate: Name of the certifier that gave the certified accuracies, such as `lipschitz-sound`.
    """

    network: nn.Module
    metrics: Mapping[str, float]
    run_id: str
    certificate: str


@naming_extras()
def train(
    recipe: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    storage: str | os.PathLike[str] = "runs",
    name: str = "",
    on_epoch: "Callable[[EpochMetrics], None]" = lambda report: None,
) -> TrainingResult:
    """Train a recipe, evaluate the selected network on the test set and log the run, as `linflab train`.

    Args:
        recipe: Name of a shipped recipe, or the path of a YAML file.
        overrides: Settings to replace, such as "model.width=128".
        storage: Storage directory of the tracking store, checkpoints and weights.
        name: Name of the run; by default the name of the recipe.
        on_epoch: Called with the metrics of each epoch.

    Returns:
        The selected network with its metrics and run id.

    Raises:
        InputError: If a setting, the dataset or the storage is invalid. This is checked before training starts.
        TrainingError: If training diverged.
        ModuleNotFoundError: If a package of an extra is not installed; the message has the command that installs it.
    """
    from linflab.platform.config.overrides import load_config
    from linflab.platform.data.datasets import load_dataset
    from linflab.platform.distributed.address import needs_ray
    from linflab.platform.results.load import download_weights
    from linflab.platform.results.publish import log_model_and_figures
    from linflab.platform.tracking.storage import Storage
    from linflab.platform.training.loop import EpochMetrics
    from linflab.platform.training.trainer import check_dataset_compatibility
    from linflab.platform.training.weights import load_weights
    from linflab.platform.trial import (
        TrialRequest,
        TrialResult,
        check_local_resources,
        default_run_name,
        run_trial,
        train_command,
    )
    from linflab.reports import schema

    recipe = os.fspath(recipe)
    experiment = load_config(recipe, overrides)
    check_dataset_compatibility(experiment, load_dataset(experiment.dataset, experiment.augmentation))
    run_storage = Storage.open(Path(storage))
    tags = {schema.KIND: "trial", schema.INVOCATION_ID: uuid.uuid4().hex, schema.RECIPE: recipe,
            schema.COMMAND: train_command(recipe, overrides), schema.MISSING: "model and figures"}  # fmt: skip
    request = TrialRequest(experiment, run_storage, name or default_run_name(recipe, overrides), tags)
    run: Callable[..., TrialResult | None] = run_trial
    if needs_ray(experiment):
        from linflab.platform.distributed.train import start_ray, train_distributed

        start_ray()
        run = train_distributed
    else:
        check_local_resources(experiment)
    result = run(request, lambda report: on_epoch(report) if isinstance(report, EpochMetrics) else None)
    assert result is not None
    log_model_and_figures(run_storage, result.run_id)
    network = load_weights(download_weights(run_storage, result.run_id)).network
    return TrainingResult(network, result.metrics, result.run_id, result.certificate)


@naming_extras()
def load(run_id_or_path: str | os.PathLike[str], storage: str | os.PathLike[str] = "runs") -> nn.Module:
    """Load a trained network; the files of its dataset are not needed.

    Args:
        run_id_or_path: Run id, prefix of a run id, run name, path of a weights file, path or https URL of a folder of
            `linflab export --format safetensors`, `hf://OWNER/NAME` for a repository of the Hugging Face Hub, or
            `pretrained:NAME` for a network that is shipped with linflab.
        storage: Storage directory of the run.

    Returns:
        The network, on the CPU and in evaluation mode.

    Raises:
        InputError: If the run, file, URL or repository does not exist, or the weights cannot be read or differ from
            the hash in their manifest.
        ModuleNotFoundError: If a package of an extra is not installed; the message has the command that installs it.
    """
    from linflab.platform.results.load import find_weights
    from linflab.platform.training.weights import load_weights

    return load_weights(find_weights(os.fspath(run_id_or_path), Path(storage))[0]).network


@naming_extras()
def records(storage: str | os.PathLike[str] = "runs") -> "pd.DataFrame":
    """Return all training runs of a storage directory, newest first.

    Args:
        storage: Storage directory.

    Returns:
        One row for each run, with settings, metrics and tags as columns.

    Raises:
        InputError: If the directory has no tracking store.
        ModuleNotFoundError: If a package of an extra is not installed; the message has the command that installs it.
    """
    from linflab.platform.tracking.storage import Storage
    from linflab.reports import schema
    from linflab.reports.records import read_runs

    return read_runs(Storage.open_existing(Path(storage)).tracking_uri, {schema.KIND: "trial"})
