"""Data sets: what is in them, what the splits hold, what damaged files lead to."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from linflab.platform.augmentation import AugmentationConfig
from linflab.platform.datasets import FACTS, inventory, load_dataset, prepare_dataset
from linflab.platform.errors import SettingError
from linflab.platform.originals import ORIGINALS, Arrays


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


def originals_of_mnist(folder: Path, images: int = 6000) -> dict[str, np.ndarray]:
    """Files as MNIST and Fashion-MNIST are published (IDX: a header, then bytes), filled with noise."""
    generator = np.random.RandomState(0)
    arrays = {}
    folder.mkdir(parents=True)
    for split, count in (("train", images), ("t10k", 50)):
        arrays[split] = generator.randint(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{split} labels"] = generator.randint(0, 10, count).astype(np.uint8)
        header = np.array([0x00000803, count, 28, 28], ">i4").tobytes()
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + arrays[split].tobytes())
        header = np.array([0x00000801, count], ">i4").tobytes()
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(header + arrays[f"{split} labels"].tobytes())
    return arrays


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_preparing_from_originals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    arrays = originals_of_mnist(tmp_path / "originals" / "raw")
    prepare_dataset(name, tmp_path / "originals")
    data = load_dataset(name)
    assert np.array_equal(data.train.images[:, 0].numpy(), arrays["train"])
    assert np.array_equal(data.train.labels.numpy(), arrays["train labels"])
    assert np.array_equal(data.test.images[:, 0].numpy(), arrays["t10k"])
    shutil.rmtree(tmp_path / "originals")
    prepare_dataset(name, tmp_path / "originals")  # it is there: nothing to be done
    assert [path.name for path in (tmp_path / "data").iterdir()] == [name]  # no leftovers


@pytest.mark.parametrize("damage", ["t10k-labels-idx1-ubyte", "cut", "few"])
def test_damaged_originals_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    originals_of_mnist(tmp_path / "originals", images=100 if damage == "few" else 6000)
    if damage == "cut":
        path = tmp_path / "originals" / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:1000])
    elif damage != "few":
        (tmp_path / "originals" / damage).unlink()
    with pytest.raises(SettingError, match="originals"):
        prepare_dataset("mnist", tmp_path / "originals")
    assert not list((tmp_path / "data").iterdir())


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))

    def broken(source: Path | None, workplace: Path) -> Arrays:
        raise RuntimeError("connection lost")

    monkeypatch.setitem(ORIGINALS, "fashion_mnist", broken)
    with pytest.raises(SettingError, match="connection lost"):
        load_dataset("fashion_mnist")
    assert list(tmp_path.iterdir()) == []


def test_tiny_imagenet_from_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    monkeypatch.setitem(FACTS, "tiny_imagenet", replace(FACTS["tiny_imagenet"], validation_size=2))
    root = tmp_path / "tiny-imagenet-200"
    classes = ["n02", "n01", "n10"]
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(classes))
    annotations = []
    for shade, name in enumerate(classes):
        (root / "train" / name / "images").mkdir(parents=True)
        for number in range(2):
            mode = "L" if number else "RGB"  # some of the originals are grey
            image = Image.new(mode, (64, 64), 80 * shade if number else (80 * shade,) * 3)
            image.save(root / "train" / name / "images" / f"{name}_{number}.JPEG")
        image.save(root / "val" / "images" / f"val_{shade}.JPEG")
        annotations.append(f"val_{shade}.JPEG\t{name}\t0\t0\t62\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(annotations))
    prepare_dataset("tiny_imagenet", tmp_path)
    data = load_dataset("tiny_imagenet", AugmentationConfig(crop=56))
    assert data.facts.input_shape == (3, 56, 56) and len(data.train) + len(data.validation) == 6
    for images, labels, shades in (
        (data.train.images, data.train.labels, None),
        (data.test.images, data.test.labels, 1),
    ):
        # labels follow the sorted names: n01 (shade 80), n02 (0), n10 (160)
        assert torch.equal(images.float().mean(dim=(1, 2, 3)).round(), torch.tensor([80.0, 0, 160])[labels.long()])
        assert images.shape[1:] == (3, 64, 64) and (shades is None or labels.tolist() == [1, 0, 2])
    images, _ = data.test.batch(torch.arange(3))
    assert images.shape == (3, 3, 56, 56)


def test_a_data_set_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    generator = np.random.RandomState(0)
    images = (generator.rand(50, 3, 12, 9) * [[[[200]], [[100]], [[50]]]]).astype(np.uint8)
    labels = (np.arange(50) % 7).astype(np.uint8)
    prepared(
        tmp_path / "mine", train_images=images, train_labels=labels, test_images=images[:5], test_labels=labels[:5]
    )
    data = load_dataset("mine")
    assert (len(data.train), len(data.validation), len(data.test)) == (45, 5, 5)
    assert data.facts.input_shape == (3, 12, 9) and data.facts.classes == 7
    np.testing.assert_allclose(data.facts.mean, images.mean(axis=(0, 2, 3)) / 255, rtol=1e-12)
    np.testing.assert_allclose(data.facts.std, images.std() / 255, rtol=1e-9)
    states = {entry.name: entry for entry in inventory()}
    assert states["mine"].state == "ready" and states["mine"].train == 45
    assert states["mnist"].state == "not prepared" and states["digits"].state == "ready, with the published mean"


def test_inventory_tells_other_images_from_the_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    prepared(tmp_path / "mnist")  # noise
    prepared(tmp_path / "fashion_mnist", test_labels=np.zeros(3, np.uint8))
    states = {entry.name: entry.state for entry in inventory()}
    assert "published" in states["mnist"] and "50 images but 3 labels" in states["fashion_mnist"]


def test_unknown_data_set() -> None:
    with pytest.raises(SettingError, match=r"dataset=imagenet.*digits"):
        load_dataset("imagenet")
