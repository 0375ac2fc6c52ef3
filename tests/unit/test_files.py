"""Files that are whole or absent, and their identity."""

from __future__ import annotations

import errno
import hashlib
import os

import pytest

from invmm.files import file_sha256, read_file, record_key, write_atomically


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "x.json"
    write_atomically(path, b"a longer text")
    write_atomically(path, b"short")
    assert path.read_bytes() == b"short"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"old"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"newest")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error_and_stays_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "gone/x.json", b"text")
    assert list(tmp_path.iterdir()) == []


def test_the_digest_is_of_the_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == hashlib.sha256(b"abc").hexdigest()
    assert file_sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea")


def test_ids_that_look_alike_stay_apart():
    ids = ["a/b", "a-b", "a b", "A-b", "x" * 60 + "1", "x" * 60 + "2"]
    keys = {record_key(image_id).lower() for image_id in ids}
    assert len(keys) == len(ids)


def test_a_file_that_was_written_again_is_hashed_again(tmp_path):
    path = tmp_path / "weights"
    digests = []
    for content in (b"one", b"two", b"one"):
        path.write_bytes(content)
        digests += [file_sha256(path), file_sha256(path)]
    assert digests[0] == digests[1] == digests[4] == digests[5]
    assert digests[2] == digests[3] == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_regular_file_is_refused_and_never_hangs(make, tmp_path):
    make(tmp_path / "it")
    with pytest.raises(OSError, match=r"no regular file|Is a directory"):
        read_file(tmp_path / "it")
