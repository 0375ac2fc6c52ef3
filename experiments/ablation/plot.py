"""From the records of all variants to summary.json, a table, and a figure."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from invmm.analysis.statistics import image_groups, rank_correlation, success_curve
from invmm.analysis.study import (
    finish,
    found_by_group,
    read_run,
    rounded,
    separation,
    shown_estimate,
)
from invmm.analysis.style import COLOURS, LABELS, style, subplots
from invmm.results.collect import has_score, is_censored

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STUDY = Path(__file__).parent
RESULTS = Path("results/ablation")
PANELS = 6
"""Of the figure of success, in a row."""
BUDGETS = {"base": 600, "trajectory": 96}
"""Optimiser steps."""


def main() -> int:
    """Draws and checks the study."""
    counted = read_run(RESULTS / "counted")
    runs = {name: read_run(RESULTS / name) for name in variants()}
    summary = {
        name: of_variant(frame, runs[base_of(name)], counted) for name, frame in runs.items()
    }
    table = pd.DataFrame([flat(name, found) for name, found in summary.items()])
    details = table.filter(regex="_(low|high|alone|least|most)$|^tpr")
    print(table.drop(columns=list(details)).to_string(index=False))
    curves = {name: success_of(frame) for name, frame in runs.items()}
    tables = {
        "variants": table,
        "success": pd.concat(curve.assign(variant=name) for name, curve in curves.items()),
    }
    with style():
        figures = {"variants": figure_of(summary), "success": success_figure(curves)}
        return finish(STUDY, RESULTS, summary, figures, tables)


def variants() -> list[str]:
    """All inversions that run.sh makes, in its order."""
    lines = (STUDY / "run.sh").read_text(encoding="utf-8").splitlines()
    names = [line.split()[1] for line in lines if line.startswith("variant ")]
    return [name for name in names if name != "counted"]


def base_of(name: str) -> str:
    """The inversion that a variant differs from in one setting."""
    return "trajectory" if name.startswith("trajectory") else "base"


def of_variant(frame: pd.DataFrame, base: pd.DataFrame, counted: pd.DataFrame) -> dict[str, object]:
    """What it found, how its scores compare with those of the base on icons that both found."""
    both = frame.merge(base, on="image_id", suffixes=("", "_base"))
    both = both.loc[both.score.notna() & both.score_base.notna()]
    ratios = both.score / both.score_base
    return {
        "found": found_by_group(frame),
        **separation(frame),
        "spearman_with_p": shown_estimate(rank_correlation(frame, counted, tie_break=True)),
        "score_median": rounded(frame.score.median(), 4),
        "confirmed_rate_median": rounded(frame.replication_rate[has_score(frame)].median()),
        "both_found": len(both),
        "score_against_base": rounded(ratios.median()),
        "score_against_base_least": rounded(ratios.min()),
        "score_against_base_most": rounded(ratios.max()),
        "evaluations_median": float(evaluations(frame).median()),
        "failed": int(frame.status.isin(["FAILED", "DIVERGED"]).sum()),
    }


def evaluations(frame: pd.DataFrame) -> pd.Series:
    """Rows through the network, forwards and backwards, that each icon took in all."""
    return frame.evaluations_forward + frame.evaluations_backward


def success_of(frame: pd.DataFrame) -> pd.DataFrame:
    """Share of the duplicated icons found within so many steps, the others censored at the last."""
    is_measured = has_score(frame) | is_censored(frame)
    mine = frame.loc[is_measured & (image_groups(frame) == "duplicated")]
    found = has_score(mine)
    steps = mine.steps.where(found, frame.steps.max())  # some end once nothing is left to confirm
    curve = success_curve(steps.to_numpy(float), found.to_numpy())
    none = pd.DataFrame({"budgets": [0.0], "shares": [0.0]})
    return pd.concat([none, pd.DataFrame(asdict(curve))], ignore_index=True)


def flat(name: str, found: dict) -> dict[str, object]:
    """One line of the table."""
    groups = {group: f"{share['found']}/{share['of']}" for group, share in found["found"].items()}
    return {"variant": name, **groups, **{k: v for k, v in found.items() if k != "found"}}


def figure_of(summary: dict[str, dict]) -> Figure:
    """Shares found by group, scores against the base, and cost, one line a variant."""
    names = list(summary)
    places = np.arange(len(names))[::-1]
    figure, (shares, ratios, costs) = subplots(
        1,
        3,
        figsize=(7.4, 0.26 * len(names) + 1),
        sharey=True,
        width_ratios=[2, 1, 1],
        layout="constrained",
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
        axis.set_xlim(left=0)
    ratios.axvline(1, color="#999999", linewidth=0.8)
    costs.xaxis.set_major_formatter("{x:,.0f}")
    shares.margins(y=0.02)
    shares.set_yticks(places, names)
    shares.set_xlabel("share found (exact 95 % interval)")
    ratios.set_xlabel("score / base")
    costs.set_xlabel("evaluations, median")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def success_figure(curves: dict[str, pd.DataFrame]) -> Figure:
    """Success of each variant against steps with its 95 % interval; grey: of its base."""
    rows = -(-len(curves) // PANELS)
    figure, axes = subplots(rows, PANELS, figsize=(9.6, 1.5 * rows), sharey=True, squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    colour = COLOURS["duplicated"]
    for axis, (name, curve) in zip(axes.flat, curves.items(), strict=False):
        base = curves[base_of(name)]
        axis.step(base.budgets, base.shares, where="post", color="#999999", linewidth=0.8)
        axis.step(curve.budgets, curve.shares, where="post", color=colour)
        ends = (curve.budgets, curve.low, curve.high)
        axis.fill_between(*ends, step="post", color=colour, alpha=0.2, linewidth=0)
        axis.set_title(name, fontsize=7)
        axis.set_xlim(0, BUDGETS[base_of(name)])
        axis.set_ylim(0, 1.02)
        axis.tick_params(labelsize=7)
    figure.supxlabel("optimiser steps, up to the budget", fontsize=8)
    figure.supylabel("share of the duplicated icons found", fontsize=8)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    sys.exit(main())
