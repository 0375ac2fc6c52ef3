"""The folder of a run: it belongs to one config, to one run at a time, and loses nothing.

run_dir/manifest.json            what was run, on what
run_dir/records/KEY/record.json  one folder an image; its record is written last
run_dir/finished.log             one line a record, in the order they were finished
run_dir/processes.jsonl          how each process that came to its end spent its time
run_dir/free_samples/            embeddings of a bank of free samples, one file a block
run_dir/damaged/                 what a rerun found damaged and made anew
run_dir/locks/                   held by processes at work; the kernel frees them when one dies

A folder belongs to one config from its first result on. After a run that ended without any, another
config may use the folder.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from invmm.data.dataset import ImageEntry
from invmm.engine.outcomes import Status
from invmm.files import read_file, record_key, write_atomically
from invmm.inversion.saved import load_record
from invmm.results.damage import set_aside, set_irregular_aside, set_records_aside

_RESULTS = ("records/*/record.json", "free_samples/*.safetensors", "checkpoints/*.ckpt", "step_*")
"""Results of measuring, then of training; a folder with any of them belongs to its config."""
_BEFORE_RESULTS = ("config.json", "manifest.json", "rows.json", "processes.jsonl",
                   "training_manifest.json")  # fmt: skip
"""Files that a run may write before its first result."""
_ACCOUNTED = ("seconds", "consumer", "idle_slot_seconds", "tail_slot_seconds", "slots", "rows",
              "padding")  # fmt: skip
"""Numbers of a process, beside the seconds `by_kind`."""


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, as every process of the run sees it.

    Attributes:
        path: of the folder.
        digest: of the config that it belongs to.
    """

    path: Path
    digest: str

    @classmethod
    def open(
        cls, path: Path, *, config: Mapping[str, Any], digest: str, shard: str | None = None
    ) -> OwnedRunFolder:
        """Creates the folder or comes back to it, as the one run that may write there.

        Args:
            path: of the folder.
            config: of the run.
            digest: of that config.
            shard: name of the part that this run measures; runs of different parts may be at
                work in one folder at the same time.

        Raises:
            ValueError: it belongs to another config, or another run is at work in it.
        """
        return OwnedRunFolder(cls(path, digest), config, shard)

    def record_folder(self, image_id: str) -> Path:
        """Where an image's record and pictures go."""
        return self.path / "records" / record_key(image_id)

    def status_of(self, image_id: str) -> Status | None:
        """How the image ended, None if it has no whole record."""
        record = load_record(self.record_folder(image_id) / "record.json")
        return None if record is None else Status(record["status"])

    def set_damaged_aside(self, entries: Sequence[ImageEntry]) -> list[str]:
        """Sets the damaged records of these images aside; a line each.

        Raises:
            ValueError: a record was written by a later version of this package.
        """
        places = [self.record_folder(entry.image_id) for entry in entries]
        return set_records_aside(self.path, places)

    def pending(self, entries: Sequence[ImageEntry], *, retry_failed: bool) -> list[ImageEntry]:
        """The images without a record; on request those that FAILED too, their records removed."""
        waiting = []
        for entry in entries:
            status = self.status_of(entry.image_id)
            if status is Status.FAILED and retry_failed:
                (self.record_folder(entry.image_id) / "record.json").unlink()
                status = None
            if status is None:
                waiting.append(entry)
        return waiting

    def claim(self, image_id: str) -> Claim | None:
        """Takes an image for this process; None if another has it or it is done."""
        return self._claim(record_key(image_id), lambda: self.status_of(image_id) is not None)

    def claim_file(self, file: Path) -> Claim | None:
        """Takes a file of the folder to be made; None if another process does or it is there."""
        return self._claim(record_key(str(file.relative_to(self.path))), file.exists)

    def _claim(self, name: str, is_done: Callable[[], bool]) -> Claim | None:
        locks = self.path / "locks"
        locks.mkdir(exist_ok=True)
        file = _lock(locks / f"{name}.lock")
        if file is None:
            return None
        if is_done():
            file.close()
            return None
        return Claim(file)

    def finished(self, image_id: str, status: Status) -> None:
        """Notes that a record is on disk, for whoever watches the run."""
        line = json.dumps([image_id, status.value]) + "\n"
        with (self.path / "finished.log").open("ab") as file:
            file.write(line.encode())

    def follow_finished(self, image_ids: Collection[str]) -> Callable[[], Iterator[Status]]:
        """A function that yields the statuses of these images noted since it was last called."""
        log = self.path / "finished.log"
        position = log.stat().st_size if log.exists() else 0

        def new() -> Iterator[Status]:
            nonlocal position
            if not log.is_file():
                return
            with log.open("rb") as file:
                file.seek(position)
                for line in file:
                    if line.endswith(b"\n"):
                        position += len(line)
                        try:
                            image_id, status = json.loads(line)
                            if image_id in image_ids:
                                yield Status(status)
                        except (ValueError, TypeError, RecursionError):
                            continue  # torn when a process was killed

        return new

    def bank_block(self, block: int) -> Path:
        """Where a block of a bank of free samples goes."""
        return self.path / "free_samples" / f"{block:05}.safetensors"

    def num_bank_blocks(self) -> int:
        """Blocks that are drawn."""
        return len(list((self.path / "free_samples").glob("*.safetensors")))

    def note_process(self, account: Mapping[str, Any]) -> None:
        """Keeps how a process spent its time."""
        with (self.path / "processes.jsonl").open("ab") as file:
            file.write((json.dumps(account) + "\n").encode())

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """While it is open, no other process has this file of the folder.

        Args:
            name: of the file.
        """
        with (self.path / f"{name}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def settled(self, name: str, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the first process to ask decides, for all processes and reruns of the run.

        Args:
            name: of the file in the folder that keeps it.
            decide: called by one process only; the others wait.

        Raises:
            ValueError: the file is damaged or missing, but results rest on it.
        """
        path = self.path / name
        with self.exclusive(name):
            noted = self.noted(name)
            if noted is None and any(self.path.glob("records/*/record.json")):
                raise ValueError(
                    f"{path} is missing or damaged, and the records beside it rest on what it "
                    "said; put it back, or choose another run_dir"
                )
            if noted is None:
                noted = decide()
                write_atomically(path, json.dumps(noted, indent=1).encode())
            return noted

    def noted(self, name: str) -> dict[str, Any] | None:
        """What was decided once for all processes, see `settled`; None if it is not there."""
        try:
            return dict(json.loads(read_file(self.path / name)))
        except (OSError, ValueError, TypeError, RecursionError):
            return None


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


@dataclass(frozen=True)
class Claim:
    """An image taken by this process until the block ends or the process dies."""

    file: IO[bytes]

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.file.close()


class OwnedRunFolder:
    """Context of the one run that may write into a folder.

    Args:
        folder: the folder.
        config: the resolved config, compared and kept.
        shard: its name; None for a run of all images.
    """

    def __init__(self, folder: RunFolder, config: Mapping[str, Any], shard: str | None) -> None:
        path = folder.path
        self._folder, self._is_alone = folder, shard is None
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
        self._locks = [_lock(path / "run.lock")]
        if self._locks != [None]:
            self._forget_run_without_results()
        if shard is not None:
            self._close()
            (path / "locks").mkdir(exist_ok=True)
            name = f"shard-{shard.replace('/', '-of-')}.lock"
            self._locks = [_lock(path / "run.lock", shared=True), _lock(path / "locks" / name)]
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
        locks = [_lock(file) for file in (path / "locks").glob("*.lock")]
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
            raise ValueError(
                f"run_dir={self._folder.path} holds a run of another config "
                f"({'; '.join(differences(stored['config'], config)) or 'see its config.json'}); "
                "choose another run_dir or use the same values"
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


def _lock(path: Path, *, shared: bool = False) -> IO[bytes] | None:
    """An open file with a lock, exclusive unless shared; None if someone else holds it."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
