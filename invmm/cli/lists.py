"""Lists that a config names by a file: dataset.ids=@FILE and dataset.rows=@FILE.

What counts is the content. It takes the name's place wherever a config is read, so the digest, the
run folder and every worker see the list itself; a changed file is another run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NUMBERS = {"ids": False, "rows": True}
"""Keys of the node `dataset` that may name a file, and whether the list is one of numbers."""
_SHOWN = 20
"""Longer lists are counted, not shown."""
_contents: dict[str, list[Any]] = {}


def contents() -> dict[str, list[Any]]:
    """The lists that this process has read: KEY=@FILE -> list.

    A command reads each file once, and takes the lists along to other machines, where a job may
    begin hours later.
    """
    return _contents


def with_lists(config: Mapping[str, Any], faults: list[str] | None = None) -> dict[str, Any]:
    """A config with the lists in place of the names of their files.

    Args:
        config: plain containers.
        faults: files that cannot be read are appended, and their keys count as null.

    Raises:
        ValueError: a file cannot be read, and nobody lists faults.
    """
    dataset = config.get("dataset")
    if not isinstance(dataset, Mapping):
        return dict(config)
    lists: dict[str, Any] = {}
    for key, numbers in _NUMBERS.items():
        value = dataset.get(key)
        if not isinstance(value, str) or not value.startswith("@"):
            continue
        named = f"dataset.{key}={value}"
        try:
            if named not in _contents:
                _contents[named] = _read(named, value[1:], numbers=numbers)
        except ValueError as error:
            if faults is None:
                raise
            faults.append(str(error))
        lists[key] = _contents.get(named)
    return {**config, "dataset": {**dataset, **lists}} if lists else dict(config)


def shortened(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config for people: long lists are counted."""
    dataset = config.get("dataset")
    if not isinstance(dataset, Mapping):
        return dict(config)
    short = {
        key: f"{len(value):,} from {value[0]} to {value[-1]}"
        for key in _NUMBERS
        if isinstance(value := dataset.get(key), list) and len(value) > _SHOWN
    }
    return {**config, "dataset": {**dataset, **short}}


def _read(named: str, name: str, *, numbers: bool) -> list[Any]:
    """One entry a line, or a JSON list."""
    from invmm.data.images import read_bytes

    try:
        text = read_bytes(Path(name).expanduser()).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{named} is not UTF-8 text; save the list as UTF-8") from None
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{named} cannot be used: {error}; give a file of one a line") from None
    found = _parsed(text)
    if found is None:
        if name.endswith(".json"):
            raise ValueError(f"{named} is not a JSON list; give one, or a .txt with one a line")
        found = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
        if numbers:
            found = [
                int(s) if (s := line.strip()).isdecimal() and len(s) < 19 else s for line in found
            ]
    kind, meaning = (int, "row number") if numbers else (str, "id")
    for place, value in enumerate(found, start=1):
        if type(value) is not kind:
            raise ValueError(f"{named}: entry {place}, {value!r:.60}, is no {meaning}")
    if not found:
        raise ValueError(f"{named} is an empty list; give at least one {meaning}")
    return found


def _parsed(text: str) -> list[Any] | None:
    """The list of a JSON text, None if it is none: an id may begin with a bracket too."""
    try:
        value = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None
