"""Damage in the folder of a run: files that are not as they were written.

A record says what its files were and carries a checksum of itself, so that a damaged one is told
from a whole one. The next run of the same command sets it aside in run_dir/damaged and measures its
image again. This is no protection from forgery: whoever alters a record can write its checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from invmm.files import file_sha256, record_key
from invmm.results.columns import misfit
from invmm.results.record_files import load_record

SCHEMA_VERSION = 3
"""Of records; those of 2 know neither their files nor a checksum."""
FILES = ("arrays.safetensors", "target.png", "samples.png")
"""What lies beside a record.json."""
VOUCHING = ("files", "checksum")
"""Keys of a record that vouch for the others."""
_SHARED = ("*.lock", "locks/*.lock", "finished.log", "processes.jsonl")
"""Files of a run that its processes open to write, not to replace."""


def vouched(record: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    """A record with the size and SHA-256 of its files, and its own checksum.

    Args:
        record: plain values.
        files: name -> content of what lies beside it.
    """
    marks = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    whole = {**record, "files": marks}
    return {**whole, "checksum": checksum(whole)}


def checksum(record: Mapping[str, Any]) -> str:
    """SHA-256 over a record without its key `checksum`, whatever the order of the others."""
    kept = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def record_fault(place: Path) -> str | None:
    """What is damaged in the folder of a record, in one line; None if it is whole or not there.

    Raises:
        ValueError: the record was written by a later version of this package.
    """
    path = place / "record.json"
    for file in (path, *(place / name for name in FILES)):
        if os.path.lexists(file) and not file.is_file():
            return f"{file} is no regular file"
    if not path.exists():
        return None if place.is_dir() or not os.path.lexists(place) else f"{place} is no folder"
    record = load_record(path)
    if record is None:
        return f"{path} cannot be read"
    version = record.get("schema_version")
    if type(version) is int and version > SCHEMA_VERSION:
        raise ValueError(
            f"{path} is of schema_version {version}, this invmm knows {SCHEMA_VERSION} and earlier "
            "ones; use the version of invmm that wrote it, or choose another run_dir"
        )
    if record_key(record["image_id"]) != place.name:
        return f"{path} is of another image, {record['image_id']}"
    if wrong := misfit(record):
        return f"{path} was altered: its {wrong}"
    if version != SCHEMA_VERSION and "checksum" not in record:
        return None if (place / FILES[0]).exists() else f"{place / FILES[0]} is missing"
    files = record.get("files")
    if record.get("checksum") != checksum(record) or not isinstance(files, dict):
        return f"{path} was altered"
    if not {FILES[0]} <= files.keys() <= set(FILES):
        return f"{path} was altered: its files are {list(files)!r:.60}"
    faults = (_file_fault(place / name, mark) for name, mark in files.items())
    return next(filter(None, faults), None)


def set_aside(run_dir: Path, path: Path) -> Path:
    """Moves a file or folder of a run into its folder `damaged`; where it lies then.

    Raises:
        ValueError: that is no folder but a link or a file.
    """
    place = run_dir / "damaged"
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise ValueError(f"{place} is no folder, so that {path} cannot be set aside; remove it")
    place.mkdir(exist_ok=True)
    target, number = place / path.name, 1
    while os.path.lexists(target):
        number += 1
        target = place / f"{path.name}-{number}"
    path.rename(target)
    return target


def set_records_aside(run_dir: Path, places: Iterable[Path]) -> list[str]:
    """Sets the damaged ones among some records aside; a line each.

    Args:
        run_dir: folder of the run.
        places: folders of records, there or not.
    """
    return [
        f"{fault}; set aside in {set_aside(run_dir, place)}, its image is measured again"
        for place in places
        if (fault := record_fault(place))
    ]


def set_irregular_aside(run_dir: Path) -> None:
    """Sets pipes, links and folders aside that stand where a run writes its locks and logs.

    A lock in a pipe would hang the run, and a log that is a link would grow elsewhere.
    """
    for file in (file for pattern in _SHARED for file in run_dir.glob(pattern)):
        with suppress(FileNotFoundError):  # another process was first
            if not stat.S_ISREG(file.lstat().st_mode):
                set_aside(run_dir, file)


def _file_fault(path: Path, mark: Any) -> str | None:
    try:
        size = path.stat().st_size
        is_whole = isinstance(mark, dict) and mark.get("bytes") == size
        is_whole = is_whole and mark.get("sha256") == file_sha256(path)
    except OSError as error:
        return f"{path} is missing" if isinstance(error, FileNotFoundError) else f"{error}"
    return None if is_whole else f"{path} was altered"
