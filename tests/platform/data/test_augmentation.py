"""Augmentation, compared with crops and flips in NumPy."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from linflab.platform.config.overrides import load_config
from linflab.platform.data.augmentation import AugmentationConfig
from linflab.platform.data.datasets import load_dataset
from linflab.platform.training.fit import fit
from tests.conftest import QUICK, RECIPE


@st.composite
def cases(draw: st.DrawFn) -> tuple[AugmentationConfig, int, int, int]:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    config = AugmentationConfig(
        crop_size=draw(st.one_of(st.none(), st.integers(1, min(height, width)))),
        padding=draw(st.integers(0, 3)),
        padding_mode=draw(st.sampled_from(["constant", "edge"])),
        horizontal_flip=draw(st.booleans()),
    )
    return config, height, width, draw(st.integers(0, 2**32))


@given(cases())
def test_augmented_images_are_crops_of_padded_images(case: tuple[AugmentationConfig, int, int, int]) -> None:
    config, height, width, seed = case
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (20, 2, height, width), generator=generator, dtype=torch.uint8)
    draws = config.sample_params(20, height, width, generator)
    augmented = config.augment(images, draws)
    pad = [(0, 0), (config.padding,) * 2, (config.padding,) * 2]
    rows, columns = config.output_size(height, width)
    for image, (top, left, flip), seen in zip(images.numpy(), draws.tolist(), augmented.numpy(), strict=True):
        padded = np.pad(image, pad, mode=config.padding_mode)
        expected = padded[:, top : top + rows, left : left + columns]
        assert np.array_equal(seen, expected[:, :, ::-1] if flip else expected)
    central = config.center_crop(images)
    assert central.shape == augmented.shape
    if config.crop_size is not None:
        top, left = (height - config.crop_size) // 2, (width - config.crop_size) // 2
        assert torch.equal(central, images[:, :, top : top + config.crop_size, left : left + config.crop_size])


def test_every_offset_and_both_sides_occur() -> None:
    config = AugmentationConfig(crop_size=6, padding=1, horizontal_flip=True)
    draws = config.sample_params(1000, 8, 8, torch.Generator().manual_seed(0))
    assert {tuple(row) for row in draws.tolist()} == {(y, x, f) for y in range(5) for x in range(5) for f in range(2)}


def test_augmentation_changes_training_reproducibly() -> None:
    weights = []
    for overrides in ([], ["augmentation.padding=1"], ["augmentation.padding=1"]):
        experiment = load_config(RECIPE, [*QUICK, *overrides])
        result = fit(experiment, load_dataset("digits", experiment.augmentation))
        weights.append(result.network.state_dict()["features.distances.0.weight"])
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])
