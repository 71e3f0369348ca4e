"""Datasets as uint8 arrays with a fixed validation split, shared by all trials on a machine.

A prepared dataset is a folder `<name>/{train,test}_{images,labels}.npy` under `$LINFLAB_DATA` (default
~/.cache/linflab/datasets): images (N, C, H, W) uint8 and integer labels (N). The files are memory-mapped, so concurrent
trials share one copy. Any folder of this form is a dataset, and the name of the folder is its name. `digits` is part of
scikit-learn and needs no files.
"""

import os
import stat
import tempfile
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from linflab.platform import signals
from linflab.platform.data.arrays import map_array
from linflab.platform.data.augmentation import AugmentationConfig
from linflab.platform.data.info import DATASETS, DatasetInfo, channel_statistics
from linflab.platform.errors import InputError
from linflab.platform.files import exists

if TYPE_CHECKING:
    from linflab.platform.data.raw_data import Arrays


VALIDATION_FRACTION = 0.1  # of the training images of your own datasets
MAX_CLASSES = 2**16  # of your own datasets; a larger label indicates an error


SplitName = Literal["validation", "test"]


@dataclass(frozen=True)
class Split:
    """Split of a dataset: the entries at `indices` in `images` (N, C, H, W) uint8 and `labels` (N)."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    max_value: int
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, positions: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return a batch of the split.

        Args:
            positions: (B) positions in the split.
            draws: (B, 3 or 4) rows of `sample_augmentation`, to augment the images; None for images in evaluation.

        Returns:
            Images (B, C, H, W) float32 with pixels in [0, 1], and labels (B) int64.
        """
        indices = self.indices[positions]
        images = self.images[indices]
        labels = self.labels[indices].to(torch.int64)
        if draws is None:
            return self._pixels(self.augmentation.center_crop(images)), labels
        inputs = self._pixels(self.augmentation.crop_and_flip(images, draws))
        return self.augmentation.correct_gamma(inputs, draws), labels

    def _pixels(self, images: Tensor) -> Tensor:
        """Return pixels as float32, scaled to [0, 1]."""
        return images.to(torch.float32).div_(self.max_value)

    def sample_augmentation(self, generator: torch.Generator) -> Tensor:
        """Draw augmentation parameters (N, 3 or 4) int64 for an epoch; row i is for image i of the epoch's order."""
        return self.augmentation.sample_params(len(self), self.images.shape[2], self.images.shape[3], generator)

    def take(self, count: int) -> "Split":
        """Return the first `count` samples as a split."""
        return replace(self, indices=self.indices[:count])

    def to(self, device: torch.device) -> "Split":
        """Return the split on a device."""
        return replace(
            self, images=self.images.to(device), labels=self.labels.to(device), indices=self.indices.to(device)
        )


@dataclass(frozen=True)
class Dataset:
    """Dataset with its splits; `info.input_shape` is the shape after augmentation."""

    name: str
    info: DatasetInfo
    train: Split
    validation: Split
    test: Split

    def evaluation_split(self, name: SplitName) -> Split:
        """Return the validation or the test split."""
        return self.test if name == "test" else self.validation

    def training_split(self, include_validation: bool) -> Split:
        """Return the training split, with the validation images if `include_validation`."""
        if not include_validation:
            return self.train
        return replace(self.train, indices=torch.cat([self.train.indices, self.validation.indices]).sort().values)

    def to(self, device: torch.device) -> "Dataset":
        """Return the dataset on a device; on the CPU, the arrays stay memory-mapped."""
        splits = (self.train.to(device), self.validation.to(device), self.test.to(device))
        return Dataset(self.name, self.info, *splits)


def data_dir() -> Path:
    """Return the folder of prepared datasets: $LINFLAB_DATA or ~/.cache/linflab/datasets.

    Raises:
        InputError: If the path cannot be expanded.
    """
    location = os.environ.get("LINFLAB_DATA") or "~/.cache/linflab/datasets"
    try:
        return Path(location).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # unknown user, or deleted working directory
        raise InputError(f"LINFLAB_DATA={location}: {error}; use an absolute path") from None


def dataset_info(name: str) -> DatasetInfo:
    """Return the info of a dataset by name; for your own datasets, compute it from the images.

    Raises:
        InputError: If the dataset does not exist, or its files are invalid.
    """
    if name in DATASETS:
        return DATASETS[name]
    if name in ("", "..") or name != Path(name).name or not _is_folder(data_dir() / name):
        raise InputError(
            f"dataset={name[:200]}: not found; use one of {', '.join(DATASETS)}, or a folder in {data_dir()} with "
            f"{', '.join(f'{file}.npy' for file in ARRAY_NAMES)}"
        )
    images, labels, _, test_labels = _open(data_dir() / name)
    mean, std, channel_std = channel_statistics(images)
    if std < 1e-6 and (images == images[:1, :1, :1, :1]).all():  # a tiny std by itself can be a rounding error
        raise InputError(
            f"{data_dir() / name / 'train_images.npy'}: all pixels are {images[0, 0, 0, 0]}, so the standard deviation "
            "is zero; use images that differ"
        )
    classes = 1 + int(max(labels.max(), test_labels.max()))
    validation_size = max(1, int(VALIDATION_FRACTION * len(labels)))
    return DatasetInfo(mean, std, images.shape[1:], classes, validation_size, channel_std=channel_std)


def load_dataset(name: str, augmentation: AugmentationConfig | None = None) -> Dataset:
    """Load a dataset by name; download and prepare it first if necessary.

    The validation images are drawn from the training set with a fixed seed, so they are the same in every run.

    Args:
        name: One of `DATASETS`, or a folder in `data_dir()`.
        augmentation: Augmentation of training images, and crop of all images; None for neither.

    Raises:
        InputError: If the dataset does not exist, is neither prepared nor downloadable, or has images smaller than the
            crop. The message names the folder.
    """
    augmentation = augmentation or AugmentationConfig()
    if name != "digits" and name in DATASETS and not _is_folder(data_dir() / name):
        prepare_dataset(name)
    info = dataset_info(name)
    arrays = _digits() if name == "digits" else _open(data_dir() / name, info)
    train_images, train_labels, test_images, test_labels = (torch.from_numpy(array) for array in arrays)
    channels, height, width = info.input_shape
    if augmentation.crop_size is not None and augmentation.crop_size > min(height, width):
        raise InputError(
            f"augmentation.crop_size={augmentation.crop_size}: must be at most {min(height, width)}; images of {name} "
            f"have {height} x {width} pixels"
        )
    order = torch.from_numpy(_fixed_permutation(len(train_labels)))
    validation_indices, train_indices = order[: info.validation_size], order[info.validation_size :]

    def split(images: Tensor, labels: Tensor, indices: Tensor) -> Split:
        return Split(images, labels, indices, info.max_value, augmentation)

    return Dataset(
        name,
        replace(info, input_shape=(channels, *augmentation.output_size(height, width))),
        train=split(train_images, train_labels, train_indices.sort().values),
        validation=split(train_images, train_labels, validation_indices.sort().values),
        test=split(test_images, test_labels, torch.arange(len(test_labels))),
    )


ARRAY_NAMES = ("train_images", "train_labels", "test_images", "test_labels")


def _fixed_permutation(size: int) -> np.ndarray:
    # Unlike default_rng, RandomState has the same stream in all NumPy versions.
    return np.random.RandomState(0).permutation(size).astype(np.int64)


def _digits() -> "Arrays":
    """Return 1797 images of 8 x 8 pixels with values from 0 to 16; a fixed fifth is the test set."""
    spec = find_spec("sklearn")  # without its import, which takes a second
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images, labels = rows[:, :-1].reshape(-1, 1, 8, 8), rows[:, -1]
    order = _fixed_permutation(len(labels))
    test, train = order[:360], order[360:]
    return images[train], labels[train], images[test], labels[test]


def _is_folder(path: Path) -> bool:
    return exists(path, stat.S_IFDIR)


def _open(folder: Path, info: DatasetInfo | None = None) -> "Arrays":
    """Map the four arrays of a prepared folder copy-on-write, so that processes share their pages.

    Raises:
        InputError: If images and labels are invalid or do not match; the message names the file.
    """
    train, train_labels, test, test_labels = (folder / f"{file}.npy" for file in ARRAY_NAMES)
    images = _open_images(train)
    shape = images.shape[1:] if info is None else info.input_shape
    if images.shape[1:] != shape:
        raise InputError(f"{train}: images have shape {images.shape[1:]}; must be {shape}")
    test_images = _open_images(test)
    if test_images.shape[1:] != shape:
        raise InputError(f"{test}: images have shape {test_images.shape[1:]}; must be {shape}, as in {train.name}")
    classes = MAX_CLASSES if info is None else info.classes
    labels = _open_labels(train_labels, len(images), classes)
    validation_size = 1 if info is None else info.validation_size
    if len(labels) <= validation_size:
        raise InputError(f"{train}: has {len(labels)} images; must have more than {validation_size}")
    if info is None and labels.min() == labels.max():
        raise InputError(f"{train_labels}: all labels are {labels[0]}; must have at least two classes")
    return images, labels, test_images, _open_labels(test_labels, len(test_images), classes)


def _open_images(path: Path) -> np.ndarray:
    array = map_array(path)
    if array.dtype != np.uint8 or array.ndim != 4:
        raise InputError(
            f"{path}: has {array.dtype} of shape {array.shape}; must have uint8 from 0 to 255 of shape (N, C, H, W)"
        )
    _, channels, height, width = array.shape
    if width in (1, 3, 4) and channels > 4 and height > width:
        raise InputError(
            f"{path}: shape {array.shape} looks like (N, H, W, C); must be (N, C, H, W); use "
            "images.transpose(0, 3, 1, 2)"
        )
    return array


def _open_labels(path: Path, images: int, classes: int) -> np.ndarray:
    """Return the labels of the images: mapped if uint8, else converted to int64."""
    array = map_array(path)
    if array.dtype.kind not in "iu" or array.shape != (images,):
        raise InputError(
            f"{path}: has {array.dtype} of shape {array.shape}; must have integers of shape ({images},), one label per "
            "image"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= classes:
        raise InputError(f"{path}: has labels from {low} to {high}; must be from 0 to {classes - 1}")
    return array if array.dtype == np.uint8 else array.astype(np.int64)


def prepare_dataset(name: str, source: Path | None = None) -> Path:
    """Convert the raw files of a dataset to its prepared form, unless the prepared form exists.

    Args:
        name: Dataset with raw files: all of `DATASETS` except digits.
        source: Folder or file with the raw files; None downloads them.

    Returns:
        Folder of the prepared dataset.

    Raises:
        InputError: If the dataset does not exist, or its raw files cannot be downloaded or read. No incomplete files
            remain.
    """
    from linflab.platform.data.raw_data import RAW_LOADERS, load_raw_arrays  # imports image decoders

    if name not in RAW_LOADERS:
        raise InputError(f"dataset={name}: has no raw files to prepare; use one of {', '.join(RAW_LOADERS)}")
    folder = data_dir() / name
    if _is_folder(folder):
        return folder
    if source is not None and not exists(source):
        raise InputError(f"source={source}: not found; use a folder or file with the raw files of {name}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The temporary folder is removed after an interruption, too.
        with signals.guarded(), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as temporary:
            raw, prepared = Path(temporary) / "raw", Path(temporary) / "prepared"
            raw.mkdir()
            prepared.mkdir()
            for file, array in zip(ARRAY_NAMES, load_raw_arrays(name, source, raw), strict=True):
                np.save(prepared / f"{file}.npy", np.ascontiguousarray(array))
            _open(prepared, DATASETS[name])
            try:
                prepared.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process has prepared the same dataset
                    raise
    except Exception as error:  # damaged raw files can raise almost any exception
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if source is not None:
            raise InputError(
                f"dataset={name}: cannot read the raw files in {source} ({reason}); use the published files"
            ) from None
        files = ", ".join(f"{file}.npy" for file in ARRAY_NAMES)
        raise InputError(
            f"dataset={name}: not found at {folder}, and the download failed ({reason}); put {files} there, set "
            f"LINFLAB_DATA to the folder of {name}/, or run `linflab data prepare` with --source"
        ) from None
    return folder


@dataclass(frozen=True)
class DatasetStatus:
    """Status of a dataset; counts and statistics are None unless it is prepared."""

    name: str
    location: str
    train: int | None = None
    validation: int | None = None
    test: int | None = None
    shape: tuple[int, ...] | None = None
    classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: float | None = None
    state: str = "not prepared"


def list_datasets() -> list[DatasetStatus]:
    """Return the status of shipped datasets, compared with the published means, and of your own datasets."""
    own_names = sorted(path.name for path in data_dir().glob("*") if path.is_dir() and path.name[0] != ".")
    statuses = []
    for name in [*DATASETS, *(name for name in own_names if name not in DATASETS and is_prepared(name))]:
        location = "comes with scikit-learn" if name == "digits" else str(data_dir() / name)
        if name != "digits" and not _is_folder(data_dir() / name):
            statuses.append(DatasetStatus(name, location))
            continue
        try:
            data = load_dataset(name)
        except InputError as error:
            statuses.append(DatasetStatus(name, location, state=str(error)))
            continue
        mean, std, _ = channel_statistics(data.train.images.numpy(), data.info.max_value)
        is_mean_published = all(abs(a - b) < 2e-3 for a, b in zip(mean, data.info.mean, strict=True))
        suffix = ", with the published mean" if name in DATASETS else ""
        state = (
            f"ready{suffix}"
            if is_mean_published
            else f"mean differs from the published {data.info.mean}; check the images"
        )
        sizes = len(data.train), len(data.validation), len(data.test)
        statuses.append(
            DatasetStatus(name, location, *sizes, data.info.input_shape, data.info.classes, mean, std, state)
        )
    return statuses


def dataset_problem(name: str) -> str | None:
    """Return what is wrong with the files of a dataset, as loading reports it, or None; pixels are not read."""
    try:
        if name != "digits":
            _open(data_dir() / name, DATASETS.get(name))
    except InputError as error:
        return str(error)
    return None


def is_prepared(name: str) -> bool:
    """Return whether all files of a dataset exist in `data_dir()`."""
    return all((data_dir() / name / f"{file}.npy").is_file() for file in ARRAY_NAMES)
