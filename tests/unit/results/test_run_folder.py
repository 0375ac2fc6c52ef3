"""A run folder belongs to one config and one run at a time, and loses nothing."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import subprocess
import sys

import pytest
import written

from invmm.engine.accounting import EngineSummary
from invmm.engine.outcomes import Outcome, Status
from invmm.results.ownership import OwnedRunFolder, differences
from invmm.results.processes import read_processes

HOLD = """
import sys, time
from pathlib import Path
from invmm.results.ownership import OwnedRunFolder
from invmm.results.run_folder import RunFolder
path, what = Path(sys.argv[1]), sys.argv[2]
if what == "run":
    owned = OwnedRunFolder(path, config={"a": 1}, digest="d")
else:
    claim = RunFolder(path, "d").claim(what)
    assert claim is not None
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path):
    with OwnedRunFolder(tmp_path / "run", config=written.CONFIG, digest="d") as folder:
        yield folder


def held_elsewhere(path, what):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), what], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_another_process_is_refused_until_it_dies(tmp_path):
    other = held_elsewhere(tmp_path, "run")
    try:
        with pytest.raises(ValueError, match=f"another run is at work in {tmp_path}"):
            OwnedRunFolder(tmp_path, config={"a": 1}, digest="d")
    finally:
        end(other)
    with OwnedRunFolder(tmp_path, config={"a": 1}, digest="d") as folder:
        assert folder.path == tmp_path


def test_an_image_is_claimed_once_and_freed_by_death(folder):
    other = held_elsewhere(folder.path, "cat.png")
    try:
        assert folder.claim("cat.png") is None
        claim = folder.claim("dog.png")
        assert claim is not None
        with claim:
            assert folder.claim("dog.png") is None
    finally:
        end(other)
    assert folder.claim("cat.png") is not None
    assert folder.claim("dog.png") is not None


def test_a_finished_image_cannot_be_claimed(folder):
    written.write(folder, written.entry("a"), written.outcome(Status.NOT_REPLICATED))
    assert folder.claim("a") is None
    assert folder.status_of("a") is Status.NOT_REPLICATED


def test_another_config_is_refused_with_both_values(tmp_path):
    before = {"seed": 0, "sampler": {"steps": 20, "eta": 0.0}, "same": [1, 2]}
    after = {"seed": 7, "sampler": {"steps": 20, "eta": 0.5}, "same": [1, 2]}
    with OwnedRunFolder(tmp_path, config=before, digest="one") as folder:
        written.write(folder, written.entry("a"), written.outcome(Status.REPLICATED, score=0.1))
    with pytest.raises(ValueError, match="holds a run of another config") as refusal:
        OwnedRunFolder(tmp_path, config=after, digest="two")
    message = str(refusal.value)
    assert "seed was 0 and is 7" in message
    assert "sampler.eta was 0.0 and is 0.5" in message
    assert "steps" not in message
    assert "choose another run_dir" in message
    # a refusal leaves nothing locked
    with OwnedRunFolder(tmp_path, config=before, digest="one"):
        pass


@pytest.mark.parametrize("content", ["{", "[]", '{"_class_name": "UNet2DModel"}'])
def test_a_config_that_is_damaged_or_not_a_runs_is_said_and_stays(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged or not a run's"):
        OwnedRunFolder(tmp_path, config={}, digest="one")
    assert (tmp_path / "config.json").read_text() == content


@pytest.mark.parametrize("shard", [None, "0/2"])
def test_a_run_without_results_leaves_no_claim(shard, tmp_path):
    for digest in ("one", "two"):
        with OwnedRunFolder(tmp_path, config={"a": digest}, digest=digest, shard=shard) as folder:
            assert not (tmp_path / "manifest.json").exists()
            assert json.loads((tmp_path / "config.json").read_bytes())["digest"] == digest
            (tmp_path / "manifest.json").write_text("{}")
    written.write(folder, written.entry("a"), written.outcome(Status.REPLICATED, score=0.1))
    with pytest.raises(ValueError, match="a was two and is one"):
        OwnedRunFolder(tmp_path, config={"a": "one"}, digest="one", shard=shard)


@pytest.mark.parametrize("result", [
    "free_samples/00000.safetensors", "checkpoints/step=00000003.ckpt", "step_000004/model.json",
])  # fmt: skip
def test_other_results_than_records_claim_a_folder_too(result, tmp_path):
    with OwnedRunFolder(tmp_path, config={"a": 1}, digest="one"):
        (tmp_path / result).parent.mkdir()
        (tmp_path / result).touch()
    with pytest.raises(ValueError, match="holds a run of another config"):
        OwnedRunFolder(tmp_path, config={"a": 2}, digest="two")


def test_a_shard_at_work_keeps_its_claim_before_its_first_record(tmp_path):
    with OwnedRunFolder(tmp_path, config={"a": 1}, digest="one", shard="0/2"):
        with OwnedRunFolder(tmp_path, config={"a": 1}, digest="one", shard="1/2"):
            pass
        with pytest.raises(ValueError, match="a was 1 and is 2"):
            OwnedRunFolder(tmp_path, config={"a": 2}, digest="two", shard="1/2")
        with pytest.raises(ValueError, match="another run is at work"):
            OwnedRunFolder(tmp_path, config={"a": 2}, digest="two")


def test_a_process_that_outlived_its_run_keeps_the_claim(tmp_path):
    """A worker may take a moment to notice that the command that started it was killed."""
    with OwnedRunFolder(tmp_path, config={"a": 1}, digest="one"):
        pass
    other = held_elsewhere(tmp_path, "cat.png")
    try:
        with pytest.raises(ValueError, match="a was 1 and is 2"):
            OwnedRunFolder(tmp_path, config={"a": 2}, digest="two")
    finally:
        end(other)
    with OwnedRunFolder(tmp_path, config={"a": 2}, digest="two"):
        pass


def test_a_folder_that_cannot_be_written_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run_dir=.*file/run cannot be written"):
        OwnedRunFolder(tmp_path / "file" / "run", config={}, digest="d")


def test_coming_back_sweeps_up_what_a_kill_left(tmp_path):
    with OwnedRunFolder(tmp_path, config={}, digest="d") as folder:
        place = folder.record_folder("a")
        place.mkdir(parents=True)
    leftover = place / ".record.json.123.tmp"
    leftover.write_text("{")
    with OwnedRunFolder(tmp_path, config={}, digest="d"):
        assert not leftover.exists()


def test_pending_keeps_order_and_retries_only_failures(folder):
    entries = [written.entry(name) for name in ("c", "a", "d", "b")]
    written.write(folder, entries[1], written.outcome(Status.REPLICATED, score=0.1))
    written.write(folder, entries[2], Outcome(status=Status.FAILED, error="x"), loaded=None)
    names = lambda retry: [e.image_id for e in folder.pending(entries, retry_failed=retry)]  # noqa: E731
    assert names(False) == ["c", "b"]
    assert names(True) == ["c", "d", "b"]
    assert names(False) == ["c", "d", "b"]  # the failed record is gone


def test_followers_hear_of_each_record_once(folder):
    written.write(folder, written.entry("before"), written.outcome(Status.REPLICATED))
    new = folder.follow_finished({"before", "a", "b"})
    written.write(folder, written.entry("of another shard"), written.outcome(Status.REPLICATED))
    assert list(new()) == []
    written.write(folder, written.entry("a"), written.outcome(Status.NOT_REPLICATED))
    written.write(folder, written.entry("b"), written.outcome(Status.DIVERGED))
    assert list(new()) == [Status.NOT_REPLICATED, Status.DIVERGED]
    assert list(new()) == []
    with (folder.path / "finished.log").open("ab") as log:
        log.write(b'["half')
    assert list(new()) == []


@pytest.mark.parametrize(
    "image_id",
    ["../../etc/passwd", "/absolute", ".", "..", "", "a\x00b", "a\nb", "x" * 5000, "ü/ä.png",
     os.fsdecode(b"\xff.png"), "CON", "a//b", "-rf"],
)  # fmt: skip
def test_no_id_leaves_the_folder(folder, image_id):
    place = folder.record_folder(image_id)
    assert place.resolve().parent == (folder.path / "records").resolve()
    written.write(folder, written.entry(image_id), written.outcome(Status.NOT_REPLICATED))
    assert json.loads((place / "record.json").read_text())["image_id"] == image_id


def test_workers_get_the_folder_by_pickle(folder):
    assert pickle.loads(pickle.dumps(folder)) == folder


def test_differences_of_nested_configs():
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []
    assert differences({"a": 1}, {"a": 1, "c": {"d": 2}}) == ["c was None and is {'d': 2}"]


def test_shards_work_side_by_side_but_not_twice_and_not_beside_a_whole_run(tmp_path):
    def open_as(shard):
        return OwnedRunFolder(tmp_path, config={}, digest="d", shard=shard)

    with open_as("0/2"), open_as("1/2"):
        for shard in ("1/2", None):
            with pytest.raises(ValueError, match="another run is at work"):
                open_as(shard)
    with open_as(None), pytest.raises(ValueError, match="another run is at work"):
        open_as("0/2")
    with open_as("1/2"):
        pass


def test_a_shard_leaves_what_another_is_writing(tmp_path):
    with OwnedRunFolder(tmp_path, config={}, digest="d"):
        pass
    (tmp_path / ".scores.csv.1234.tmp").touch()
    with OwnedRunFolder(tmp_path, config={}, digest="d", shard="0/2"):
        assert (tmp_path / ".scores.csv.1234.tmp").exists()
    with OwnedRunFolder(tmp_path, config={}, digest="d"):
        assert not (tmp_path / ".scores.csv.1234.tmp").exists()


def test_what_one_process_decides_holds_for_all(folder):
    asked = []

    def decide():
        asked.append(1)
        return {"rows_denoise": 32}

    assert folder.settled("rows.json", decide) == {"rows_denoise": 32}
    assert folder.settled("rows.json", decide) == {"rows_denoise": 32}
    assert asked == [1]


def account(seconds: float) -> dict:
    return {**EngineSummary(seconds=seconds, slots=1).as_dict(), "host": "here"}


def test_accounts_of_processes_come_back_and_half_a_line_does_not(folder):
    assert read_processes(folder.path) == []
    folder.note_process(account(1.5))
    folder.note_process(account(2.5))
    with (folder.path / "processes.jsonl").open("a") as file:
        file.write(json.dumps(account(9)))
    assert read_processes(folder.path) == [account(1.5), account(2.5)]


@pytest.mark.parametrize("line", [
    {}, [], None, 7, "x", {"seconds": 1}, {**account(1), "by_kind": None},
    {**account(1), "by_kind": {"network": "1"}}, {**account(1), "seconds": math.nan},
    {**account(1), "rows": 10**400}, {**account(1), "slots": None},
])  # fmt: skip
def test_accounts_that_say_no_times_are_left_out(folder, line):
    with (folder.path / "processes.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert read_processes(folder.path) == []


def test_torn_lines_and_pipes_leave_no_traceback(folder):
    folder.note_process(account(1.5))
    with (folder.path / "processes.jsonl").open("ab") as file:
        file.write(b'{"seconds": 2\n\xff\n[1]\n' + b"[" * 10**5 + b'\n{"seconds"')
    assert read_processes(folder.path) == [account(1.5)]
    new = folder.follow_finished({"a"})
    with (folder.path / "finished.log").open("ab") as file:
        file.write(b'["a", "REPL["a", "FAILED"]\n["a", "NEVER"]\n[["a"], "FAILED"]\n7\n')
    folder.finished("a", Status.FAILED)
    assert list(new()) == [Status.FAILED]
    (folder.path / "processes.jsonl").unlink()
    os.mkfifo(folder.path / "processes.jsonl")
    assert read_processes(folder.path) == []
    place = folder.record_folder("a")
    place.mkdir(parents=True)
    os.mkfifo(place / "record.json")
    assert folder.status_of("a") is None


def test_a_folder_of_the_same_values_by_another_digest_is_of_an_earlier_version(tmp_path):
    with OwnedRunFolder(tmp_path / "run", config={"scale": 1}, digest="of 1") as folder:
        written.write(folder, written.entry("it"), written.outcome(Status.NOT_REPLICATED))
    with pytest.raises(ValueError, match=r"an earlier version.*choose another run_dir to measure"):
        OwnedRunFolder(tmp_path / "run", config={"scale": 1.0}, digest="of 1.0")
