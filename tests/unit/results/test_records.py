"""Records: what is written is read again, and a half-written one does not count."""

from __future__ import annotations

import errno
import json
import math

import numpy as np
import pytest
import torch
import written
from PIL import Image
from safetensors.torch import load_file

from invmm.engine.outcomes import Outcome, Status
from invmm.results.ownership import OwnedRunFolder
from invmm.results.records import (
    read_curves,
    read_pictures,
    read_records,
    record_faults,
    unreadable_records,
)
from invmm.runtime import recording as module
from invmm.runtime.recording import why_nothing_is_measured


@pytest.fixture
def folder(tmp_path):
    with OwnedRunFolder(tmp_path / "run", config=written.CONFIG, digest="d") as folder:
        yield folder


def test_a_record_holds_all_that_was_found(folder):
    result = written.outcome(
        Status.REPLICATED, score=0.25, similarity=0.75, columns={"log_p": -3.5}
    )
    written.write(folder, written.entry("a.png", 4, "a cat"), result)
    (record,) = read_records(folder.path)
    assert record == {
        "schema_version": 3,
        "image_id": "a.png",
        "path": "/images/a.png",
        "sha256": "ab" * 32,
        "caption": "a cat",
        "split": "train",
        "copies": 4,
        "status": "REPLICATED",
        "score": 0.25,
        "score_nats": 12.0,
        "replication_rate": 1.0,
        "best_similarity": 0.75,
        "second_similarity": 0.5,
        "num_samples": 2,
        "steps": 2,
        "evaluations_forward": 40,
        "evaluations_backward": 8,
        "evaluations_sampler": 32,
        "seconds": 1.5,
        "seconds_network": 0.5,
        "seconds_sampler": 0.25,
        "seconds_similarity": 0.0,
        "seconds_measurement": 0.0,
        "seconds_preparation": 0.0,
        "error": None,
        "seed": 3,
        "config_digest": "d",
        "columns": {"log_p": -3.5},
        "folder": folder.record_folder("a.png").name,
    }
    arrays = load_file(folder.record_folder("a.png") / "arrays.safetensors")
    assert torch.equal(arrays["mean"], result.tensors["mean"])
    curves = read_curves(folder.path, record)
    assert set(curves) == {"loss", "similarity", "similarity_step"}
    assert curves["similarity"].tolist() == [0.1, 0.25]


def test_a_run_of_failures_says_what_most_of_them_are(folder):
    entries = [written.entry(name) for name in "abcd"]
    assert why_nothing_is_measured(folder, []) is None
    ends = [(Status.FAILED, "ImageError: no image"), (Status.DIVERGED, "a sample is not finite"),
            (Status.FAILED, "ImageError: no image")]  # fmt: skip
    for entry, (status, error) in zip(entries, ends, strict=False):
        assert why_nothing_is_measured(folder, entries) is None  # some are missing
        written.write(folder, entry, Outcome(status=status, error=error))
    assert why_nothing_is_measured(folder, entries[:3]) == (
        "no image was measured: 2 FAILED and 1 DIVERGED, 2 of them with the error: ImageError: "
        "no image. The same command with retry_failed=true measures again the images that FAILED"
    )
    line = why_nothing_is_measured(folder, entries[1:2])
    assert line is not None
    assert "1 DIVERGED, all with the error: a sample is not finite" in line
    written.write(folder, entries[3], written.outcome(Status.NOT_REPLICATED, similarity=0.1))
    assert why_nothing_is_measured(folder, entries) is None


def test_pictures_come_back_target_first(folder):
    samples = torch.stack([torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), 0.0)])
    result = written.outcome(Status.NOT_REPLICATED, similarity=0.1, samples=samples)
    written.write(folder, written.entry("a"), result)
    (record,) = read_records(folder.path)
    target, first, second = read_pictures(folder.path, record)
    assert target.shape == (4, 4, 3)
    assert [int(np.unique(p).item()) for p in (target, first, second)] == [255, 0, 128]
    strip = Image.open(folder.record_folder("a") / "samples.png")
    assert strip.size == (8, 4)


def test_an_image_that_never_loaded_has_no_pictures(folder):
    failed = Outcome(status=Status.FAILED, error="truncated")
    written.write(folder, written.entry("a"), failed, loaded=None, second_opinion=None)
    (record,) = read_records(folder.path)
    assert read_pictures(folder.path, record) == []
    assert read_curves(folder.path, record) == {}
    assert (record["error"], record["sha256"], record["second_similarity"]) == (
        "truncated", None, None,
    )  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(folder, value):
    result = written.outcome(Status.DIVERGED, similarity=value)
    written.write(folder, written.entry("a"), result, second_opinion=value)
    text = (folder.record_folder("a") / "record.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert record["best_similarity"] is None
    assert record["second_similarity"] is None


@pytest.mark.parametrize("writes", [0, 1, 2, 3])
def test_killed_between_two_files_an_image_is_not_done(folder, monkeypatch, writes):
    """The process dies after so many of the four files."""
    real, count = module.write_atomically, 0

    def dying(path, content):
        nonlocal count
        if count == writes:
            raise KeyboardInterrupt
        count += 1
        real(path, content)

    result = written.outcome(Status.REPLICATED, score=0.5, similarity=0.9)
    monkeypatch.setattr(module, "write_atomically", dying)
    with pytest.raises(KeyboardInterrupt):
        written.write(folder, written.entry("a"), result)
    assert folder.status_of("a") is None
    assert read_records(folder.path) == []
    assert [e.image_id for e in folder.pending([written.entry("a")], retry_failed=False)] == ["a"]
    monkeypatch.undo()
    written.write(folder, written.entry("a"), result)
    assert folder.status_of("a") is Status.REPLICATED


@pytest.mark.parametrize("value", [[1.0], {"a": 1}, 2**63, (1, 2), math.nan, -math.inf])
def test_what_no_table_holds_is_recorded_as_failed(folder, value):
    """A measurement from elsewhere returns it; measured again, it would return it again."""
    result = written.outcome(Status.REPLICATED, score=0.5, columns={"found": value})
    written.write(folder, written.entry("a"), result)
    (record,) = read_records(folder.path)
    assert (record["status"], record["score"], record["columns"]) == ("FAILED", None, {})
    assert record["error"] == f"what was found cannot be recorded: its found is {value!r}"
    assert record["evaluations_forward"] == 40
    assert record_faults(folder.path) == []


@pytest.mark.parametrize("value", [np.float64(0.5), "text", True, -(2**63), 0, None])
def test_what_a_table_holds_is_kept(folder, value):
    result = written.outcome(Status.REPLICATED, score=0.5, columns={"found": value})
    written.write(folder, written.entry("a"), result)
    (record,) = read_records(folder.path)
    assert record["columns"] == {"found": value}


def test_a_full_disk_leaves_no_half_record(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("invmm.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        written.write(folder, written.entry("a"), written.outcome(Status.REPLICATED, score=0.5))
    assert list(folder.record_folder("a").iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b'{"image_id": "a"}', b'{"image_id": "a", "status": "X"}',
     b'{"image_id": null, "status": "FAILED"}', b"\xff\xfe"],
)  # fmt: skip
def test_a_damaged_record_is_measured_again_and_named(folder, content):
    written.write(folder, written.entry("a"), written.outcome(Status.REPLICATED, score=0.5))
    written.write(folder, written.entry("b"), written.outcome(Status.REPLICATED, score=0.5))
    path = folder.record_folder("a") / "record.json"
    path.write_bytes(content)
    assert folder.status_of("a") is None
    assert [record["image_id"] for record in read_records(folder.path)] == ["b"]
    assert unreadable_records(folder.path) == [path]
    assert record_faults(folder.path) == [f"{path} cannot be read"]
    claim = folder.claim("a")
    assert claim is not None


def test_records_come_sorted_by_id(folder):
    for name in ("b", "c", "a"):
        written.write(folder, written.entry(name), written.outcome(Status.NOT_REPLICATED))
    assert [record["image_id"] for record in read_records(folder.path)] == ["a", "b", "c"]
