"""The progress bars: images done, with a score so far, or steps trained; and the time left."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
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


class TrainingBar(pl.Callback):
    """The bar of a training; a resumed one starts at its checkpoint and measures its own speed."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar at the step of the checkpoint, or at 0."""
        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            unit="step",
            desc="training",
            smoothing=0,  # the mean speed
            mininterval=_SECONDS_BETWEEN_LOOKS,
            dynamic_ncols=True,
            disable=not trainer.is_global_zero,
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Shows the last loss that was logged."""
        if self._bar is not None:
            shown = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
