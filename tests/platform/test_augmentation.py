"""Augmentation: every image against the same cut made by hand."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from linflab.platform.augmentation import AugmentationConfig
from linflab.platform.config import load_experiment
from linflab.platform.datasets import load_dataset
from linflab.platform.training import fit
from tests.conftest import QUICK, RECIPE


@st.composite
def cases(draw: st.DrawFn) -> tuple[AugmentationConfig, int, int, int]:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    config = AugmentationConfig(
        crop=draw(st.one_of(st.none(), st.integers(1, min(height, width)))),
        padding=draw(st.integers(0, 3)),
        padding_mode=draw(st.sampled_from(["constant", "edge"])),
        flip=draw(st.booleans()),
    )
    return config, height, width, draw(st.integers(0, 2**32))


@given(cases())
def test_augmented_images_are_cut_from_the_padded_ones(case: tuple[AugmentationConfig, int, int, int]) -> None:
    config, height, width, seed = case
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (20, 2, height, width), generator=generator, dtype=torch.uint8)
    draws = config.draw(20, height, width, generator)
    augmented = config.augment(images, draws)
    pad = [(0, 0), (config.padding,) * 2, (config.padding,) * 2]
    rows, columns = config.size(height, width)
    for image, (top, left, flip), seen in zip(images.numpy(), draws.tolist(), augmented.numpy(), strict=True):
        padded = np.pad(image, pad, mode=config.padding_mode)
        expected = padded[:, top : top + rows, left : left + columns]
        assert np.array_equal(seen, expected[:, :, ::-1] if flip else expected)
    central = config.centre(images)
    assert central.shape == augmented.shape
    if config.crop is not None:
        top, left = (height - config.crop) // 2, (width - config.crop) // 2
        assert torch.equal(central, images[:, :, top : top + config.crop, left : left + config.crop])


def test_every_offset_and_both_sides_occur() -> None:
    config = AugmentationConfig(crop=6, padding=1, flip=True)
    draws = config.draw(1000, 8, 8, torch.Generator().manual_seed(0))
    assert {tuple(row) for row in draws.tolist()} == {(y, x, f) for y in range(5) for x in range(5) for f in range(2)}


def test_training_sees_augmented_images_and_repeats() -> None:
    nets = []
    for overrides in ([], ["augmentation.padding=1"], ["augmentation.padding=1"]):
        experiment = load_experiment(RECIPE, [*QUICK, *overrides])
        trained = fit(experiment, load_dataset("digits", experiment.augmentation))
        nets.append(trained.network.state_dict()["features.distances.0.weight"])
    assert torch.equal(nets[1], nets[2]) and not torch.equal(nets[0], nets[1])
