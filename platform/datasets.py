"""The data sets as uint8 arrays, shared by all trials of a machine, with a fixed validation split.

In prepared form a data set is a folder `<name>/{train,test}_{images,labels}.npy` under `$LINFLAB_DATA` (default
~/.cache/linflab/datasets): uint8, images N x C x H x W, labels N. The files are memory-mapped, so concurrent trials
hold one copy. Any folder of that form is a data set by its name. `digits` comes with scikit-learn and needs no files.
"""

import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from linflab.platform.augmentation import AugmentationConfig
from linflab.platform.errors import SettingError
from linflab.platform.originals import ORIGINALS, Arrays, read_originals


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
    "mnist": Facts(mean=(0.1307,), std=0.3081, input_shape=(1, 28, 28), classes=10, validation_size=5000),
    "fashion_mnist": Facts(mean=(0.2860,), std=0.3520, input_shape=(1, 28, 28), classes=10, validation_size=5000),
    # the published stds of the colour sets are the mean of those of single images: less than that of all pixels
    "cifar10": Facts(
        mean=(0.4914, 0.4822, 0.4465), std=0.2009, input_shape=(3, 32, 32), classes=10, validation_size=5000
    ),
    "tiny_imagenet": Facts(
        mean=(0.4802, 0.4481, 0.3975), std=0.2276, input_shape=(3, 64, 64), classes=200, validation_size=10000
    ),
}
VALIDATION_SHARE = 0.1  # of the training images, in data sets of one's own


@dataclass(frozen=True)
class Split:
    """Samples of a data set: `images` (N, C, H, W) uint8 and `labels` (N), of which `indices` belong to the split."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    white: int
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, positions: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) float32 in [0, 1] and labels (B) int64 at these positions of the split.

        With `draws` (B, 3) of the augmentation, images for training; without, images for evaluation.
        """
        chosen = self.indices[positions]
        images = self.images[chosen]
        seen = self.augmentation.centre(images) if draws is None else self.augmentation.augment(images, draws)
        return seen.to(torch.float32).div_(self.white), self.labels[chosen].to(torch.int64)

    def draws(self, generator: torch.Generator) -> Tensor:
        """What the augmentation needs of chance for an epoch: (N, 3), by position in the epoch's order."""
        return self.augmentation.draw(len(self), self.images.shape[2], self.images.shape[3], generator)

    def first(self, count: int) -> "Split":
        """The first samples of it."""
        return replace(self, indices=self.indices[:count])

    def to(self, device: torch.device) -> "Split":
        return replace(
            self, images=self.images.to(device), labels=self.labels.to(device), indices=self.indices.to(device)
        )


@dataclass(frozen=True)
class Dataset:
    """A data set as a network sees it: `facts.input_shape` is what the augmentation leaves of an image."""

    name: str
    facts: Facts
    train: Split
    validation: Split
    test: Split

    def training(self, include_validation: bool) -> Split:
        """What is trained on: the training images, or those and the validation images together."""
        if not include_validation:
            return self.train
        return replace(self.train, indices=torch.cat([self.train.indices, self.validation.indices]).sort().values)

    def to(self, device: torch.device) -> "Dataset":
        """The same data on a device; on the CPU the memory-mapped arrays themselves."""
        splits = (self.train.to(device), self.validation.to(device), self.test.to(device))
        return Dataset(self.name, self.facts, *splits)


def data_folder() -> Path:
    """Where prepared data sets are: $LINFLAB_DATA or ~/.cache/linflab/datasets."""
    return Path(os.environ.get("LINFLAB_DATA") or "~/.cache/linflab/datasets").expanduser().absolute()


def facts_of(name: str) -> Facts:
    """The facts of a data set by name; those of one's own data sets are measured.

    Raises:
        SettingError: no such data set.
    """
    if name in FACTS:
        return FACTS[name]
    if not name or name != Path(name).name or not (data_folder() / name).is_dir():
        raise SettingError(
            f"dataset={name}: unknown; must be one of {', '.join(FACTS)}, or a folder in {data_folder()} that holds "
            f"{', '.join(f'{file}.npy' for file in FILES)}"
        )
    images, labels, _, test_labels = _open(data_folder() / name)
    mean, std = measure(images)
    classes = 1 + int(max(labels.max(), test_labels.max()))
    return Facts(mean, std, images.shape[1:], classes, validation_size=max(1, int(VALIDATION_SHARE * len(labels))))


def measure(images: np.ndarray, white: int = 255) -> tuple[tuple[float, ...], float]:
    """Mean of every channel and standard deviation of all pixels, for images (N, C, H, W) uint8, in [0, 1]."""
    totals, squares = np.zeros(images.shape[1]), 0.0
    for start in range(0, len(images), 4096):  # a part at a time: in float64 the whole might not fit into memory
        part = images[start : start + 4096].astype(np.float64) / white
        totals += part.sum(axis=(0, 2, 3))
        squares += (part**2).sum()
    pixels = images.size / images.shape[1]
    mean = totals / pixels
    return tuple(mean.tolist()), float(np.sqrt(squares / images.size - (totals.sum() / images.size) ** 2))


def load_dataset(name: str, augmentation: AugmentationConfig | None = None) -> Dataset:
    """A data set by name, fetched and prepared first where it is not there yet.

    The validation split is drawn from the training set by a fixed permutation: the same images for every seed.

    Raises:
        SettingError: no such data set, or it is neither prepared nor to be downloaded (names the place looked in), or
            its images are smaller than the augmentation's crop.
    """
    augmentation = augmentation or AugmentationConfig()
    if name != "digits" and name in FACTS and not (data_folder() / name).is_dir():
        prepare_dataset(name)
    facts = facts_of(name)
    arrays = _digits() if name == "digits" else _open(data_folder() / name, facts)
    train_images, train_labels, test_images, test_labels = (torch.from_numpy(array) for array in arrays)
    channels, height, width = facts.input_shape
    if augmentation.crop is not None and augmentation.crop > min(height, width):
        raise SettingError(f"augmentation.crop={augmentation.crop}: images of {name} are {height} x {width} pixels")
    order = torch.from_numpy(_fixed_permutation(len(train_labels)))
    held_out, kept = order[: facts.validation_size], order[facts.validation_size :]

    def split(images: Tensor, labels: Tensor, indices: Tensor) -> Split:
        return Split(images, labels, indices, facts.white, augmentation)

    return Dataset(
        name,
        replace(facts, input_shape=(channels, *augmentation.size(height, width))),
        train=split(train_images, train_labels, kept.sort().values),
        validation=split(train_images, train_labels, held_out.sort().values),
        test=split(test_images, test_labels, torch.arange(len(test_labels))),
    )


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


def _open(folder: Path, facts: Facts | None = None) -> Arrays:
    """The four arrays of a prepared folder, mapped copy-on-write: pages are shared until somebody writes."""
    images, labels, test_images, test_labels = (
        _open_array(folder / f"{file}.npy", ndim=4 if "images" in file else 1) for file in FILES
    )
    shape = images.shape[1:] if facts is None else facts.input_shape
    for image_array, label_array in ((images, labels), (test_images, test_labels)):
        if len(image_array) != len(label_array):
            raise SettingError(f"{folder}: {len(image_array)} images but {len(label_array)} labels; prepare it anew")
        if image_array.shape[1:] != shape:
            raise SettingError(f"{folder}: images are {image_array.shape[1:]}, should be {shape}")
        if len(label_array) == 0 or (facts is not None and label_array.max() >= facts.classes):
            raise SettingError(
                f"{folder}: labels must be there" + (f", and be from 0 to {facts.classes - 1}" if facts else "")
            )
    held_out = 1 if facts is None else facts.validation_size
    if len(labels) <= held_out:
        raise SettingError(f"{folder}: {len(labels)} training images; more than {held_out} are needed")
    return images, labels, test_images, test_labels


def _open_array(path: Path, ndim: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="c")
    except (OSError, ValueError, EOFError) as error:
        raise SettingError(f"{path}: can't be read as a data set's array ({error}); prepare it anew") from None
    if array.dtype != np.uint8 or array.ndim != ndim:
        raise SettingError(f"{path}: must be uint8 with {ndim} dimensions, has {array.dtype} and {array.ndim}")
    return array


def prepare_dataset(name: str, source: Path | None = None) -> Path:
    """Convert the originals of a data set to its prepared form, once; returns the folder.

    Args:
        name: a data set that has originals: all of `FACTS` but digits.
        source: a folder or file with the originals; None downloads them.

    Raises:
        SettingError: no such data set, or its originals can't be had or read; nothing is left half-written.
    """
    if name not in ORIGINALS:
        raise SettingError(f"dataset={name}: there is nothing to prepare; must be one of {', '.join(ORIGINALS)}")
    folder = data_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as temporary:
            originals, ready = Path(temporary) / "originals", Path(temporary) / "ready"
            originals.mkdir()
            ready.mkdir()
            for file, array in zip(FILES, read_originals(name, source, originals), strict=True):
                np.save(ready / f"{file}.npy", np.ascontiguousarray(array))
            _open(ready, FACTS[name])
            try:
                ready.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, and what it prepared is the same
                    raise
    except (OSError, RuntimeError, ValueError, KeyError, SettingError) as error:
        reason = " ".join(str(error).split())
        if source is not None:
            raise SettingError(f"dataset={name}: its originals in {source} can't be used ({reason})") from None
        files = ", ".join(f"{file}.npy" for file in FILES)
        raise SettingError(
            f"dataset={name}: not at {folder}, and fetching it failed ({reason}); put {files} there, point "
            f"LINFLAB_DATA to the folder that holds {name}/, or give the originals to linflab data prepare --source"
        ) from None
    return folder


@dataclass(frozen=True)
class Inventory:
    """What is there of a data set; counts and measurements are None where it is not prepared."""

    name: str
    place: str
    train: int | None = None
    validation: int | None = None
    test: int | None = None
    shape: tuple[int, ...] | None = None
    classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: float | None = None
    state: str = "not prepared"


def inventory() -> list[Inventory]:
    """The known data sets and one's own, with what is there of each, and whether it has the published means."""
    own = sorted(path.name for path in data_folder().glob("*") if path.is_dir() and path.name[0] != ".")
    found = []
    for name in [*FACTS, *(name for name in own if name not in FACTS and _looks_prepared(name))]:
        place = "comes with scikit-learn" if name == "digits" else str(data_folder() / name)
        if name != "digits" and not (data_folder() / name).is_dir():
            found.append(Inventory(name, place))
            continue
        try:
            data = load_dataset(name)
        except SettingError as error:
            found.append(Inventory(name, place, state=str(error)))
            continue
        mean, std = measure(data.train.images.numpy(), data.facts.white)
        as_published = all(abs(a - b) < 2e-3 for a, b in zip(mean, data.facts.mean, strict=True))
        known = ", with the published mean" if name in FACTS else ""
        state = f"ready{known}" if as_published else f"its mean is not the published {data.facts.mean}: other images?"
        sizes = len(data.train), len(data.validation), len(data.test)
        found.append(Inventory(name, place, *sizes, data.facts.input_shape, data.facts.classes, mean, std, state))
    return found


def _looks_prepared(name: str) -> bool:
    return all((data_folder() / name / f"{file}.npy").is_file() for file in FILES)
