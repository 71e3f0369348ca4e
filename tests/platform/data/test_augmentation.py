"""Augmentation, compared with crops and flips in NumPy."""

import numpy as np
import pytest
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
    augmented = config.crop_and_flip(images, draws)
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


@given(gamma=st.floats(0.01, 2), seed=st.integers(0, 2**32))
def test_gamma_correction_raises_images_to_powers_of_its_range(gamma: float, seed: int) -> None:
    config = AugmentationConfig(gamma_range=gamma)
    generator = torch.Generator().manual_seed(seed)
    inputs = 0.05 + 0.9 * torch.rand(500, 2, 3, 3, generator=generator)
    draws = config.sample_params(500, 3, 3, generator)
    changed = config.correct_gamma(inputs, draws).double().flatten(1).numpy()
    original = inputs.double().flatten(1).numpy()
    logarithms = np.log(np.log(changed[:, :1]) / np.log(original[:, :1]))
    assert np.allclose(changed, original ** np.exp(logarithms), rtol=1e-3)
    assert (np.abs(logarithms) < gamma + 1e-3).all()
    assert abs(logarithms.mean()) < 0.15 * gamma and abs(logarithms.std() - gamma / 3**0.5) < 0.1 * gamma


def test_evaluation_images_are_not_corrected() -> None:
    config = AugmentationConfig(gamma_range=0.5)
    plain, changing = load_dataset("digits"), load_dataset("digits", config)
    positions = torch.arange(50)
    draws = changing.train.sample_augmentation(torch.Generator().manual_seed(0))[positions]
    images = plain.train.batch(positions)[0]
    assert torch.equal(changing.train.batch(positions)[0], images)
    assert torch.equal(changing.test.batch(positions)[0], plain.test.batch(positions)[0])
    changed = changing.train.batch(positions, draws)[0]
    assert not torch.equal(changed, images) and torch.equal(changed, config.correct_gamma(images, draws))
    assert torch.equal(changed[(images == 0) | (images == 1)], images[(images == 0) | (images == 1)])


@pytest.mark.parametrize("override", ["augmentation.padding=1", "augmentation.gamma_range=0.3"])
def test_augmentation_changes_training_reproducibly(override: str) -> None:
    weights = []
    for overrides in ([], [override], [override]):
        experiment = load_config(RECIPE, [*QUICK, *overrides])
        result = fit(experiment, load_dataset("digits", experiment.augmentation))
        weights.append(result.network.state_dict()["features.distances.0.weight"])
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])
