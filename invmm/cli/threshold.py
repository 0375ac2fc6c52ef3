"""`invmm-threshold`: calibrates the similarity threshold on the data at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invmm.cli.command import Command
from invmm.exits import Exit

if TYPE_CHECKING:
    from torch import Tensor

    from invmm.config.runs import ThresholdConfig
    from invmm.faults import Fault

HELP = """
invmm-threshold compares every image of a data set with every other. All are different, since of
images with the same pixels it takes one and names the others. So each pair that the similarity
network calls a replica is a false match: it prints their rate at replication.threshold with a 95 %
interval, and the smallest threshold whose interval stays below allowed_rate. For 0.001 that takes
at least 174 images, for 0.0001 at least 555.

Examples:
  invmm-threshold dataset.num_train=64 dataset.num_held_out=200
  invmm-threshold dataset=folder dataset.path=IMAGES image_size=32
  invmm-threshold dataset.num_held_out=1000 dataset.distinct_threshold=1.0
  invmm-threshold replication=correlation
  invmm-threshold allowed_rate=0.0001 replication.similarity.size=288
"""


def _check(config: Mapping[str, Any], faults: list[Fault]) -> ThresholdConfig | None:
    from invmm.config.runs import check_threshold

    return check_threshold(config, faults)


def _dry_run(settings: ThresholdConfig, config: Mapping[str, Any]) -> str:
    images = len(settings.dataset.open(settings.image_size).entries)
    return f"{images} images, {images * (images - 1) // 2} pairs"


def _execute(settings: ThresholdConfig, folder: Path) -> int:
    from hashlib import sha256

    import torch
    from tqdm import tqdm

    from invmm.data.dataset import ImageError
    from invmm.data.openmoji import OpenMoji
    from invmm.data.problems import names
    from invmm.replication.threshold import false_matches

    dataset = settings.dataset.open(settings.image_size)
    similarity = settings.replication.similarity.load(torch.device("cpu"))
    vectors: list[Tensor] = []
    first: dict[bytes, str] = {}
    repeated = []
    for entry in tqdm(dataset.entries, unit="image"):
        try:
            pixels = dataset.load(entry).pixels
        except ImageError as error:
            print(f"left out {entry.image_id}: {error}")
            continue
        shown = sha256(pixels.numpy().tobytes()).digest()
        if first.setdefault(shown, entry.image_id) == entry.image_id:
            vectors.append(similarity.embed(pixels[None]))
        else:
            repeated.append(f"{first[shown]} = {entry.image_id}")
    if repeated:
        print(f"same pictures, of which only the first is kept {names(repeated)}")
    if len(vectors) < 2:
        raise ValueError("fewer than two images can be used; dataset=... must hold more")
    print(
        false_matches(
            torch.cat(vectors),
            threshold=settings.replication.threshold,
            allowed_rate=settings.allowed_rate,
        )
    )
    if isinstance(settings.dataset, OpenMoji) and settings.dataset.distinct_threshold < 1:
        print(
            f"dataset=openmoji was selected to be distinct: no similarity reaches "
            f"dataset.distinct_threshold={settings.dataset.distinct_threshold:g}; "
            "dataset.distinct_threshold=1.0 gives the rate among all icons"
        )
    return Exit.DONE


COMMAND = Command(
    name="invmm-threshold",
    config_name="threshold",
    groups=("dataset", "replication"),
    help=HELP,
    check=_check,
    dry_run=_dry_run,
    execute=_execute,
)


def main() -> None:
    """Console script."""
    COMMAND.main()


if __name__ == "__main__":
    main()
