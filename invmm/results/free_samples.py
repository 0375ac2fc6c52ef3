"""A bank of free samples in the folder of a run: blocks of embeddings that vouch for themselves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from invmm.files import read_file, write_atomically
from invmm.results.damage import set_aside
from invmm.results.run_folder import RunFolder


def write_block(path: Path, embeddings: np.ndarray) -> None:
    """Writes a block with the digest of its place and its values.

    Args:
        path: from `RunFolder.bank_block`.
        embeddings: (B, D).
    """
    embeddings = np.ascontiguousarray(embeddings)
    write_atomically(path, save({"embeddings": embeddings}, {"sha256": _digest(path, embeddings)}))


def read_block(path: Path) -> np.ndarray:
    """The (B, D) embeddings of a block; those of an earlier version carry no digest.

    Raises:
        ValueError: it is damaged, in one line.
    """
    try:
        content = read_file(path)
        embeddings = load(content)["embeddings"]
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        noted = header.get("__metadata__", {}).get("sha256")
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if embeddings.ndim != 2 or noted not in (None, _digest(path, embeddings)):
        raise ValueError(f"{path} was altered")
    return embeddings


def set_blocks_aside(folder: RunFolder) -> list[str]:
    """Sets the damaged blocks of a run aside, to be drawn again; a line each."""
    lines = []
    for path in sorted((folder.path / "free_samples").glob("*.safetensors")):
        try:
            read_block(path)
        except ValueError as error:
            place = set_aside(folder.path, path)
            lines.append(f"{error}; set aside in {place}, its samples are drawn again")
    return lines


def _digest(path: Path, embeddings: np.ndarray) -> str:
    shape = f"{path.name} {embeddings.shape} torch.{embeddings.dtype} "
    return hashlib.sha256(shape.encode() + embeddings.tobytes()).hexdigest()
