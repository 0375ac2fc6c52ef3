"""From the records of the three runs to summary.json, the share of icons found, and a gallery."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from invmm.analysis.statistics import image_groups
from invmm.analysis.study import finish, found_by_group, read_run, separation, share_table
from invmm.analysis.style import COLOURS, LABELS, one_line, style, subplots
from invmm.results.records import read_pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STUDY = Path(__file__).parent
RESULTS = Path("results/text_demo")
PROMPTS = ("caption", "empty", "learned")
SHOWN = {"duplicated": 4, "single": 2, "held_out": 2}


def main() -> int:
    """Draws and checks the study."""
    runs = {prompt: read_run(RESULTS / prompt) for prompt in PROMPTS}
    summary = {prompt: of_run(frame) for prompt, frame in runs.items()}
    tables = {"found": share_table(runs, "prompt"), "gallery": gallery_table(runs)}
    with style():
        figures = {"found": found_figure(runs), "gallery": gallery_figure(runs)}
        return finish(STUDY, RESULTS, summary, figures, tables)


def of_run(frame: pd.DataFrame) -> dict[str, object]:
    """What one prompt gave."""
    evaluations = frame.evaluations_forward + frame.evaluations_backward
    return {
        "found": found_by_group(frame),
        **separation(frame),
        "failed": int(frame.status.isin(["FAILED", "DIVERGED"]).sum()),
        "evaluations_median": float(evaluations.median()),
        "seconds_of_one_core": round(float(frame.filter(regex="^seconds_").sum().sum()), 1),
    }


def found_figure(runs: dict[str, pd.DataFrame]) -> Figure:
    """Share of the icons of each group with a replicating distribution, under each prompt."""
    figure, axis = subplots(figsize=(5.0, 2.8))
    for offset, (group, colour) in zip((-0.25, 0.0, 0.25), list(COLOURS.items())[:3], strict=True):
        found = [found_by_group(frame)[group] for frame in runs.values()]
        shares = [one["found"] / max(one["of"], 1) for one in found]
        below = [share - one["low"] for share, one in zip(shares, found, strict=True)]
        above = [one["high"] - share for share, one in zip(shares, found, strict=True)]
        axis.errorbar(
            [place + offset for place in range(len(runs))],
            shares,
            yerr=[below, above],
            fmt="o",
            color=colour,
            capsize=2,
            label=f"{LABELS[group]} ({found[0]['of']})",
        )
    axis.set_xticks(range(len(runs)), [f"prompt={prompt}" for prompt in runs])
    axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel("share of icons found\n(exact 95 % interval)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def shown_icons(runs: dict[str, pd.DataFrame]) -> list[str]:
    """The first icons of each group."""
    first = runs[PROMPTS[0]]
    groups = image_groups(first)
    return [
        image_id
        for group, count in SHOWN.items()
        for image_id in first[groups == group].image_id.head(count).tolist()
    ]


def gallery_table(runs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """What the gallery says of its icons, one line an icon and prompt."""
    columns = ["image_id", "caption", "copies", "status", "score", "best_similarity"]
    found = ["guidance_scale", "prompt"]
    table = pd.concat(
        frame.reindex(columns=[*columns, *found])
        .rename(columns={"prompt": "found_prompt"})
        .assign(prompt=prompt)
        for prompt, frame in runs.items()
    )
    return table.loc[table.image_id.isin(shown_icons(runs))]


def gallery_figure(runs: dict[str, pd.DataFrame]) -> Figure:
    """Icons beside the closest sample under each prompt, with score, guidance and found prompt."""
    rows = shown_icons(runs)
    figure, axes = subplots(
        len(rows), 1 + len(runs), figsize=(7.2, 1.35 * len(rows)), squeeze=False
    )
    for line, image_id in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, (prompt, frame) in zip(line[1:], runs.items(), strict=True):
            record = frame[frame.image_id == image_id].iloc[0]
            pictures = read_pictures(RESULTS / prompt, record.to_dict())
            line[0].imshow(pictures[0], interpolation="nearest")
            if len(pictures) > 1:
                axis.imshow(pictures[1], interpolation="nearest")
            axis.set_title(_words(record), fontsize=6, parse_math=False)
        caption, copies = record.caption, record.copies
        line[0].set_title(f"{one_line(caption, 26)}\n{copies} copies", fontsize=6, parse_math=False)
    for axis, prompt in zip(axes[0], ("icon", *(f"prompt={p}" for p in runs)), strict=True):
        axis.annotate(prompt, (0.5, 1.45), xycoords="axes fraction", ha="center", fontsize=8)
    figure.tight_layout()
    return figure


def _words(record: pd.Series) -> str:
    """Score or best similarity, the guidance scale that worked, and the prompt that was found."""
    if pd.notna(record.score):
        first = f"{record.score:.3f} nats/dim, guidance {record.guidance_scale:g}"
    else:
        first = f"not replicated, similarity {record.best_similarity:.2f}"
    found = record.get("prompt")
    return first if found is None or pd.isna(found) else f"{first}\n{one_line(found, 40)!r}"


if __name__ == "__main__":
    sys.exit(main())
