"""From the records of the demo to one table and one picture: the score beside the truth."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from invmm.analysis.statistics import image_groups
from invmm.analysis.study import finish, found_by_group, read_run, separation
from invmm.analysis.style import COLOURS, LABELS, new_figure, one_line, style
from invmm.results.records import read_pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STUDY = Path(__file__).parent
RESULTS = Path("results/demo")
COLUMNS = [
    *("image_id", "caption", "copies", "status", "score", "replication_rate", "best_similarity"),
    *("log_p", "log_p_low", "log_p_high", "how"),
]


def main() -> int:
    """Draws and checks the demo."""
    scores = read_run(RESULTS)
    counted, split = read_run(RESULTS / "counted"), read_run(RESULTS / "split")
    joined = with_probability(scores, counted, split)
    summary = {
        "inversion": {"found": found_by_group(scores), **separation(scores)},
        "counted": {
            "free_samples": int(counted.num_free_samples.max()),
            "seen": int(counted.score.notna().sum()),
        },
        "split": {"images": len(split), "estimated": int(split.score.notna().sum())},
    }
    print(text_table(joined))
    with style():
        figures = {"demo": figure_of(joined)}
        return finish(STUDY, RESULTS, summary, figures, {"demo": joined.loc[:, COLUMNS]})


def with_probability(
    scores: pd.DataFrame, counted: pd.DataFrame, split: pd.DataFrame
) -> pd.DataFrame:
    """Each icon with its probability, split where that was done, else counted; likeliest first."""
    columns = ["image_id", "log_p", "log_p_low", "log_p_high"]
    others = counted.loc[~counted.image_id.isin(split.image_id)]
    truth = pd.concat([others[columns].assign(how="counted"), split[columns].assign(how="split")])
    joined = scores.merge(truth, on="image_id")
    order = joined.assign(by=joined.log_p.fillna(-np.inf), then=joined.copies)
    return order.sort_values(["by", "then"], ascending=False, ignore_index=True).drop(
        columns=["by", "then"]
    )


def one_in(row: pd.Series) -> str:
    """Draws for one replica."""
    if pd.notna(row.log_p):
        few, many = np.exp(-row.log_p_high), np.exp(-row.log_p_low)
        return f"{np.exp(-row.log_p):,.0f} ({few:,.0f} to {many:,.0f})"
    return f"more than {np.exp(-row.log_p_high):,.0f}"


def text_table(joined: pd.DataFrame) -> str:
    """One line an icon."""
    lines = [f"{'icon':28} {'copies':>6} {'InvMM':>6}  one in ... draws (95 %)"]
    for _, row in joined.iterrows():
        score = f"{row.score:.3f}" if pd.notna(row.score) else "-"
        name = one_line(row.caption, 28)
        lines.append(f"{name:28} {row.copies:>6} {score:>6}  {one_in(row)}, {row.how}")
    return "\n".join(lines)


def figure_of(joined: pd.DataFrame) -> Figure:
    """Icon, closest sample of the search, score, and the probability with its interval."""
    rows = len(joined)
    height = 0.42 * rows + 0.8
    figure = new_figure(figsize=(7.2, height))
    figure.subplots_adjust(top=1 - 0.3 / height, bottom=0.5 / height)
    grid = figure.add_gridspec(rows, 4, width_ratios=[1, 1, 7, 9], wspace=0.08, hspace=0.12)
    groups = image_groups(joined).tolist()
    for place, (group, (_, row)) in enumerate(zip(groups, joined.iterrows(), strict=True)):
        pictures = read_pictures(RESULTS, row.to_dict())[:2]
        for column in range(3):
            axis = figure.add_subplot(grid[place, column])
            axis.set_axis_off()
            if column < len(pictures):
                axis.imshow(pictures[column], interpolation="nearest")
        found = f"InvMM {row.score:.3f}" if pd.notna(row.score) else "not replicated"
        axis.text(
            0.02,
            0.5,
            f"{one_line(row.caption, 24)}\n{row.copies} in training, {found}",
            va="center",
            fontsize=7,
            color=COLOURS[group],
            parse_math=False,
        )
    axis = figure.add_subplot(grid[:, 3])
    heights = np.arange(rows)[::-1] + 0.5
    for group, colour in list(COLOURS.items())[:3]:
        mine = np.array([own == group for own in groups])
        p, low, high = (
            np.exp(joined[name].to_numpy(float)) for name in ("log_p", "log_p_low", "log_p_high")
        )
        seen, never = mine & np.isfinite(p), mine & ~np.isfinite(p)
        axis.errorbar(
            p[seen],
            heights[seen],
            xerr=[p[seen] - low[seen], high[seen] - p[seen]],
            fmt="o",
            markersize=4,
            linewidth=1,
            color=colour,
            label=LABELS[group],
        )
        axis.scatter(high[never], heights[never], marker="<", s=16, color=colour, alpha=0.5)
    axis.set_xscale("log")
    axis.set_ylim(0, rows)
    axis.set_yticks([])
    axis.set_xlabel("probability that a draw replicates it (95 %; arrow: upper limit)")
    figure.text(0.125, 1 - 0.15 / height, "icon, closest sample of the search", fontsize=7)
    figure.legend(loc="upper right", ncols=3, frameon=False, fontsize=7, borderaxespad=0)
    return figure


if __name__ == "__main__":
    sys.exit(main())
