"""The end of a study: writes its summary, figures and tables, and compares with expectations.

A study is a folder of `experiments/`: `run.sh` trains and measures, `plot.py` turns the saved
records into `summary.json`, figures and the tables behind them, and `expected.json` says what they
must show.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invmm.analysis.separation import contrast
from invmm.analysis.statistics import Estimate, found_shares, image_groups
from invmm.analysis.style import save_figure
from invmm.exits import Exit
from invmm.files import write_atomically
from invmm.results.collect import has_score, is_censored, score_table
from invmm.results.records import record_faults

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_BOUNDS = ("at_least", "at_most", "value", "within")


def read_run(run_dir: Path) -> pd.DataFrame:
    """The score table of a finished run, from its records.

    Raises:
        SystemExit: the table is missing or records are damaged; a printed line names the command
            that makes them.
    """
    again = f"`make study STUDY={run_dir.parent.name}` measures what is left"
    if not (run_dir / "scores.parquet").is_file():
        print(f"{run_dir / 'scores.parquet'} is missing; {again}", file=sys.stderr)
        raise SystemExit(Exit.INCOMPLETE)
    if faults := record_faults(run_dir):
        print(f"{'; '.join(faults)}; {again}", file=sys.stderr)
        raise SystemExit(Exit.INCOMPLETE)
    return score_table([run_dir]).drop(columns="run")


def found_by_group(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Images with a score: group -> how many, of how many measured, and the exact 95 % interval."""
    shares = found_shares(frame)
    return {
        group: {
            "found": shares[group].count,
            "of": shares[group].total,
            "low": round(shares[group].low, 4),
            "high": round(shares[group].high, 4),
        }
        for group in ("duplicated", "single", "held_out")
    }


def share_table(runs: Mapping[Any, pd.DataFrame], name: str) -> pd.DataFrame:
    """`found_by_group` of several runs, one row per run and group.

    Args:
        runs: label of each run -> its score table.
        name: name of the column of labels.
    """
    import pandas as pd

    return pd.DataFrame(
        {name: run, "group": group, **share}
        for run, frame in runs.items()
        for group, share in found_by_group(frame).items()
    )


def separation(frame: pd.DataFrame) -> dict[str, float | None]:
    """How well the score tells duplicated images from held-out ones, with 95 % intervals.

    The AUROC and the true-positive rate at <= 1 % false positives, with the censored ordered by
    best similarity and with all of them tied.
    """
    measured = frame.loc[has_score(frame) | is_censored(frame)]
    groups = image_groups(measured)
    sides = groups == "duplicated", groups == "held_out"
    values = {}
    for suffix, tie_break in (("", True), ("_score_alone", False)):
        result = contrast(measured, *sides, tie_break=tie_break)
        for name in ("auroc", "tpr_at_fpr_1"):
            estimate = result and getattr(result, name)
            values[name + suffix] = rounded(estimate and estimate.value, 4)
            values[f"{name}{suffix}_low"] = rounded(estimate and estimate.low, 4)
            values[f"{name}{suffix}_high"] = rounded(estimate and estimate.high, 4)
    return values


def rounded(value: float | None, digits: int = 3) -> float | None:
    """The number rounded; None for None or NaN."""
    import pandas as pd

    return None if value is None or pd.isna(value) else round(float(value), digits)


def shown_estimate(estimate: Estimate | None) -> dict[str, float | None] | None:
    """The value and interval of an estimate, rounded for a summary."""
    return estimate and {end: rounded(value, 5) for end, value in asdict(estimate).items()}


def finish(
    study: Path,
    results: Path,
    summary: Mapping[str, Any],
    figures: Mapping[str, Figure],
    tables: Mapping[str, pd.DataFrame],
) -> int:
    """Writes summary.json, figures and tables, and compares the summary with expected.json.

    Args:
        study: the folder of `experiments/` with expected.json.
        results: the folder to write to.
        summary: nested mappings of numbers, texts or lists.
        figures: by file name without suffix, each written as PDF and PNG.
        tables: by file name without suffix, written as CSV: the numbers behind the figures.

    Returns:
        The exit code: 0 as expected, 1 if not; every difference is printed.
    """
    results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    contents = {"summary.json": text}
    contents |= {f"{name}.csv": table.to_csv(index=False) for name, table in tables.items()}
    written = [results / name for name in contents]
    for path, content in zip(written, contents.values(), strict=True):
        write_atomically(path, content.encode())
    for name, figure in figures.items():
        written += save_figure(figure, results / f"{name}.pdf", results / f"{name}.png")
    print(f"written: {', '.join(map(str, written))}")
    expected = json.loads((study / "expected.json").read_text(encoding="utf-8"))
    differences = unexpected(summary, expected)
    for difference in differences:
        print(f"not as expected: {difference}")
    if not differences:
        print(f"as expected: {len(expected)} figures of {study / 'expected.json'}")
    return Exit.DOES_NOT_HOLD if differences else Exit.DONE


def unexpected(
    summary: Mapping[str, Any], expected: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """The differences of a summary from what is expected, one line each.

    Args:
        summary: as in `finish`.
        expected: path of a number in the summary, such as "caption.auroc" -> its bounds:
            `value` with `within` (absolute, 0 unless given), `at_least`, `at_most`.

    Raises:
        ValueError: a path with no bounds or an unknown one.
    """
    differences = []
    for path, bounds in expected.items():
        if (
            not bounds
            or not set(bounds) <= set(_BOUNDS)
            or ("within" in bounds) > ("value" in bounds)
        ):
            raise ValueError(
                f"{path} has the bounds {dict(bounds)}; known are {', '.join(_BOUNDS)}"
            )
        value = _at(summary, path)
        if isinstance(value, bool) or not isinstance(value, int | float):
            differences.append(f"{path} is {value!r}, no number")
            continue
        low = max(bounds.get("at_least", -float("inf")), _ends(bounds)[0])
        high = min(bounds.get("at_most", float("inf")), _ends(bounds)[1])
        if not low <= value <= high:
            differences.append(f"{path} is {value:g}, not in [{low:g}, {high:g}]")
    return differences


def _ends(bounds: Mapping[str, float]) -> tuple[float, float]:
    if "value" not in bounds:
        return -float("inf"), float("inf")
    within = bounds.get("within", 0.0)
    return bounds["value"] - within, bounds["value"] + within


def _at(summary: Any, path: str) -> Any:
    for key in path.split("."):
        summary = summary.get(key) if isinstance(summary, Mapping) else None
    return summary
