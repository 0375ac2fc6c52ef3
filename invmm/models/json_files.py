"""Reading the JSON files of a model folder, which anyone can have written."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from invmm.files import FileState, file_sha256, read_file, state_of

_MAX_JSON_BYTES = 1 << 20
_MAX_TEXT_BYTES = 1 << 30
_ATTENTION = (None, "eager", "sdpa")
_PROGRAMS: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), _ATTENTION),
    **dict.fromkeys(("_attn_implementation_internal",), _ATTENTION),
    "_attn_implementation_autoset": (None, True, False),
    **dict.fromkeys(("experts_implementation", "_experts_implementation"), (None, "eager")),
    **dict.fromkeys(("auto_map", "kernel_config", "custom_pipelines"), (None, {})),
    **dict.fromkeys(("trust_remote_code", "use_kernels"), (None, False)),
}
"""Key of a config by which diffusers or transformers may fetch code -> the values that do not.

transformers takes "owner/repository" for a kernel of the hub, and fetches one for
"flash_attention_2" where its package is not installed.
"""
_NOTES = ("transformers_version", "name_or_path")
"""Keys beside those with an underscore that say how a config was saved."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder; of a file that was not written since, as it was found.

    Raises:
        ValueError: missing, too large, no JSON object, or one that asks for programs.
    """
    try:
        return copy.deepcopy(_object(path, state_of(path)))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; save the model again by save_pretrained") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


@lru_cache(maxsize=256)
def _object(path: Path, state: FileState) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path} is too large for a config file")
    content = json.loads(read_file(path).decode("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    _refuse_programs(path, content)
    return content


def _refuse_programs(path: Path, content: Any) -> None:
    """Refuses keys by which a config makes the libraries fetch and run a program, at any depth."""
    if isinstance(content, list):
        for value in content:
            _refuse_programs(path, value)
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if key in _PROGRAMS and not any(value is one or value == one for one in _PROGRAMS[key]):
            allowed = " or ".join(json.dumps(one) for one in _PROGRAMS[key])
            raise ValueError(
                f"{path} has {key}={str(value)[:100]!r}, which may fetch and run a program; set it "
                f"to {allowed}, or take the key out"
            )
        _refuse_programs(path, value)


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
    size = path.stat().st_size
    if size > _MAX_TEXT_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, more than any vocabulary; save the model again by "
            "save_pretrained"
        )
    if path.suffix != ".json" or size > _MAX_JSON_BYTES:
        return file_sha256(path)
    return settings_digest(read_json(path))


def _is_setting(key: str) -> bool:
    return key == "_class_name" or not (key.startswith("_") or key in _NOTES)
