"""The report of a run, made from its records: table, summary, pictures and costs."""

from __future__ import annotations

from pathlib import Path

from invmm.analysis.pictures import gallery, score_histogram
from invmm.analysis.table import (
    accounting,
    duplicate_groups,
    replicating_share,
    summary,
    table,
)
from invmm.results.collect import collect
from invmm.results.processes import read_processes
from invmm.results.records import record_faults


def report(run_dir: Path) -> str:
    """Collects the records, draws the pictures, and returns the table and summary as text."""
    frame = collect(run_dir)
    pictures = [gallery(run_dir, frame), score_histogram(run_dir, frame)]
    damaged = [f"left out: {fault}" for fault in record_faults(run_dir)]
    files = ", ".join(str(path) for path in (run_dir / "scores.parquet", *pictures))
    costs = accounting(read_processes(run_dir), frame)
    results = (summary(frame), replicating_share(run_dir, frame), duplicate_groups(frame))
    parts = (*(part for part in results if part), costs, *damaged, f"written: {files}")
    return "\n".join(("", table(frame), "", *parts))
