"""A run folder written by hand: known images, known outcomes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from invmm.data.dataset import ImageEntry, LoadedImage
from invmm.engine.outcomes import Evaluations, Outcome, Seconds, Spent, Status
from invmm.results.damage import FILES, vouched
from invmm.results.ownership import OwnedRunFolder
from invmm.results.run_folder import RunFolder
from invmm.runtime.recording import write_record

CONFIG = {"seed": 3, "sampler": {"steps": 20}}
DIGEST = "0123456789ab"


def entry(image_id: str, copies: int | None = 1, caption: str | None = None) -> ImageEntry:
    split = "unknown" if copies is None else "train" if copies else "held_out"
    path = f"/images/{image_id}"
    return ImageEntry(image_id=image_id, path=path, caption=caption, split=split, copies=copies)


def picture(value: float, size: int = 4) -> LoadedImage:
    return LoadedImage(pixels=torch.full((3, size, size), value), sha256="ab" * 32)


def outcome(status: Status, *, score: float | None = None, similarity: float | None = None, **more):
    """An outcome of two steps with a check after each, and two samples if it has a similarity."""
    given = dict(
        status=status,
        score=score,
        score_nats=None if score is None else 48 * score,
        replication_rate=None if score is None else 1.0,
        best_similarity=similarity,
        steps=2,
        curves={"loss": [2.0, 1.0], "similarity": [0.1, 0.25], "similarity_step": [0, 2]},
        tensors={"mean": torch.arange(48.0).reshape(3, 4, 4)},
        samples=None if similarity is None else torch.stack([-torch.ones(3, 4, 4)] * 2),
        evaluations=Evaluations(forward=40, backward=8, sampler=32),
        seconds=Seconds(total=1.5, on={Spent.NETWORK: 0.5, Spent.SAMPLER: 0.25}),
    )
    return Outcome(**{**given, **more})


def write(folder: RunFolder, image: ImageEntry, result: Outcome, **more) -> None:
    given = dict(loaded=picture(1.0), seed=3, second_opinion=0.5)
    write_record(folder, image, result, **{**given, **more})


def vouch(place: Path, **changes) -> None:
    """Changes a record and makes it vouch for itself and its files again, as a forger would."""
    path = place / "record.json"
    record = {**json.loads(path.read_bytes()), **changes}
    files = {name: (place / name).read_bytes() for name in FILES if (place / name).is_file()}
    path.write_text(json.dumps(vouched(record, files)))


def write_run(path: Path) -> Path:
    """Two duplicated, one single, two held-out images and a broken one, out of order."""
    with OwnedRunFolder(path, config=CONFIG, digest=DIGEST) as folder:
        write(folder, entry("z-failed", 1), Outcome(status=Status.FAILED, error="truncated"),
              loaded=None, second_opinion=None)  # fmt: skip
        write(folder, entry("held-near", 0), outcome(Status.NOT_REPLICATED, similarity=0.45))
        write(folder, entry("held-far", 0), outcome(Status.NOT_REPLICATED, similarity=0.2))
        write(folder, entry("single", 1), outcome(Status.NOT_REPLICATED, similarity=0.4))
        write(folder, entry("many", 8, "a $caption{"), outcome(
            Status.REPLICATED, score=0.02, similarity=0.9))  # fmt: skip
        write(folder, entry("few", 2), outcome(Status.REPLICATED, score=1.25, similarity=0.95))
    return path
