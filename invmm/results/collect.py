"""From records to one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invmm.engine.outcomes import Status
from invmm.files import write_atomically
from invmm.results.columns import COLUMNS
from invmm.results.damage import record_fault
from invmm.results.groups import MIN_SHARED, near_duplicates
from invmm.results.records import read_records, read_replicas

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


def score_table(run_dirs: Sequence[Path]) -> pd.DataFrame:
    """All records of some runs, one row an image and run, sorted by run and image id.

    Beside what the records hold: `near_duplicate_group`, see `near_duplicates`; none without a
    bank of free samples that all images share.
    """
    import pandas as pd

    rows = []
    for run_dir in run_dirs:
        records = read_records(run_dir)
        groups = near_duplicates(_replicas(run_dir, records)) if has_shared_bank(run_dir) else {}
        for record in records:
            own = {"near_duplicate_group": groups.get(record["image_id"]), "run": str(run_dir)}
            rows.append({**record.pop("columns", {}), **record, **own})
    types = {**{name: column.type for name, column in COLUMNS.items()}, "run": "string"}
    frame = pd.DataFrame(rows)
    own = sorted(set(frame.columns) - set(types))
    return frame.reindex(columns=[*types, *own]).astype(types)


def collect(run_dir: Path) -> pd.DataFrame:
    """Writes scores.parquet and scores.csv from the records; running it again changes nothing."""
    frame = score_table([run_dir]).drop(columns="run")
    write_atomically(run_dir / "scores.parquet", frame.to_parquet(index=False))
    write_atomically(run_dir / "scores.csv", frame.to_csv(index=False).encode())
    return frame


def table_faults(run_dir: Path) -> list[str]:
    """What no table is made of: damaged records, and tables of other records; one line each.

    Records that cannot be read at all, and tables that are missing, are left out.
    """
    import pandas as pd

    try:
        faults = [
            fault
            for record in read_records(run_dir, only_whole=False)
            if (fault := record_fault(run_dir / "records" / record["folder"]))
        ]
        expected = score_table([run_dir]).drop(columns="run").to_csv(index=False).encode()
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        return [f"the records are no table: {error}"]
    readers = {
        "scores.csv": Path.read_bytes,
        "scores.parquet": lambda path: pd.read_parquet(path).to_csv(index=False).encode(),
    }
    for name, read in readers.items():
        path = run_dir / name
        try:
            is_current = not path.exists() or (path.is_file() and read(path) == expected)
        except (OSError, ValueError):  # pyarrow's errors are among them
            is_current = False
        if not is_current:
            faults.append(f"{name} is not the table of the records; invmm-collect makes it anew")
    return faults


def has_shared_bank(run_dir: Path) -> bool:
    """Whether the images of a run were compared with the same free samples."""
    return (run_dir / "free_samples").is_dir()


def has_score(frame: pd.DataFrame) -> pd.Series:
    """Images with a score: replicated, their probability estimated, or their membership scored."""
    return frame.status.isin([status.value for status in Status if status.has_score])


def is_membership(frame: pd.DataFrame) -> bool:
    """Whether the scores are membership scores, which know neither a threshold nor a budget."""
    return bool((frame.status == Status.SCORED.value).any())


def is_censored(frame: pd.DataFrame) -> pd.Series:
    """Images whose budget ended before a score was found."""
    return frame.status.isin([status.value for status in Status if status.is_censored])


def ranked(frame: pd.DataFrame) -> pd.DataFrame:
    """Most memorized, or most like a training image, first.

    Images with a score by rising score, then censored ones by falling best similarity, then those
    without a result.
    """
    place = 2 - 2 * has_score(frame) - is_censored(frame)
    order = frame.assign(_place=place, _similarity=-frame.best_similarity.fillna(-1))
    return order.sort_values(
        ["_place", "score", "_similarity", "image_id"], kind="stable", na_position="last"
    ).drop(columns=["_place", "_similarity"])


def _replicas(run_dir: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Image id -> its replicas, for the images that have enough of them to share."""
    return {
        record["image_id"]: read_replicas(run_dir, record)
        for record in records
        if record.get("columns", {}).get("count", 0) >= MIN_SHARED
    }
