"""What the scripts of `experiments/` would run, without running it."""

from __future__ import annotations

import subprocess
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
_NOTE_THE_CALL = """#!/usr/bin/env bash
call=$(printf '%s\\037' "${0##*/}" "$@")
echo "$call" >> calls # in one piece, as scripts may run two at a time
"""


def calls_of(study: str, folder: Path, *options: str) -> list[list[str]]:
    """The commands of a study's run.sh with their arguments, in a working folder."""
    commands = folder / ".venv" / "bin"
    commands.mkdir(parents=True, exist_ok=True)
    for name in ("invmm", "invmm-train", "python"):
        (commands / name).write_text(_NOTE_THE_CALL)
        (commands / name).chmod(0o755)
    script = EXPERIMENTS / study / "run.sh"
    subprocess.run(["bash", script, *options], cwd=folder, check=True)
    lines = (folder / "calls").read_text().splitlines()
    (folder / "calls").unlink()
    return [line.split("\x1f")[:-1] for line in lines]
