"""What is added to the record of a network that people will look at: its model for MLflow, and its figures.

A single training gets it, and the best trial of a sweep; not every trial, since weights of the paper's size are
hundreds of megabytes.
"""

import logging
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from mlflow.entities import LoggedModelOutput
from mlflow.tracking import MlflowClient
from torch import nn

from linflab.models.robustness.bounds.rounding import exact_products
from linflab.models.robustness.certification import certifier_of, lipschitz_radius
from linflab.platform.datasets import Split, load_dataset
from linflab.platform.evaluation import batches, scoring_of
from linflab.platform.scoring import weights_of_run
from linflab.platform.storage import Storage
from linflab.platform.tracking import patient_client, patiently
from linflab.platform.trial import device_of
from linflab.platform.weights import load_network
from linflab.reports import schema
from linflab.reports.figures import (
    certified_accuracy_figure,
    learning_curves,
    margin_figure,
    radius_histogram,
    write_figure,
)
from linflab.reports.pages import Page
from linflab.reports.records import read_history, read_runs, read_trials
from linflab.reports.rendering import to_markdown
from linflab.reports.sweep_tables import in_order
from linflab.reports.tables import Table

LONGEST_NOTE = 8000  # letters that MLflow keeps of a tag
NOTES_AT_MOST = 5  # notes of a table that its short form has


def publish_run(storage: Storage, run_id: str) -> None:
    """Add to a finished run the model (`mlflow.pytorch.load_model`), and figures of its training and its certificates.

    Of networks that are Lipschitz by construction, the margins of all training images and the certified radii of all
    test images, as CSV and as figures. A run that has been published stays as it is.

    Raises:
        SettingError: the run has no weights, or its data set is gone.
    """
    client = patient_client(storage)
    if client.list_artifacts(run_id, schema.FIGURES_FOLDER):  # which are added last
        return
    experiment, network = load_network(weights_of_run(storage, run_id))
    dataset = load_dataset(experiment.dataset, experiment.augmentation).to(device_of(experiment))
    network = network.to(device_of(experiment))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / schema.FIGURES_FOLDER
        folder.mkdir()
        write_figure(
            learning_curves(read_history(client, run_id), f"{experiment.method} on {experiment.dataset}"),
            folder,
            "learning_curves",
        )
        size, scoring = experiment.evaluation.batch_size, scoring_of(experiment, network, attacked=False)
        if certifier_of(network) == "lipschitz":
            seen = [dataset.train] + ([dataset.validation] if experiment.training.include_validation else [])
            margins = np.concatenate([_radii(network, split, size) for split in seen])
            _write_numbers(folder / schema.MARGINS_FILE, "half_margin", margins)
            write_figure(margin_figure(margins, experiment.eps, experiment.dataset), folder, "training_margins")
        if scoring.certifier == "lipschitz":  # others would take a bisection
            radii, by = _radii(network, dataset.test, size, scoring.sound), scoring.certificate
            _write_numbers(folder / schema.RADII_FILE, "certified_radius", radii)
            write_figure(
                certified_accuracy_figure(radii, experiment.dataset, by, robust={}), folder, "certified_accuracy"
            )
            write_figure(radius_histogram(radii, experiment.dataset, by), folder, "radius_histogram")
        images, _ = dataset.test.batch(torch.arange(2, device=dataset.test.indices.device))
        save_model(network.cpu(), images.cpu(), Path(name) / schema.MODEL)
        _log_model(client, run_id, Path(name) / schema.MODEL)
        client.log_artifacts(run_id, str(folder), schema.FIGURES_FOLDER)


def _log_model(client: MlflowClient, run_id: str, folder: Path) -> None:
    run = client.get_run(run_id)
    if run.outputs is not None and run.outputs.model_outputs:  # of a time that was cut before the figures were added
        return
    experiment = run.info.experiment_id
    model = client.create_logged_model(experiment, schema.MODEL, source_run_id=run_id)
    client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])


def publish_launch(storage: Storage, launch: str) -> None:
    """Publish the runs of a launch."""
    runs = patiently(lambda: read_runs(storage.tracking_uri, {schema.LAUNCH: launch}))
    for run_id in runs.get("run_id", []):
        publish_run(storage, run_id)


def publish_sweep(storage: Storage, name: str, page: Page) -> None:
    """Add the report of a sweep that has ended to its run, the head of the table as the note that the UI shows.

    Its best trial is published, too.

    Raises:
        SettingError: as `publish_run`.
    """
    client = patient_client(storage)
    of_sweep = {schema.KIND: "sweep", schema.SWEEP: name}
    parents = patiently(lambda: read_runs(storage.tracking_uri, of_sweep))
    for path in page.files:
        client.log_artifact(parents["run_id"].iloc[0], str(path), schema.REPORT_FOLDER)
    client.set_tag(parents["run_id"].iloc[0], schema.NOTE, short_note(page.table))
    best = in_order(patiently(lambda: read_trials(storage.tracking_uri, name))).iloc[0]
    if best["status"] == "FINISHED":
        publish_run(storage, best["run_id"])


def short_note(table: Table) -> str:
    """As many of a table's rows, from the first, as MLflow's description of a run has room for."""
    for rows in range(min(len(table.rows), LONGEST_NOTE // 100), 0, -1):  # a row with its command has more than 100
        more = len(table.rows) - rows
        notes = table.notes[:NOTES_AT_MOST] + ((f"{more} more rows are in the artifacts.",) if more else ())
        kept = Table(table.title, table.columns, table.rows[:rows], notes)
        text = to_markdown(kept)
        if len(text) <= LONGEST_NOTE:
            return text
    return table.title


def _radii(network: nn.Module, split: Split, batch_size: int, sound: bool = False) -> np.ndarray:
    with exact_products() if sound else nullcontext():
        found = [
            lipschitz_radius(network, *split.batch(positions), sound).cpu() for positions in batches(split, batch_size)
        ]
    return torch.cat(found).double().numpy()


def _write_numbers(path: Path, name: str, numbers: np.ndarray) -> None:
    lines = (f"{place},{number:.7g}" for place, number in enumerate(numbers.tolist()))
    path.write_text("\n".join([f"image,{name}", *lines, ""]))


def save_model(network: nn.Module, images: torch.Tensor, path: Path) -> None:
    """MLflow's form of a network, as the graph of torch.export: data, no code."""
    import mlflow.pytorch
    from mlflow.models import infer_signature

    with torch.no_grad():
        outputs = network(images)
    for name in ("mlflow", "torch.export"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pytorch.save_model(
            network,
            path,
            signature=infer_signature(images.numpy(), outputs.numpy()),
            input_example=images.numpy(),
            pip_requirements=["linflab"],  # its operators are in the graph: import linflab.models.distance to load it
        )
