"""What a training finds in its folder when it goes on: its images, its exports, its checkpoints."""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from pathlib import Path

import torch

from invmm.data.manifest import TrainingManifest
from invmm.files import file_sha256, read_file, write_atomically
from invmm.results.damage import set_aside

FINAL = "final"
"""A link to the export of the last step."""
MANIFEST = "training_manifest.json"
"""The images trained on; in the folder of the run and in each export."""
_EXPORTS = "exports.json"
_SHOWN = 3


def check_images(run_dir: Path, manifest: TrainingManifest) -> None:
    """Notes the images of a new training; one that goes on must have the same.

    Raises:
        ValueError: an image, its copies, caption or place in the list changed since.
    """
    path = next((p for p in (run_dir / MANIFEST, run_dir / FINAL / MANIFEST) if p.exists()), None)
    if path is None:
        manifest.write(run_dir / MANIFEST)
        return
    before = {entry.image_id: entry for entry in TrainingManifest.read(path).entries}
    now = {entry.image_id: entry for entry in manifest.entries}
    changed = [
        f"{name} {'is gone' if name not in now else 'changed' if name in before else 'is new'}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if not changed and list(before) != list(now):
        changed = ["their order changed"]
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise ValueError(
            f"run_dir={run_dir} trains on other images ({', '.join(changed[:_SHOWN])}{more}); put "
            "them back, or choose another run_dir"
        )


def note_export(run_dir: Path, folder: Path) -> None:
    """Keeps the SHA-256 of the files of an export, so that damage to them is seen."""
    noted = _noted(run_dir)
    noted[folder.name] = {
        str(path.relative_to(folder)): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_atomically(run_dir / _EXPORTS, json.dumps(noted, indent=1).encode())


def link_final(run_dir: Path, name: str) -> None:
    """Makes `final` a link to an export, whole or not at all."""
    link = run_dir / f".{FINAL}.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, run_dir / FINAL)


def first_to_make(run_dir: Path, last: int) -> int | None:
    """The first step whose export has to be made again; None if the training is done.

    Damaged exports are set aside with a line each, and the training forgets all that came after
    the first of them, so that it goes on from there even if it is killed on the way.

    Args:
        run_dir: folder of the training.
        last: its number of steps.
    """
    noted = _noted(run_dir)
    faults = {
        _step_of(name): fault
        for name, files in noted.items()
        if (run_dir / name).is_dir() and (fault := _fault(run_dir / name, files))
    }
    if faults:
        first = min(faults)
        (run_dir / FINAL).unlink(missing_ok=True)
        for path in _checkpoints(run_dir):
            if _step(path) >= first:
                path.unlink()
        kept = {name: files for name, files in noted.items() if _step_of(name) < first}
        write_atomically(run_dir / _EXPORTS, json.dumps(kept, indent=1).encode())
        for step, fault in sorted(faults.items()):
            place = set_aside(run_dir, run_dir / f"step_{step:06d}")
            print(f"{fault}; set aside in {place}, trained again", file=sys.stderr)
        return first
    name = f"step_{last:06d}"
    if not (run_dir / FINAL).exists() and name in noted and (run_dir / name).is_dir():
        link_final(run_dir, name)
    return None if (run_dir / FINAL).exists() else last


def newest_checkpoint(run_dir: Path, before: int) -> str | None:
    """The last whole checkpoint before a step; damaged ones are set aside with a line each."""
    for path in reversed(_checkpoints(run_dir)):
        if _step(path) >= before:
            continue
        if _is_whole(path):
            return str(path)
        print(f"{path} is damaged; set aside in {set_aside(run_dir, path)}", file=sys.stderr)
    return None


def _step_of(export: str) -> int:
    return int(export.removeprefix("step_"))


def _checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("*.ckpt"))


def _step(checkpoint: Path) -> int:
    """Of a checkpoint, from its name; 0 if it names none."""
    found = re.search(r"(\d+)\.ckpt$", checkpoint.name)
    return int(found[1]) if found else 0


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint can be read and its check sums are right, which torch does not ask."""
    try:
        if not path.is_file():
            return False
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:
                return False
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever a damaged file makes zipfile and torch raise
        return False
    return True


def _noted(run_dir: Path) -> dict[str, dict[str, str]]:
    """Export -> file -> SHA-256; nothing for a training of an earlier version."""
    try:
        noted = json.loads(read_file(run_dir / _EXPORTS))
        return {name: dict(files) for name, files in noted.items() if re.match(r"step_\d+$", name)}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _fault(folder: Path, files: dict[str, str]) -> str | None:
    for name, sha in files.items():
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
        if file_sha256(folder / name) != sha:
            return f"{folder / name} was altered"
    return None
