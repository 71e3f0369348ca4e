"""Conversion of a dataset's raw files, downloaded or local, to the four arrays of its prepared form.

Local files are untrusted. The sizes that a file declares are checked before memory is allocated. Pickles are read only
if their checksums equal the published ones.
"""

import gzip
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from linflab.platform.data.images import open_image
from linflab.platform.files import open_regular, read_bytes

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # train images, train labels, test images, test labels

TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_ARCHIVE = "tiny-imagenet-200.zip"
MAX_ARCHIVE_BYTES = 2 * 2**30  # after extraction; TinyImageNet has 0.3 GiB
MAX_ARCHIVE_FILES = 500_000  # TinyImageNet has 120,000
MAX_IDX_IMAGES = 1_000_000


def load_raw_arrays(name: str, source: Path | None, work_dir: Path) -> Arrays:
    """Return the arrays of a dataset from its raw files.

    Args:
        name: One of `RAW_LOADERS`.
        source: Folder that has the raw files at any depth, or one raw file; None downloads them.
        work_dir: Empty folder for temporary files.

    Returns:
        Training images (N, C, H, W), training labels (N), test images and test labels, all uint8.

    Raises:
        OSError: If a file is missing or cannot be read, or the download failed.
        RuntimeError: If the download failed.
        ValueError: If a file is damaged.
    """
    return RAW_LOADERS[name](source, work_dir)


def _mnist(kind: str) -> Callable[[Path | None, Path], Arrays]:
    """Return a reader of MNIST or a dataset in the same format; torchvision downloads and verifies files."""

    def read(source: Path | None, work_dir: Path) -> Arrays:
        if source is None:
            import torchvision  # slow to import

            getattr(torchvision.datasets, kind)(work_dir, train=True, download=True)
            source = work_dir / kind / "raw"
        arrays = []
        for split in ("train", "t10k"):
            images = _read_idx(_find(source, *_names(split, "images-idx3-ubyte")), (28, 28))
            labels = _read_idx(_find(source, *_names(split, "labels-idx1-ubyte")), ())
            if len(images) != len(labels):
                raise ValueError(f"{len(images)} {split} images, but {len(labels)} labels; must be equal")
            if labels.max() > 9:
                raise ValueError(f"{split} labels are up to {labels.max()}; must be from 0 to 9")
            arrays += [images[:, None], labels]
        return arrays[0], arrays[1], arrays[2], arrays[3]

    return read


def _names(split: str, kind: str) -> tuple[str, str]:
    return f"{split}-{kind}.gz", f"{split}-{kind}"


def _read_idx(path: Path, sizes: tuple[int, ...]) -> np.ndarray:
    """Return the array (N, *sizes) uint8 of a file in IDX format, with or without gzip compression.

    Format: two zero bytes, the type (8: unsigned bytes), the number of axes, the length of each axis as a big-endian
    32-bit integer, and the data.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If the content is not valid; the message names the file.
    """
    with open_regular(path) as plain:
        file = gzip.GzipFile(fileobj=plain) if path.suffix == ".gz" else plain
        try:
            head = file.read(4 * (2 + len(sizes)))
            magic, expected = head[:4], bytes((0, 0, 8, 1 + len(sizes)))
            if magic != expected:
                raise ValueError(f"its first bytes are {magic.hex()}; must be {expected.hex()} ({expected[3]} axes)")
            if len(head) < 4 * (2 + len(sizes)):
                raise ValueError("it ends within the header")
            count, *rest = (int(size) for size in np.frombuffer(head, ">u4", offset=4))
            if tuple(rest) != sizes or not 0 < count <= MAX_IDX_IMAGES:
                raise ValueError(f"its shape is {(count, *rest)}; must be (N{''.join(f', {size}' for size in sizes)})")
            size = count * math.prod(sizes)
            content = file.read(size + 1)  # limits decompression to the declared size
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{path.name}: {error}") from None
    if len(content) != size:
        raise ValueError(
            f"{path.name}: must have {size} bytes after the header, has {'more' if content[size:] else len(content)}"
        )
    return np.frombuffer(content, np.uint8).reshape(count, *sizes).copy()


def _cifar10(source: Path | None, work_dir: Path) -> Arrays:
    """Read CIFAR-10 from its archive or folder, whose files must have the published checksums."""
    import torchvision

    kind = torchvision.datasets.CIFAR10
    if source is not None:
        source_path = _find(source, kind.filename, kind.base_folder)
        sums = [(source_path, kind.tgz_md5)]
        if source_path.is_dir():
            meta = (kind.meta["filename"], kind.meta["md5"])
            sums = [(source_path / name, md5) for name, md5 in [*kind.train_list, *kind.test_list, meta]]
        for path, md5 in sums:
            with open_regular(path):
                pass
            if not torchvision.datasets.utils.check_integrity(path, md5):
                raise ValueError(f"{path.name}: must be the published file with MD5 {md5}; download it again")
        (work_dir / source_path.name).symlink_to(source_path)
    arrays = []
    for train in (True, False):
        data = kind(work_dir, train=train, download=True)
        arrays += [np.asarray(data.data).transpose(0, 3, 1, 2), np.asarray(data.targets, dtype=np.uint8)]
    return arrays[0], arrays[1], arrays[2], arrays[3]


def _find(source: Path, *names: str) -> Path:
    """Return the first file or folder with one of these names, at or below `source`."""
    for name in names:
        matches = [source] if source.name == name else sorted(source.rglob(name))
        if matches:
            return matches[0].absolute()
    raise FileNotFoundError(f"{' or '.join(names)} not found")


def _tiny_imagenet(source: Path | None, work_dir: Path) -> Arrays:
    """Read TinyImageNet from its folder or zip archive; as usual, its validation images are the test set."""
    if source is None:
        from torchvision.datasets.utils import download_url

        download_url(TINY_IMAGENET, str(work_dir), TINY_IMAGENET_ARCHIVE)
        source = work_dir / TINY_IMAGENET_ARCHIVE
    if not source.is_file():
        source = _find(source, "wnids.txt", TINY_IMAGENET_ARCHIVE)
    if source.name != "wnids.txt":
        _extract(source, work_dir / "extracted")
        source = _find(work_dir / "extracted", "wnids.txt")
    root = source.parent
    classes = sorted(_lines(root / "wnids.txt"))
    labels = {name: label for label, name in enumerate(classes)}
    if not 0 < len(labels) <= 256 or any(name != Path(name).name for name in classes):
        raise ValueError("wnids.txt: must have the names of at most 256 classes, one per line")

    def load(paths: list[tuple[Path, int]]) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((len(paths), 3, 64, 64), np.uint8)
        for row, (path, _) in enumerate(paths):
            images[row] = _read_image(path)
        return images, np.array([label for _, label in paths], np.uint8)

    train = [
        (path, label) for name, label in labels.items() for path in sorted((root / "train" / name).rglob("*.JPEG"))
    ]
    test = []
    for line in _lines(root / "val" / "val_annotations.txt"):
        file, name = [*line.split(), "", ""][:2]
        if file != Path(file).name or name not in labels:
            raise ValueError(f"val_annotations.txt: line {line[:100]!r} must have an image and its class")
        test.append((root / "val" / "images" / file, labels[name]))
    if not train or not test:
        raise ValueError(f"train/ has {len(train)} images and val/ has {len(test)}; both must have images")
    return *load(train), *load(test)


def _lines(path: Path) -> Sequence[str]:
    try:
        return [line for line in read_bytes(path, 2**24).decode().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from None


def _extract(archive: Path, folder: Path) -> None:
    """Extract an untrusted zip archive if its number of files and total size are within the limits.

    zipfile writes only inside the folder, and reads no more bytes of a file than the archive declares for that file.
    """
    with open_regular(archive) as file:
        try:
            with zipfile.ZipFile(file) as zip_file:
                entries = zip_file.infolist()
                size = sum(entry.file_size for entry in entries)
                if len(entries) > MAX_ARCHIVE_FILES or size > MAX_ARCHIVE_BYTES:
                    raise ValueError(
                        f"it has {len(entries)} files with {size / 2**30:.3g} GiB; must have at most "
                        f"{MAX_ARCHIVE_FILES} files with {MAX_ARCHIVE_BYTES / 2**30:g} GiB"
                    )
                zip_file.extractall(folder)
        except Exception as error:  # from zlib, struct, zipfile or encryption
            raise ValueError(f"{archive.name}: must be a zip archive ({error})") from None


def _read_image(path: Path) -> np.ndarray:
    """Read an image of TinyImageNet, (3, 64, 64) uint8."""
    with open_image(path, ("JPEG",), ["L", "RGB", "CMYK"]) as image:
        if image.size != (64, 64):  # checked before decoding
            raise ValueError(f"it has {image.height} x {image.width} pixels; must be 64 x 64")
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


RAW_LOADERS: dict[str, Callable[[Path | None, Path], Arrays]] = {
    "mnist": _mnist("MNIST"),
    "fashion_mnist": _mnist("FashionMNIST"),
    "cifar10": _cifar10,
    "tiny_imagenet": _tiny_imagenet,
}
