"""A folder of images: what is listed, what is there, and what must not be opened."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from invmm.data.dataset import ImageError
from invmm.data.folder import ImageFolder
from invmm.data.manifest import ManifestEntry, TrainingManifest

COLOURS = ("red", "blue", "green", "white", "black")


def paint(folder: Path, *names: str) -> None:
    """Images of different colours."""
    for name, colour in zip(names, COLOURS, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(folder / name, "PNG")


def describe(folder: Path, *rows) -> None:
    """metadata.jsonl; a row that is a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def opened(folder: Path, **options):
    return ImageFolder(path=str(folder), **options).open(8)


def ids(dataset) -> list[str]:
    return [entry.image_id for entry in dataset.entries]


def by_id(dataset) -> dict:
    return {entry.image_id: entry for entry in dataset.entries}


def test_ids_are_sorted_relative_paths(tmp_path):
    paint(tmp_path, "b.png", "sub/deep/a.JPEG", "a.png", "sub.png", "Z.webp")
    dataset = opened(tmp_path)
    assert ids(dataset) == ["Z.webp", "a.png", "b.png", "sub.png", "sub/deep/a.JPEG"]
    assert dataset.entries[4].path == str(tmp_path / "sub/deep/a.JPEG")
    assert {(e.caption, e.split, e.copies, e.error) for e in dataset.entries} == {
        (None, "unknown", None, None)
    }
    assert list(dataset.problems) == []
    assert ids(opened(tmp_path, recursive=False)) == ["Z.webp", "a.png", "b.png", "sub.png"]


def test_hidden_files_are_skipped(tmp_path):
    paint(tmp_path, "a.png", ".hidden.png", ".cache/b.png", "._a.png")
    assert ids(opened(tmp_path)) == ["a.png"]


def test_loads_at_the_size_of_the_model_or_its_own(tmp_path):
    paint(tmp_path, "a.png")
    own = opened(tmp_path, size=5)
    assert (own.size, own.load(own.entries[0]).pixels.shape) == (5, (3, 5, 5))
    model = pickle.loads(pickle.dumps(opened(tmp_path)))
    assert (model.size, model.load(model.entries[0]).pixels.shape) == (8, (3, 8, 8))


def test_captions_come_from_metadata_then_from_text_files(tmp_path):
    paint(tmp_path, "a.png", "b.png", "c.png", "d.png")
    describe(
        tmp_path,
        {"file_name": "a.png", "text": "a cat"},
        {"file_name": "b.png", "caption": "ein Hund"},
        {"file_name": "c.png"},
        {"file_name": "d.png"},
    )
    (tmp_path / "a.txt").write_text("beside")
    (tmp_path / "c.txt").write_bytes("  drei Vögel \n".encode())
    captions = {entry.image_id: entry.caption for entry in opened(tmp_path).entries}
    assert captions == {
        "a.png": "a cat",
        "b.png": "ein Hund",
        "c.png": "drei Vögel",
        "d.png": None,
    }


def test_an_empty_text_leaves_the_caption_and_a_list_is_none(tmp_path):
    paint(tmp_path, "a.png", "b.png")
    describe(
        tmp_path,
        {"file_name": "a.png", "text": None, "caption": "a cat"},
        {"file_name": "b.png", "text": ["two", "texts"]},
    )
    dataset = opened(tmp_path)
    assert [entry.caption for entry in dataset.entries] == ["a cat", None]
    assert list(dataset.problems) == ["'b.png': caption ['two', 'texts'] is not a text"]


def test_a_text_file_with_a_byte_order_mark(tmp_path):
    paint(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes("\ufeffa cat".encode())
    assert opened(tmp_path).entries[0].caption == "a cat"


def test_listed_but_missing_fails_and_unlisted_is_reported(tmp_path):
    paint(tmp_path, "a.png", "extra.png")
    describe(tmp_path, {"file_name": "gone.png", "text": "a ghost"}, {"file_name": "a.png"})
    dataset = opened(tmp_path)
    assert ids(dataset) == ["a.png", "extra.png", "gone.png"]
    gone = by_id(dataset)["gone.png"]
    assert gone.error == "listed in metadata.jsonl but missing"
    assert gone.caption == "a ghost"
    with pytest.raises(ImageError, match=r"listed in metadata\.jsonl but missing"):
        dataset.load(gone)
    assert list(dataset.problems) == [
        "'extra.png' is not listed in metadata.jsonl",
        "'gone.png': listed in metadata.jsonl but missing",
    ]
    assert dataset.load(by_id(dataset)["extra.png"]).pixels[2].mean() == 1


def test_bad_lines_are_reported_by_number(tmp_path):
    """One line a kind: the first in full, the others counted."""
    paint(tmp_path, "a.png")
    nested = "[" * 100_000
    describe(
        tmp_path, "{broken", "", '["a.png"]', '{"text": "x"}', "3", nested,
        {"file_name": 7}, {"file_name": "a\0b.png"}, {"file_name": "a.png", "text": "first"},
        {"file_name": "./a.png", "text": "second"},
    )  # fmt: skip
    dataset = opened(tmp_path)
    assert list(dataset.problems) == [
        "metadata.jsonl, line 1 is not a JSON object with file_name; likewise 4 more: "
        "metadata.jsonl, line 3, metadata.jsonl, line 4, metadata.jsonl, line 5, ...",
        "metadata.jsonl, line 7: file_name 7 is not a name; likewise 1 more: "
        "metadata.jsonl, line 8",
        "metadata.jsonl, line 10: 'a.png' is listed twice; the first line is used",
    ]
    assert [(entry.image_id, entry.caption) for entry in dataset.entries] == [("a.png", "first")]


def test_metadata_with_a_byte_order_mark(tmp_path):
    paint(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(
        b'\xef\xbb\xbf{"file_name": "a.png", "text": "x"}\r\n'
    )
    assert opened(tmp_path).entries[0].caption == "x"


@pytest.mark.parametrize("name", ["../secret.png", "{root}/secret.png", "sub/../../secret.png"])
def test_names_that_leave_the_folder_are_never_opened(name, tmp_path):
    paint(tmp_path, "secret.png", "images/a.png", "images/sub/b.png")
    name = name.format(root=tmp_path)
    describe(tmp_path / "images", {"file_name": name})
    (escaped,) = (entry for entry in opened(tmp_path / "images").entries if entry.error)
    assert escaped.image_id == name
    outside = "names it by an absolute path" if name[0] == "/" else "outside the data folder"
    assert outside in escaped.error
    with pytest.raises(ImageError, match=outside):
        opened(tmp_path / "images").load(escaped)


def test_links_out_of_the_folder_are_never_followed(tmp_path):
    paint(tmp_path, "outside/secret.png", "images/a.png", "images/b.png")
    (tmp_path / "outside/secret.txt").write_text("a secret")
    images = tmp_path / "images"
    (images / "link").symlink_to(tmp_path / "outside")
    (images / "secret.png").symlink_to(tmp_path / "outside/secret.png")
    (images / "a.txt").symlink_to(tmp_path / "outside/secret.txt")
    (images / "inside.png").symlink_to("b.png")
    describe(images, *({"file_name": name} for name in ("link/secret.png", "a.png", "b.png")))
    dataset = opened(images)
    errors = {entry.image_id: entry.error for entry in dataset.entries}
    out = "the link leads out of the data folder"
    assert errors == {
        "a.png": None,
        "b.png": None,
        "inside.png": None,
        "link/secret.png": out,
        "secret.png": out,
    }
    assert by_id(dataset)["a.png"].caption is None
    digests = [dataset.load(by_id(dataset)[name]).sha256 for name in ("inside.png", "b.png")]
    assert digests[0] == digests[1]


def test_metadata_that_leads_out_of_the_folder_is_not_used(tmp_path):
    paint(tmp_path, "images/a.png")
    describe(tmp_path, {"file_name": "a.png", "text": "a secret"})
    (tmp_path / "images/metadata.jsonl").symlink_to(tmp_path / "metadata.jsonl")
    dataset = opened(tmp_path / "images")
    assert dataset.entries[0].caption is None
    assert list(dataset.problems) == [
        "metadata.jsonl is not used: the link leads out of the data folder"
    ]


def test_metadata_that_is_no_file_is_not_used(tmp_path):
    paint(tmp_path, "a.png")
    os.mkfifo(tmp_path / "metadata.jsonl")
    assert list(opened(tmp_path).problems) == ["metadata.jsonl is not used: not a regular file"]


def test_loops_of_links_end(tmp_path):
    paint(tmp_path, "a.png", "sub/b.png")
    (tmp_path / "sub/up").symlink_to(tmp_path)
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "a.txt").symlink_to("a.txt")
    assert ids(opened(tmp_path)) == ["a.png", "sub/b.png"]


def test_what_is_listed_counts_whatever_its_name(tmp_path):
    """No extension, hidden, below a folder that is not searched, written in another way."""
    names = ["no-extension", ".hidden.png", "sub/b.png", "a.png"]
    paint(tmp_path, *names)
    describe(tmp_path, *({"file_name": f".//{name}"} for name in names))
    dataset = opened(tmp_path, recursive=False)
    assert ids(dataset) == sorted(names)
    assert all(dataset.load(entry).sha256 for entry in dataset.entries)
    assert list(dataset.problems) == []


def test_odd_names_survive(tmp_path):
    odd = [
        os.fsdecode(b"caf\xe9.png"),
        "caf\u00e9.png",
        "a\nb.png",
        "x" * 251 + ".png",
    ]
    paint(tmp_path, *odd)
    dataset = opened(tmp_path)
    assert ids(dataset) == sorted(odd)
    assert len({dataset.load(entry).sha256 for entry in dataset.entries}) == len(odd)
    assert list(pickle.loads(pickle.dumps(dataset)).entries) == list(dataset.entries)


def test_problems_with_odd_names_are_lines_that_can_be_printed(tmp_path):
    paint(tmp_path, "a.png", os.fsdecode(b"caf\xe9.png"), "a\nb.png")
    describe(tmp_path, {"file_name": "a.png"}, {"file_name": "\ud800.png", "copies": -1})
    problems = opened(tmp_path).problems
    assert len(problems) == 3
    assert "\n".join(problems).encode().count(b"\n") == 2


def test_impossible_names_in_the_metadata_are_missing_files(tmp_path):
    paint(tmp_path, "a.png")
    describe(
        tmp_path, {"file_name": "x" * 5000}, {"file_name": "\ud800.png"}, {"file_name": "a.png"}
    )
    dataset = opened(tmp_path)
    errors = [entry.error for entry in dataset.entries]
    assert errors == [
        None,
        "listed in metadata.jsonl but missing",
        "listed in metadata.jsonl but missing",
    ]


def test_a_folder_that_cannot_be_read_is_reported(tmp_path, monkeypatch):
    paint(tmp_path, "a.png", "closed/b.png")
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", "closed")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    dataset = opened(tmp_path)
    assert ids(dataset) == ["a.png"]
    (problem,) = dataset.problems
    assert problem == "a folder cannot be read: [Errno 13] Permission denied: 'closed'"


def test_split_and_copies_of_the_metadata(tmp_path):
    paint(tmp_path, *(names := ["a.png", "b.png", "c.png", "d.png", "e.png"]))
    more = [
        {"split": "train", "copies": 4},
        {"copies": 0},
        {"split": "held_out"},
        {"split": "held_out", "copies": 1},
        {"split": "test", "copies": True},
    ]
    describe(tmp_path, *({"file_name": n, **m} for n, m in zip(names, more, strict=True)))
    dataset = opened(tmp_path)
    assert [(entry.split, entry.copies, entry.group) for entry in dataset.entries] == [
        ("train", 4, "duplicated"),
        ("held_out", 0, "held_out"),
        ("held_out", None, "held_out"),
        ("train", 1, "single"),
        ("unknown", None, None),
    ]
    assert list(dataset.problems) == [
        "'d.png': split held_out contradicts copies 1; train is used",
        "'e.png': split 'test' is none of train, held_out, unknown",
        "'e.png': copies True is not a number of copies",
    ]


def test_a_training_manifest_is_matched_by_content(tmp_path):
    paint(tmp_path / "images", "renamed.png", "twin-of-blue.png", "never-seen.png")
    (tmp_path / "images/broken.png").write_bytes(b"")
    images = opened(tmp_path / "images")
    digest = {e.image_id: images.load(e).sha256 for e in images.entries if e.image_id[0] != "b"}
    manifest = TrainingManifest(
        entries=(
            ManifestEntry(image_id="0", sha256=digest["renamed.png"], split="train", copies=8),
            ManifestEntry(image_id="1", sha256=digest["twin-of-blue.png"], split="train", copies=1),
            ManifestEntry(image_id="2", sha256=digest["twin-of-blue.png"], split="train", copies=2),
        ),
        source="test",
    )
    manifest.write(tmp_path / "training_manifest.json")
    known = opened(tmp_path / "images", training_manifest=str(tmp_path / "training_manifest.json"))
    assert [(e.image_id, e.split, e.copies) for e in known.entries] == [
        ("broken.png", "unknown", None),
        ("never-seen.png", "held_out", 0),
        ("renamed.png", "train", 8),
        ("twin-of-blue.png", "train", 3),
    ]


def test_training_entries_are_all_that_was_not_held_out(tmp_path):
    paint(tmp_path, "a.png", "b.png", "c.png", "d.png")
    describe(
        tmp_path,
        {"file_name": "a.png", "copies": 3},
        {"file_name": "b.png", "copies": 0},
        {"file_name": "c.png", "split": "held_out"},
        {"file_name": "d.png"},
        {"file_name": "gone.png", "copies": 2},
    )
    dataset = opened(tmp_path, take={"held_out": 1})
    assert ids(dataset) == ["b.png"]
    whole = by_id(opened(tmp_path))
    assert dataset.training_entries() == [whole["a.png"], replace(whole["d.png"], copies=1)]


@pytest.mark.parametrize(
    ("path", "cure"),
    [("nowhere", "is not a folder; give a folder of images"),
     ("file.png", "is not a folder; give a folder of images"),
     ("~nobody-of-this-name/x", "is not a folder; give a folder of images"),
     ("empty", "holds no images that can be read (PNG, JPEG, ")],
)  # fmt: skip
def test_an_unusable_folder_names_key_value_and_cure(path, cure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paint(tmp_path, "file.png", "empty/.hidden.png")
    with pytest.raises(ValueError, match=f"^dataset.path={path} ") as caught:
        ImageFolder(path=path).open(8)
    assert cure in str(caught.value)


@pytest.mark.parametrize("path", ["nul\0", "x" * 300, "y/" * 3000])
def test_an_impossible_path_is_no_folder(path):
    with pytest.raises(ValueError, match="is not a folder; give a folder of images"):
        ImageFolder(path=path).open(8)


def test_the_preset_holds_the_defaults():
    preset = yaml.safe_load(Path("conf/dataset/folder.yaml").read_text())
    assert preset.pop("_target_") == f"{ImageFolder.__module__}.{ImageFolder.__qualname__}"
    assert preset.pop("path") == "???"
    assert preset == {f.name: f.default for f in fields(ImageFolder) if f.default is not MISSING}
