"""How a study ends: a summary of numbers, figures beside it, and whether they are as expected.

A study is a folder of `experiments/`: `run.sh` trains and measures, `plot.py` turns the saved
records into `summary.json` and figures, and `expected.json` says what they must show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invmm.analysis.statistics import (
    auroc,
    image_groups,
    memorization_order,
    proportion,
    tpr_at_fpr,
)
from invmm.analysis.style import save_figure
from invmm.files import write_atomically
from invmm.results.collect import has_score, is_censored

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_BOUNDS = ("at_least", "at_most", "value", "within")


def read_run(run_dir: Path) -> pd.DataFrame:
    """The score table of a finished run.

    Raises:
        SystemExit: there is none; the message names the command that makes it.
    """
    import pandas as pd

    path = run_dir / "scores.parquet"
    if not path.is_file():
        raise SystemExit(
            f"{path} is missing; `make study STUDY={run_dir.parent.name}` measures what is left"
        )
    return pd.read_parquet(path)


def found_by_group(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Images with a score: group -> how many, of how many measured, and the exact 95 % interval."""
    measured = frame.loc[has_score(frame) | is_censored(frame)]
    groups, scored = image_groups(measured), has_score(measured)
    found = {}
    for group in ("duplicated", "single", "held_out"):
        share = proportion(int((scored & (groups == group)).sum()), int((groups == group).sum()))
        found[group] = {
            "found": share.count,
            "of": share.total,
            "low": round(share.low, 4),
            "high": round(share.high, 4),
        }
    return found


def separation(frame: pd.DataFrame) -> dict[str, float | None]:
    """How well the score tells duplicated images from held-out ones.

    The AUROC and the true-positive rate at <= 1 % false positives, with the censored ordered by
    best similarity and with all of them tied.
    """
    measured = frame.loc[has_score(frame) | is_censored(frame)]
    groups = image_groups(measured).to_numpy()
    values = {}
    for suffix, tie_break in (("", True), ("_score_alone", False)):
        order = memorization_order(measured, tie_break=tie_break)
        duplicated, held_out = order[groups == "duplicated"], order[groups == "held_out"]
        for name, statistic in (("auroc", auroc), ("tpr_at_fpr_1", tpr_at_fpr)):
            value = statistic(duplicated, held_out)
            values[name + suffix] = None if value is None else round(value, 4)
    return values


def finish(
    study: Path, results: Path, summary: Mapping[str, Any], figures: Mapping[str, Figure]
) -> int:
    """Writes summary.json and every figure as PDF and PNG, and holds the summary to expected.json.

    Args:
        study: the folder of `experiments/` with expected.json.
        results: where summary and figures go.
        summary: nested, its leaves numbers, texts or lists.
        figures: by file name without suffix.

    Returns:
        The exit code: 0 as expected, 1 if not; every difference is printed.
    """
    results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(results / "summary.json", text.encode())
    written = [results / "summary.json"]
    for name, figure in figures.items():
        written += save_figure(figure, results / f"{name}.pdf", results / f"{name}.png")
    print(f"written: {', '.join(map(str, written))}")
    expected = json.loads((study / "expected.json").read_text(encoding="utf-8"))
    differences = unexpected(summary, expected)
    for difference in differences:
        print(f"not as expected: {difference}")
    if not differences:
        print(f"as expected: {len(expected)} figures of {study / 'expected.json'}")
    return 1 if differences else 0


def unexpected(
    summary: Mapping[str, Any], expected: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """What differs, one line each.

    Args:
        summary: as in `finish`.
        expected: path of a number in the summary, such as "caption.auroc" -> its bounds:
            `value` with `within` (absolute, 0 unless given), `at_least`, `at_most`.

    Raises:
        ValueError: a bound of another name, or none.
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
        found = _at(summary, path)
        if isinstance(found, bool) or not isinstance(found, int | float):
            differences.append(f"{path} is {found!r}, no number")
            continue
        low = max(bounds.get("at_least", -float("inf")), _ends(bounds)[0])
        high = min(bounds.get("at_most", float("inf")), _ends(bounds)[1])
        if not low <= found <= high:
            differences.append(f"{path} is {found:g}, not in [{low:g}, {high:g}]")
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
