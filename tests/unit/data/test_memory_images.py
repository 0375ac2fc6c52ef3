"""Images in memory: ids, prompts as people hold them, and the same picture as from a file."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from invmm.data.folder import ImageFolder
from invmm.data.memory import MemoryImages

PICTURES = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]


def told(images, prompts) -> list[tuple]:
    entries = MemoryImages.of(images, prompts).open(8).entries
    return [(entry.image_id, entry.caption, entry.label) for entry in entries]


@pytest.mark.parametrize(("value", "caption", "label"), [
    ("a cat", "a cat", None), ("", "", None), ("3", "3", None), (3, None, 3), (3.0, None, 3),
    (np.int64(3), None, 3), (np.float32(3), None, 3), (None, None, None),
    (float("nan"), None, None),
])  # fmt: skip
def test_a_prompt_is_a_caption_or_a_label(value, caption, label):
    assert told(PICTURES[:1], [value]) == [("0", caption, label)]


@pytest.mark.parametrize("value", [True, -1, 2.5, ["a"], b"a", float("inf")])
def test_what_is_neither_is_refused(value):
    with pytest.raises(ValueError, match=r"^prompts\['0'\]=.* is neither a caption nor a class"):
        MemoryImages.of(PICTURES[:1], [value])


@pytest.mark.parametrize(("images", "prompts", "refusal"), [
    (PICTURES, ["a", "b"], "prompts has 2 entries for 3 images; give one for each, None where"),
    (PICTURES, ["a"] * 11, "prompts has 11 entries for 3 images"),
    (PICTURES, {"fox": "a"}, "prompts has 'fox', which is none of the images; give prompts by"),
    ({1: PICTURES[0], "1": PICTURES[1]}, None, "images has two keys with the same text"),
])  # fmt: skip
def test_prompts_that_do_not_fit_are_refused(images, prompts, refusal):
    with pytest.raises(ValueError, match=f"^{refusal}"):
        MemoryImages.of(images, prompts)


def test_a_turned_picture_is_turned_as_from_its_file(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    halves = np.zeros((8, 8, 3), np.uint8)
    halves[:, 4:] = 255
    Image.fromarray(halves).save(tmp_path / "a.png", exif=exif)
    folder = ImageFolder(path=str(tmp_path)).open(8)
    memory = MemoryImages.of([Image.open(tmp_path / "a.png")]).open(8)
    expected = folder.load(folder.entries[0]).pixels
    assert torch.equal(memory.load(memory.entries[0]).pixels, expected)
    assert expected[:, 0].max() == -1


def test_pictures_that_differ_in_their_palette_are_two_runs():
    """Equal indices of different colours must not go on with each other's records."""
    digests = set()
    for colour in ((255, 0, 0), (0, 0, 255)):
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, *colour])
        digests.add(MemoryImages.of([image]).fingerprint()["0"])
        stream = io.BytesIO()
        image.save(stream, "PNG")
    assert len(digests) == 2
