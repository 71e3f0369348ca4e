"""The data sets as uint8 arrays, shared by all trials of a machine, with a fixed validation split.

In prepared form a data set is a folder `<name>/{train,test}_{images,labels}.npy` under `$LINFLAB_DATA` (default
~/.cache/linflab/datasets): uint8, images N x C x H x W, labels N. The files are memory-mapped, so concurrent trials
hold one copy. `digits` comes with scikit-learn and needs no files.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from linflab.platform.errors import SettingError


@dataclass(frozen=True)
class Facts:
    """What is known of a data set without opening it. Mean (per channel) and std are of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: float
    input_shape: tuple[int, int, int]
    classes: int
    validation_size: int
    white: int = 255  # the value that is 1.0


FACTS = {
    "digits": Facts(mean=(0.3053,), std=0.3761, input_shape=(1, 8, 8), classes=10, validation_size=237, white=16),
    "fashion_mnist": Facts(mean=(0.2860,), std=0.3520, input_shape=(1, 28, 28), classes=10, validation_size=5000),
}


@dataclass(frozen=True)
class Split:
    """Samples of a data set: `images` (N, C, H, W) uint8 and `labels` (N), of which `indices` belong to the split."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    white: int

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) float32 in [0, 1] and labels (B) int64 at these positions of the split."""
        chosen = self.indices[positions]
        return self.images[chosen].to(torch.float32).div_(self.white), self.labels[chosen].to(torch.int64)

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device), self.indices.to(device), self.white)


@dataclass(frozen=True)
class Dataset:
    name: str
    facts: Facts
    train: Split
    validation: Split
    test: Split

    def to(self, device: torch.device) -> "Dataset":
        """The same data on a device; on the CPU the memory-mapped arrays themselves."""
        splits = (self.train.to(device), self.validation.to(device), self.test.to(device))
        return Dataset(self.name, self.facts, *splits)


def data_folder() -> Path:
    """Where prepared data sets are: $LINFLAB_DATA or ~/.cache/linflab/datasets."""
    return Path(os.environ.get("LINFLAB_DATA") or "~/.cache/linflab/datasets").expanduser().absolute()


def facts_of(name: str) -> Facts:
    """The facts of a data set by name.

    Raises:
        SettingError: no such data set.
    """
    if name not in FACTS:
        raise SettingError(f"dataset={name}: unknown; must be one of {', '.join(FACTS)}")
    return FACTS[name]


def load_dataset(name: str) -> Dataset:
    """A data set by name, fetched and prepared first where it is not there yet.

    The validation split is drawn from the training set by a fixed permutation: the same images for every seed.

    Raises:
        SettingError: no such data set, or it is neither prepared nor to be downloaded; names the place looked in.
    """
    facts = facts_of(name)
    arrays = _digits() if name == "digits" else _open(_prepared(name), facts)
    train_images, train_labels, test_images, test_labels = (torch.from_numpy(array) for array in arrays)
    order = torch.from_numpy(_fixed_permutation(len(train_labels)))
    held_out, kept = order[: facts.validation_size], order[facts.validation_size :]
    return Dataset(
        name,
        facts,
        train=Split(train_images, train_labels, kept.sort().values, facts.white),
        validation=Split(train_images, train_labels, held_out.sort().values, facts.white),
        test=Split(test_images, test_labels, torch.arange(len(test_labels)), facts.white),
    )


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
FILES = ("train_images", "train_labels", "test_images", "test_labels")


def _fixed_permutation(size: int) -> np.ndarray:
    # RandomState, not default_rng: its stream is frozen across numpy versions
    return np.random.RandomState(0).permutation(size).astype(np.int64)


def _digits() -> Arrays:
    """1797 images of 8 x 8 pixels from 0 to 16. They come without a test set: a fixed fifth becomes one."""
    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8)[:, None], bunch.target.astype(np.uint8)
    order = _fixed_permutation(len(labels))
    test, train = order[:360], order[360:]
    return images[train], labels[train], images[test], labels[test]


def _open(folder: Path, facts: Facts) -> Arrays:
    """The four arrays of a prepared folder, mapped copy-on-write: pages are shared until somebody writes."""
    images, labels, test_images, test_labels = (
        _open_array(folder / f"{file}.npy", ndim=4 if "images" in file else 1) for file in FILES
    )
    for image_array, label_array in ((images, labels), (test_images, test_labels)):
        if len(image_array) != len(label_array):
            raise SettingError(f"{folder}: {len(image_array)} images but {len(label_array)} labels; prepare it anew")
        if image_array.shape[1:] != facts.input_shape:
            raise SettingError(f"{folder}: images are {image_array.shape[1:]}, should be {facts.input_shape}")
        if len(label_array) == 0 or label_array.max() >= facts.classes:
            raise SettingError(f"{folder}: labels must be there, and be from 0 to {facts.classes - 1}")
    if len(labels) <= facts.validation_size:
        raise SettingError(f"{folder}: {len(labels)} training images; more than {facts.validation_size} are needed")
    return images, labels, test_images, test_labels


def _open_array(path: Path, ndim: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="c")
    except (OSError, ValueError, EOFError) as error:
        raise SettingError(f"{path}: can't be read as a data set's array ({error}); prepare it anew") from None
    if array.dtype != np.uint8 or array.ndim != ndim:
        raise SettingError(f"{path}: must be uint8 with {ndim} dimensions, has {array.dtype} and {array.ndim}")
    return array


def _prepared(name: str) -> Path:
    """The folder of a prepared data set; downloads and converts the original once."""
    folder = data_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as temporary:
            arrays = DOWNLOADS[name](Path(temporary) / "originals")
            ready = Path(temporary) / "ready"
            ready.mkdir()
            for file, array in zip(FILES, arrays, strict=True):
                np.save(ready / f"{file}.npy", array)
            try:
                ready.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, and what it prepared is the same
                    raise
    except (OSError, RuntimeError) as error:
        files = ", ".join(f"{file}.npy" for file in FILES)
        reason = " ".join(str(error).split())
        raise SettingError(
            f"dataset={name}: not at {folder}, and fetching it failed ({reason}); "
            f"put {files} there, or point LINFLAB_DATA to the folder that holds {name}/"
        ) from None
    return folder


def _download_fashion_mnist(folder: Path) -> Arrays:
    import torchvision  # slow to import, and needed once only

    sets = [torchvision.datasets.FashionMNIST(folder, train=train, download=True) for train in (True, False)]
    arrays = [array for s in sets for array in (s.data.numpy()[:, None], s.targets.numpy().astype(np.uint8))]
    shutil.rmtree(folder)
    return arrays[0], arrays[1], arrays[2], arrays[3]


DOWNLOADS: dict[str, Callable[[Path], Arrays]] = {"fashion_mnist": _download_fashion_mnist}
