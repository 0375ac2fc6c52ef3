"""`trainer.predict` measures: the entry point reads as the data flow."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from invmm.analysis.report import report
from invmm.data.dataset import ImageDataset, ImageEntry, ImageError
from invmm.engine.outcomes import Status
from invmm.exits import Exit
from invmm.probability.bank import BankMeasurement
from invmm.results.free_samples import set_blocks_aside
from invmm.results.ownership import OwnedRunFolder
from invmm.results.record_files import load_record
from invmm.results.records import read_records
from invmm.results.run_folder import RunFolder
from invmm.results.seal import seal
from invmm.runtime.manifest import Inputs, write_manifest
from invmm.runtime.processes import (
    WORKER_DEATHS,
    last_line,
    own_processes,
)
from invmm.runtime.progress import progress_bar
from invmm.runtime.recording import why_nothing_is_measured
from invmm.runtime.run import MeasureRun
from invmm.runtime.signals import Interrupted, interruptible, raise_on_signals
from invmm.runtime.trainer import TrainerSettings
from invmm.runtime.worker import Worker


def measure(run: MeasureRun, run_dir: Path) -> int:
    """Measures all images that have no record yet, then collects, draws and prints.

    Args:
        run: what to measure.
        run_dir: where records go; it belongs to one config.

    Returns:
        The exit code: 0 all images have a record; 3 some are missing (a process died, the disk is
        full), or every one FAILED or DIVERGED; 130 or 143 interrupted by a signal.

    Raises:
        ValueError: the folder belongs to another run, or model and images do not go together.
    """
    dataset = run.dataset.open(run.model.describe().image_size)
    run.prompt.check(dataset.entries)
    with OwnedRunFolder(run_dir, config=run.identity, digest=run.digest, shard=run.shard) as folder:
        inputs = Inputs.of(run.model, run.replication, dataset)
        write_manifest(
            folder, inputs, config=run.config, seed=run.seed, problems=list(dataset.problems)
        )
        entries = run.part.of(dataset.entries) if run.part else dataset.entries
        for damaged in (*folder.set_damaged_aside(entries), *set_blocks_aside(folder)):
            print(damaged, file=sys.stderr)
        pending = folder.pending(entries, retry_failed=run.retry_failed)
        _refuse_others(run, folder, dataset, entries)
        _announce(run, folder, dataset, len(entries), len(pending))
        exit_code = Exit.DONE
        if pending or _lacks_blocks(run, folder):
            exit_code = _measure_pending(run, folder, dataset, pending)
        try:
            print(report(folder.path), flush=True)
            root = seal(folder)
            print(f"root hash, for `invmm-verify --expect`: {root}", flush=True)
            run.logger.publish(folder.path, {**run.config, "root_hash": root})
        except OSError as error:
            print(
                f"the report could not be made: {error}; every record is kept. Mend this, then "
                "run the same command again",
                file=sys.stderr,
            )
            return exit_code or Exit.INCOMPLETE
        if exit_code == Exit.DONE and (failure := why_nothing_is_measured(folder, entries)):
            print(failure, file=sys.stderr)
            return Exit.INCOMPLETE
    return exit_code


def _lacks_blocks(run: MeasureRun, folder: RunFolder) -> bool:
    """Whether estimates of the run rest on free samples of which some are no longer there."""
    recipe = run.measurement
    if not (isinstance(recipe, BankMeasurement) and run.prompt.is_shared):
        return False
    bank = recipe.bank(0, run.model.describe().latent_shape, run.sampler)
    is_whole = all(folder.bank_block(block).exists() for block in range(bank.num_blocks))
    return not is_whole and any(
        Status(record["status"]) in (Status.ESTIMATED, Status.CENSORED)
        for record in read_records(folder.path)
    )


def _refuse_others(
    run: MeasureRun, folder: RunFolder, dataset: ImageDataset, entries: Sequence[ImageEntry]
) -> None:
    """Refuses to go on where a record is of another run, or of an image that was replaced since."""
    rows = folder.noted("rows.json") if run.engine.rows_to_measure else {}
    for entry in entries:
        record = load_record(folder.record_folder(entry.image_id) / "record.json")
        if record is None:
            continue
        if rows is not None and (digest := record.get("config_digest")) != run.digest_with(rows):
            raise ValueError(
                f"run_dir={folder.path} holds a record of {entry.image_id} of another run, whose "
                f"config_digest is {digest}; take the record away, or choose another run_dir"
            )
        if not (was := record.get("sha256")):
            continue
        try:
            found = dataset.load(entry).sha256
        except (ImageError, OSError) as error:
            found = f"that of no image ({error})"
        if found != was:
            raise ValueError(
                f"run_dir={folder.path} measured another image {entry.image_id}: its SHA-256 was "
                f"{was} and is {found}; put the image back, or choose another run_dir"
            )


def _announce(
    run: MeasureRun, folder: RunFolder, dataset: ImageDataset, total: int, num_pending: int
) -> None:
    for problem in dataset.problems:
        print(f"data set: {problem}", file=sys.stderr)
    part = f" (shard {run.shard} of {len(dataset.entries)})" if run.shard else ""
    done = f", {total - num_pending} of them measured before" if num_pending < total else ""
    print(f"{total} images{part}{done}; records in {folder.path}", flush=True)


def _measure_pending(
    run: MeasureRun, folder: RunFolder, dataset: ImageDataset, pending: Sequence[ImageEntry]
) -> int:
    exit_code, reason = Exit.DONE, "a process ended early"
    try:
        with interruptible(), progress_bar(folder, pending):
            _predict(MeasureModule(run, folder, dataset, pending), run.trainer)
    except Interrupted as signal:
        exit_code, reason = signal.exit_code, f"stopped by {signal}"
    except WORKER_DEATHS as error:
        reason = f"a worker died: {last_line(error)}"
    except OSError as error:
        reason = f"a record could not be written: {error}"
    missing = folder.pending(pending, retry_failed=False)
    if missing or exit_code:
        print(
            f"{reason}; {len(pending) - len(missing)} of {len(pending)} images are written, "
            f"{len(missing)} are missing. The same command goes on where this one stopped.",
            file=sys.stderr,
        )
        return exit_code or Exit.INCOMPLETE
    return Exit.DONE


class MeasureModule(pl.LightningModule):
    """Measures one process's share of the images in a single `predict_step`.

    The images wait in a queue that all processes see; gradients are each image's own and never
    averaged, hence `predict` and not `fit`.
    """

    def __init__(
        self,
        run: MeasureRun,
        folder: RunFolder,
        dataset: ImageDataset,
        entries: Sequence[ImageEntry],
    ) -> None:
        super().__init__()
        self.run, self.folder, self.dataset, self.entries = run, folder, dataset, entries

    def on_predict_start(self) -> None:
        """Takes the signals back from Lightning, in every process."""
        raise_on_signals()
        torch.set_num_threads(self.run.trainer.num_threads)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Drains the queue; the batch is a placeholder."""
        with torch.enable_grad():
            Worker(self.run, self.folder, self.dataset, self.entries, self.device).drain()


class _OneBatch:
    """A loader with a single placeholder batch: the queue of images is the module's own."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[int]:
        yield 0


def _predict(module: MeasureModule, settings: TrainerSettings) -> None:
    with own_processes(
        settings,
        inference_mode=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    ) as trainer:
        trainer.predict(module, _OneBatch(), return_predictions=False)
