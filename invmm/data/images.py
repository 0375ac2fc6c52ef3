"""Decodes the bytes of an image file to pixels, or fails with one line that says why.

The picture is the first frame, rotated by its EXIF orientation, alpha over white, converted to RGB;
colour profiles are ignored, as in training pipelines. It is resized by Lanczos with antialiasing:
the shorter side to the target size, of which the centre square is taken ("crop"); or both sides
("squash"); or the longer side, filled up with white ("pad").
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from invmm.data.dataset import ImageError, LoadedImage
from invmm.files import read_file

Resize = Literal["crop", "squash", "pad"]

MAX_FILE_BYTES = 256 * 2**20
"""Larger files are not read."""
MAX_PIXELS = 100_000_000
"""Larger images are not decoded; this stops decompression bombs by the size in their header."""
MIN_SIDE = 4
"""Smaller images are refused: nothing could be recognised in them."""
FORMATS = tuple("PNG JPEG WEBP BMP GIF TIFF JPEG2000 AVIF HEIF PPM ICO TGA".split())  # noqa: SIM905
"""No other format is opened, whatever the file name: for PostScript, Pillow runs Ghostscript."""
HEIF_EXTENSIONS = (".heic", ".heif", ".hif")
"""File name endings that are read if pillow-heif is installed."""


def read_bytes(path: Path) -> bytes:
    """All bytes of a regular file; pipes and devices are never opened.

    Raises:
        ImageError: not a file, empty, too large or unreadable.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not a regular file")
        if status.st_size == 0:
            raise ImageError("the file is empty")
        if status.st_size > MAX_FILE_BYTES:
            raise ImageError(f"the file has {status.st_size} bytes, more than {MAX_FILE_BYTES}")
        return read_file(path)
    except FileNotFoundError:
        raise ImageError("the file is missing") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"the file cannot be read: {error}") from error


def load_image(content: bytes, *, size: int, resize: Resize) -> LoadedImage:
    """Decodes and resizes an image.

    Args:
        content: the bytes of the file.
        size: side of the result.
        resize: what happens to images that are not square.

    Raises:
        ImageError: not an image, or one that cannot be used.
    """
    image = decode(content)
    if min(image.size) < MIN_SIDE:
        raise ImageError(f"the image has {image.width}x{image.height} pixels, under {MIN_SIDE}")
    pixels = to_pixels(_resized(image, size, resize))
    return LoadedImage(pixels=pixels, sha256=hashlib.sha256(content).hexdigest())


def decode(content: bytes) -> Image.Image:
    """The picture as RGB, whatever the mode it is stored in.

    Raises:
        ImageError: with one line that says why.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=list(formats()))
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(
                    f"the image claims {image.width}x{image.height} pixels, over {MAX_PIXELS}"
                )
            image.load()
            return _as_rgb(upright(image))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image in a known format") from None
    except Exception as error:  # decoders raise anything on hostile bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"the image cannot be decoded: {reason}") from error


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture -> (3, H, W) float32 in [-1, 1]."""
    array = np.array(image, dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1


@cache
def extensions() -> frozenset[str]:
    """File name endings of the formats that can be read on this machine, in lower case."""
    kinds = {*formats(), "MPO"}  # phones write it, and it opens as a JPEG
    known = {name for name, kind in Image.registered_extensions().items() if kind in kinds}
    return frozenset(known - {".pfm"})  # a PPM of floating-point numbers


def has_signature(path: Path) -> bool:
    """Whether a file starts with the signature of a readable format, whatever its name."""
    signed = [name for name in formats() if Image.OPEN[name][1] is not None]
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=signed):
                return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # decoders raise anything on hostile bytes
        return False


@cache
def formats() -> tuple[str, ...]:
    """The `FORMATS` that can be read on this machine; HEIF needs pillow-heif."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def upright(image: Image.Image) -> Image.Image:
    """The picture, rotated by its EXIF orientation."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises anything on broken EXIF; the pixels are intact
        return image


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        values = np.asarray(image)
        if values.max() > 65535 or values.min() < 0:
            raise ImageError("an integer image beyond 16 bits has no defined brightness")
        if (transparent := image.info.get("transparency")) is not None:
            values = np.where(values == transparent, 65535, values)
        nearest = (values.astype(np.uint32) + 128) // 257
        return Image.fromarray(nearest.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("a floating-point image has no defined brightness")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _resized(image: Image.Image, size: int, resize: Resize) -> Image.Image:
    if image.size == (size, size):
        return image
    method = Image.Resampling.LANCZOS
    if resize == "crop":
        return ImageOps.fit(image, (size, size), method)
    if resize == "pad":
        # Not ImageOps.pad, which fails where the shorter side would round to nothing.
        width, height = (max(1, round(side * size / max(image.size))) for side in image.size)
        square = Image.new("RGB", (size, size), "white")
        corner = ((size - width) // 2, (size - height) // 2)
        square.paste(image.resize((width, height), method), corner)
        return square
    return image.resize((size, size), method)
