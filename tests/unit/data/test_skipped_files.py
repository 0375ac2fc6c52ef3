"""Files of a folder that are read whatever their names, and those that are named as not read."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from invmm.data import images as decoding
from invmm.data.folder import ImageFolder

PICTURE = Image.fromarray(np.full((8, 8, 3), (10, 200, 30), np.uint8))


def opened(path: Path, **options):
    return ImageFolder(path=str(path), **options).open(8)


def ids(dataset) -> list[str]:
    return [entry.image_id for entry in dataset.entries]


def colour(dataset, entry) -> list[int]:
    return ((dataset.load(entry).pixels[:, 4, 4] + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize(("name", "form"), [
    ("a.jfif", "JPEG"), ("a.jpe", "JPEG"), ("a.JPG", "JPEG"), ("a.mpo", "JPEG"), ("a.apng", "PNG"),
    ("a.pbm", "PPM"), ("a.pnm", "PPM"), ("a.j2k", "JPEG2000"), ("a.avif", "AVIF"),
    ("a.heic", "HEIF"), ("a.HIF", "HEIF"), ("no_ending", "PNG"), ("no_ending", "WEBP"),
])  # fmt: skip
def test_whatever_pillow_reads_is_read(name, form, tmp_path):
    if form == "HEIF":
        pytest.importorskip("pillow_heif")
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    decoding.formats()
    picture = PICTURE.convert("1") if name == "a.pbm" else PICTURE
    picture.save(tmp_path / name, form)
    dataset = opened(tmp_path)
    assert ids(dataset) == [name]
    assert list(dataset.problems) == []
    if name != "a.pbm":
        off = np.abs(np.subtract(colour(dataset, dataset.entries[0]), (10, 200, 30)))
        assert off.max() <= (4 if form in ("JPEG", "AVIF", "HEIF", "JPEG2000", "WEBP") else 0)


def test_pictures_of_phones_are_turned_once(tmp_path):
    """The HEIF library turns them itself; turning them again by their EXIF would be wrong."""
    pytest.importorskip("pillow_heif")
    decoding.formats()
    halves = np.zeros((32, 64, 3), np.uint8)
    halves[:, 32:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.heic", "a.png"):
        Image.fromarray(halves).save(tmp_path / name, exif=exif.tobytes(), quality=100)
    dataset = opened(tmp_path)
    heic, png = (dataset.load(entry).pixels for entry in dataset.entries)
    assert png[:, 0].mean() < -0.9  # the dark half is on top
    assert (heic - png).abs().mean() < 0.05


def test_what_is_not_read_is_one_line_a_kind(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a caption")
    for index in range(2000):
        (tmp_path / f"{index:04}.json").touch()
    for name in ("captions.txt", "METADATA.JSONL", "list.csv", "x.psd", "y.svg", "README", "z.zip",
                 ".hidden.png", "._a.png", "data.bin", "P1"):  # fmt: skip
        (tmp_path / name).write_text("P1 is how a bitmap begins")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / ".cache").mkdir()
    dataset = opened(tmp_path)
    assert [(e.image_id, e.caption) for e in dataset.entries] == [("a.png", "a caption")]
    begins = [
        "files that look like captions or metadata and are not read (2,003): '0000.json', '0001",
        "images in formats that are not read (2): 'x.psd', 'y.svg'; convert",
        "hidden files and folders that are not read (3): '._a.png', '.hidden.png', '.cache'; ",
        "other files that are not read (5): 'P1', 'README', 'data.bin', ...",
    ]
    assert len(dataset.problems) == len(begins)
    for line, begin in zip(dataset.problems, begins, strict=True):
        assert line.startswith(begin)


@pytest.mark.parametrize("name", ["captions.txt", "METADATA.JSONL", "Metadata.csv", "prompts.csv",
                                  "captions.json", "a.caption", "meta.parquet"])  # fmt: skip
def test_each_file_that_looks_like_metadata_is_named(name, tmp_path):
    PICTURE.save(tmp_path / "a.png")
    (tmp_path / name).write_text('{"file_name": "a.png", "text": "x"}')
    (problem,) = opened(tmp_path).problems
    assert repr(name) in problem
    assert "metadata.csv, metadata.jsonl, metadata.parquet" in problem


def test_heif_without_the_package_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("invmm.data.walk.extensions", lambda: frozenset({".png"}))
    PICTURE.save(tmp_path / "a.png")
    for name in ("b.heic", "c.HEIF"):
        (tmp_path / name).touch()
    assert list(opened(tmp_path).problems) == [
        "HEIF images that are not read (2): 'b.heic', 'c.HEIF'; pip install 'invmm[heif]'"
    ]


def test_a_folder_of_nothing_that_is_read_says_what_is_there(tmp_path):
    (tmp_path / "x.psd").touch()
    with pytest.raises(ValueError, match=r"holds no images that can be read .*\(1\): 'x\.psd'; co"):
        opened(tmp_path)


def test_linked_folders_are_named(tmp_path):
    root = tmp_path / "images"
    for folder in (root / "sub", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
        PICTURE.save(folder / "a.png")
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to("sub")
    (root / "secret").symlink_to(tmp_path / "elsewhere/a.png")
    dataset = opened(root)
    assert ids(dataset) == ["sub/a.png"]
    linked, looped, other = dataset.problems
    assert linked.startswith("linked folders that lead out of the data folder and are not entered "
                             "(1): 'out'; copy")  # fmt: skip
    assert looped == "linked folders that lead elsewhere in the data folder and are read there " \
                     "(1): 'again'"  # fmt: skip
    assert other == "other files that are not read (1): 'secret'"


def test_what_the_metadata_lists_is_not_named_as_skipped(tmp_path):
    PICTURE.save(tmp_path / ".hidden.png")
    PICTURE.save(tmp_path / "odd.dat", "PNG")
    rows = '{"file_name": ".hidden.png"}\n{"file_name": "odd.dat"}'
    (tmp_path / "metadata.jsonl").write_text(rows)
    dataset = opened(tmp_path)
    assert (ids(dataset), list(dataset.problems)) == ([".hidden.png", "odd.dat"], [])


def test_a_bomb_without_an_ending_is_an_image_that_fails(tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    (tmp_path / "bomb").write_bytes(encoded(PICTURE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids(opened(tmp_path)) == ["bomb"]


def test_a_run_among_the_images_adds_none(tmp_path):
    """The pictures of a run are not images, so that the same command goes on."""
    PICTURE.save(tmp_path / "a.png")
    before = opened(tmp_path)
    for run, marker in (("run", "run.lock"), ("sub/copied", "records/x/target.png")):
        (tmp_path / run / marker).parent.mkdir(parents=True)
        PICTURE.save(tmp_path / run / marker, "PNG")
        PICTURE.save(tmp_path / run / "gallery.png")
        (tmp_path / run / "config.json").write_text("{}")
    after = opened(tmp_path)
    assert ids(after) == ids(before) == ["a.png"]
    [problem] = after.problems
    assert "folders of runs, whose pictures are none of the images" in problem
    # Of two that are alike only the marked one is a run.
    (tmp_path / "run" / "config.json").unlink()
    assert ids(opened(tmp_path)) == ["a.png", "run/gallery.png"]
