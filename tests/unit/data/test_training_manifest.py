"""The list that training leaves beside its model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from invmm.data.dataset import ImageEntry
from invmm.data.manifest import ManifestEntry, TrainingManifest, list_digest
from invmm.files import write_atomically

CAT = ManifestEntry(image_id="cat.png", sha256="ab" * 32, split="train", copies=8, caption="größe")
DOG = ManifestEntry(image_id="caf\udce9.png", sha256="cd" * 32, split="train", copies=1)
MANIFEST = TrainingManifest(entries=(CAT, DOG), source="a test")


def test_what_is_written_is_read_again(tmp_path):
    MANIFEST.write(tmp_path / "m.json")
    assert TrainingManifest.read(tmp_path / "m.json") == MANIFEST
    content = json.loads((tmp_path / "m.json").read_text())
    assert content["schema_version"] == 1
    assert content["source"] == "a test"
    assert content["entries"][0] == {
        "image_id": "cat.png",
        "sha256": "ab" * 32,
        "split": "train",
        "copies": 8,
        "caption": "größe",
    }


def test_the_digest_is_of_the_list_not_of_its_order():
    assert replace(MANIFEST, entries=(DOG, CAT)).digest == MANIFEST.digest
    for change in ({"image_id": "x"}, {"sha256": "x"}, {"split": "held_out"}, {"copies": 9}):
        assert replace(MANIFEST, entries=(replace(CAT, **change), DOG)).digest != MANIFEST.digest


def test_the_digest_of_a_list_of_entries():
    entries = [
        ImageEntry(image_id="a", path="/x/a", split="train", copies=2),
        ImageEntry(image_id="b\udcff", path="/x/b"),
    ]
    digest = list_digest(entries)
    assert list_digest(reversed(entries)) == digest
    assert list_digest([replace(entry, path="/moved") for entry in entries]) == digest
    assert list_digest([replace(entries[0], copies=3), entries[1]]) != digest
    assert list_digest(entries[:1]) != digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "is not a training manifest: its schema_version is 2"),
        ({"schema_version": ...}, "is not a training manifest: it has no 'schema_version'"),
        ({"digest": ...}, "is not a training manifest: it has no 'digest'"),
        ({"entries": ...}, "is not a training manifest: it has no 'entries'"),
        ({"entries": 3}, "is not a training manifest"),
        ({"entries": [{"image_id": "a"}]}, "is not a training manifest"),
        ({"entries": []}, "was altered"),
        ({"digest": "0"}, "was altered"),
    ],
)
def test_another_file_is_refused(change, message, tmp_path):
    path = tmp_path / "m.json"
    MANIFEST.write(path)
    content = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    with pytest.raises(ValueError, match=message):
        TrainingManifest.read(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe", b"{"])
def test_what_is_no_manifest_at_all_is_refused(content, tmp_path):
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.json is not a training manifest"):
        TrainingManifest.read(tmp_path / "m.json")


def test_a_missing_manifest_is_a_users_error(tmp_path):
    with pytest.raises(ValueError, match=r"m\.json is not a training manifest"):
        TrainingManifest.read(tmp_path / "m.json")


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_old_file_alone(failing, tmp_path, monkeypatch):
    write_atomically(tmp_path / "a", b"old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"invmm.files.{failing}", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}
