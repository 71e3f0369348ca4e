"""Logging of a run's model in MLflow's format, and of its figures.

Single runs and the best trial of a sweep get a model and figures. Other trials do not, since the weights of a network
as large as the published ones take hundreds of megabytes.
"""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from mlflow.entities import LoggedModelOutput
from mlflow.tracking import MlflowClient
from torch import nn

from linflab.models.robustness.certification import default_certifier, lipschitz_radius
from linflab.platform.data.datasets import Split, load_dataset
from linflab.platform.results.load import download_weights
from linflab.platform.tracking.mlflow import call_with_retry, retrying_client
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.evaluation import batch_indices
from linflab.platform.training.weights import load_network
from linflab.platform.trial import checkpoint_store, select_evaluation_device
from linflab.reports import schema
from linflab.reports.figures import (
    certified_accuracy_curve,
    learning_curves,
    margin_cdf,
    radius_histogram,
    save_figure,
)
from linflab.reports.outputs import write_columns
from linflab.reports.pages import Page
from linflab.reports.records import read_metric_history, read_runs, read_trials
from linflab.reports.rendering import to_markdown
from linflab.reports.sweep_tables import rank_trials as trials_in_order
from linflab.reports.tables import Table

GUIDE = "docs/how-to/report.md"
MAX_DESCRIPTION_CHARS = 8000  # MLflow truncates longer tags
MAX_NOTES = 5  # table notes in a description


def log_model_and_figures(storage: Storage, run_id: str) -> None:
    """Log the model of a finished run, and figures of its training and certificates.

    `mlflow.pytorch.load_model` loads the model. If the network is Lipschitz by construction, the half margins of all
    training images are logged too, as CSV and figure. If the run has certified radii of all test images, figures of
    these radii are logged too. A run that already has a model and figures is not changed. If an earlier call was
    interrupted, the missing files are added.

    Args:
        storage: Storage of the run.
        run_id: Run id.

    Raises:
        InputError: If the run has no weights, or its dataset is missing.
        RunLockedError: If another process trains the run or logs to it.
    """
    client, checkpoints = retrying_client(storage), checkpoint_store(storage, run_id)
    with checkpoints.lock():
        # The tag MISSING marks runs with missing files. Trials of a sweep and runs of earlier versions do not have the
        # tag, so look for figures, which are logged last and one by one.
        unfinished = schema.MISSING in client.get_run(run_id).data.tags
        if unfinished or not _files(client, run_id) - {schema.RADII_FILE}:
            if not unfinished:
                client.set_tag(run_id, schema.MISSING, "model and figures")
            _add_model_and_figures(storage, client, run_id)
            client.delete_tag(run_id, schema.MISSING)
    checkpoints.remove()


def _add_model_and_figures(storage: Storage, client: MlflowClient, run_id: str) -> None:
    experiment, network = load_network(download_weights(storage, run_id))
    device = select_evaluation_device(experiment)  # the process that trained on CUDA may be on another machine
    dataset = load_dataset(experiment.dataset, experiment.augmentation).to(device)
    network = network.to(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / schema.FIGURES_DIR
        folder.mkdir()
        save_figure(
            learning_curves(read_metric_history(client, run_id), f"{experiment.method} on {experiment.dataset}"),
            folder,
            "learning_curves",
        )
        size = experiment.evaluation.batch_size
        if default_certifier(network) == "lipschitz":
            splits = [dataset.train] + ([dataset.validation] if experiment.training.include_validation else [])
            margins = np.concatenate([_half_margins(network, split, size, sound=False) for split in splits])
            write_columns(folder / schema.MARGINS_FILE, {"half_margin": margins.tolist()})
            save_figure(margin_cdf(margins, experiment.eps, experiment.dataset), folder, "training_margins")
        if schema.RADII_FILE in _files(client, run_id):  # the evaluation computed radii
            file = client.download_artifacts(run_id, f"{schema.FIGURES_DIR}/{schema.RADII_FILE}")
            radii = pd.read_csv(file, float_precision="round_trip")["certified_radius"].to_numpy()
            certifier = client.get_run(run_id).data.tags[schema.CERTIFIER]
            save_figure(
                certified_accuracy_curve(radii, experiment.dataset, certifier, robust={}), folder, "certified_accuracy"
            )
            save_figure(radius_histogram(radii, experiment.dataset, certifier), folder, "radius_histogram")
        positions = torch.arange(2, device=dataset.test.indices.device) % len(
            dataset.test
        )  # the test set may have only one image
        images, _ = dataset.test.batch(positions)
        export_model(network.cpu(), images.cpu(), Path(name) / schema.MODEL)
        _log_model(client, run_id, Path(name) / schema.MODEL)
        client.log_artifacts(run_id, str(folder), schema.FIGURES_DIR)


def _files(client: MlflowClient, run_id: str) -> set[str]:
    """Return the names of a run's figures and their CSV files."""
    return {Path(file.path).name for file in client.list_artifacts(run_id, schema.FIGURES_DIR)}


def _log_model(client: MlflowClient, run_id: str, folder: Path) -> None:
    run = client.get_run(run_id)
    if run.outputs is not None and run.outputs.model_outputs:  # an interrupted attempt logged the model
        return
    experiment = run.info.experiment_id
    # Delete partial models of interrupted attempts.
    for partial in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        client.delete_logged_model(partial.model_id)
    model = client.create_logged_model(experiment, schema.MODEL, source_run_id=run_id)
    client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])


def log_sweep_report(storage: Storage, name: str, page: Page) -> None:
    """Log the report of a finished sweep to its parent run, with the first rows as the run's description.

    The model and figures of the sweep's best trial are logged too.

    Args:
        storage: Storage of the sweep.
        name: Name of the sweep.
        page: Report of the sweep.

    Raises:
        InputError: If the best trial has no weights, or its dataset is missing.
        RunLockedError: If another process trains the best trial or logs to it.
    """
    client = retrying_client(storage)
    filters = {schema.KIND: "sweep", schema.SWEEP: name}
    parents = call_with_retry(lambda: read_runs(storage.tracking_uri, filters))
    for path in page.files:
        client.log_artifact(parents["run_id"].iloc[0], str(path), schema.REPORT_DIR)
    client.set_tag(parents["run_id"].iloc[0], schema.DESCRIPTION, truncated_description(page.table))
    best = trials_in_order(call_with_retry(lambda: read_trials(storage.tracking_uri, name))).iloc[0]
    if best["status"] == "FINISHED":
        log_model_and_figures(storage, best["run_id"])


def truncated_description(table: Table) -> str:
    """Return the first rows of a table as Markdown, as many as fit into MLflow's description of a run."""
    # A row contains a command and so has more than 100 characters, which limits the number of rows to try.
    for rows in range(min(len(table.rows), MAX_DESCRIPTION_CHARS // 100), 0, -1):
        num_omitted = len(table.rows) - rows
        notes = (
            *table.notes[:MAX_NOTES],
            *([f"{num_omitted} more rows are in the artifacts."] if num_omitted else []),
            f"{GUIDE} describes tables and figures.",
        )
        short_table = Table(table.title, table.columns, table.rows[:rows], notes)
        text = to_markdown(short_table)
        if len(text) <= MAX_DESCRIPTION_CHARS:
            return text
    return table.title


def _half_margins(network: nn.Module, split: Split, batch_size: int, sound: bool) -> np.ndarray:
    radii = [
        lipschitz_radius(network, *split.batch(positions), sound).cpu()
        for positions in batch_indices(split, batch_size)
    ]
    return torch.cat(radii).double().numpy()


def export_model(network: nn.Module, images: torch.Tensor, path: Path) -> None:
    """Save a network in MLflow's format, as a torch.export graph, which is data without code.

    Args:
        network: Network in evaluation mode, on the CPU.
        images: Example input (B, C, H, W).
        path: Directory to write.
    """
    import mlflow.pytorch
    from mlflow.models import infer_signature

    with torch.no_grad():
        outputs = network(images)
    for name in ("mlflow", "torch.export"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), _without_requirement_check():
        warnings.simplefilter("ignore")
        mlflow.pytorch.save_model(
            network,
            path,
            signature=infer_signature(images.numpy(), outputs.numpy()),
            input_example=images.numpy(),
            pip_requirements=["linflab"],  # the graph needs ops of linflab.models.distance to load
        )


@contextmanager
def _without_requirement_check() -> Iterator[None]:
    """Make MLflow not compare a model's requirements with the installed packages.

    This takes about 5 seconds, most of the time of saving a model, to list the files of all packages. MLflow only logs
    the result as a warning, which `export_model` hides.
    """
    from mlflow.utils import environment

    name = "warn_dependency_requirement_mismatches"
    check = getattr(environment, name, None)
    if check is None:  # another version of MLflow
        yield
        return
    setattr(environment, name, lambda requirements: None)
    try:
        yield
    finally:
        setattr(environment, name, check)
