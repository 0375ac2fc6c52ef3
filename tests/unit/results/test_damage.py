"""Damage: whatever happens to a file of a run is told, set aside, and its image measured again."""

from __future__ import annotations

import json
import os
import random

import pytest
import written
from safetensors.torch import load_file, save_file

from invmm.analysis.report import report
from invmm.engine.outcomes import Status
from invmm.results.damage import FILES, checksum, record_fault, set_aside
from invmm.results.ownership import OwnedRunFolder
from invmm.results.records import read_records, record_faults

ENTRIES = [written.entry(name) for name in ("a", "b")]


@pytest.fixture
def folder(tmp_path):
    with OwnedRunFolder(tmp_path / "run", config=written.CONFIG, digest=written.DIGEST) as folder:
        for entry in ENTRIES:
            result = written.outcome(Status.NOT_REPLICATED, similarity=0.1, columns={"count": 0})
            written.write(folder, entry, result)
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def become_a_folder(path):
    path.unlink()
    path.mkdir()


def dangle(path):
    path.unlink()
    path.symlink_to("nowhere")


def swell(path):
    """To a terabyte that takes no room."""
    os.truncate(path, 2**40)


def empty(path):
    path.write_bytes(b"")


DAMAGES = [truncate, flip, pipe, become_a_folder, dangle, empty, swell]


@pytest.mark.parametrize("name", ["record.json", *FILES])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_set_aside_and_measured_again(folder, name, damage):
    place = folder.record_folder("a")
    damage(place / name)
    assert [record["image_id"] for record in read_records(folder.path)] == ["b"]
    (line,) = folder.set_damaged_aside(ENTRIES)
    assert str(place / name) in line
    assert f"set aside in {folder.path}/damaged/{place.name}" in line
    assert not place.exists()
    assert (folder.path / "damaged" / place.name).is_dir()
    assert folder.pending(ENTRIES, retry_failed=False) == ENTRIES[:1]
    assert folder.set_damaged_aside(ENTRIES) == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_gone_is_damage(folder, name):
    (folder.record_folder("a") / name).unlink()
    assert (
        record_fault(folder.record_folder("a")) == f"{folder.record_folder('a') / name} is missing"
    )


def test_a_record_in_the_folder_of_another_is_damage(folder):
    ours, others = (folder.record_folder(name) for name in "ab")
    for name in ("record.json", *FILES):
        (ours / name).write_bytes((others / name).read_bytes())
    assert record_fault(ours) == f"{ours / 'record.json'} is of another image, b"
    assert record_fault(others) is None


def test_whole_records_and_those_not_written_are_no_damage(folder):
    place = folder.record_folder("c")
    assert record_fault(place) is None
    place.mkdir()
    assert record_fault(place) is None
    (place / "target.png").write_bytes(b"half of")  # a process was killed here
    assert record_fault(place) is None
    (place / "target.png").unlink()
    os.mkfifo(place / "target.png")
    assert record_fault(place) == f"{place / 'target.png'} is no regular file"
    assert folder.set_damaged_aside(ENTRIES) == []


@pytest.mark.parametrize("kind", ["a file", "a pipe", "a link to nowhere"])
def test_what_is_no_folder_makes_room_for_one(folder, kind):
    place = folder.record_folder("c")
    make = {"a file": place.touch, "a pipe": lambda: os.mkfifo(place),
            "a link to nowhere": lambda: place.symlink_to("nowhere")}  # fmt: skip
    make[kind]()
    entry = written.entry("c")
    (line,) = folder.set_damaged_aside([entry])
    assert line.startswith(f"{place} is no folder; set aside in ")
    written.write(folder, entry, written.outcome(Status.NOT_REPLICATED))
    assert folder.status_of("c") is Status.NOT_REPLICATED


def test_what_is_set_aside_never_replaces_what_was(folder):
    for number, shown in enumerate(("x", "x-2", "x-3")):
        path = folder.path / "x"
        path.write_text(str(number))
        assert set_aside(folder.path, path) == folder.path / "damaged" / shown
    assert [path.read_text() for path in sorted((folder.path / "damaged").iterdir())] == [*"012"]


@pytest.mark.parametrize("kind", ["a file", "a link"])
def test_nothing_is_set_aside_outside_of_the_run(folder, kind, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    place = folder.path / "damaged"
    place.touch() if kind == "a file" else place.symlink_to(outside)
    flip(folder.record_folder("a") / "samples.png")
    with pytest.raises(ValueError, match=r"damaged is no folder, so that .* cannot be set aside"):
        folder.set_damaged_aside(ENTRIES)
    assert list(outside.iterdir()) == []


def test_any_flipped_byte_of_a_record_is_seen(folder):
    """Wherever it falls, also where JSON reads the same: in blanks it is, and changes nothing."""
    path, rng = folder.record_folder("a") / "record.json", random.Random(0)
    whole, seen = path.read_bytes(), json.loads(path.read_bytes())
    for _ in range(300):
        content = bytearray(whole)
        content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            fault = record_fault(path.parent)
        except ValueError as error:
            fault = str(error)
        assert fault is not None or json.loads(content) == seen
        assert fault is None or "\n" not in fault


@pytest.mark.parametrize("changes", [
    {"steps": 10**30}, {"steps": -(2**63) - 1}, {"steps": 1.5}, {"copies": True}, {"score": "0"},
    {"score": [0.1]}, {"path": 1}, {"seed": {}}, {"columns": [1]}, {"columns": {"count": 2**63}},
    {"columns": {"count": [1]}}, {"columns": None},
])  # fmt: skip
def test_values_that_no_table_holds_are_damage_though_they_are_vouched_for(folder, changes):
    written.vouch(folder.record_folder("a"), **changes)
    report(folder.path)
    (fault,) = record_faults(folder.path)
    assert f"record.json was altered: its {next(iter(changes))}"[:25] in fault
    assert len(fault) < 400


@pytest.mark.parametrize("files", [
    None, [], {}, {"arrays.safetensors": None}, {"arrays.safetensors": {"bytes": "x"}},
    {"../b/record.json": {"bytes": 1, "sha256": "x"}}, {"arrays.safetensors": {"bytes": 1}},
])  # fmt: skip
def test_files_that_no_run_lists_are_damage(folder, files):
    path = folder.record_folder("a") / "record.json"
    record = {**json.loads(path.read_bytes()), "files": files}
    path.write_text(json.dumps({**record, "checksum": checksum(record)}))
    assert len(record_faults(folder.path)) == 1
    report(folder.path)


def test_values_at_the_ends_of_their_range_are_whole(folder):
    written.vouch(
        folder.record_folder("a"), steps=2**63 - 1, score=1, columns={"n": -(2**63), "is": True}
    )
    assert record_fault(folder.record_folder("a")) is None
    report(folder.path)


def test_records_of_a_later_version_are_refused_and_stay_where_they_are(folder):
    written.vouch(folder.record_folder("a"), schema_version=4)
    for use in (
        lambda: folder.set_damaged_aside(ENTRIES),
        lambda: report(folder.path),
        lambda: read_records(folder.path),
    ):
        with pytest.raises(ValueError, match=r"schema_version 4, this invmm knows 3 and earlier"):
            use()
    assert folder.record_folder("a").is_dir()
    assert not (folder.path / "damaged").exists()


def test_records_of_an_earlier_version_vouch_for_nothing_and_are_read(folder):
    path = folder.record_folder("a") / "record.json"
    record = json.loads(path.read_bytes())
    del record["files"], record["checksum"]
    path.write_text(json.dumps({**record, "schema_version": 2}))
    arrays = load_file(path.parent / "arrays.safetensors")
    save_file(arrays, path.parent / "arrays.safetensors")
    assert record_faults(folder.path) == []
    assert len(read_records(folder.path)) == 2
    (path.parent / "arrays.safetensors").unlink()
    assert record_fault(path.parent) == f"{path.parent / 'arrays.safetensors'} is missing"


@pytest.mark.parametrize(
    "name", ["finished.log", "processes.jsonl", "run.lock", "opening.lock", "locks/x.lock"]
)
@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_stands_in_the_way_of_locks_and_logs_is_set_aside(tmp_path, name, kind):
    run, outside = tmp_path / "run", tmp_path / "outside"
    path = run / name
    path.parent.mkdir(parents=True)
    outside.write_bytes(b"mine")
    make = {"pipe": os.mkfifo, "link": lambda path: path.symlink_to(outside), "folder": os.mkdir}
    make[kind](path)
    with OwnedRunFolder(run, config=written.CONFIG, digest=written.DIGEST) as folder:
        written.write(folder, ENTRIES[0], written.outcome(Status.NOT_REPLICATED))
        folder.note_process({"pid": 1})
    assert outside.read_bytes() == b"mine"
    assert os.path.lexists(run / "damaged" / path.name)


def test_a_config_that_is_gone_or_damaged_comes_back_if_the_manifest_names_it(folder):
    path = folder.path / "config.json"
    whole = path.read_bytes()
    manifest = folder.path / "manifest.json"
    for break_it in (path.unlink, lambda: path.write_bytes(b"{"), lambda: pipe(path)):
        for noted in ("{}", "[", json.dumps({"config_digest": "another"})):
            manifest.write_text(noted)
            break_it()
            with pytest.raises(ValueError, match=r"config\.json is .*put it back"):
                reopened(folder)
            path.unlink(missing_ok=True)
            path.write_bytes(whole)
        manifest.write_text(json.dumps({"config_digest": written.DIGEST}))
        break_it()
        reopened(folder)
        assert path.read_bytes() == whole


def reopened(folder):
    """As the next run of the same command opens it."""
    with OwnedRunFolder(folder.path, config=written.CONFIG, digest=written.DIGEST) as found:
        return found


def test_what_records_rest_on_is_never_decided_twice(folder):
    path = folder.path / "rows.json"
    for break_it in (truncate, empty, pipe, lambda path: path.unlink()):
        path.write_text('{"rows_denoise": 2}')
        assert folder.settled("rows.json", dict) == {"rows_denoise": 2}
        break_it(path)
        with pytest.raises(ValueError, match=r"rows\.json is missing or damaged"):
            folder.settled("rows.json", dict)
        path.unlink(missing_ok=True)
    for place in (folder.path / "records").iterdir():
        (place / "record.json").unlink()
    os.mkfifo(path)
    assert folder.settled("rows.json", lambda: {"rows_denoise": 1}) == {"rows_denoise": 1}
