"""Everything that can stand where an image should: each ends as one line, none ends a run."""

from __future__ import annotations

import gzip
import io
import os
import socket
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from invmm.data.dataset import ImageError
from invmm.data.folder import ImageFolder
from invmm.data.images import MAX_FILE_BYTES, load_image, read_bytes

NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def saved(kind: str, image: Image.Image | None = None) -> bytes:
    stream = io.BytesIO()
    (image or Image.fromarray(NOISE)).save(stream, kind)
    return stream.getvalue()


def png(width: int, height: int, *, before_data: bytes = b"") -> bytes:
    """A PNG whose header claims a size; its data are those of no pixel."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + before_data + chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + data + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def half(kind: str) -> bytes:
    content = saved(kind)
    return content[: len(content) // 2]


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


BAD_CONTENT = {
    "empty": (b"", "empty"),
    "text": (b"not an image\n", "known format"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "known format"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "known format"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "known format"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "known format"),
    "pdf": (b"%PDF-1.4\n1 0 obj\n", "known format"),
    "zeros": (bytes(4096), "known format"),
    "random": (np.random.default_rng(1).bytes(4096), "known format"),
    "gzipped": (gzip.compress(saved("PNG")), "known format"),
    "signature": (saved("PNG")[:8], "known format"),
    "half-header": (saved("PNG")[:30], "known format"),
    "no-width": (png(0, 8), "known format"),
    "half-png": (half("PNG"), "decoded"),
    "half-jpeg": (half("JPEG"), "decoded"),
    "half-gif": (saved("GIF")[:-40], "decoded"),
    "half-bmp": (half("BMP"), "decoded"),
    "half-webp": (half("WEBP"), "decoded"),
    "half-tiff": (saved("TIFF")[:-20], "decoded"),
    "half-jp2": (half("JPEG2000"), "decoded"),
    "half-tga": (half("TGA"), "decoded"),
    "half-ppm": (half("PPM"), "decoded"),
    "checksum": (flipped(saved("PNG"), 45), "decoded"),
    "no-pixels": (png(8, 8), "decoded"),
    "bomb": (png(20_000, 20_000), "bomb"),
    "just-too-large": (png(20_000, 5_001), "claims 20000x5001"),
    "text-bomb": (png(8, 8, before_data=chunk(
        b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21)))), "decoded"),
    "floats": (saved("TIFF", Image.new("F", (8, 8), 0.5)), "floating-point"),
    "32-bit": (saved("TIFF", Image.new("I", (8, 8), 65536)), "beyond 16 bits"),
    "negative": (saved("TIFF", Image.new("I", (8, 8), -1)), "beyond 16 bits"),
    "narrow": (saved("PNG", Image.new("RGB", (3, 50))), "3x50"),
    "flat": (saved("PNG", Image.new("RGB", (50, 3))), "50x3"),
    "one-pixel": (saved("GIF", Image.new("L", (1, 1))), "1x1"),
}  # fmt: skip


def no_file(path: Path) -> None:
    """Leaves nothing there."""


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)


NO_FILES = {
    "missing": (no_file, "missing"),
    "folder": (Path.mkdir, "regular file"),
    "pipe": (os.mkfifo, "regular file"),
    "socket": (a_socket, "regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "regular file"),
    "dangling": (lambda path: path.symlink_to("gone.png"), "missing"),
    "loop": (lambda path: path.symlink_to(path.name), "cannot be read"),
    "huge": (sparse, str(MAX_FILE_BYTES)),
}


def refusal(path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(read_bytes(path), size=8, resize="crop")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", BAD_CONTENT)
def test_bad_content_is_refused_in_one_line(kind, tmp_path):
    content, reason = BAD_CONTENT[kind]
    path = tmp_path / f"{kind}.png"
    path.write_bytes(content)
    assert reason in refusal(path)


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_regular_file_is_refused_unopened(kind, tmp_path):
    make, reason = NO_FILES[kind]
    path = tmp_path / "x.png"
    make(path)
    assert reason in refusal(path)


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "nul\0.png", "\ud800.png", "a/" * 3000])
def test_impossible_names_are_refused(name, tmp_path):
    assert "cannot be read" in refusal(tmp_path / name)


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    def denied(path, flags):
        raise PermissionError(13, "Permission denied", str(path))

    path = tmp_path / "x.png"
    path.write_bytes(saved("PNG"))
    monkeypatch.setattr("invmm.files.os.open", denied)
    assert "Permission denied" in refusal(path)


def test_a_folder_of_bad_images_still_gives_the_good_one(tmp_path):
    for kind, (content, _) in BAD_CONTENT.items():
        (tmp_path / f"{kind}.png").write_bytes(content)
    for kind, (make, _) in NO_FILES.items():
        make(tmp_path / f"{kind}.png")
    (tmp_path / "good.png").write_bytes(saved("PNG"))
    folder = ImageFolder(path=str(tmp_path)).open(16)
    usable = []
    for entry in folder.entries:
        with suppress(ImageError):
            usable.append((entry.image_id, folder.load(entry).pixels))
    assert len(folder.entries) == len(BAD_CONTENT) + len(NO_FILES)  # "missing" is not there
    assert [image_id for image_id, _ in usable] == ["good.png"]
    rgb = ((usable[0][1] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(rgb, NOISE)
