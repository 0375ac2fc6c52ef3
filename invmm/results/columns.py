"""The columns of a score table and the values that may stand in a record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

COLUMNS = {
    "image_id": "string",
    "path": "string",
    "caption": "string",
    "split": "string",
    "copies": "Int64",
    "status": "string",
    "score": "float64",
    "score_nats": "float64",
    "replication_rate": "float64",
    "best_similarity": "float64",
    "steps": "Int64",
    "evaluations_forward": "Int64",
    "evaluations_backward": "Int64",
    "evaluations_sampler": "Int64",
    "seconds": "float64",
    "seconds_network": "float64",
    "seconds_sampler": "float64",
    "seconds_similarity": "float64",
    "seconds_measurement": "float64",
    "seconds_preparation": "float64",
    "error": "string",
    "seed": "Int64",
    "config_digest": "string",
    "schema_version": "Int64",
    "second_similarity": "float64",
    "num_samples": "Int64",
    "sha256": "string",
    "folder": "string",
    "near_duplicate_group": "string",
}
"""Columns of the table with their types; those of a measurement alone come after."""
_KINDS = {"string": (str,), "float64": (int, float), "Int64": (int,)}


def misfit(record: Mapping[str, Any]) -> str | None:
    """The first value of a record that no table can hold, as "KEY is VALUE"; None if all fit.

    A measurement's own columns hold texts, truth values and numbers. An integer has 64 bits, a
    number is finite, and any value may be None.
    """
    own = record.get("columns", {})
    if not isinstance(own, dict):
        return f"columns is {own!r:.60}"
    kinds = {name: _KINDS[kind] for name, kind in COLUMNS.items()}
    values = {**own, **{name: record[name] for name in record.keys() & COLUMNS.keys()}}
    for name, value in sorted(values.items()):
        if value is not None and not _fits(value, kinds.get(name, (str, bool, int, float))):
            return f"{name} is {value!r:.60}"
    return None


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int):
        return int in kinds and -(2**63) <= value < 2**63
    if isinstance(value, float):
        return float in kinds and math.isfinite(value)
    return isinstance(value, str) and str in kinds
