"""`tests/recorded_runs.py compare` on recordings made by hand."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recorded_runs import RUNS, main
from safetensors.numpy import load_file, save_file

RUN, IMAGE = "sd3_flow", "records/b"
"""The run and the image that change."""


def recording(folder: Path, machine: str) -> Path:
    """Two images a run, one of which failed; all that a machine decides depends on its name."""
    (folder / "inputs" / "images").mkdir(parents=True)
    (folder / "inputs" / "images" / "b.png").write_bytes(b"an image")
    ours = {"seconds": len(machine), "seconds_network": 0.1, "config_digest": machine}
    ours |= {"path": machine, "checksum": machine, "files": {"arrays.safetensors": machine}}
    for name in RUNS:
        for image in ("a", "b"):
            place = folder / name / "records" / image
            place.mkdir(parents=True)
            columns = {"source_digest": machine, "beta": 0.0, "steps_taken": 3}
            score = {"score": None if image == "a" else 0.1, "columns": columns}
            (place / "record.json").write_text(json.dumps({"image_id": image, **score, **ours}))
            arrays = {"mean": np.zeros((2, 3), np.float32), "none": np.zeros((0, 3), np.float32)}
            save_file({} if image == "a" else arrays, place / "arrays.safetensors")
        Image.new("RGB", (4, 4)).save(place / "target.png")
        (folder / name / "free_samples").mkdir()
        block = {"embeddings": np.full((2, 2), np.nan, np.float32)}
        save_file(block, folder / name / "free_samples" / "00000.safetensors", {"sha256": machine})
    return folder


@pytest.fixture
def pair(tmp_path):
    return recording(tmp_path / "before", "one"), recording(tmp_path / "after", "another")


def compared(pair: tuple[Path, Path], capsys) -> tuple[int, dict[str, str]]:
    """The exit code, and run -> the line about it."""
    code = main(["compare", *map(str, pair)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["inputs", *RUNS]
    return code, dict(line.split(": ", 1) for line in lines)


def test_equal_recordings_are_equal_whatever_their_machine(pair, capsys):
    code, lines = compared(pair, capsys)
    assert code == 0
    assert lines.pop("inputs") == "1 files equal"
    assert set(lines.values()) == {"2 records, 4 arrays equal"}


def column(name: str, value: object, *, own: bool = False) -> Callable[[Path], None]:
    """Changes a column; `own` columns are those of the measurement."""

    def change(run_dir: Path) -> None:
        path = run_dir / IMAGE / "record.json"
        record = json.loads(path.read_text())
        (record["columns"] if own else record)[name] = value
        path.write_text(json.dumps(record))

    return change


def array(file: str, name: str, values: np.ndarray) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        save_file({**load_file(run_dir / file), name: values}, run_dir / file)

    return change


def picture(run_dir: Path) -> None:
    image = Image.new("RGB", (4, 4))
    image.putpixel((2, 1), (0, 1, 0))
    image.save(run_dir / IMAGE / "target.png")


def without(file: str) -> Callable[[Path], None]:
    """Takes a file away, or a folder with all its files."""

    def change(run_dir: Path) -> None:
        path = run_dir / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


ARRAYS = f"{IMAGE}/arrays.safetensors"
BLOCK = "free_samples/00000.safetensors"
OTHER_BITS = np.array([[0, 0, 0], [0, -0.0, 1]], np.float32)
OTHER_NAN = np.array([0x7FC00000, 0x7FC00000, 0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
CHANGES = {
    "score": (column("score", math.nextafter(0.1, 1)),
              "b score was 0.1 and is 0.10000000000000002"),
    "score lost": (column("score", None), "b score was 0.1 and is None"),
    "new column": (column("rate", 1), "b rate is only in AFTER"),
    "sign of zero": (column("beta", -0.0, own=True), "b columns beta was 0.0 and is -0.0"),
    "type": (column("steps_taken", 3.0, own=True), "b columns steps_taken was 3 and is 3.0"),
    "bits": (array(ARRAYS, "mean", OTHER_BITS),
             "b mean [1, 1] was 0.0 and is -0.0; 2 of 6 values differ"),
    "dtype": (array(ARRAYS, "mean", np.zeros((2, 3), np.int32)),
              "b mean was float32 (2, 3) and is int32 (2, 3)"),
    "shape": (array(ARRAYS, "none", np.zeros((0, 4), np.float32)),
              "b none was float32 (0, 3) and is float32 (0, 4)"),
    "new array": (array(ARRAYS, "std", OTHER_BITS), "b std is only in AFTER"),
    "block": (array(BLOCK, "embeddings", OTHER_NAN.reshape(2, 2)),
              "free_samples/00000.safetensors embeddings [1, 1] was nan and is nan; 1 "
              "of 4 values differ"),
    "no block": (without(BLOCK), "free_samples/00000.safetensors is only in BEFORE"),
    "pixel": (picture, "b target.png [1, 2, 1] was 0 and is 1; 1 of 48 values "
              "differ"),
    "no picture": (without(f"{IMAGE}/target.png"), "b target.png is only in BEFORE"),
    "no record": (without(IMAGE), "b is only in BEFORE"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_the_smallest_change_is_named_with_both_values(name, pair, capsys):
    change, line = CHANGES[name]
    change(pair[1] / RUN)
    code, lines = compared(pair, capsys)
    assert code == 1
    assert lines.pop(RUN) == line
    assert all(line.endswith(" equal") for line in lines.values())
    _, lines = compared(pair[::-1], capsys)
    assert not lines[RUN].endswith(" equal")


@pytest.mark.parametrize(("gone", "named"), [("", ""), ("records", ""), (ARRAYS, f"/{ARRAYS}")])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_missing_is_not_equal_even_if_it_is_so_in_both(gone, named, both, pair, capsys):
    for folder in pair if both else pair[1:]:
        without(gone)(folder / RUN)
    code, lines = compared(pair, capsys)
    assert code == 1
    line = lines.pop(RUN)
    assert line.startswith("cannot be read: ")
    assert f"{(pair[0] if both else pair[1]) / RUN}{named}" in line
    assert all(line.endswith(" equal") for line in lines.values())


@pytest.mark.parametrize("file", [f"{IMAGE}/record.json", ARRAYS, f"{IMAGE}/target.png", BLOCK])
def test_damage_is_not_equal_even_if_it_is_so_in_both(file, pair, capsys):
    for folder in pair:
        (folder / RUN / file).write_bytes(b"{")
    code, lines = compared(pair, capsys)
    assert code == 1
    assert lines.pop(RUN).startswith("cannot be read: ")
    assert all(line.endswith(" equal") for line in lines.values())


def test_other_inputs_and_no_recording_are_told(pair, tmp_path, capsys):
    (pair[1] / "inputs" / "images" / "b.png").write_bytes(b"another image")
    code, lines = compared(pair, capsys)
    assert code == 1
    assert lines.pop("inputs").startswith("images/b.png sha256 was '")
    assert all(line.endswith(" equal") for line in lines.values())
    code, lines = compared((pair[0], tmp_path / "nowhere"), capsys)
    assert code == 1
    assert not any(line.endswith(" equal") for line in lines.values())


def test_a_recording_is_not_made_twice_in_a_folder(tmp_path, capsys):
    """Its runs would go on where they stopped, which is after the last image."""
    with pytest.raises(SystemExit) as ended:
        main(["record", str(tmp_path)])
    assert ended.value.code == 2
    assert f"{tmp_path} exists; give a new folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
