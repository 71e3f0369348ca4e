"""Datasets: their contents and splits, preparation from raw files, and errors for damaged files."""

import gzip
import io
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from linflab.platform.data import datasets
from linflab.platform.data.augmentation import AugmentationConfig
from linflab.platform.data.datasets import DATASETS, list_datasets, load_dataset, prepare_dataset
from linflab.platform.data.raw_data import RAW_LOADERS, Arrays
from linflab.platform.errors import InputError
from tests.conftest import assert_rejected, time_limit


def write_prepared(folder: Path, images: int = 6000, **replacements: np.ndarray) -> None:
    """Write a dataset in prepared form, filled with noise."""
    generator = np.random.RandomState(0)
    arrays = {
        "train_images": generator.randint(0, 256, (images, 1, 28, 28), np.uint8),
        "train_labels": generator.randint(0, 10, images, np.uint8),
        "test_images": generator.randint(0, 256, (50, 1, 28, 28), np.uint8),
        "test_labels": generator.randint(0, 10, 50, np.uint8),
    }
    folder.mkdir(parents=True)
    for name, array in {**arrays, **replacements}.items():
        np.save(folder / f"{name}.npy", array)


def test_digits_match_their_dataset_info() -> None:
    data = load_dataset("digits")
    assert data.train.images.shape[1:] == data.info.input_shape == (1, 8, 8)
    assert (len(data.train), len(data.validation), len(data.test)) == (1200, 237, 360)
    images, labels = data.train.batch(torch.arange(len(data.train)))
    assert images.dtype == torch.float32 and images.min() == 0 and images.max() == 1
    assert sorted(labels.unique().tolist()) == list(range(10))
    images_of_all_splits = torch.cat(
        [split.batch(torch.arange(len(split)))[0] for split in (data.train, data.validation, data.test)]
    )
    assert images_of_all_splits.mean().item() == pytest.approx(DATASETS["digits"].mean[0], abs=1e-4)
    assert images_of_all_splits.std(correction=0).item() == pytest.approx(DATASETS["digits"].std, abs=1e-4)


def test_digits_are_those_of_sklearn() -> None:
    bunch, (train, train_labels, test, test_labels) = load_digits(), datasets._digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    np.testing.assert_array_equal(np.concatenate([test, train])[:, 0], bunch.images[order])
    np.testing.assert_array_equal(np.concatenate([test_labels, train_labels]), bunch.target[order])


def test_splits_are_disjoint_and_fixed() -> None:
    one, other = load_dataset("digits"), load_dataset("digits")
    assert torch.equal(one.validation.indices, other.validation.indices)
    assert not set(one.train.indices.tolist()) & set(one.validation.indices.tolist())
    assert one.validation.indices[:4].tolist() == [1, 2, 4, 5]  # frozen: another split would change every result
    test = {bytes(image.numpy()) for image in one.test.images}
    train = {bytes(image.numpy()) for image in one.train.images}
    assert not test & train


def test_prepared_files_are_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    write_prepared(tmp_path / "fashion_mnist")
    data = load_dataset("fashion_mnist")
    assert (len(data.train), len(data.validation), len(data.test)) == (1000, 5000, 50)
    # Writes of other processes are visible, since the file is not read into memory.
    on_disk = np.load(tmp_path / "fashion_mnist" / "train_images.npy", mmap_mode="r+")
    on_disk[0] = 77
    on_disk.flush()
    assert (data.train.images[0] == 77).all()
    images, labels = data.test.batch(torch.tensor([3, 1]))
    stored = np.load(tmp_path / "fashion_mnist" / "test_images.npy")
    np.testing.assert_allclose(images.numpy(), stored[[3, 1]] / 255.0, rtol=1e-6)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("file", "array"),
    [
        ("train_labels", np.zeros(5999, np.uint8)),
        ("train_labels", np.zeros(6000, np.float32)),
        ("train_labels", np.array([True, False] * 3000)),
        ("test_labels", np.zeros((50, 1), np.uint8)),
        ("test_labels", np.full(50, 10, np.uint8)),
        ("test_labels", np.full(50, -1, np.int64)),
        ("test_labels", np.full(50, 2**63, np.uint64)),
        ("test_images", np.zeros((50, 1, 28, 28), np.float32)),
        ("test_images", np.zeros((50, 1, 28, 28), np.int64)),
        ("test_images", np.zeros((50, 28, 28), np.uint8)),
        ("test_images", np.zeros((50, 1, 32, 32), np.uint8)),
        ("test_images", np.zeros((50, 3, 28, 28), np.uint8)),
        ("test_images", np.zeros((50, 28, 28, 1), np.uint8)),
        ("train_images", np.zeros((6000, 0, 28, 28), np.uint8)),
        ("train_images", np.array([None, 3])),
        ("train_images", np.array(["a", "b"])),
        ("train_images", np.zeros(6000, [("a", np.uint8), ("b", np.uint8)])),
    ],
)
def test_invalid_arrays_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, array: np.ndarray
) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    write_prepared(tmp_path / "fashion_mnist", **{file: array})
    with pytest.raises(InputError) as caught:
        load_dataset("fashion_mnist")
    assert_rejected(caught, f"{file}.npy")


def make_npy(header: str, content: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    """Return a .npy file with this header, valid or not."""
    size = struct.pack("<H" if version == (1, 0) else "<I", len(header) + 1)
    return b"\x93NUMPY" + bytes(version) + size + header.encode() + b"\n" + content


def make_npz(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


IMAGES = "{'descr': '|u1', 'fortran_order': False, 'shape': %s, }"


@pytest.mark.parametrize(
    "content",
    [
        make_npz(np.zeros((6000, 1, 28, 28), np.uint8)),
        make_npy(IMAGES % "(-5, 1, 8, 8)"),
        make_npy(IMAGES % "(100, 0, 8, 8)"),
        make_npy(IMAGES % "(10**15, 1, 28, 28)"),
        make_npy(IMAGES % "(1000000000000000, 1, 28, 28)", bytes(100)),
        make_npy(IMAGES % "(True, 1, 8, 8)", bytes(100)),
        make_npy(IMAGES % "(2.0, 1, 8, 8)", bytes(200)),
        make_npy(IMAGES % "4", bytes(200)),
        make_npy(IMAGES % ("(" * 3000 + ")" * 3000)),
        make_npy("{'descr': '|u1', 'fortran_order': False}"),
        make_npy("{'descr': '|O', 'fortran_order': False, 'shape': (2,), }", b"cos\nsystem\n(S'true'\ntR."),
        make_npy("{'descr': '|u1', 'fortran_order': 3, 'shape': (2,), }", bytes(2)),
        make_npy("{'descr': [('a', '|u1', (1000000000,))], 'fortran_order': False, 'shape': (2,), }", bytes(2)),
        make_npy("[" * 200),
        make_npy("os.abort()"),
        make_npy(IMAGES % "(2,)", bytes(2), (9, 9)),
        b"\x93NUMPY\x01\x00\xff\xff",
        b"\x93NUMPY",
        b"",
        b"no array",
    ],
)
def test_invalid_array_files_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    write_prepared(tmp_path / "mine", 100)
    (tmp_path / "mine" / "train_images.npy").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_dataset("mine")
    assert_rejected(caught, "train_images.npy")
    assert "train_images.npy" in {entry.name: entry for entry in list_datasets()}["mine"].state


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_arrays_of_all_versions_and_orders_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]
) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    write_prepared(tmp_path / "mine", 100)
    path = tmp_path / "mine" / "train_images.npy"
    images = np.load(path)
    path.unlink()
    header = "{'descr': '|u1', 'fortran_order': True, 'shape': (100, 1, 28, 28), }"
    (tmp_path / "elsewhere.npy").write_bytes(make_npy(header, images.tobytes(order="F"), version))
    path.symlink_to(tmp_path / "elsewhere.npy")
    data = load_dataset("mine")
    seen, _ = data.train.batch(torch.arange(len(data.train)))
    np.testing.assert_array_equal(seen.numpy(), images[data.train.indices].astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint16", ">i4", "uint8"])
def test_labels_of_all_integer_types_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    labels = np.arange(100).astype(dtype) % 7
    write_prepared(
        tmp_path / "mine", 100, train_labels=labels.astype(dtype), test_labels=(labels[:50] % 3).astype(dtype)
    )
    data = load_dataset("mine")
    _, seen = data.train.batch(torch.arange(len(data.train)))
    assert seen.dtype == torch.int64 and seen.tolist() == labels[data.train.indices].tolist()
    assert data.info.classes == 7 and data.test.labels.max() == 2


@pytest.mark.parametrize("shape", [(8, 8, 3), (28, 28, 1), (32, 30, 4), (5, 9, 3)])
def test_images_with_channels_last_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    images = np.random.RandomState(0).randint(0, 256, (100, *shape), np.uint8)
    write_prepared(tmp_path / "mine", 100, train_images=images, test_images=images[:50])
    with pytest.raises(InputError, match=r"train_images\.npy.*transpose"):
        load_dataset("mine")


@pytest.mark.parametrize("shape", [(3, 8, 3), (2, 8, 3), (1, 3, 1), (16, 1, 1), (3, 28, 4), (8, 8, 8)])
def test_narrow_images_with_channels_first_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    images = np.random.RandomState(0).randint(0, 256, (100, *shape), np.uint8)
    write_prepared(tmp_path / "mine", 100, train_images=images, test_images=images[:50])
    assert load_dataset("mine").info.input_shape == shape


@pytest.mark.parametrize("value", [0, 77, 255])
def test_constant_images_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: int) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    write_prepared(tmp_path / "mine", 100, train_images=np.full((100, 1, 28, 28), value, np.uint8))
    with pytest.raises(InputError, match=r"train_images\.npy"):
        load_dataset("mine")
    assert {entry.name: entry for entry in list_datasets()}["mine"].train is None


def test_labels_of_one_class_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    write_prepared(tmp_path / "mine", 100, train_labels=np.zeros(100, np.uint8), test_labels=np.zeros(50, np.uint8))
    with pytest.raises(InputError, match=r"train_labels\.npy"):
        load_dataset("mine")


def test_named_pipes_are_rejected_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    write_prepared(tmp_path / "data" / "fashion_mnist")
    (tmp_path / "data" / "fashion_mnist" / "test_images.npy").unlink()
    os.mkfifo(tmp_path / "data" / "fashion_mnist" / "test_images.npy")
    with time_limit(20), pytest.raises(InputError, match=r"test_images\.npy"):
        load_dataset("fashion_mnist")
    write_raw_mnist(tmp_path / "originals")
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte.gz", "cifar-10-python.tar.gz", "wnids.txt"):
        (tmp_path / "originals" / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / "originals" / name)
    for name in ("mnist", "cifar10", "tiny_imagenet"):
        with time_limit(20), pytest.raises(InputError, match=str(tmp_path / "originals")):
            prepare_dataset(name, tmp_path / "originals")


@pytest.mark.parametrize("damage", ["cut", "gone", "garbage"])
def test_damaged_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    write_prepared(tmp_path / "fashion_mnist")
    path = tmp_path / "fashion_mnist" / "train_images.npy"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:1000] if damage == "cut" else b"no array at all")
    with pytest.raises(InputError, match=r"train_images\.npy"):
        load_dataset("fashion_mnist")


def write_raw_mnist(folder: Path, images: int = 6000) -> dict[str, np.ndarray]:
    """Write files in the format of MNIST and Fashion-MNIST (IDX: a header, then bytes), filled with noise."""
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
def test_prepared_dataset_equals_its_raw_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    arrays = write_raw_mnist(tmp_path / "originals" / "raw")
    prepare_dataset(name, tmp_path / "originals")
    data = load_dataset(name)
    assert np.array_equal(data.train.images[:, 0].numpy(), arrays["train"])
    assert np.array_equal(data.train.labels.numpy(), arrays["train labels"])
    assert np.array_equal(data.test.images[:, 0].numpy(), arrays["t10k"])
    shutil.rmtree(tmp_path / "originals")
    prepare_dataset(name, tmp_path / "originals")  # prepared already: does nothing
    assert [path.name for path in (tmp_path / "data").iterdir()] == [name]  # no leftovers


def damage_raw_mnist(folder: Path, damage: str) -> str:
    """Damage raw files of MNIST and return the words that the error must contain."""
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    content = images.read_bytes()
    if damage == "gone":
        labels.unlink()
        return labels.name
    if damage == "large labels":
        labels.write_bytes(labels.read_bytes()[:-1] + b"\x0a")
        return "train labels"
    if damage == "fewer labels":
        labels.write_bytes(struct.pack(">II", 0x801, 5) + bytes(5))
        return "train images"
    if damage == "compressed bomb":
        images.unlink()
        images = images.with_suffix(".gz")
        images.write_bytes(gzip.compress(content[:16] + bytes(2**28)))
        return images.name
    images.write_bytes(
        {
            "cut": content[:1000],
            "longer": content + b"1",
            "empty": b"",
            "header alone": content[:7],
            "magic number": struct.pack(">I", 0x1803) + content[4:],
            "floats": struct.pack(">I", 0xD03) + content[4:],
            "integers": struct.pack(">I", 0xC03) + content[4:],
            "labels for images": struct.pack(">II", 0x801, 6000) + bytes(6000),
            "size": struct.pack(">IIII", 0x803, 6000, 32, 32) + content[16:],
            "huge": struct.pack(">IIII", 0x803, 2**32 - 1, 28, 28),
            "negative": struct.pack(">IiII", 0x803, -6000, 28, 28) + content[16:],
            "none": struct.pack(">IIII", 0x803, 0, 28, 28),
        }[damage]
    )
    return images.name


DAMAGES = ["gone", "large labels", "fewer labels", "compressed bomb", "cut", "longer", "empty", "header alone"]
DAMAGES += ["magic number", "floats", "integers", "labels for images", "size", "huge", "negative", "none"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_raw_files_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    write_raw_mnist(tmp_path / "originals")
    expected = damage_raw_mnist(tmp_path / "originals", damage)
    with pytest.raises(InputError) as caught:
        prepare_dataset("mnist", tmp_path / "originals")
    assert_rejected(caught, expected)
    assert not list((tmp_path / "data").iterdir())


def test_too_few_raw_images_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    write_raw_mnist(tmp_path / "originals", images=100)
    with pytest.raises(InputError, match="originals"):
        prepare_dataset("mnist", tmp_path / "originals")
    assert not list((tmp_path / "data").iterdir())


def test_compressed_raw_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    arrays = write_raw_mnist(tmp_path / "originals")
    for path in list((tmp_path / "originals").iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    prepare_dataset("mnist", tmp_path / "originals")
    assert np.array_equal(load_dataset("mnist").train.images[:, 0].numpy(), arrays["train"])


@pytest.mark.parametrize("name", ["mnist", "cifar10", "tiny_imagenet"])
def test_missing_source_is_reported_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    with pytest.raises(InputError, match=r"source=.*gone\.zip"):
        prepare_dataset(name, tmp_path / "gone.zip")


def test_pickles_are_read_only_with_published_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds for the batches of CIFAR-10 and for their archive."""
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    pickle = f"cos\nsystem\n(S'touch {tmp_path / 'executed'}'\ntR.".encode()
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"):
        (batches / name).write_bytes(pickle)
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(gzip.compress(b"no archive"))
    for source in (batches, archive):
        with pytest.raises(InputError, match=r"data_batch_1|cifar-10-python\.tar\.gz"):
            prepare_dataset("cifar10", source)
    assert not (tmp_path / "executed").exists() and not list((tmp_path / "data").iterdir())


def test_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))

    def fail_download(source: Path | None, workplace: Path) -> Arrays:
        raise RuntimeError("connection lost")

    monkeypatch.setitem(RAW_LOADERS, "fashion_mnist", fail_download)
    with pytest.raises(InputError, match="connection lost"):
        load_dataset("fashion_mnist")
    assert list(tmp_path.iterdir()) == []


def write_tiny_imagenet(root: Path) -> None:
    """Write folders in the format of TinyImageNet, with three classes of three images each."""
    classes = ["n02", "n01", "n10"]
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(classes))
    annotations = []
    for shade, name in enumerate(classes):
        (root / "train" / name / "images").mkdir(parents=True)
        for number in range(2):
            mode = "L" if number else "RGB"  # some published images are gray
            image = Image.new(mode, (64, 64), 80 * shade if number else (80 * shade,) * 3)
            image.save(root / "train" / name / "images" / f"{name}_{number}.JPEG")
        image.save(root / "val" / "images" / f"val_{shade}.JPEG")
        annotations.append(f"val_{shade}.JPEG\t{name}\t0\t0\t62\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(annotations))


def zip_folder(root: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(root.rglob("*")):
            file.write(path, Path(root.name) / path.relative_to(root))


@pytest.mark.parametrize("form", ["folder", "archive", "folder of the archive"])
def test_tiny_imagenet_is_read_in_all_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    monkeypatch.setitem(DATASETS, "tiny_imagenet", replace(DATASETS["tiny_imagenet"], validation_size=2))
    root, source = tmp_path / "source" / "tiny-imagenet-200", tmp_path / "source"
    write_tiny_imagenet(root)
    if form != "folder":
        zip_folder(root, source / "tiny-imagenet-200.zip")
        shutil.rmtree(root)
    prepare_dataset("tiny_imagenet", source / "tiny-imagenet-200.zip" if form == "archive" else source)
    data = load_dataset("tiny_imagenet", AugmentationConfig(crop_size=56))
    assert data.info.input_shape == (3, 56, 56) and len(data.train) + len(data.validation) == 6
    for images, labels, shades in (
        (data.train.images, data.train.labels, None),
        (data.test.images, data.test.labels, 1),
    ):
        # Labels follow the sorted names: n01 (shade 80), n02 (0), n10 (160).
        assert torch.equal(images.float().mean(dim=(1, 2, 3)).round(), torch.tensor([80.0, 0, 160])[labels.long()])
        assert images.shape[1:] == (3, 64, 64) and (shades is None or labels.tolist() == [1, 0, 2])
    images, _ = data.test.batch(torch.arange(3))
    assert images.shape == (3, 3, 56, 56)


@pytest.mark.parametrize(
    "damage", ["image bomb", "large image", "cut image", "no image", "png", "annotation", "climbs", "class", "empty"]
)
def test_damaged_tiny_imagenet_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    root = tmp_path / "t"
    write_tiny_imagenet(root)
    image, annotations = root / "val" / "images" / "val_0.JPEG", root / "val" / "val_annotations.txt"
    if damage == "image bomb":
        # A valid header of 65000 x 65000 pixels.
        marker = image.read_bytes().index(b"\xff\xc0")
        content = bytearray(image.read_bytes())
        content[marker + 5 : marker + 9] = struct.pack(">HH", 65000, 65000)
        image.write_bytes(content)
    elif damage == "large image":
        Image.new("RGB", (65, 64)).save(image)
    elif damage == "cut image":
        image.write_bytes(image.read_bytes()[:300])
    elif damage == "no image":
        image.write_bytes(b"no image")
    elif damage == "png":
        Image.new("RGB", (64, 64)).save(image, "PNG")
    elif damage == "annotation":
        annotations.write_text("val_0.JPEG\n")
    elif damage == "climbs":
        annotations.write_text("../../../secret.JPEG\tn01\t0\t0\t62\t62")
    elif damage == "class":
        annotations.write_text("val_0.JPEG\tn99\t0\t0\t62\t62")
    elif damage == "empty":
        shutil.rmtree(root / "train")
    zip_folder(root, tmp_path / "t.zip")
    with warnings.catch_warnings(), pytest.raises(InputError, match=r"t\.zip") as caught:
        warnings.simplefilter("error")
        prepare_dataset("tiny_imagenet", tmp_path / "t.zip")
    assert "\n" not in str(caught.value) and not list((tmp_path / "data").iterdir())


def test_archives_with_bad_paths_or_sizes_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    with zipfile.ZipFile(tmp_path / "climbs.zip", "w") as file:
        file.writestr("../../../../../climbed", "content")
        file.writestr(f"{tmp_path}/climbed", "content")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for number in range(10):
            file.writestr(f"{number}", bytes(2**20))
    (tmp_path / "other.zip").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "text.zip").write_text("no archive")
    monkeypatch.setattr("linflab.platform.data.raw_data.MAX_ARCHIVE_BYTES", 5 * 2**20)
    for name in ("climbs", "bomb", "other", "text"):
        with pytest.raises(InputError, match=rf"{name}\.zip"):
            prepare_dataset("tiny_imagenet", tmp_path / f"{name}.zip")
    assert not list(tmp_path.rglob("climbed")) and not list((tmp_path / "data").iterdir())


def test_own_dataset_is_loaded_with_its_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    generator = np.random.RandomState(0)
    images = (generator.rand(50, 3, 12, 9) * [[[[200]], [[100]], [[50]]]]).astype(np.uint8)
    labels = (np.arange(50) % 7).astype(np.uint8)
    write_prepared(
        tmp_path / "mine", train_images=images, train_labels=labels, test_images=images[:5], test_labels=labels[:5]
    )
    data = load_dataset("mine")
    assert (len(data.train), len(data.validation), len(data.test)) == (45, 5, 5)
    assert data.info.input_shape == (3, 12, 9) and data.info.classes == 7
    np.testing.assert_allclose(data.info.mean, images.mean(axis=(0, 2, 3)) / 255, rtol=1e-12)
    np.testing.assert_allclose(data.info.std, images.std() / 255, rtol=1e-9)
    np.testing.assert_allclose(data.info.channel_std, images.std(axis=(0, 2, 3)) / 255, rtol=1e-9)
    states = {entry.name: entry for entry in list_datasets()}
    assert states["mine"].state == "ready" and states["mine"].train == 45
    assert states["mnist"].state == "not prepared" and states["digits"].state == "ready, with the published mean"


def test_listing_reports_unpublished_and_invalid_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    write_prepared(tmp_path / "mnist")  # noise
    write_prepared(tmp_path / "fashion_mnist", test_labels=np.zeros(3, np.uint8))
    states = {entry.name: entry.state for entry in list_datasets()}
    assert "published" in states["mnist"] and "test_labels.npy" in states["fashion_mnist"]


def test_unknown_dataset_is_rejected() -> None:
    with pytest.raises(InputError, match=r"dataset=imagenet.*digits"):
        load_dataset("imagenet")


@pytest.mark.parametrize("name", ["", "..", "a/b", "\0", "a" * 5000, "/", "mnist/"])
def test_invalid_dataset_names_are_rejected(name: str) -> None:
    with pytest.raises(InputError, match="dataset="):
        load_dataset(name)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_interrupted_preparation_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    data = tmp_path / "data"
    code = (
        "import sys, time\nfrom linflab.platform.__main__ import main\n"
        "from linflab.platform.data.raw_data import RAW_LOADERS\n"
        "def slow(source, place):\n    (place / 'part').write_text('x')\n    time.sleep(120)\n"
        "RAW_LOADERS['mnist'] = slow\nsys.argv = ['linflab', 'data', 'prepare', 'mnist']\nmain()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "LINFLAB_DATA": str(data)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with time_limit(120):
        while not list(data.glob(".mnist-*/raw/part")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and stderr.count("\n") == 1 and stderr.startswith("linflab: "), stderr
    assert list(data.iterdir()) == []


def test_datasets_are_prepared_in_other_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    write_raw_mnist(tmp_path / "originals")
    with ThreadPoolExecutor(1) as threads:
        folder = threads.submit(prepare_dataset, "mnist", tmp_path / "originals").result()
    assert [path.name for path in (tmp_path / "data").iterdir()] == [folder.name]


def test_invalid_data_folders_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", "~nobodyxx/data")
    with pytest.raises(InputError, match="LINFLAB_DATA"):
        load_dataset("mnist")
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    with pytest.raises(InputError, match="source="):
        prepare_dataset("mnist", Path("a" * 300))
