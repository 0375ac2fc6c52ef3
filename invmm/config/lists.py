"""Lists that a config names by a file: dataset.ids=@FILE and dataset.rows=@FILE.

The content replaces the file's name wherever a config is read, so the digest, the run folder and
every worker see the list itself; a file with another content makes another run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from invmm.faults import Fault, fault_of

_IS_NUMERIC = {"ids": False, "rows": True}
"""Keys of the node `dataset` that may name a file -> whether the entries are numbers."""
_MAX_SHOWN = 20
"""Of longer lists, only the length and both ends are shown."""
_contents: dict[str, list[Any]] = {}


def contents() -> dict[str, list[Any]]:
    """The lists that this process has read: KEY=@FILE -> list.

    A command reads each file once and sends the lists with its jobs, which may start hours later on
    other machines.
    """
    return _contents


def with_lists(config: Mapping[str, Any], faults: list[Fault] | None = None) -> dict[str, Any]:
    """A config in which each KEY=@FILE is replaced by the list in the file.

    Args:
        config: plain containers.
        faults: gets a line for each file that cannot be read; its key becomes null.

    Raises:
        ValueError: a file cannot be read, and `faults` is None.
    """
    dataset = config.get("dataset")
    if not isinstance(dataset, Mapping):
        return dict(config)
    lists: dict[str, Any] = {}
    for key, numbers in _IS_NUMERIC.items():
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
            faults.append(fault_of(error))
        lists[key] = _contents.get(named)
    return {**config, "dataset": {**dataset, **lists}} if lists else dict(config)


def shortened(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config to be printed: long lists are replaced by their length and both ends."""
    dataset = config.get("dataset")
    if not isinstance(dataset, Mapping):
        return dict(config)
    short = {
        key: f"{len(value):,} from {value[0]} to {value[-1]}"
        for key in _IS_NUMERIC
        if isinstance(value := dataset.get(key), list) and len(value) > _MAX_SHOWN
    }
    return {**config, "dataset": {**dataset, **short}}


def _read(named: str, name: str, *, numbers: bool) -> list[Any]:
    """One entry a line, or a JSON list."""
    from invmm.data.images import read_bytes

    kind, meaning = (int, "row number") if numbers else (str, "id")
    try:
        text = read_bytes(Path(name).expanduser()).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{named} is not UTF-8 text; save the list as UTF-8") from None
    except (ValueError, RuntimeError) as error:
        cure = f"give a text file with one {meaning} a line"
        raise ValueError(f"{named} cannot be used: {error}; {cure}") from None
    found = _parsed(text)
    if found is None:
        if name.endswith(".json"):
            raise ValueError(
                f"{named} is not a JSON list; give one, or a .txt file with one {meaning} a line"
            )
        found = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
        if numbers:
            found = [
                int(s) if (s := line.strip()).isdecimal() and len(s) < 19 else s for line in found
            ]
    for place, value in enumerate(found, start=1):
        if type(value) is not kind:
            raise ValueError(
                f"{named}: entry {place}, {value!r:.60}, is no {meaning}; correct the file"
            )
    if not found:
        raise ValueError(f"{named} is an empty list; give at least one {meaning}")
    return found


def _parsed(text: str) -> list[Any] | None:
    """The list in a JSON text; None for other texts, as the first id may begin with a bracket."""
    try:
        value = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None
