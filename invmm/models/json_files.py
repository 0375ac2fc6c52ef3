"""Reading the JSON files of a model folder, which anyone can have written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from invmm.files import file_sha256

_MAX_JSON_BYTES = 1 << 20
_NOTES = ("transformers_version", "name_or_path")
"""Keys beside those with an underscore that say how a config was saved."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        ValueError: missing, too large, or no JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"{path} is too large for a config file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; save the model again by save_pretrained") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def settings_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config, without the notes that saving it leaves there."""
    kept = {key: value for key, value in config.items() if _is_setting(key)}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def settings_digests(root: Path, folders: Iterable[str]) -> dict[str, str]:
    """File, as a path below the root -> SHA-256, of all in these folders that are no weights.

    Of JSON objects the notes that saving leaves there, such as the version of the library, do not
    count.

    Args:
        root: of the model.
        folders: of its parts, "" for the root itself, where only config.json is looked at.
    """
    found = {}
    for name in folders:
        for path in sorted((root / name).glob("*" if name else "config.json")):
            if path.suffix in (".json", ".txt", ".model") and ".index" not in path.name:
                found[path.relative_to(root).as_posix()] = _file_digest(path)
    return found


def _file_digest(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is no regular file; save the model again by save_pretrained")
    if path.suffix != ".json" or path.stat().st_size > _MAX_JSON_BYTES:
        return file_sha256(path)
    return settings_digest(read_json(path))


def _is_setting(key: str) -> bool:
    return key == "_class_name" or not (key.startswith("_") or key in _NOTES)
