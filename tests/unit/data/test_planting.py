"""The planted CIFAR-10 of the duplication study, from a parquet file of stand-ins."""

from __future__ import annotations

import runpy
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from invmm.data.folder import ImageFolder

pytest.importorskip("datasets")

PLANT = Path(__file__).parents[3] / "experiments" / "duplication" / "plant.py"


def test_images_are_planted_in_turns_and_the_last_are_held_out(tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    images = [{"bytes": f"image {number}".encode(), "path": None} for number in range(1100)]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {"img": pyarrow.array(images, kind), "label": [number % 10 for number in range(1100)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    monkeypatch.setattr(
        sys, "argv", ["plant.py", str(tmp_path / "planted"), f"--source={tmp_path}/train.parquet"]
    )
    runpy.run_path(str(PLANT), run_name="__main__")
    assert "1100 images, 2290 with copies" in capsys.readouterr().out
    planted = ImageFolder(path=str(tmp_path / "planted")).open(32)
    numbers = (100, 64, 32, 16, 8, 4, 2)
    copies = [entry.copies for entry in planted.entries]
    assert copies[:14] == [*numbers, *numbers]
    assert Counter(copies) == {**dict.fromkeys(numbers, 10), 1: 30, 0: 1000}
    assert len(planted.training_entries()) == 100
    for entry in planted.entries[::100]:
        number = int(entry.image_id.removesuffix(".png").rpartition("-")[2])
        assert Path(entry.path).read_bytes() == f"image {number}".encode()
        assert entry.label == number % 10
