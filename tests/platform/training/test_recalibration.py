"""Recalibration of batch normalization before validations, and for the selected network."""

from pathlib import Path

import pytest
import torch

from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.errors import InputError
from linflab.platform.training.checkpoints import CheckpointStore
from linflab.platform.training.evaluation import evaluate, evaluation_spec
from linflab.platform.training.fit import fit
from linflab.platform.training.loop import EpochMetrics
from linflab.platform.training.trainer import Trainer
from tests.conftest import RECIPE

# 400 divides the number of training images.
SETTINGS = ["model.kind=cnn7", "model.variant=cifar", "model.width=2", "model.hidden_size=8", "training.batch_size=400"]
SETTINGS += ["objective.kind=adversarial_cross_entropy", "objective.eps_train=0.05", "objective.steps=1"]
SETTINGS += ["training.epochs=3", "augmentation.padding=1", "evaluation.calibration_images=800"]
ON = "training.recalibrate_batch_norm=true"


@pytest.mark.integration
def test_selected_network_has_statistics_of_all_training_images(tmp_path: Path) -> None:
    """Training is unchanged, although its attacks use running averages."""
    results, states, epochs = [], [], []
    for settings in ([], [ON]):
        experiment, reports = load_config(RECIPE, [*SETTINGS, *settings]), list[EpochMetrics]()
        data, checkpoints = load_dataset("digits", experiment.augmentation), CheckpointStore(tmp_path / f"{settings}")
        results.append(fit(experiment, data, reports.append, checkpoints=checkpoints))
        states.append(checkpoints.load()["loss"])
        epochs.append(reports)
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    network, images = results[1].network, data.train.batch(torch.arange(1200))[0]
    first = network[:2](images)  # of the convolution before the first batch normalization
    torch.testing.assert_close(network[2].running_mean, first.mean((0, 2, 3)).detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(network[2].running_var, first.var((0, 2, 3)).detach(), rtol=0.02, atol=0)
    spec = evaluation_spec(experiment, network, with_attacks=False)
    assert evaluate(network, data.validation, spec, 1000) == [results[1].validation]
    assert [report.train_loss for report in epochs[0]] == [report.train_loss for report in epochs[1]]
    assert [report.validation for report in epochs[0]] != [report.validation for report in epochs[1]]


def test_recalibration_requires_batch_norm() -> None:
    with pytest.raises(InputError, match=r"training\.recalibrate_batch_norm=true: .*linf_dist_mlp"):
        Trainer(load_config(RECIPE, [ON]), load_dataset("digits"))
