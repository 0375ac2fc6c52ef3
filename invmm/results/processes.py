"""How the processes of a run spent their time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from invmm.files import read_file

_ACCOUNTED = ("seconds", "consumer", "idle_slot_seconds", "tail_slot_seconds", "slots", "rows",
              "padding")  # fmt: skip
"""Numbers of a process, beside the seconds `by_kind`."""


def read_processes(run_dir: Path) -> list[dict[str, Any]]:
    """How the processes of a run spent their time, the oldest first; torn lines are left out."""
    try:
        lines = read_file(run_dir / "processes.jsonl").splitlines(keepends=True)
    except OSError:
        return []
    return [account for line in lines if (account := _account(line)) is not None]


def _account(line: bytes) -> dict[str, Any] | None:
    """What a line of processes.jsonl says, None if it was torn or altered."""
    try:
        account = json.loads(line) if line.endswith(b"\n") else {}
        numbers = [*(account[name] for name in _ACCOUNTED), *account["by_kind"].values()]
        return account if all(math.isfinite(number) for number in numbers) else None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
