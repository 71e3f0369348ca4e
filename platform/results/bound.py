"""Report of the robust generalization bound of a run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from linflab.models.robustness.certification import lipschitz_radius
from linflab.models.robustness.generalization import (
    DELTAS,
    TRIED_PAIRS,
    generalization_bound,
    network_class,
    published_size_term,
    size_term,
)
from linflab.platform.data.datasets import Split, load_dataset
from linflab.platform.errors import InputError
from linflab.platform.results.load import download_weights, find_run_id
from linflab.platform.tracking.mlflow import client_of, wrap_errors
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.evaluation import batch_indices
from linflab.platform.training.weights import load_weights
from linflab.reports import schema
from linflab.reports.bound import BoundReport, bound_figure, bound_table
from linflab.reports.figures import save_figure
from linflab.reports.pages import Page, page_stem, write_page
from linflab.reports.records import read_run


def report_bound(storage: Storage, run: str, images: int | None, confidence: float, out: Path | None) -> Page:
    """Write the bound on the robust test error of a run, next to the measured error.

    Args:
        storage: Storage of the run.
        run: Run name, or prefix of its id.
        images: Number of training images whose margins are computed, the first of the training split; None for all.
        confidence: Probability with which the bound holds.
        out: Output directory; None for reports/ in the storage.

    Raises:
        InputError: If the run has no weights, its network does not consist of distance layers, there are fewer training
            images, the confidence is not in (0, 1), or the runs or files are not accessible.
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence={confidence:g}: must be between 0 and 1; use 0.95")
    with wrap_errors(storage, out):
        run_id = find_run_id(storage, run)
        report = _compute(storage, run_id, images, confidence)
        folder, name = out or storage.reports, page_stem("bound", run_id[:8])
        folder.mkdir(parents=True, exist_ok=True)
        files = save_figure(bound_figure(report), folder, f"{name}_terms")
        figures = {"margins of the training images and terms of the bound": f"{name}_terms.png"}
        return write_page(replace(bound_table(report), figures=figures), folder, name, files)


def _compute(storage: Storage, run_id: str, images: int | None, confidence: float) -> BoundReport:
    weights = load_weights(download_weights(storage, run_id))
    experiment = weights.experiment
    try:
        nets = network_class(weights.network)
    except (TypeError, ValueError) as error:
        raise InputError(f"run={run_id}: model.kind={experiment.model.kind}: {error}") from None
    train = load_dataset(experiment.dataset, experiment.augmentation).training_split(
        experiment.training.include_validation
    )
    if images is not None and not 1 <= images <= len(train):
        raise InputError(
            f"images={images}: must be between 1 and {len(train)}, the number of training images; leave it out for all"
        )
    radii = _radii(weights.network, train.take(images or len(train)), experiment.evaluation.batch_size)
    best = generalization_bound(nets, radii, experiment.eps, confidence)
    data = read_run(client_of(storage), run_id).data
    errors = [
        None if name not in data.metrics else 1 - data.metrics[name]
        for name in (schema.TEST_ROBUST, schema.TEST_CERTIFIED)
    ]
    return BoundReport(
        run=data.tags.get(schema.NAME, run_id[:8]),
        dataset=experiment.dataset,
        eps=experiment.eps,
        confidence=confidence,
        radii=np.nan_to_num(radii.double().numpy(), nan=-1.0),
        deltas=DELTAS,
        size_terms=[size_term(nets, best.images, delta, confidence) for delta in DELTAS],
        published_terms=[published_size_term(nets, best.images, delta, confidence) for delta in DELTAS],
        best=DELTAS.index(best.delta),
        constants={
            "n": best.images,
            "D": nets.parameters,
            "G": nets.tensors,
            "B": nets.magnitude,
            "std": round(nets.std, 6),
            "delta": round(best.delta, 6),
            "T": TRIED_PAIRS,
            "L": nets.depth,
            "W": nets.width,
        },
        needed_images=best.needed_images,
        robust_error=errors[0],
        certified_error=errors[1],
        attacks=data.tags.get(schema.ATTACK, ""),
    )


def _radii(network: torch.nn.Module, split: Split, batch_size: int) -> torch.Tensor:
    """Return certified radii (N,) of all images of a split, with float32 rounding, as the bound counts them."""
    return torch.cat(
        [lipschitz_radius(network, *split.batch(positions)) for positions in batch_indices(split, batch_size)]
    )
