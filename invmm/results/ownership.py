"""The one run that may write into a folder: it belongs to one config, to one run at a time.

A folder belongs to one config from its first result on. After a run that ended without any, another
config may use the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from invmm.files import read_file, write_atomically
from invmm.results.damage import set_aside, set_irregular_aside
from invmm.results.locks import open_locked
from invmm.results.run_folder import RunFolder

_RESULTS = ("records/*/record.json", "free_samples/*.safetensors", "checkpoints/*.ckpt", "step_*")
"""Results of measuring, then of training; a folder with any of them belongs to its config."""
_BEFORE_RESULTS = ("config.json", "manifest.json", "rows.json", "processes.jsonl",
                   "training_manifest.json")  # fmt: skip
"""Files that a run may write before its first result."""


class OwnedRunFolder:
    """Creates a folder or comes back to it, as the one run that may write there; a context.

    Args:
        path: of the folder.
        config: of the run, compared and kept.
        digest: of that config.
        shard: name of the part that this run measures, None for all images; runs of different
            parts may be at work in one folder at the same time.

    Raises:
        ValueError: it belongs to another config, or another run is at work in it.
    """

    def __init__(
        self, path: Path, *, config: Mapping[str, Any], digest: str, shard: str | None = None
    ) -> None:
        self._folder, self._is_alone = RunFolder(path, digest), shard is None
        self._locks: list[IO[bytes] | None] = []
        try:
            path.mkdir(parents=True, exist_ok=True)
            set_irregular_aside(path)
            with (path / "opening.lock").open("ab") as opening:
                # One run at a time looks for other runs in the folder and for its config.
                fcntl.flock(opening, fcntl.LOCK_EX)
                self._claim(config, shard)
        except OSError as error:
            self._close()
            raise ValueError(
                f"run_dir={path} cannot be written: {error.strerror}; choose another run_dir"
            ) from error
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> RunFolder:
        for place in (".*.tmp", "records/*/.*.tmp") if self._is_alone else ():
            for leftover in self._folder.path.glob(place):
                if leftover.is_file():
                    leftover.unlink(missing_ok=True)
        return self._folder

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        for lock in self._locks:
            if lock is not None:
                lock.close()

    def _claim(self, config: Mapping[str, Any], shard: str | None) -> None:
        """Locks the folder, or a shard of it, for this run and writes or compares its config."""
        path = self._folder.path
        self._locks = [open_locked(path / "run.lock")]
        if self._locks != [None]:
            self._forget_run_without_results()
        if shard is not None:
            self._close()
            (path / "locks").mkdir(exist_ok=True)
            name = f"shard-{shard.replace('/', '-of-')}.lock"
            self._locks = [
                open_locked(path / "run.lock", shared=True),
                open_locked(path / "locks" / name),
            ]
        if None in self._locks:
            raise ValueError(
                f"another run is at work in {path}; wait for it or choose another run_dir"
            )
        self._belongs_to(config)

    def _forget_run_without_results(self) -> None:
        """Removes the config of a run that ended before its first result."""
        path = self._folder.path
        if stored_config(path) is None or any(any(path.glob(pattern)) for pattern in _RESULTS):
            return
        locks = [open_locked(file) for file in (path / "locks").glob("*.lock")]
        if None not in locks:  # else a process of that run has not ended yet
            for name in _BEFORE_RESULTS:
                (path / name).unlink(missing_ok=True)
        for lock in locks:
            if lock is not None:
                lock.close()

    def _belongs_to(self, config: Mapping[str, Any]) -> None:
        path = self._folder.path / "config.json"
        stored = stored_config(self._folder.path)
        if stored is None:
            self._check_without_config(path)
            content = {"digest": self._folder.digest, "config": config}
            write_atomically(path, json.dumps(content, indent=1).encode())
        elif stored["digest"] != self._folder.digest:
            changed = differences(stored["config"], config)
            if not changed:
                raise ValueError(
                    f"run_dir={self._folder.path} holds a run of these values by an earlier "
                    "version, which told runs apart by how a config spells them; collect and "
                    "verify it as it is, and choose another run_dir to measure"
                )
            raise ValueError(
                f"run_dir={self._folder.path} holds a run of another config "
                f"({'; '.join(changed)}); choose another run_dir or use the same values"
            )

    def _check_without_config(self, path: Path) -> None:
        """Where config.json is missing or damaged, the manifest must name the config of results."""
        has_results = any(any(path.parent.glob(pattern)) for pattern in _RESULTS)
        fault = "is damaged or not a run's" if os.path.lexists(path) else "is missing"
        if has_results:
            try:
                noted = json.loads(read_file(path.parent / "manifest.json"))["config_digest"]
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                noted = None
            if noted != self._folder.digest:
                raise ValueError(
                    f"{path} {fault}, and manifest.json beside it does not say that the results "
                    "there are of this config; put it back, or choose another run_dir"
                )
        if os.path.lexists(path):
            if not has_results:
                raise ValueError(f"{path} {fault}; choose another run_dir")
            set_aside(path.parent, path)


def stored_config(path: Path) -> dict[str, Any] | None:
    """The content of a run's config.json; None if it is missing, damaged or no run's."""
    try:
        stored = json.loads(read_file(path / "config.json"))
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(stored, dict) and stored.keys() == {"digest", "config"}
    return stored if is_ours else None


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """The keys in which two configs differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for name in sorted({*old, *new})
            for line in differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if old == new else [f"{key} was {_cut(old)} and is {_cut(new)}"]


def _cut(value: Any) -> str:
    """The text of a value, cut to 200 characters: lists can have thousands of entries."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"
