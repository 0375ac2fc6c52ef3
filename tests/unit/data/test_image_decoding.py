"""Colours and orientation to the exact level, whatever the file format."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from invmm.data.images import MIN_SIDE, load_image, to_pixels


def flat(mode, colour):
    return Image.new(mode, (4, 4), colour)


def palette(colour, transparency=None):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, *colour])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "GIF", "TIFF", "PPM", "TGA", "JPEG2000"])
def test_lossless_formats_keep_every_level(file_format, encoded, levels, gradient):
    picture = gradient.crop((0, 0, 8, 8))
    if file_format == "GIF":
        picture = picture.quantize(64)
    assert np.array_equal(
        levels(encoded(picture, file_format), 8), np.array(picture.convert("RGB"))
    )


def test_webp_without_loss_keeps_every_level(encoded, levels, gradient):
    picture = gradient.crop((0, 0, 8, 8))
    content = encoded(picture, "WEBP", lossless=True)
    assert np.array_equal(levels(content, 8), np.array(picture))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (flat("RGBA", (255, 0, 0, 255)), (255, 0, 0)),
        (flat("RGBA", (0, 0, 0, 0)), (255, 255, 255)),
        (flat("RGBA", (255, 0, 0, 128)), (255, 127, 127)),
        (flat("LA", (0, 51)), (204, 204, 204)),
        (flat("L", 77), (77, 77, 77)),
        (flat("1", 1), (255, 255, 255)),
        (palette((10, 20, 30)), (10, 20, 30)),
        (palette((10, 20, 30), transparency=1), (255, 255, 255)),
        (palette((10, 20, 30), transparency=b"\xff\x00"), (255, 255, 255)),
        (palette((10, 20, 30), transparency=b"\xff\x80"), (132, 137, 142)),
    ],
)
def test_png_modes_on_white(image, expected, encoded, levels):
    assert (levels(encoded(image)) == expected).all()


def test_one_colour_can_be_transparent(png, levels):
    rgb_key = (b"tRNS", bytes([0, 10, 0, 20, 0, 30]))
    content = png((4, 4), 8, 2, [[10, 20, 30, 1, 2, 3] * 2] * 4, rgb_key)
    expected = [[255, 255, 255], [1, 2, 3]] * 2
    assert levels(content).tolist() == [expected] * 4
    grey = png((4, 4), 8, 0, [[7, 8, 7, 8]] * 4, (b"tRNS", b"\0\7"))
    assert levels(grey)[0, :, 0].tolist() == [255, 8, 255, 8]


def test_16_bit_grey_goes_to_the_nearest_of_256_levels(png, levels):
    values = np.array([0, 128, 129, 65535], dtype=">u2")
    assert levels(png((4, 4), 16, 0, [values.tobytes()] * 4))[0, :, 0].tolist() == [0, 0, 1, 255]
    ramp = np.arange(256, dtype=">u2") * 257
    seen = levels(png((256, 256), 16, 0, [ramp.tobytes()] * 256), 256)
    assert (seen == np.arange(256)[None, :, None]).all()


def test_16_bit_grey_can_be_transparent(png, levels):
    row = np.array([[257 * 7, 257 * 8] * 2], dtype=">u2").tobytes()
    content = png((4, 4), 16, 0, [row] * 4, (b"tRNS", bytes([7, 7])))
    assert levels(content)[0, :, 0].tolist() == [255, 8, 255, 8]


def test_16_bit_tiff_and_pgm(encoded, levels):
    values = np.array([[0, 257, 25700, 65535]] * 4, dtype=np.uint16)
    tiff = encoded(Image.fromarray(values), "TIFF")
    pgm = b"P5 4 4 65535\n" + values.astype(">u2").tobytes()
    for content in (tiff, pgm):
        assert levels(content)[2, :, 1].tolist() == [0, 1, 100, 255]


def test_16_bit_colour(png, levels):
    row = np.array([[0, 257 * 100, 65535]] * 4, dtype=">u2").tobytes()
    assert (levels(png((4, 4), 16, 2, [row] * 4)) == (0, 100, 255)).all()


@pytest.mark.parametrize(
    ("inks", "expected"),
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_cmyk_is_not_inverted(inks, expected, encoded, levels):
    assert (levels(encoded(flat("CMYK", inks), "TIFF")) == expected).all()
    jpeg = levels(encoded(flat("CMYK", inks), "JPEG", quality=100)).astype(int)
    assert np.abs(jpeg - expected).max() <= 2


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(file_format, encoded, levels):
    options = {"lossless": True} if file_format == "WEBP" else {}
    content = encoded(
        flat("RGB", "red"),
        file_format,
        save_all=True,
        append_images=[flat("RGB", "blue")],
        **options,
    )
    assert (levels(content) == (255, 0, 0)).all()


# Orientation as EXIF defines it: where the stored row 0 and column 0 belong in the picture.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_the_picture_is_turned_as_its_exif_says(orientation, encoded, levels):
    upright = np.arange(6 * 6 * 3, dtype=np.uint8).reshape(6, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    assert np.array_equal(levels(encoded(stored, exif=exif), 6), upright)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM"]
)
def test_broken_exif_does_not_cost_the_picture(exif, encoded, levels):
    content = encoded(flat("RGB", (40, 50, 60)), exif=exif)
    assert (levels(content) == (40, 50, 60)).all()


def test_a_colour_profile_changes_nothing(encoded, levels):
    content = encoded(flat("RGB", (40, 50, 60)), icc_profile=b"not a profile")
    assert (levels(content) == (40, 50, 60)).all()


def test_the_content_decides_not_the_name(encoded, levels):
    assert (levels(encoded(flat("L", 9), "BMP")) == 9).all()


def test_crop_takes_the_centre(encoded, levels, gradient):
    assert np.array_equal(levels(encoded(gradient), 8), np.array(gradient)[:, 2:10])


def test_pad_keeps_all_and_fills_with_white(encoded, levels, gradient):
    seen = levels(encoded(gradient), 12, "pad")
    assert np.array_equal(seen[2:10], np.array(gradient))
    assert (seen[:2] == 255).all()
    assert (seen[10:] == 255).all()


def test_squash_scales_both_sides(encoded, levels):
    halves = np.zeros((8, 16, 3), np.uint8)
    halves[:, 8:] = 200
    seen = levels(encoded(Image.fromarray(halves)), 8, "squash").astype(int)
    assert np.abs(seen[:, :2]).max() <= 2
    assert np.abs(seen[:, 6:] - 200).max() <= 2


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(MIN_SIDE, 5000), (5000, MIN_SIDE), (4, 4), (1000, 999)])
def test_any_shape_fits(resize, size, encoded, levels):
    seen = levels(encoded(Image.new("RGB", size, (1, 2, 3))), 16, resize)
    assert (seen[7, 7] == (1, 2, 3)).all()


def test_shrinking_averages(encoded, levels):
    """Every other pixel white: without antialiasing the result is black or white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    seen = levels(encoded(Image.fromarray(board)), 16).astype(int)
    assert np.abs(seen[2:-2, 2:-2] - 127.5).max() < 4


def test_what_is_transparent_does_not_bleed(encoded, levels):
    """Invisible black beside red: on white, the red channel is full everywhere."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 31, 64))
    seen = levels(encoded(image), 16)
    assert (seen[..., 0] == 255).all()
    assert (seen[:, 0] == (255, 0, 0)).all()
    assert (seen[:, -1] == 255).all()


def test_the_digest_is_of_the_files_bytes(encoded):
    content = encoded(flat("RGB", "red"))
    loaded = load_image(content, size=4, resize="crop")
    assert loaded.sha256 == hashlib.sha256(content).hexdigest()


def test_levels_to_pixels():
    levels = np.array([[[0, 51, 255]]], np.uint8)
    pixels = to_pixels(Image.fromarray(levels))
    assert torch.allclose(pixels.flatten(), torch.tensor([-1, -0.6, 1]))
