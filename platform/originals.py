"""From the originals of a data set, downloaded or already there, to the four arrays of its prepared form."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # train images, train labels, test images, test labels

TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


def read_originals(name: str, source: Path | None, workplace: Path) -> Arrays:
    """The arrays of a data set: images N x C x H x W and labels N, uint8.

    Args:
        name: one of `ORIGINALS`.
        source: a folder that holds the original files at any depth, or one such file; None downloads them.
        workplace: an empty folder for what is in between.

    Raises:
        OSError, RuntimeError, ValueError: a file is missing or damaged, or the download failed.
    """
    return ORIGINALS[name](source, workplace)


def _torchvision(kind: str, folder: str, files: tuple[tuple[str, ...], ...]) -> Callable[[Path | None, Path], Arrays]:
    """A reader by torchvision, which looks in `folder` below its root and checks the archives' sums.

    Of every tuple in `files` one will do: an archive, or what was in it.
    """

    def read(source: Path | None, workplace: Path) -> Arrays:
        import torchvision  # slow to import, and needed once only

        if source is not None:
            (workplace / folder).mkdir(parents=True, exist_ok=True)
            for names in files:
                found = _find(source, *names)
                (workplace / folder / found.name).symlink_to(found)
        make = getattr(torchvision.datasets, kind)
        sets = [make(workplace, train=train, download=True) for train in (True, False)]
        arrays = []
        for data in sets:
            images = np.asarray(data.data)
            arrays.append(images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2))
            arrays.append(np.asarray(data.targets, dtype=np.uint8))
        return arrays[0], arrays[1], arrays[2], arrays[3]

    return read


def _find(source: Path, *names: str) -> Path:
    """The first file or folder with one of these names, at or below `source`."""
    for name in names:
        found = [source] if source.name == name else sorted(source.rglob(name))
        if found:
            return found[0].absolute()
    raise FileNotFoundError(f"there is no {' or '.join(names)}")


def _tiny_imagenet(source: Path | None, workplace: Path) -> Arrays:
    """TinyImageNet from its folder or zip archive; as in the literature, its validation images are the test set."""
    from PIL import Image

    if source is None:
        from torchvision.datasets.utils import download_url

        download_url(TINY_IMAGENET, str(workplace))
        source = workplace / Path(TINY_IMAGENET).name
    if source.is_file():
        with zipfile.ZipFile(source) as archive:
            archive.extractall(workplace)
        source = workplace
    root = _find(source, "wnids.txt").parent
    classes = sorted((root / "wnids.txt").read_text().split())
    label_of = {name: label for label, name in enumerate(classes)}

    def load(paths: list[tuple[Path, int]]) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((len(paths), 3, 64, 64), np.uint8)
        for row, (path, _) in enumerate(paths):
            with Image.open(path) as image:
                images[row] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        return images, np.array([label for _, label in paths], np.uint8)

    train = [
        (path, label) for name, label in label_of.items() for path in sorted((root / "train" / name).rglob("*.JPEG"))
    ]
    lines = (root / "val" / "val_annotations.txt").read_text().splitlines()
    test = [(root / "val" / "images" / file, label_of[name]) for file, name, *_ in map(str.split, lines)]
    return *load(train), *load(test)


MNIST_FILES = tuple(
    (f"{split}-{kind}-ubyte.gz", f"{split}-{kind}-ubyte")
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)

ORIGINALS: dict[str, Callable[[Path | None, Path], Arrays]] = {
    "mnist": _torchvision("MNIST", "MNIST/raw", MNIST_FILES),
    "fashion_mnist": _torchvision("FashionMNIST", "FashionMNIST/raw", MNIST_FILES),
    "cifar10": _torchvision("CIFAR10", "", (("cifar-10-python.tar.gz", "cifar-10-batches-py"),)),
    "tiny_imagenet": _tiny_imagenet,
}
