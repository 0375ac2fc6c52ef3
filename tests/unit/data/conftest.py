"""Bytes of image files, good and bad."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from invmm.data.images import Resize, load_image


@pytest.fixture
def encoded():
    """(image, format, options of Pillow's save) -> the bytes of a file."""

    def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, file_format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def png():
    """A PNG written by hand: depth and colour type as in its header, rows as raw bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    def build(size, depth: int, colour: int, rows, *extra: tuple[bytes, bytes]) -> bytes:
        header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
        packed = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
        chunks = [(b"IHDR", header), *extra, (b"IDAT", packed), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)

    return build


@pytest.fixture
def gradient():
    """A 12x8 picture without any symmetry."""
    return Image.fromarray(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3) * 5 % 251)


@pytest.fixture
def levels():
    """Bytes of a file -> (H, W, 3) levels 0 to 255 as they are loaded, size unchanged."""

    def load(content: bytes, size: int = 4, resize: Resize = "crop") -> np.ndarray:
        pixels = load_image(content, size=size, resize=resize).pixels
        assert pixels.dtype.is_floating_point
        assert pixels.shape == (3, size, size)
        assert pixels.abs().max() <= 1
        shifted = (pixels + 1) * 127.5
        assert (shifted - shifted.round()).abs().max() < 1e-4
        return shifted.round().permute(1, 2, 0).numpy().astype(np.uint8)

    return load
