"""Data sets: what is in them, what the splits hold, what damaged files lead to."""

from pathlib import Path

import numpy as np
import pytest
import torch

from linflab.platform import datasets
from linflab.platform.datasets import FACTS, load_dataset
from linflab.platform.errors import SettingError


def prepared(folder: Path, images: int = 6000, **replaced: np.ndarray) -> None:
    """A folder in prepared form, filled with noise."""
    generator = np.random.RandomState(0)
    arrays = {
        "train_images": generator.randint(0, 256, (images, 1, 28, 28), np.uint8),
        "train_labels": generator.randint(0, 10, images, np.uint8),
        "test_images": generator.randint(0, 256, (50, 1, 28, 28), np.uint8),
        "test_labels": generator.randint(0, 10, 50, np.uint8),
    }
    folder.mkdir(parents=True)
    for name, array in {**arrays, **replaced}.items():
        np.save(folder / f"{name}.npy", array)


def test_digits() -> None:
    data = load_dataset("digits")
    assert data.train.images.shape[1:] == data.facts.input_shape == (1, 8, 8)
    assert (len(data.train), len(data.validation), len(data.test)) == (1200, 237, 360)
    images, labels = data.train.batch(torch.arange(len(data.train)))
    assert images.dtype == torch.float32 and images.min() == 0 and images.max() == 1
    assert sorted(labels.unique().tolist()) == list(range(10))
    everything = torch.cat(
        [split.batch(torch.arange(len(split)))[0] for split in (data.train, data.validation, data.test)]
    )
    assert everything.mean().item() == pytest.approx(FACTS["digits"].mean[0], abs=1e-4)
    assert everything.std(correction=0).item() == pytest.approx(FACTS["digits"].std, abs=1e-4)


def test_splits_are_disjoint_and_always_the_same() -> None:
    one, other = load_dataset("digits"), load_dataset("digits")
    assert torch.equal(one.validation.indices, other.validation.indices)
    assert not set(one.train.indices.tolist()) & set(one.validation.indices.tolist())
    assert one.validation.indices[:4].tolist() == [1, 2, 4, 5]  # frozen: another split would change every result
    test = {bytes(image.numpy()) for image in one.test.images}
    train = {bytes(image.numpy()) for image in one.train.images}
    assert not test & train


def test_prepared_files_are_mapped_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    prepared(tmp_path / "fashion_mnist")
    data = load_dataset("fashion_mnist")
    assert (len(data.train), len(data.validation), len(data.test)) == (1000, 5000, 50)
    # what another process writes to the file is seen: it has not been read into memory
    on_disk = np.load(tmp_path / "fashion_mnist" / "train_images.npy", mmap_mode="r+")
    on_disk[0] = 77
    on_disk.flush()
    assert (data.train.images[0] == 77).all()
    images, labels = data.test.batch(torch.tensor([3, 1]))
    stored = np.load(tmp_path / "fashion_mnist" / "test_images.npy")
    np.testing.assert_allclose(images.numpy(), stored[[3, 1]] / 255.0, rtol=1e-6)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("file", "array", "says"),
    [
        ("train_labels", np.zeros(5999, np.uint8), "6000 images but 5999 labels"),
        ("test_images", np.zeros((50, 1, 28, 28), np.float32), "float32"),
        ("test_labels", np.zeros((50, 1), np.uint8), "dimensions"),
        ("test_labels", np.full(50, 10, np.uint8), "from 0 to 9"),
        ("test_images", np.zeros((50, 1, 32, 32), np.uint8), "should be"),
        ("test_images", np.zeros((50, 3, 28, 28), np.uint8), "should be"),
    ],
)
def test_wrong_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, array: np.ndarray, says: str) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    prepared(tmp_path / "fashion_mnist", **{file: array})
    with pytest.raises(SettingError, match=says):
        load_dataset("fashion_mnist")


@pytest.mark.parametrize("damage", ["cut", "gone", "garbage"])
def test_damaged_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    prepared(tmp_path / "fashion_mnist")
    path = tmp_path / "fashion_mnist" / "train_images.npy"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:1000] if damage == "cut" else b"no array at all")
    with pytest.raises(SettingError, match=r"train_images\.npy"):
        load_dataset("fashion_mnist")


def test_conversion_is_done_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    source = tmp_path / "source"
    prepared(source)
    calls = []

    def download(folder: Path) -> datasets.Arrays:
        calls.append(folder)
        train_images, train_labels, test_images, test_labels = (np.load(source / f"{f}.npy") for f in datasets.FILES)
        return train_images, train_labels, test_images, test_labels

    monkeypatch.setitem(datasets.DOWNLOADS, "fashion_mnist", download)
    load_dataset("fashion_mnist")
    load_dataset("fashion_mnist")
    assert len(calls) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fashion_mnist", "source"]  # no leftovers

    def broken(folder: Path) -> datasets.Arrays:
        raise RuntimeError("connection lost")

    monkeypatch.setitem(datasets.DOWNLOADS, "fashion_mnist", broken)
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(SettingError, match="connection lost"):
        load_dataset("fashion_mnist")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_unknown_data_set() -> None:
    with pytest.raises(SettingError, match=r"dataset=imagenet.*digits"):
        load_dataset("imagenet")
