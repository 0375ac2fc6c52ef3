"""Writing one image's record: scores in JSON, arrays in safetensors, pictures."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from invmm.data.dataset import ImageEntry, LoadedImage
from invmm.engine.outcomes import Outcome, Status
from invmm.files import write_atomically
from invmm.results.columns import misfit
from invmm.results.damage import SCHEMA_VERSION, vouched
from invmm.results.record_files import load_record
from invmm.results.records import encodable
from invmm.results.run_folder import RunFolder


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
    record = _record(folder, entry, outcome, loaded, seed, second_opinion)
    if wrong := misfit(record):
        outcome = Outcome(
            status=Status.FAILED,
            error=f"what was found cannot be recorded: its {wrong}",
            steps=outcome.steps,
            evaluations=outcome.evaluations,
            seconds=outcome.seconds,
        )
        record = _record(folder, entry, outcome, loaded, seed, second_opinion)
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


def _record(
    folder: RunFolder,
    entry: ImageEntry,
    outcome: Outcome,
    loaded: LoadedImage | None,
    seed: int,
    second_opinion: float | None,
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "image_id": entry.image_id,
        "path": entry.path,
        "sha256": loaded.sha256 if loaded else None,
        "caption": entry.caption,
        "split": entry.split,
        "copies": entry.copies,
        "status": outcome.status.value,
        "score": _finite(outcome.score),
        "score_nats": _finite(outcome.score_nats),
        "replication_rate": _finite(outcome.replication_rate),
        "best_similarity": _finite(outcome.best_similarity),
        "second_similarity": _finite(second_opinion),
        "num_samples": 0 if outcome.samples is None else len(outcome.samples),
        "steps": outcome.steps,
        "evaluations_forward": outcome.evaluations.forward,
        "evaluations_backward": outcome.evaluations.backward,
        "evaluations_sampler": outcome.evaluations.sampler,
        "seconds": outcome.seconds.total,
        "seconds_network": outcome.seconds.network,
        "seconds_sampler": outcome.seconds.sampler,
        "seconds_similarity": outcome.seconds.similarity,
        "seconds_measurement": outcome.seconds.measurement,
        "seconds_preparation": outcome.seconds.preparation,
        "error": outcome.error,
        "seed": seed,
        "config_digest": folder.digest,
        "columns": dict(outcome.columns),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _png(pixels: Tensor) -> bytes:
    """(3, H, W) in [-1, 1] -> a PNG file."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(array.cpu().numpy()).save(buffer, "PNG")
    return buffer.getvalue()
