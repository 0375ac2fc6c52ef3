"""From the records of all scores to summary.json, a table of how they separate, and figures."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from invmm.analysis.separation import contrast
from invmm.analysis.sheet import EMPTY, Row, image_and_closest, sheet
from invmm.analysis.statistics import image_groups, rank_correlation
from invmm.analysis.study import finish, found_by_group, read_run, rounded, shown_estimate
from invmm.analysis.style import COLOURS, LABELS, style, subplots
from invmm.engine.outcomes import Status
from invmm.results.collect import has_score, is_censored

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STUDY = Path(__file__).parent
RESULTS = Path("results/membership")
MEMORIZATION = ("counted", "trajectory", "adaptive")
MEMBERSHIP = ("denoising_loss", "secmi", "pia", "pian")
CONTROL = "png_bytes"
STATISTICS = ("auroc", "low", "high", "tpr_at_fpr_1", "tpr_at_fpr_1_low", "tpr_at_fpr_1_high")
NUM_SHOWN = 6
"""Icons of each group in the sheet of pictures."""
CONTRASTS = {
    "member_held_out": "trained on, against held out",
    "single_held_out": "one copy, against held out",
    "duplicated_single": "duplicated, against one copy",
    "returned_never": "returned by sampling, against never",
}


def main() -> int:
    """Draws and checks the study."""
    runs = {name: read_run(RESULTS / name) for name in (*MEMORIZATION, *MEMBERSHIP)}
    runs[CONTROL] = png_bytes(runs["counted"])
    table = separations(runs)
    print(table.to_string(index=False))
    summary = {name: of_score(name, frame, runs, table) for name, frame in runs.items()}
    joined = with_counts(runs["denoising_loss"], runs["counted"])
    samples = int(runs["counted"].num_free_samples.max())
    best_known = least_losses(runs["denoising_loss"], runs["counted"])
    columns = ["image_id", "caption", "copies", "loss", "count", "num_free_samples"]
    tables = {
        "loss_and_probability": joined,
        "separations": table,
        "icons": best_known[[*columns, "best_similarity"]],
    }
    with style():
        figures = {
            "loss_and_probability": loss_figure(joined, samples),
            "separations": separation_figure(table),
            "icons": icon_sheet(best_known),
        }
        return finish(STUDY, RESULTS, summary, figures, tables)


def png_bytes(frame: pd.DataFrame) -> pd.DataFrame:
    """The blind control: each image's size as a PNG file; no model is asked.

    As for the other scores, lower counts as more memorized: simple images come back more easily.
    """
    records = RESULTS / "counted" / "records"
    sizes = [(records / folder / "target.png").stat().st_size for folder in frame.folder]
    known = frame[["image_id", "split", "copies", "best_similarity"]]
    return known.assign(status=Status.SCORED.value, score=np.array(sizes, float))


def contrasted(frame: pd.DataFrame, counted: pd.DataFrame) -> dict[str, tuple[pd.Series, ...]]:
    """Contrast -> which images are its positives, and which its negatives."""
    groups = image_groups(frame)
    returned = frame.image_id.isin(counted.image_id[counted["count"] > 0])
    single, held_out = groups == "single", groups == "held_out"
    sides = (
        (~held_out, held_out),
        (single, held_out),
        (groups == "duplicated", single),
        (returned, ~returned),
    )
    return dict(zip(CONTRASTS, sides, strict=True))


def separations(runs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """AUROC and TPR at <= 1 % FPR with their intervals, one line a score and contrast.

    Censored images stand last: by best similarity, and once more tied (`tie_break` False). Counts
    are not held against whether they are 0. The counts tell the near-duplicates.
    """
    alike = runs["counted"].set_index("image_id").near_duplicate_group
    lines = []
    for name, frame in runs.items():
        measured = frame.loc[has_score(frame) | is_censored(frame)]
        measured = measured.assign(near_duplicate_group=measured.image_id.map(alike))
        sides = contrasted(measured, runs["counted"])
        for tie_break in (True, False) if is_censored(measured).any() else (True,):
            for side, (positives, negatives) in sides.items():
                if (name, side) == ("counted", "returned_never"):
                    continue
                found = contrast(measured, positives, negatives, tie_break=tie_break)
                area, rate = (found.auroc, found.tpr_at_fpr_1) if found else (None, None)
                lines.append(
                    {
                        "score": name,
                        "tie_break": tie_break,
                        "contrast": side,
                        "positives": int(positives.sum()),
                        "negatives": int(negatives.sum()),
                        "auroc": rounded(area and area.value),
                        "low": rounded(area and area.low),
                        "high": rounded(area and area.high),
                        "tpr_at_fpr_1": rounded(rate and rate.value),
                        "tpr_at_fpr_1_low": rounded(rate and rate.low),
                        "tpr_at_fpr_1_high": rounded(rate and rate.high),
                    }
                )
    return pd.DataFrame(lines)


def of_score(
    name: str, frame: pd.DataFrame, runs: dict[str, pd.DataFrame], table: pd.DataFrame
) -> dict[str, object]:
    """What one score says: of the groups, beside the counts, and of each contrast."""
    counted = runs["counted"]
    members = frame.loc[image_groups(frame) != "held_out"]
    found: dict[str, object] = {"images": len(frame)}
    if name in MEMORIZATION:
        found["found"] = found_by_group(frame)
    if name != "counted":
        found["spearman_with_p"] = shown_estimate(rank_correlation(frame, counted, tie_break=True))
        found["spearman_with_p_score_alone"] = shown_estimate(
            rank_correlation(frame, counted, tie_break=False)
        )
        found["spearman_with_p_members"] = shown_estimate(
            rank_correlation(members, counted, tie_break=True)
        )
    if name != CONTROL:
        found["failed"] = int(frame.status.isin(["FAILED", "DIVERGED"]).sum())
        evaluations = frame.evaluations_forward + frame.evaluations_backward
        found["evaluations_median"] = float(evaluations.median())
    for line in table.loc[table.score == name].to_dict("records"):
        suffix = "" if line["tie_break"] else "_score_alone"
        found[line["contrast"] + suffix] = {column: rounded(line[column]) for column in STATISTICS}
    return found


def with_counts(losses: pd.DataFrame, counted: pd.DataFrame) -> pd.DataFrame:
    """Denoising loss and counted log p with its interval, one line an icon."""
    columns = ["image_id", "log_p", "log_p_low", "log_p_high"]
    return losses[["image_id", "split", "copies", "score"]].merge(counted[columns], on="image_id")


def loss_figure(joined: pd.DataFrame, samples: int) -> Figure:
    """Denoising loss against counted probability: a membership score against memorization."""
    groups = image_groups(joined)
    figure, (never, often) = subplots(1, 2, figsize=(5.2, 3.6), sharey=True, width_ratios=[1, 3])
    for place, (group, colour) in enumerate(list(COLOURS.items())[:3]):
        mine = joined.loc[groups == group]
        seen, unseen = mine.loc[mine.log_p.notna()], mine.loc[mine.log_p.isna()]
        p, low, high = np.exp(seen[["log_p", "log_p_low", "log_p_high"]].to_numpy(float)).T
        never.scatter([place] * len(unseen), unseen.score, s=14, color=colour)
        often.errorbar(
            p,
            seen.score,
            xerr=[p - low, high - p],
            fmt="o",
            markersize=4,
            linewidth=0.8,
            color=colour,
            label=f"{LABELS[group]} ({len(mine)})",
        )
    never.set(xlim=(-0.6, 2.6), xticks=[], yscale="log", xlabel=f"none in {samples:,}")
    never.set_ylabel("denoising loss (low: like a training image)")
    often.set(xscale="log", xlabel="counted probability, exact 95 % interval")
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.legend(
        *often.get_legend_handles_labels(), loc="upper center", ncols=3, frameon=False, fontsize=7
    )
    return figure


def separation_figure(table: pd.DataFrame) -> Figure:
    """AUROC of every score in every contrast; hollow: of the score alone, the censored tied."""
    names = list(dict.fromkeys(table.score))
    figure, axes = subplots(
        1, len(CONTRASTS), figsize=(9.6, 0.4 * len(names) + 1), sharey=True, sharex=True
    )
    for axis, (side, title) in zip(axes, CONTRASTS.items(), strict=True):
        for line in table.loc[table.contrast == side].to_dict("records"):
            colour, is_alone = colour_of(line["score"]), not line["tie_break"]
            place = -names.index(line["score"]) - 0.3 * is_alone
            face = "white" if is_alone else colour
            axis.plot([line["low"], line["high"]], [place, place], color=colour, linewidth=0.8)
            axis.scatter(line["auroc"], place, s=16, facecolors=face, edgecolors=colour, zorder=3)
            rate, low, high = (line[column] for column in STATISTICS[3:])
            axis.text(1.08, place, f"{rate:.0%} ({low:.0%} to {high:.0%})", va="center", fontsize=5)
        axis.axvline(0.5, color="#999999", linewidth=0.8)
        axis.set_title(title, fontsize=7)
        axis.set_xlim(0, 1.02)
        axis.set_xlabel("AUROC, 95 % interval\n(right: TPR at <= 1 % FPR)", fontsize=7)
    axes[0].set_yticks(-np.arange(len(names)), names)
    figure.tight_layout()
    return figure


def least_losses(losses: pd.DataFrame, counted: pd.DataFrame) -> pd.DataFrame:
    """Counts of the icons of least denoising loss, best known to the model, of each group."""
    known = losses.set_index("image_id").score.rename("loss")
    joined = counted.loc[counted["count"].notna()].join(known, on="image_id", how="inner")
    joined = joined.sort_values(["loss", "image_id"])
    return joined.groupby(image_groups(joined), sort=False).head(NUM_SHOWN)


def icon_sheet(best_known: pd.DataFrame) -> Figure:
    """The icons best known to the model, and what returns of them.

    Above an icon stands its loss, above the closest free sample how many are replicas.
    """
    blocks = []
    for group, colour in list(COLOURS.items())[:3]:
        block = []
        for _, icon in best_known.loc[image_groups(best_known) == group].iterrows():
            image, closest = image_and_closest(RESULTS / "counted", icon)
            image = replace(image, title=f"loss {icon['loss']:.3f}", colour=colour)
            closest = replace(closest, title=f"{icon['count']:,} of {icon.num_free_samples:,}")
            block.append((image, closest))
        blocks.append(block + [(EMPTY, EMPTY)] * (NUM_SHOWN - len(block)))
    rows = [Row(tiles=[*chain(*line)]) for line in zip(*blocks, strict=True)]
    groups = list(LABELS.values())[:3]
    return sheet([name for group in groups for name in (group, "closest sample")], rows)


def colour_of(score: str) -> str:
    """By what a score means to measure."""
    if score == CONTROL:
        return COLOURS["unknown"]
    return COLOURS["single" if score in MEMBERSHIP else "duplicated"]


if __name__ == "__main__":
    sys.exit(main())
