"""The columns of a score table and the values that may stand in a record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from invmm.engine.outcomes import Spent

Type = Literal["string", "float64", "Int64"]


@dataclass(frozen=True)
class Column:
    """A column of the score table.

    Attributes:
        type: of its values, any of which may be missing.
        source: where a record takes it from, as a path of attributes of what was measured (see
            `invmm.runtime.recording.Measured`); None for a column that is added on reading.
    """

    type: Type
    source: str | None


COLUMNS = {
    "image_id": Column("string", "entry.image_id"),
    "path": Column("string", "entry.path"),
    "caption": Column("string", "entry.caption"),
    "split": Column("string", "entry.split"),
    "copies": Column("Int64", "entry.copies"),
    "status": Column("string", "outcome.status.value"),
    "score": Column("float64", "outcome.score"),
    "score_nats": Column("float64", "outcome.score_nats"),
    "replication_rate": Column("float64", "outcome.replication_rate"),
    "best_similarity": Column("float64", "outcome.best_similarity"),
    "steps": Column("Int64", "outcome.steps"),
    "evaluations_forward": Column("Int64", "outcome.evaluations.forward"),
    "evaluations_backward": Column("Int64", "outcome.evaluations.backward"),
    "evaluations_sampler": Column("Int64", "outcome.evaluations.sampler"),
    "seconds": Column("float64", "outcome.seconds.total"),
    **{f"seconds_{kind}": Column("float64", f"seconds.{kind}") for kind in Spent},
    "error": Column("string", "outcome.error"),
    "seed": Column("Int64", "seed"),
    "config_digest": Column("string", "config_digest"),
    "schema_version": Column("Int64", "schema_version"),
    "second_similarity": Column("float64", "second_similarity"),
    "num_samples": Column("Int64", "num_samples"),
    "sha256": Column("string", "sha256"),
    "folder": Column("string", None),
    "near_duplicate_group": Column("string", None),
}
"""Columns of every score table; those of a measurement alone come after. One more is one row."""
_KINDS = {"string": (str,), "float64": (int, float), "Int64": (int,)}


def misfit(record: Mapping[str, Any]) -> str | None:
    """The first value of a record that no table can hold, as "KEY is VALUE"; None if all fit.

    A measurement's own columns hold texts, truth values and numbers. An integer has 64 bits, a
    number is finite, and any value may be None.
    """
    own = record.get("columns", {})
    if not isinstance(own, dict):
        return f"columns is {own!r:.60}"
    kinds = {name: _KINDS[column.type] for name, column in COLUMNS.items()}
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
