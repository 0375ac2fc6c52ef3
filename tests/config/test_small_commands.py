"""`invmm-threshold` and `invmm-collect` on inputs with known answers."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
import tiny
import written
from PIL import Image

from invmm.cli import collect
from invmm.engine.outcomes import Status
from invmm.results.ownership import OwnedRunFolder


def test_the_threshold_counts_false_matches(tmp_path):
    """Two opposite ramps correlate by -1, and each with its brighter self by 1: 2 of 6 pairs."""
    images = tmp_path / "images"
    images.mkdir()
    ramp = np.tile(np.arange(0, 160, 20, dtype=np.uint8), (8, 1))
    for name, picture in {"up": ramp, "down": np.ascontiguousarray(ramp[:, ::-1])}.items():
        Image.fromarray(picture).save(images / f"{name}.png")
        Image.fromarray(picture + 50).save(images / f"{name}-bright.png")
    for index in range(4):  # no false matches, whatever the file
        Image.fromarray(ramp).save(images / f"up-{index}.{'bmp' if index else 'png'}")
    (images / "broken.png").write_bytes(b"not an image")
    result = tiny.invmm(
        [
            sys.executable, "-m", "invmm.cli.threshold", "dataset=folder", f"dataset.path={images}",
            "image_size=8", "replication=correlation", "replication.threshold=0.9",
        ],
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "left out broken.png: " in result.stdout
    again = "same pictures, of which only the first is kept (4): 'up-0.png = up-1.bmp'"
    assert again in result.stdout
    assert "4 images, 6 pairs of different ones\nthreshold 0.9: 2 pairs match" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_a_group_of_another_command_is_named(capsys):
    from invmm.cli.threshold import COMMAND

    assert COMMAND.run(["dataset=folder", "dataset.path=x", "trainer=cpu"]) == 2
    assert "trainer is no group of options of this command; --help" in capsys.readouterr().err


@pytest.fixture
def runs(tmp_path):
    """Two run folders with one image each, replicated in the first only."""
    folders = [tmp_path / "a", tmp_path / "b"]
    outcomes = [
        written.outcome(Status.REPLICATED, score=0.25, similarity=0.9),
        written.outcome(Status.NOT_REPLICATED, similarity=0.3),
    ]
    for folder, outcome in zip(folders, outcomes, strict=True):
        with OwnedRunFolder(folder, config=written.CONFIG, digest=written.DIGEST) as opened:
            written.write(opened, written.entry("x.png", 4), outcome)
    return folders


def test_collecting_names_no_folder(runs, monkeypatch, capsys):
    file = runs[0] / "config.json"
    monkeypatch.setattr(sys, "argv", ["invmm-collect", str(file)])
    with pytest.raises(SystemExit) as end:
        collect.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "invmm-collect: RUN_DIR names files only; give the folder of a run\n"
    )


def test_collecting_prints_the_table_and_joins_runs(runs, tmp_path, monkeypatch, capsys):
    joined = tmp_path / "joined.csv"
    beside = tmp_path / "multirun.yaml"
    beside.touch()
    arguments = ["invmm-collect", *map(str, runs), str(beside), "--join", str(joined)]
    monkeypatch.setattr(sys, "argv", arguments)
    collect.main()
    collect.main()
    shown = capsys.readouterr().out
    assert shown.count("duplicated: replicated 1 of 1") == 2
    assert shown.count("duplicated: replicated 0 of 1") == 2
    table = pd.read_csv(joined)
    assert table.status.tolist() == ["REPLICATED", "NOT_REPLICATED"]
    assert table.score.tolist()[0] == 0.25
    for folder in runs:
        assert len(pd.read_parquet(folder / "scores.parquet")) == 1
        assert (folder / "gallery.png").stat().st_size > 0
