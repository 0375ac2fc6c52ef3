"""Reading the files in the folder of a run that name what it is: manifest.json and record.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from invmm.engine.outcomes import Status
from invmm.files import read_file


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """The manifest of a run.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = run_dir / "manifest.json"
    try:
        manifest = json.loads(read_file(path))
        missing = {"inputs", "config", "config_digest"} - manifest.keys()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is missing; give the folder of a run") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if missing:
        raise ValueError(f"{path} is damaged: it has no {', '.join(sorted(missing))}")
    return manifest


def load_record(path: Path) -> dict[str, Any] | None:
    """A record.json; None if it is missing or damaged, so that its image is not measured yet."""
    try:
        record = json.loads(read_file(path))
        Status(record["status"])
        return record if isinstance(record["image_id"], str) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
