"""The progress bar of a run: images done, with a score so far, time left."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from invmm.data.dataset import ImageEntry
from invmm.engine.outcomes import Status
from invmm.results.run_folder import RunFolder

_SECONDS_BETWEEN_LOOKS = 0.5


@contextmanager
def progress_bar(folder: RunFolder, entries: Sequence[ImageEntry]) -> Iterator[None]:
    """Follows the records that any process of the run finishes, from a thread of the parent."""
    finished = folder.follow_finished({entry.image_id for entry in entries})
    stop = threading.Event()
    bar = tqdm(total=len(entries), unit="image", desc="measuring", dynamic_ncols=True)
    scored = failed = 0

    def look() -> None:
        nonlocal scored, failed
        statuses = list(finished())
        for status in statuses:
            scored += status.has_score
            failed += status in (Status.FAILED, Status.DIVERGED)
        counts = {"with a score": scored, **({"failed": failed} if failed else {})}
        if bar.n == 0 and (blocks := folder.num_bank_blocks()):
            counts = {"blocks of free samples": blocks}
        bar.set_postfix(counts, refresh=False)
        bar.n += len(statuses)
        if statuses or sys.stderr.isatty():  # a log file needs no ticking clock
            bar.refresh()

    def watch() -> None:
        while not stop.wait(_SECONDS_BETWEEN_LOOKS):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()
        bar.close()
