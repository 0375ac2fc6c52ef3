"""From the records of all variants to summary.json, a table, and a figure."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from invmm.analysis.statistics import rank_correlation
from invmm.analysis.study import finish, found_by_group, read_run, separation
from invmm.analysis.style import COLOURS, LABELS, style

STUDY = Path(__file__).parent
RESULTS = Path("results/ablation")


def main() -> int:
    """Draws and checks the study."""
    counted = read_run(RESULTS / "counted")
    runs = {name: read_run(RESULTS / name) for name in variants()}
    base = {False: runs["base"], True: runs["trajectory"]}
    summary = {
        name: of_variant(frame, base[name.startswith("trajectory")], counted)
        for name, frame in runs.items()
    }
    table = pd.DataFrame([flat(name, found) for name, found in summary.items()])
    RESULTS.mkdir(parents=True, exist_ok=True)
    table.to_csv(RESULTS / "variants.csv", index=False)
    print(table.to_string(index=False))
    with style():
        return finish(STUDY, RESULTS, summary, {"variants": figure_of(summary)})


def variants() -> list[str]:
    """All inversions that run.sh makes, in its order."""
    lines = (STUDY / "run.sh").read_text(encoding="utf-8").splitlines()
    names = [line.split()[1] for line in lines if line.startswith("variant ")]
    return [name for name in names if name != "counted"]


def of_variant(frame: pd.DataFrame, base: pd.DataFrame, counted: pd.DataFrame) -> dict[str, object]:
    """What it found, how its scores compare with those of the base on icons that both found."""
    both = frame.merge(base, on="image_id", suffixes=("", "_base"))
    both = both.loc[both.score.notna() & both.score_base.notna()]
    ratios = both.score / both.score_base
    evaluations = frame.evaluations_forward + frame.evaluations_backward
    correlation = rank_correlation(frame, counted, tie_break=True)
    return {
        "found": found_by_group(frame),
        **separation(frame),
        "spearman_with_p": None if correlation is None else round(correlation, 3),
        "score_median": None if frame.score.isna().all() else round(frame.score.median(), 4),
        "both_found": len(both),
        "score_against_base": round(float(np.median(ratios)), 3) if len(both) else None,
        "evaluations_median": float(evaluations.median()),
        "failed": int(frame.status.isin(["FAILED", "DIVERGED"]).sum()),
    }


def flat(name: str, found: dict) -> dict[str, object]:
    """One line of the table."""
    groups = {group: f"{share['found']}/{share['of']}" for group, share in found["found"].items()}
    return {"variant": name, **groups, **{k: v for k, v in found.items() if k != "found"}}


def figure_of(summary: dict[str, dict]) -> Figure:
    """Shares found by group, scores against the base, and cost, one line a variant."""
    names = list(summary)
    places = np.arange(len(names))[::-1]
    figure, (shares, ratios, costs) = plt.subplots(
        1, 3, figsize=(7.4, 0.26 * len(names) + 1), sharey=True, width_ratios=[2, 1, 1]
    )
    for offset, (group, colour) in zip((0.22, 0, -0.22), list(COLOURS.items())[:3], strict=True):
        found = [summary[name]["found"][group] for name in names]
        share = np.array([one["found"] / max(one["of"], 1) for one in found])
        ends = np.array([[one["low"], one["high"]] for one in found]).T
        shares.errorbar(
            share,
            places + offset,
            xerr=np.abs(ends - share),
            fmt="o",
            markersize=3,
            linewidth=0.8,
            color=colour,
            label=LABELS[group],
        )
    for axis, key in ((ratios, "score_against_base"), (costs, "evaluations_median")):
        values = [summary[name][key] for name in names]
        axis.scatter([np.nan if value is None else value for value in values], places, s=12)
        axis.set_xscale("log")
    ratios.axvline(1, color="#999999", linewidth=0.8)
    shares.set_yticks(places, names)
    shares.set_xlabel("share found (exact 95 % interval)")
    ratios.set_xlabel("score / base")
    costs.set_xlabel("evaluations, median")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
