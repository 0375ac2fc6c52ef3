"""The duplication plan: how many times each image is in the training set."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch


def planted(ids: Sequence[str], copies: Sequence[int]) -> dict[str, int]:
    """The first images get these numbers of copies, all others one."""
    assert len(copies) <= len(ids)
    return {**dict.fromkeys(ids, 1), **dict(zip(ids, copies, strict=False))}


def shuffled(ids: list[str], seed: int) -> list[str]:
    """A permutation that depends on the seed only."""
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return [ids[index] for index in order.tolist()]


def read_plan(path: Path) -> dict[str, int]:
    """A plan from a CSV file with the columns image_id and copies.

    Raises:
        ValueError: naming the line.
    """
    plan: dict[str, int] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if sorted(reader.fieldnames or ()) != ["copies", "image_id"]:
                raise ValueError(f"{path}: the columns must be image_id and copies")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                image_id, copies = row["image_id"], row["copies"]
                if not image_id or image_id in plan:
                    raise ValueError(f"{where}: image_id {image_id!r} is empty or stands twice")
                if None in row or not (copies or "").strip().isdecimal():
                    raise ValueError(f"{where}: not an image_id and a number of copies")
                plan[image_id] = int(copies)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not plan:
        raise ValueError(f"{path} names no image; give a line with image_id and copies for each")
    return plan
