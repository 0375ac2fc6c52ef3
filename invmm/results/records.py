"""Reading the records of a run: scores, curves, pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from invmm.files import read_file
from invmm.results.damage import VOUCHING, record_fault
from invmm.results.record_files import load_record


def read_records(run_dir: Path, *, only_whole: bool = True) -> list[dict[str, Any]]:
    """The records of a run, by image id; `folder` says where each lies.

    File names need not be UTF-8 but tables must: bytes that are not are shown escaped.

    Args:
        run_dir: folder of the run.
        only_whole: leave out damaged records, otherwise only those that cannot be read at all.

    Raises:
        ValueError: a record was written by a later version of this package.
    """
    records = []
    for path in (run_dir / "records").glob("*/record.json"):
        record = load_record(path)
        if record is not None and not (only_whole and record_fault(path.parent)):
            shown = {n: encodable(value) for n, value in record.items() if n not in VOUCHING}
            records.append({**shown, "folder": path.parent.name})
    return sorted(records, key=lambda record: record["image_id"])


def unreadable_records(run_dir: Path) -> list[Path]:
    """Each record.json that says neither which image it is of nor how that ended."""
    paths = sorted((run_dir / "records").glob("*/record.json"))
    return [path for path in paths if load_record(path) is None]


def record_faults(run_dir: Path) -> list[str]:
    """What is damaged, one line a record; a rerun measures their images again."""
    places = sorted(path.parent for path in (run_dir / "records").glob("*/record.json"))
    return [fault for place in places if (fault := record_fault(place))]


def read_curves(run_dir: Path, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Name -> values of an image's curves."""
    return {
        name.removeprefix("curve/"): values
        for name, values in _arrays(run_dir, record).items()
        if name.startswith("curve/")
    }


def read_replicas(run_dir: Path, record: Mapping[str, Any]) -> np.ndarray:
    """Indices of the free samples that replicate an image; empty if none were counted."""
    return _arrays(run_dir, record).get("replicas", np.empty(0, np.int64))


def read_pictures(run_dir: Path, record: Mapping[str, Any]) -> list[np.ndarray]:
    """The target and its closest samples, (H, W, 3) uint8 each; empty if it never loaded."""
    place = run_dir / "records" / record["folder"]
    if not (place / "target.png").exists():
        return []
    pictures = [_picture(place / "target.png")]
    if record["num_samples"] and (place / "samples.png").exists():
        pictures += np.split(_picture(place / "samples.png"), record["num_samples"], axis=1)
    return pictures


def _arrays(run_dir: Path, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    from safetensors.numpy import load

    return load(read_file(run_dir / "records" / record["folder"] / "arrays.safetensors"))


def _picture(path: Path) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(read_file(path))))


def encodable(value: Any) -> Any:
    """A value as a table can hold it: bytes of a text that are not UTF-8 are shown escaped."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
