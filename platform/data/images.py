"""User images as network inputs, from image files, .npy arrays and folders of both.

A certificate must refer to the image that people see. Therefore an EXIF rotation is applied, as image viewers do.
Files with transparency, several frames or pages, or more than 8 bits per channel are rejected.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from linflab.models.robustness.inputs import to_unit_range
from linflab.platform.data.arrays import map_array
from linflab.platform.errors import InputError
from linflab.platform.files import open_regular

# Only formats whose decoders do not run other programs.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".npy")
OPAQUE_8_BIT_MODES = ("1", "L", "P", "RGB")  # other modes would be truncated or scaled to 8 bits


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the image files and arrays at paths; a folder is replaced by its images, sorted by name.

    Raises:
        InputError: If a folder cannot be read or has no images.
    """
    image_paths: list[Path] = []
    for path in paths:
        try:
            is_folder = path.is_dir()
            files = sorted(one for one in path.iterdir() if one.suffix.lower() in SUFFIXES) if is_folder else [path]
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error}); use a readable file or folder") from None
        if not files:
            raise InputError(f"{path}: no images found; use a folder with files that end in {', '.join(SUFFIXES)}")
        image_paths += files
    return image_paths


def read_images(path: Path, shape: Sequence[int]) -> tuple[list[str], Tensor]:
    """Read the images of a file as inputs of a network.

    Args:
        path: Image file, or .npy array of shape (C, H, W) or (N, C, H, W): uint8, or floats in [0, 1].
        shape: Input shape (C, H, W) of the network.

    Returns:
        N names, and images (N, C, H, W) float32 with pixels in [0, 1].

    Raises:
        InputError: If the file cannot be read, or has images of another shape, dtype or range.
    """
    if path.suffix.lower() == ".npy":
        images = _read_array(path, shape)
        names = [str(path)] if images.shape[0] == 1 else [f"{path}[{index}]" for index in range(len(images))]
        return names, images
    return [str(path)], _read_image_file(path, shape)[None]


def _read_array(path: Path, shape: Sequence[int]) -> Tensor:
    array = map_array(path)
    input_shape = tuple(shape)
    if array.shape[-3:] != input_shape or array.ndim not in (3, 4):
        expected = f"{input_shape}, or {('N', *input_shape)}".replace("'", "")
        is_gray = input_shape[0] == 1 and array.ndim in (2, 3) and array.shape[-2:] == input_shape[1:]
        advice = f"; save images[{':, ' * (array.ndim - 2)}None] to add the channel dimension" if is_gray else ""
        raise InputError(f"{path}: its shape is {array.shape}; must be {expected}{advice}")
    if array.dtype == np.uint8:
        images = to_unit_range(torch.from_numpy(np.ascontiguousarray(array)))
    elif array.dtype.kind == "f":
        exact = np.asarray(array, dtype=np.float64)
        if not bool(((exact >= 0) & (exact <= 1)).all()):  # false for NaN
            raise InputError(f"{path}: must have values in [0, 1]; save bytes as uint8, or divide them by 255")
        images = torch.from_numpy(exact.astype(np.float32))
    else:
        raise InputError(f"{path}: dtype {array.dtype} is not supported; use uint8 from 0 to 255, or floats in [0, 1]")
    return images.reshape(-1, *input_shape)


def _read_image_file(path: Path, shape: Sequence[int]) -> Tensor:
    channels, height, width = shape
    if channels not in (1, 3):
        raise InputError(
            f"{path}: the network requires {channels} channels, but image files have 1 or 3; use a .npy array"
        )
    with open_image(path) as image:
        # Check the size before decoding; a rotation can only exchange height and width.
        if {image.width, image.height} != {width, height}:
            raise ValueError(_size_error(image.height, image.width, height, width))
        upright = ImageOps.exif_transpose(image)
        if upright.size != (width, height):
            raise ValueError(_size_error(upright.height, upright.width, height, width))
        pixels = np.asarray(upright.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels.copy()).view(height, width, channels).permute(2, 0, 1).float() / 255


def _size_error(height: int, width: int, input_height: int, input_width: int) -> str:
    return f"it has {height} x {width} pixels, but the network requires {input_height} x {input_width}"


def _has_deep_samples(image: Image.Image) -> bool:
    """Return True if samples have more than 8 bits, which Pillow truncates silently in RGB images."""
    arguments = [tile.args for tile in getattr(image, "tile", [])]  # arguments of the decoder
    if image.format == "PPM":  # the last argument is the maximum value
        return any(isinstance(args, tuple) and int(args[-1]) > 255 for args in arguments)
    return any(";16" in str(args) for args in arguments)


@contextmanager
def open_image(
    path: Path, formats: tuple[str, ...] = FORMATS, modes: Sequence[str] = OPAQUE_8_BIT_MODES
) -> Iterator[Image.Image]:
    """Open an untrusted image file; pixels are decoded on access.

    Any exception inside the block becomes an InputError that names this file.

    Args:
        path: Image file.
        formats: Accepted formats, by their names in Pillow.
        modes: Accepted modes, by their names in Pillow.

    Yields:
        The open image.

    Raises:
        InputError: If the file is not a single opaque image of 8 bits per channel; the message names the file.
    """
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=formats) as image:
                if image.mode not in modes or _has_deep_samples(image):
                    raise ValueError(f"its mode is {image.mode}, or it has more than 8 bits; use gray or RGB of 8 bits")
                if image.has_transparency_data:
                    raise ValueError("it has transparent pixels; must be opaque")
                if getattr(image, "is_animated", False):
                    raise ValueError("it has several frames or pages; must be a single image")
                yield image
    except UnidentifiedImageError:
        raise InputError(f"{path}: must be an image in the format {' or '.join(formats)}; convert it") from None
    except Exception as error:  # a damaged file can raise almost any exception
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{path}: cannot be read as an image ({' '.join(reason.split())}); use another file") from None
