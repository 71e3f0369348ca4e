"""Your own image files: those that are read as displayed, and those that are rejected."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from linflab.platform.data.images import find_images, read_images
from linflab.platform.errors import InputError
from tests.conftest import time_limit

GENERATOR = np.random.RandomState(0)
GRAY = GENERATOR.randint(0, 256, (6, 8), np.uint8)
COLOR = GENERATOR.randint(0, 256, (6, 8, 3), np.uint8)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "pgm", "gif"])
def test_gray_images_are_read_unchanged(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(GRAY).save(tmp_path / f"image.{suffix}")
    names, images = read_images(tmp_path / f"image.{suffix}", (1, 6, 8))
    assert names == [str(tmp_path / f"image.{suffix}")] and images.shape == (1, 1, 6, 8)
    np.testing.assert_array_equal(images[0, 0].numpy(), GRAY.astype(np.float32) / np.float32(255))


def test_color_images_are_read_unchanged(tmp_path: Path) -> None:
    Image.fromarray(COLOR).save(tmp_path / "image.png")
    _, images = read_images(tmp_path / "image.png", (3, 6, 8))
    np.testing.assert_array_equal(images[0].numpy(), COLOR.transpose(2, 0, 1).astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_rotations_in_exif_are_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    """An image with orientation N is stored rotated or mirrored by the inverse of that orientation."""
    stored = {
        1: GRAY, 2: GRAY[:, ::-1], 3: GRAY[::-1, ::-1], 4: GRAY[::-1], 5: GRAY.T, 6: np.rot90(GRAY),
        7: GRAY[::-1, ::-1].T, 8: np.rot90(GRAY, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"image.{suffix}", exif=exif)
    _, images = read_images(tmp_path / f"image.{suffix}", (1, 6, 8))
    np.testing.assert_array_equal(np.rint(255 * images[0, 0].numpy()).astype(np.uint8), GRAY)


def test_rotated_images_of_another_size_are_rejected(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GRAY).save(tmp_path / "image.png", exif=exif)
    with pytest.raises(InputError, match=r"image\.png"):
        read_images(tmp_path / "image.png", (1, 6, 8))
    assert read_images(tmp_path / "image.png", (1, 8, 6))[1].shape == (1, 1, 8, 6)


def make_16_bit_png() -> bytes:
    """Return a PNG of 6 x 8 RGB pixels of 16 bits, which Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 8, 6, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(range(48))) * 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def make_png_bomb() -> bytes:
    """Return the header of a PNG of 2^31 pixels."""
    content = bytearray(make_16_bit_png())
    content[16:24] = struct.pack(">II", 2**16, 2**15)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def save_two_frames(path: Path) -> None:
    Image.fromarray(GRAY).save(path, save_all=True, append_images=[Image.fromarray(GRAY[::-1].copy())])


REJECTED: dict[str, Callable[[Path], object]] = {
    "palette transparency.png": lambda path: Image.fromarray(COLOR).quantize(4).save(path, transparency=0),
    "palette transparency.gif": lambda path: Image.fromarray(COLOR).quantize(4).save(path, transparency=0),
    "transparent gray.png": lambda path: Image.fromarray(GRAY).save(path, transparency=3),
    "RGBA.png": lambda path: Image.fromarray(COLOR).convert("RGBA").save(path),
    "LA.png": lambda path: Image.fromarray(GRAY).convert("LA").save(path),
    "CMYK.jpg": lambda path: Image.fromarray(COLOR).convert("CMYK").save(path),
    "16 bits.png": lambda path: Image.fromarray(GRAY.astype(np.uint16)).save(path),
    "16 bits color.png": lambda path: path.write_bytes(make_16_bit_png()),
    "16 bits.ppm": lambda path: path.write_bytes(b"P6 8 6 65535\n" + bytes(288)),
    "floats.tif": lambda path: Image.fromarray(GRAY.astype(np.float32)).save(path),
    "integers.tif": lambda path: Image.fromarray(GRAY.astype(np.int32)).save(path),
    "animation.gif": save_two_frames,
    "animation.png": save_two_frames,
    "pages.tif": save_two_frames,
    "size.png": lambda path: Image.new("L", (9, 8)).save(path),
    "turned.png": lambda path: Image.new("L", (6, 8)).save(path),
    "bomb.png": lambda path: path.write_bytes(make_png_bomb()),
    "cut.png": lambda path: (Image.fromarray(GRAY).save(path), path.write_bytes(path.read_bytes()[:60])),
    "text.png": lambda path: path.write_text("no image"),
    "empty.png": lambda path: path.write_bytes(b""),
    "program.eps": lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\n"),
    "pipe.png": os.mkfifo,
    "pipe.npy": os.mkfifo,
    "folder.png": os.mkdir,
    "gone.png": lambda path: None,
    "gone.npy": lambda path: None,
    "archive.npy": lambda path: np.savez(path.open("wb"), GRAY),
    "gray.npy": lambda path: np.save(path, GRAY),
    "channels last.npy": lambda path: np.save(path, GRAY[..., None]),
    "many axes.npy": lambda path: np.save(path, GRAY[None, None, None]),
    "integers.npy": lambda path: np.save(path, GRAY[None].astype(np.int64)),
    "booleans.npy": lambda path: np.save(path, GRAY[None] > 100),
    "above 1.npy": lambda path: np.save(path, np.full((1, 6, 8), 1.001)),
    "below 0.npy": lambda path: np.save(path, np.full((1, 6, 8), -1e-9)),
    "NaN.npy": lambda path: np.save(path, np.full((1, 6, 8), np.nan, np.float32)),
    "objects.npy": lambda path: np.save(path, np.array([None])),
}


@pytest.mark.parametrize("name", REJECTED)
def test_unsupported_files_are_rejected(tmp_path: Path, name: str) -> None:
    REJECTED[name](tmp_path / name)
    with time_limit(10), pytest.raises(InputError) as caught:
        read_images(tmp_path / name, (1, 6, 8))
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_arrays_are_read(tmp_path: Path, dtype: str, count: int) -> None:
    shape = (count, 2, 6, 8) if count else (2, 6, 8)
    array = GENERATOR.randint(0, 256, shape) if dtype == "uint8" else GENERATOR.rand(*shape)
    np.save(tmp_path / "images.npy", array.astype(dtype))
    names, images = read_images(tmp_path / "images.npy", (2, 6, 8))
    expected = array.astype(np.float32) / 255 if dtype == "uint8" else array.astype(dtype)
    np.testing.assert_allclose(images.numpy(), expected.reshape(-1, 2, 6, 8), rtol=1e-6)
    indexed = [f"{tmp_path / 'images.npy'}[{index}]" for index in range(5)]
    assert names == (indexed if count == 5 else [str(tmp_path / "images.npy")])


def test_images_are_found_in_folders(tmp_path: Path) -> None:
    for name in ("b.png", "a.npy", "notes.txt", "c.JPG"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    found = find_images([tmp_path / "b.png", tmp_path])
    assert [path.name for path in found] == ["b.png", "a.npy", "b.png", "c.JPG"]
    with pytest.raises(InputError, match="empty"):
        find_images([tmp_path / "empty"])
