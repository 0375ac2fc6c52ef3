"""Writing one image's record: scores in JSON, arrays in safetensors, pictures."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from invmm.data.dataset import ImageEntry, LoadedImage
from invmm.engine.outcomes import Outcome, Spent, Status
from invmm.files import write_atomically
from invmm.results.columns import COLUMNS, misfit
from invmm.results.damage import SCHEMA_VERSION, vouched
from invmm.results.record_files import load_record
from invmm.results.records import encodable
from invmm.results.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a record is made of.

    Attributes:
        entry: the image.
        outcome: what was found.
        loaded: its pixels, None if it could not be loaded.
        seed: of the run.
        config_digest: of the run.
        second_similarity: of the closest sample by the control measure.
    """

    entry: ImageEntry
    outcome: Outcome
    loaded: LoadedImage | None
    seed: int
    config_digest: str
    second_similarity: float | None
    schema_version: int = SCHEMA_VERSION

    @property
    def sha256(self) -> str | None:
        """Of the image file."""
        return self.loaded.sha256 if self.loaded else None

    @property
    def num_samples(self) -> int:
        """Closest samples that are shown beside the record."""
        return 0 if self.outcome.samples is None else len(self.outcome.samples)

    @property
    def seconds(self) -> SimpleNamespace:
        """By what they were spent on."""
        return SimpleNamespace(**{kind: self.outcome.seconds.on.get(kind, 0.0) for kind in Spent})

    def record(self) -> dict[str, Any]:
        """The columns that a record has; what is not finite is missing."""
        sources = {name: column.source for name, column in COLUMNS.items() if column.source}
        values = {name: attrgetter(source)(self) for name, source in sources.items()}
        return {
            **{name: _finite(value) for name, value in values.items()},
            "columns": dict(self.outcome.columns),
        }


def write_record(
    folder: RunFolder,
    entry: ImageEntry,
    outcome: Outcome,
    *,
    loaded: LoadedImage | None,
    seed: int,
    second_opinion: float | None,
) -> None:
    """Writes everything about an image; record.json last, so that it vouches for the rest.

    What no table can hold, such as a list among a measurement's columns, is recorded as FAILED.

    Args:
        folder: of the run.
        entry: the image.
        outcome: what was found.
        loaded: its pixels, None if it could not be loaded.
        seed: of the run.
        second_opinion: similarity of the closest sample by the control measure.

    Raises:
        OSError: the disk is full or gone; no record is left behind.
    """
    measured = Measured(
        entry=entry,
        outcome=outcome,
        loaded=loaded,
        seed=seed,
        config_digest=folder.digest,
        second_similarity=second_opinion,
    )
    record = measured.record()
    if wrong := misfit(record):
        outcome = Outcome(
            status=Status.FAILED,
            error=f"what was found cannot be recorded: its {wrong}",
            steps=outcome.steps,
            evaluations=outcome.evaluations,
            seconds=outcome.seconds,
        )
        record = replace(measured, outcome=outcome).record()
    place = folder.record_folder(entry.image_id)
    place.mkdir(parents=True, exist_ok=True)
    arrays = {
        **{name: value.contiguous() for name, value in outcome.tensors.items()},
        **{
            f"curve/{name}": torch.tensor(values, dtype=torch.float64)
            for name, values in outcome.curves.items()
        },
    }
    files = {"arrays.safetensors": save(arrays)}
    if loaded is not None:
        files["target.png"] = _png(loaded.pixels)
    if outcome.samples is not None:
        files["samples.png"] = _png(torch.cat([*outcome.samples], dim=2))
    for name, content in files.items():
        write_atomically(place / name, content)
    content = json.dumps(vouched(record, files), indent=1, allow_nan=False)
    write_atomically(place / "record.json", content.encode())
    folder.finished(entry.image_id, outcome.status)


def why_nothing_is_measured(folder: RunFolder, entries: Sequence[ImageEntry]) -> str | None:
    """One line with the most frequent error if every image FAILED or DIVERGED; None otherwise."""
    paths = [folder.record_folder(entry.image_id) / "record.json" for entry in entries]
    records = [record for path in paths if (record := load_record(path)) is not None]
    unmeasured = (Status.FAILED, Status.DIVERGED)
    if not records or len(records) < len(entries):
        return None
    if any(record["status"] not in unmeasured for record in records):
        return None
    ((error, count),) = Counter(record["error"] for record in records).most_common(1)
    statuses = Counter(record["status"] for record in records)
    shown = " and ".join(
        f"{statuses[status]} {status}" for status in unmeasured if statuses[status]
    )
    share = "all" if count == len(records) else f"{count} of them"
    line = f"no image was measured: {shown}, {share} with the error: {encodable(error)}"
    if not statuses[Status.FAILED]:  # the same command would diverge again
        return line
    return f"{line}. The same command with retry_failed=true measures again the images that FAILED"


def _png(pixels: Tensor) -> bytes:
    """(3, H, W) in [-1, 1] -> a PNG file."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(array.cpu().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
