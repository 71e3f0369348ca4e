"""Networks that store training images: `fit` fills them, and rejects settings that do not fit."""

import pytest
import torch

from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.errors import InputError
from linflab.platform.training.fit import fit

RECIPE = "digits_eps0.1_l_inf_nearest"


@pytest.mark.parametrize(("samples", "include_validation"), [(1437, True), (1200, False), (300, False)])
def test_fit_stores_images_of_the_training_split(samples: int, include_validation: bool) -> None:
    overrides = [f"model.samples={samples}", f"training.include_validation={str(include_validation).lower()}"]
    dataset = load_dataset("digits")
    trained = fit(load_config(RECIPE, overrides), dataset)
    split = dataset.training_split(include_validation)
    images, labels = split.batch(torch.arange(len(split)))
    expected = {(tuple(image.flatten().tolist()), int(label)) for image, label in zip(images, labels, strict=True)}
    network = trained.network
    layer, last, normalize = network.features.distances[0], network.last, network.features.normalize
    pixels = (layer.weight.detach() * normalize.std + normalize.mean.flatten()).mul(16).round() / 16
    stored_labels = last.weight.detach().argmin(dim=0)
    found = {(tuple(row.tolist()), int(label)) for row, label in zip(pixels, stored_labels, strict=True)}
    assert len(pixels) == samples and found <= expected and len(found) > 0.95 * samples
    assert (trained.validation is None) == include_validation
    assert trained.validation is None or trained.validation.clean > 0.85
    again = fit(load_config(RECIPE, overrides), dataset)
    assert torch.equal(again.network.features.distances[0].weight, layer.weight)


def test_settings_that_do_not_fit_are_rejected() -> None:
    with pytest.raises(InputError, match=r"^training.epochs=2"):
        load_config(RECIPE, ["training.epochs=2"])
    with pytest.raises(InputError, match=r"^model.samples=1438"):
        fit(load_config(RECIPE, ["model.samples=1438"]), load_dataset("digits"))
    with pytest.raises(InputError, match=r"^model.samples=4"):
        fit(load_config(RECIPE, ["model.samples=4"]), load_dataset("digits"))
