"""The folder of a run: where its processes claim images, and where results go.

run_dir/manifest.json            what was run, on what
run_dir/records/KEY/record.json  one folder an image; its record is written last
run_dir/finished.log             one line a record, in the order they were finished
run_dir/processes.jsonl          how each process that came to its end spent its time
run_dir/free_samples/            embeddings of a bank of free samples, one file a block
run_dir/damaged/                 what a rerun found damaged and made anew
run_dir/locks/                   held by processes at work; the kernel frees them when one dies
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from invmm.engine.outcomes import Status
from invmm.files import read_file, record_key, write_atomically
from invmm.results.damage import set_records_aside
from invmm.results.locks import Lease, open_locked
from invmm.results.record_files import load_record


class Named(Protocol):
    """An image of a data set, as far as a run folder knows it."""

    @property
    def image_id(self) -> str:
        """Unique within a data set."""
        ...


Image = TypeVar("Image", bound=Named)


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, as every process of the run sees it.

    Attributes:
        path: of the folder.
        digest: of the config that it belongs to.
    """

    path: Path
    digest: str

    def record_folder(self, image_id: str) -> Path:
        """Where an image's record and pictures go."""
        return self.path / "records" / record_key(image_id)

    def status_of(self, image_id: str) -> Status | None:
        """How the image ended, None if it has no whole record."""
        record = load_record(self.record_folder(image_id) / "record.json")
        return None if record is None else Status(record["status"])

    def set_damaged_aside(self, entries: Sequence[Named]) -> list[str]:
        """Sets the damaged records of these images aside; a line each.

        Raises:
            ValueError: a record was written by a later version of this package.
        """
        places = [self.record_folder(entry.image_id) for entry in entries]
        return set_records_aside(self.path, places)

    def pending(self, entries: Sequence[Image], *, retry_failed: bool) -> list[Image]:
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

    def claim(self, image_id: str) -> Lease | None:
        """Takes an image for this process; None if another has it or it is done."""
        return self._claim(record_key(image_id), lambda: self.status_of(image_id) is not None)

    def claim_file(self, file: Path) -> Lease | None:
        """Takes a file of the folder to be made; None if another process does or it is there."""
        return self._claim(record_key(str(file.relative_to(self.path))), file.exists)

    def _claim(self, name: str, is_done: Callable[[], bool]) -> Lease | None:
        locks = self.path / "locks"
        locks.mkdir(exist_ok=True)
        file = open_locked(locks / f"{name}.lock")
        if file is None:
            return None
        if is_done():
            file.close()
            return None
        return Lease(file)

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
